"""An ONNX file that flyweight wrote as a classifier. Needs onnxruntime, numpy and pillow, not torch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flyweight.bench.engines import Engine, lacking, opening, read_export
from flyweight.bench.engines import engine as engine_named
from flyweight.bench.engines import onnxruntime as engine
from flyweight.data.images import ImageSource
from flyweight.errors import FlyweightError, UsageError
from flyweight.preprocess import Preprocess

BATCH = 64


class Classifier:
    """A shipped ONNX file: pictures in, class names or probabilities out."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        self.path = path
        try:
            self._session = engine.session(path.read_bytes(), threads)
        except FileNotFoundError:
            raise UsageError(f"{path} does not exist: check the path") from None
        except Exception as error:  # onnxruntime raises its own classes, one for each way to be no model
            raise FlyweightError(f"{path} is no ONNX model that can be run: {_first_line(error)}") from error
        self.preprocess: Preprocess
        self.classes: tuple[str, ...]
        try:
            self.preprocess, self.classes = engine.stated_by(self._session)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None

    def predict_proba(self, images: ImageSource | Sequence[ImageSource]) -> np.ndarray:
        """Probabilities float32 [N, classes] of pictures: paths, encoded bytes, Pillow images or uint8 [H, W, C].

        Raises DataError naming the first picture that cannot be read.
        """
        pictures = _listed(images)
        if not pictures:
            return np.empty((0, len(self.classes)), np.float32)
        out = []
        for start in range(0, len(pictures), BATCH):
            out.append(
                self.answers(np.stack([self.preprocess.pixels(picture) for picture in pictures[start : start + BATCH]]))
            )
        return np.concatenate(out)

    def answers(self, pixels: np.ndarray) -> np.ndarray:
        """Probabilities float32 [N, classes] of pictures that are ready, uint8 [N, H, W, C] at the network's size."""
        return np.asarray(self._session.run(None, {"image": pixels})[0])

    def predict(self, images: ImageSource | Sequence[ImageSource]) -> list[str]:
        """The most probable class of each picture."""
        return [self.classes[i] for i in self.predict_proba(images).argmax(axis=1)]


class ExportedClassifier(Classifier):
    """The same of a file for another runtime, which must be installed."""

    def __init__(self, path: Path, threads: int = 1, engine: str = "") -> None:
        """`engine` by its name; without one the first that opens such a file and is installed."""
        self.path = path
        exported = read_export(path)
        self.classes, self.preprocess = exported.classes, exported.preprocess
        self._run = chosen(path, engine).start(exported, threads)

    def answers(self, pixels: np.ndarray) -> np.ndarray:
        return self._run(pixels)


def chosen(path: Path, name: str) -> Engine:
    """The engine of a name, or the first that opens a file here. Raises UsageError where none is installed."""
    if name:
        return engine_named(name)
    openers = opening(path)
    return next((each for each in openers.values() if lacking(each) is None), None) or engine_named(next(iter(openers)))


def _listed(images: ImageSource | Sequence[ImageSource]) -> list[ImageSource]:
    """One picture or several, as a list; an array of four dimensions is several."""
    if isinstance(images, np.ndarray):
        return list(images) if images.ndim == 4 else [images]
    return list(images) if isinstance(images, list | tuple) else [images]  # type: ignore[list-item]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
