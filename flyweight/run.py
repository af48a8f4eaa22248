"""A finished run, or any ONNX file flyweight wrote, as a classifier. Needs onnxruntime, numpy and pillow, not torch."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

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
        metadata = self._session.get_modelmeta().custom_metadata_map
        if "classes" not in metadata or "preprocess" not in metadata:
            raise UsageError(
                f"{path} lacks the metadata 'classes' and 'preprocess', so it was not written by flyweight"
            )
        self.classes: tuple[str, ...] = tuple(json.loads(metadata["classes"]))
        self.preprocess = Preprocess.from_json(json.loads(metadata["preprocess"]))

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


class Run:
    """A finished run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "result.json"
        if not path.exists():
            raise UsageError(f"{folder} is not a finished run: it has no result.json")
        try:
            self.result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FlyweightError(f"{path} is damaged: {error}") from error
        if "shipped" not in self.result:
            raise UsageError(
                f"{folder} ships no classifier, being a run of flyweight train: flyweight evaluate scores it"
            )

    @cached_property
    def classifier(self) -> Classifier:
        """The classifier that the run shipped."""
        return Classifier(self.folder / self.result["shipped"]["file"], self.result["threads"])

    @property
    def met(self) -> bool:
        """Whether the shipped classifier keeps every limit of the budget."""
        return self.result["status"] == "met"

    def predict(self, images: ImageSource | Sequence[ImageSource]) -> list[str]:
        """The most probable class of each picture."""
        return self.classifier.predict(images)

    def predict_proba(self, images: ImageSource | Sequence[ImageSource]) -> np.ndarray:
        """Probabilities float32 [N, classes] of pictures."""
        return self.classifier.predict_proba(images)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self.result['winner']['name']}, budget {self.result['status']})"


def load(path: str | Path) -> Run:
    """Opens a finished run folder. Raises UsageError where there is none."""
    folder = Path(path)
    if not folder.exists():
        raise UsageError(f"{folder} does not exist: check the path")
    return Run(folder)


def classifier(path: str | Path) -> Classifier:
    """The classifier of a run folder or of an ONNX file."""
    path = Path(path)
    return Classifier(path) if path.suffix == ".onnx" else load(path).classifier


def _listed(images: ImageSource | Sequence[ImageSource]) -> list[ImageSource]:
    """One picture or several, as a list; an array of four dimensions is several."""
    if isinstance(images, np.ndarray):
        return list(images) if images.ndim == 4 else [images]
    return list(images) if isinstance(images, list | tuple) else [images]  # type: ignore[list-item]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
