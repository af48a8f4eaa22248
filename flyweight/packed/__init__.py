"""The packed file `.fly`: a network in few bytes, decoded and run without torch (numpy and onnxruntime are enough)."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from flyweight.bench.engines import onnxruntime as engine
from flyweight.classifier import Classifier
from flyweight.errors import FlyweightError, UsageError
from flyweight.packed.container import MOST_BYTES, Contents, read
from flyweight.packed.damage import DamagedError

SUFFIX = ".fly"


class Packed(Classifier):
    """An opened packed file: its tensors by name, and pictures in, class names or probabilities out.

    `spec` is the Spec of the network as JSON values, or None where the file holds the tensors of its ONNX file alone.
    """

    def __init__(self, path: Path, contents: Contents, threads: int = 1) -> None:
        self.path = path
        self.contents = contents
        self.threads = threads
        self.classes = contents.classes
        self.preprocess = contents.preprocess

    @property
    def name(self) -> str:
        """What the network is called, for people."""
        return self.contents.name

    @property
    def spec(self) -> Mapping[str, Any] | None:
        """The Spec of the network."""
        return self.contents.spec

    @property
    def tensors(self) -> Mapping[str, NDArray]:
        """The tensors, bit for bit as they were packed."""
        return self.contents.tensors

    def onnx(self) -> bytes:
        """The ONNX file, byte for byte as it was exported."""
        return self.contents.onnx()

    @cached_property
    def _session(self) -> Any:
        try:
            session = engine.session(self.onnx(), self.threads)
        except Exception as error:  # onnxruntime raises its own classes, one for each way to be no model
            reason = " ".join(str(error).split())
            raise FlyweightError(f"{self.path} holds no ONNX model that can be run: {reason}") from error
        shape = session.get_outputs()[0].shape
        if len(shape) < 2 or shape[1] != len(self.classes):
            raise DamagedError(f"{self.path} names {len(self.classes)} classes and answers {shape}")
        return session

    def __repr__(self) -> str:
        return f"Packed({str(self.path)!r}, {self.name}, {len(self.tensors)} tensors)"


def open_packed(path: str | Path, threads: int = 1) -> Packed:
    """Opens a packed file, which may come from anywhere: FORMAT.md states what is checked and what it may cost.

    Raises DamagedError, a FlyweightError, that says what is wrong with it; UsageError where there is none.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise DamagedError(f"{path} has more than the {MOST_BYTES:,} bytes that are read")
        data = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist: check the path") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return Packed(path, read(data), threads)
    except DamagedError as error:
        raise DamagedError(f"{path} {error}") from error
