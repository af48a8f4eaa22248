"""Training, validation and test images: what the data gives is kept, what it lacks is held out of training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MAX_HELD_OUT = 5000


def held_out_count(n: int) -> int:
    """How many of n images are held out: 20 % of few, 10 % of many, 1,000 in between, and never more than 5,000."""
    return min(MAX_HELD_OUT, round(n * max(0.10, min(0.20, 1000 / n))))


def missing_splits(splits: NDArray[np.str_]) -> list[str]:
    """The splits that have to be held out, in the order in which that is done."""
    return [name for name in ("test", "validation") if not (splits == name).any()]


def split_problems(labels: NDArray[np.int64], splits: NDArray[np.str_], classes: Sequence[str]) -> list[str]:
    """The classes with too few training images to hold some out."""
    missing = missing_splits(splits)
    needed = 1 + len(missing)
    each = f"{', '.join(['train', *missing[:-1]])} and {missing[-1]}" if missing else "train"
    counts = np.bincount(labels[trainable(splits)], minlength=len(classes)).tolist()
    return [
        f"the class {name} has {count} image{'s' if count > 1 else ''} to train on, but needs {needed}, "
        f"one each for {each}: add some"
        for name, count in zip(classes, counts, strict=True)
        if 0 < count < needed
    ]


def complete(
    splits: NDArray[np.str_], labels: NDArray[np.int64], repeated: NDArray[np.bool_], seed: int
) -> NDArray[np.str_]:
    """`splits` with each image in "train", "validation" or "test"; what was given stays.

    Images that are held out are drawn at random from each class in proportion to its size, at least one; `repeated`
    ones, which others in training resemble, only where a class has not enough of the rest.
    """
    rng = np.random.default_rng(seed)
    completed = np.where(trainable(splits), "train", splits).astype("<U10")  # wide enough for "validation"
    for name in missing_splits(splits):
        pool = np.flatnonzero(completed == "train")
        for label, count in enumerate(_counts_by_class(labels[pool])):
            drawn = rng.permutation(pool[labels[pool] == label])
            drawn = drawn[np.argsort(repeated[drawn], kind="stable")]
            completed[drawn[:count]] = name
    return completed


def trainable(splits: NDArray[np.str_]) -> NDArray[np.bool_]:
    """The images that may be held out: those given for training, or for nothing in particular."""
    return (splits == "train") | (splits == "")


def _counts_by_class(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many images of each class are held out: shares by largest remainder, but at least 1.

    As no more than 20 % are, a class of n > 1 images keeps some, and one of 3 can give twice.
    """
    sizes = np.bincount(labels)
    total = held_out_count(len(labels))
    shares = sizes * total / len(labels)
    counts = np.floor(shares).astype(np.int64)
    rest = np.argsort(counts - shares, kind="stable")[: total - counts.sum()]
    counts[rest] += 1
    return np.maximum(counts, 1)
