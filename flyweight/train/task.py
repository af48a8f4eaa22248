"""What a training is asked to do, its clock, and what came of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flyweight.data import Dataset
from flyweight.errors import FlyweightError
from flyweight.preprocess import Preprocess
from flyweight.records import Records
from flyweight.train.recipe import Recipe


class Diverged(FlyweightError):
    """The loss is no longer a number."""


@dataclass
class Clock:
    """How much of the training is done: by time (`seconds`) or, exactly repeatable, by `epochs`."""

    seconds: float | None = None
    epochs: float | None = None
    spent: float = 0.0
    _since: float = field(default=0.0, repr=False)

    def start(self) -> None:
        """Time runs from here; what was spent before counts."""
        self._since = time.perf_counter() - self.spent

    def progress(self, epochs: float) -> float:
        """In [0, 1] and beyond, after `epochs` of the data."""
        self.spent = time.perf_counter() - self._since
        if self.epochs is not None:
            return epochs / self.epochs
        assert self.seconds is not None
        return self.spent / self.seconds


@dataclass(frozen=True)
class Trained:
    """What came of a training: `accuracy` of the weights that are kept on the validation pictures."""

    epochs: float
    steps: int
    seconds: float
    accuracy: float
    loss: float


@dataclass
class Training:
    """One training: network, data, recipe, clock.

    `emit` takes the figures of an epoch, `note` a sentence, `progress` the share done. `checkpoint` is the file that
    keeps the state, written every `checkpoint_seconds`; when it is taken up, `records` are cut back to where they stood
    then. `micro` bounds the pictures that go through the network at once, `threads` the cores (all by default).
    `sync_batchnorm` takes batch statistics over all processes. `teacher` is what the recipe distils from; or `answers`
    are a teacher's to the training pictures, probabilities [pictures, classes], which take part in the targets.
    """

    net: nn.Module
    data: Dataset
    validation: Dataset
    preprocess: Preprocess
    recipe: Recipe
    clock: Clock
    seed: int = 0
    emit: Callable[[dict[str, Any]], None] = lambda record: None
    progress: Callable[[float], None] = lambda share: None
    checkpoint: Path | None = None
    mode: str | None = None
    note: Callable[[str], None] = lambda message: None
    records: Records | None = None
    checkpoint_seconds: float = 15.0
    micro: int | None = None
    threads: int | None = None
    device: str = "auto"
    sync_batchnorm: bool = False
    teacher: nn.Module | None = None
    answers: Tensor | None = None

    def pixels(self, indices: np.ndarray) -> Tensor:
        """Training pictures, uint8 [n, H, W, C]."""
        return torch.from_numpy(self.data.batch(self.preprocess.size[0], indices))

    def truth(self, indices: np.ndarray) -> Tensor:
        """Labels int64 [n], or with a teacher's answers the classes' shares, float32 [n, classes]."""
        labels = torch.from_numpy(self.data.labels[indices])
        if self.answers is None:
            return labels
        return F.one_hot(labels, len(self.data.classes)).float().lerp(self.answers[indices], self.recipe.distil)
