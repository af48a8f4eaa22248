"""A finished run as a classifier. Needs onnxruntime, numpy and pillow, not torch."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flyweight.classifier import Classifier, ExportedClassifier
from flyweight.data.images import ImageSource
from flyweight.errors import FlyweightError, UsageError
from flyweight.packed import SUFFIX, open_packed


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
        shipped = self.result["shipped"]
        return open_classifier(self.folder / shipped["file"], self.result["threads"], shipped.get("engine", ""))

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
    """The classifier of a run's folder, of an exported file or of a packed file."""
    path = Path(path)
    return open_classifier(path) if path.suffix and not path.is_dir() else load(path).classifier


def open_classifier(path: Path, threads: int = 1, engine: str = "") -> Classifier:
    """That in an ONNX file, in a packed one or in one for another runtime, run by the engine of a name."""
    if path.suffix == SUFFIX:
        return open_packed(path, threads)
    return Classifier(path, threads) if path.suffix == ".onnx" else ExportedClassifier(path, threads, engine)
