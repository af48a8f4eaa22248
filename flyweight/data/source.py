"""What a data format hands over: labelled images as they were found, before anything is decoded or held out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Source:
    """N labelled images; `splits` holds what the data calls each: "train", "validation", "test", or "" if nothing.

    `images` are uint8 [N, H, W, C] or files; `labels` int64 [N] index `classes`; `names` are short and for people;
    `channels` is 1 or 3; `size` is the images' (height, width), for files the median; `licence` is one sentence.
    """

    root: Path
    name: str
    images: NDArray[np.uint8] | list[Path]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    splits: NDArray[np.str_]
    names: list[str]
    channels: int
    size: tuple[int, int]
    licence: str = "not stated"
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)
