"""The training kernels in C++: compiled on first use for the machine at hand, kept in the cache folder."""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from flyweight.data.pack import cache_folder
from flyweight.errors import FlyweightError

SOURCE = Path(__file__).with_name("kernels.cpp")
# Not -ffast-math: a loss that is no number must stay one, or divergence would not be noticed.
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fPIC", "-Wno-psabi"]
SECONDS = 120
_INT, _LONG, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
# As declared at the end of kernels.cpp.
ARGUMENTS = {
    "norm_forward": [*[_POINTER] * 3, *[_LONG] * 2, _POINTER, *[_INT] * 2],
    "norm_depthwise_forward": [*[_POINTER] * 4, _INT, _POINTER, _INT],
    "norm_depthwise_backward": [*[_POINTER] * 8, *[_INT] * 2, _POINTER, _INT],
    "norm_backward": [*[_POINTER] * 5, *[_LONG] * 2, *[_POINTER] * 3, *[_INT] * 3],
    "depthwise_forward": [*[_POINTER] * 4, _INT],
    "depthwise_backward": [*[_POINTER] * 6, _INT],
    "pointwise": [*[_POINTER] * 3, *[_LONG] * 4, *[_INT] * 2],
    "pointwise_weights": [*[_POINTER] * 3, *[_LONG] * 4, _INT],
}
# How kernels.cpp calls the types that activations may have.
SCALARS = {torch.float32: "float", torch.bfloat16: "bf16"}


class Norm(ctypes.Structure):
    """kernels.cpp's Norm: a BatchNorm's parameters, buffers and settings, and where to keep what backward needs."""

    _fields_ = [
        *((name, _POINTER) for name in ("gamma", "beta", "running_mean", "running_var", "kept")),
        *((name, ctypes.c_double) for name in ("eps", "momentum")),
        ("training", _INT),
    ]


class Shape(ctypes.Structure):
    """kernels.cpp's Shape of a depthwise convolution."""

    _fields_ = [
        (name, _LONG)
        for name in (
            "n", "channels", "height", "width", "out_height", "out_width",
            "kernel_h", "kernel_w", "stride", "dilation", "top", "left",
        )
    ]  # fmt: skip


class NoKernels(FlyweightError):
    """The kernels cannot be had here."""


def call(name: str, dtype: torch.dtype, *arguments: object) -> None:
    """Runs a kernel on tensors of `dtype`, passed as their memory (None as null), with all of torch's threads."""
    values = [_value(each) for each in arguments]
    getattr(library(dtype), name)(*values, torch.get_num_threads())


def _value(argument: object) -> object:
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    return ctypes.byref(argument) if isinstance(argument, ctypes.Structure) else argument


@cache
def missing() -> str | None:
    """Why the kernels cannot be had here, in a sentence; None where they can."""
    try:
        library()
    except NoKernels as error:
        return str(error)
    return None


@cache
def library(dtype: torch.dtype = torch.bfloat16) -> ctypes.CDLL:
    """The kernels for activations of `dtype`, compiled where the cache has none for this machine.

    Raises NoKernels with the reason why there are none.
    """
    command = [_compiler(), *FLAGS, f"-DSCALAR={SCALARS[dtype]}"]
    place = cache_folder() / "kernels" / f"{_key(command)}.so"
    if not place.exists():
        _build(command, place)
    try:
        loaded = ctypes.CDLL(str(place))
    except OSError as error:
        raise NoKernels(f"the training kernels {place} cannot be loaded ({error}): remove the file") from error
    for name, arguments in ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    return loaded


def _compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in names:
        if found := shutil.which(name):
            return found
    raise NoKernels(f"there is no C++ compiler ({', '.join(names)}) to build the training kernels with")


def _key(command: list[str]) -> str:
    """What the compiled file depends on: source, compiler and flags, torch, processor."""
    parts = [SOURCE.read_bytes(), " ".join(command).encode(), torch.__version__.encode(), _processor()]
    version = subprocess.run([command[0], "--version"], capture_output=True, check=False).stdout
    return hashlib.sha256(b"\0".join([*parts, version])).hexdigest()[:20]


def machine() -> str:
    """The processor, as far as it decides what is fast, and torch's version and threads."""
    told = [_processor(), torch.__version__.encode(), str(torch.get_num_threads()).encode()]
    return hashlib.sha256(b"\0".join(told)).hexdigest()[:20]


def _processor() -> bytes:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    return "\n".join(sorted(set(re.findall(r"^(?:model name|flags|Features)\s*:.*", text, re.M)))).encode()


def _build(command: list[str], place: Path) -> None:
    """Compiles into a file of its own, then puts it in place at once: another process may be doing the same."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            made = Path(folder) / place.name
            native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
            compiled = [*command, native, "-c", str(SOURCE), "-o", f"{made}.o"]
            linked = [command[0], "-shared", f"{made}.o", "-o", str(made), *_openmp()]
            _run([*compiled, "-fopenmp"] if _openmp() else compiled)
            _run(linked)
            os.replace(made, place)
    except OSError as error:
        raise NoKernels(f"the training kernels cannot be kept in {place.parent}: {error.strerror}") from error


def _openmp() -> list[str]:
    """The OpenMP library that torch has loaded, to share its threads; none where it is not GNU's."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return []
    return sorted(set(re.findall(r"/\S*libgomp\S*", maps)))[:1]


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise NoKernels(f"{command[0]} did not build the training kernels within {SECONDS} s") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no word"])[0]
        raise NoKernels(f"{command[0]} could not build the training kernels: {said}")
