"""What the machine at hand needs to train fast: memory that is kept, and bfloat16 where it pays."""

import ctypes
import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flyweight.data.pack import cache_folder
from flyweight.errors import UsageError
from flyweight.train import kernels
from flyweight.train.checkpoint import write_atomically
from flyweight.train.fused import fused

log = logging.getLogger(__name__)

Forward = Callable[[Any, Tensor], Tensor]

PRECISIONS = ("float32", "bfloat16", "fused")
NEAR = 1.5  # times the fastest: what is slower than that at first is not measured again
# glibc's mallopt parameters (malloc.h).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


@cache
def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory: else large activations cost a page fault per 4 KB, most of a step's time."""
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library, with an allocator of its own
    mallopt(M_MMAP_THRESHOLD, 1 << 30)
    mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    mallopt(M_TOP_PAD, 64 << 20)


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_threads(threads: int) -> None:
    """Raises UsageError where the machine has not so many cores."""
    if not 1 <= threads <= cores():
        raise UsageError(f"--threads must be from 1 to {cores()}, the cores of this machine, not {threads}")


def _dense(conv: nn.Conv2d, x: Tensor) -> Tensor:
    bias = None if conv.bias is None else conv.bias.bfloat16()
    return conv._conv_forward(x.bfloat16(), conv.weight.bfloat16(), bias)  # which knows its padding


def _float_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return conv._conv_forward(x.float(), conv.weight, conv.bias)


def _strided_point(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1 × 1 convolution with a stride, of the positions that it reads alone.

    oneDNN's own backward pass, in torch 2.13, kills the process for some shapes in channels-last memory: 8 channels
    into 16 at stride 2, pictures of 48 × 48.
    """
    down, right = conv.stride
    x = x[:, :, ::down, ::right].contiguous(memory_format=torch.channels_last)
    return F.conv2d(x.to(conv.weight.dtype), conv.weight, conv.bias, groups=conv.groups)


def _float_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x.float(), linear.weight, linear.bias)


@contextmanager
def precision(net: nn.Module, name: str) -> Iterator[None]:
    """Within it the network computes in `name`: "float32", "bfloat16" in its ungrouped convolutions, or "fused".

    "bfloat16" leaves grouped convolutions, whose kernels in torch are many times slower then, in float32. "fused" keeps
    all activations in bfloat16, in kernels of our own; where those cannot be built, it says so and is "bfloat16".
    """
    if name == "fused" and (reason := kernels.missing()):
        log.warning("training goes on without fused layers: %s", reason)
        name = "bfloat16"
    with fused(net) if name == "fused" else _by_leaf(net, _in_bfloat16 if name == "bfloat16" else _in_float32):
        yield


def _in_bfloat16(leaf: nn.Module) -> Forward | None:
    if isinstance(leaf, nn.Conv2d):
        return _dense if leaf.groups == 1 else _float_conv
    return _float_linear if isinstance(leaf, nn.Linear) else None


def _in_float32(leaf: nn.Module) -> Forward | None:
    strided = type(leaf) is nn.Conv2d and leaf.kernel_size == (1, 1) and leaf.stride != (1, 1)
    return _strided_point if strided and leaf.padding == (0, 0) else None


@contextmanager
def _by_leaf(net: nn.Module, choose: Callable[[nn.Module], Forward | None]) -> Iterator[None]:
    """Within it leaves compute as `choose` says, where it says anything."""
    changed: list[nn.Module] = []
    for leaf in net.modules():
        if forward := choose(leaf):
            leaf.forward = MethodType(forward, leaf)
            changed.append(leaf)
    try:
        yield
    finally:
        for leaf in changed:
            del leaf.forward


def usual_precision() -> str:
    """What is nearly always fastest where it is to be had."""
    return "float32" if kernels.missing() else "fused"


def faster_precision(net: nn.Module, step: Callable[[], None]) -> str:
    """The precision in which `step` (a training step of `net`) runs fastest here; remembered for machine and network.

    Each is run once, then those near the best again, in turn.
    """
    told = f"{kernels.machine()} {getattr(net, 'spec', '')} {net}"
    place = cache_folder() / "precision" / hashlib.sha256(told.encode()).hexdigest()[:20]
    known = place.read_text(encoding="utf-8") if place.is_file() else ""
    if known in PRECISIONS:
        return known
    names = [name for name in PRECISIONS if name != "fused" or not kernels.missing()]
    seconds = {name: _seconds(net, name, step) for name in names}
    for _ in range(2):
        for name in [name for name in names if seconds[name] < NEAR * min(seconds.values())]:
            seconds[name] = min(seconds[name], _seconds(net, name, step))
    best = min(seconds, key=lambda name: seconds[name])
    with suppress(OSError):  # then it is measured again
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, best.encode())
    return best


def _seconds(net: nn.Module, name: str, step: Callable[[], None]) -> float:
    with precision(net, name):
        start = time.perf_counter()
        step()
        return time.perf_counter() - start


def set_threads() -> None:
    """All cores for one operation, none for running operations side by side."""
    torch.set_num_threads(cores())
