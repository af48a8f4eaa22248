"""From a source to what training works on: decoded, audited, split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flyweight.data.audit import class_problems, imbalance, twins
from flyweight.data.pack import Pack, Progress, pack
from flyweight.data.source import Source
from flyweight.data.split import complete, missing_splits, split_problems, trainable
from flyweight.errors import DataError

SHOWN = 5  # problems spelled out in a message, and repeats named in a note


@dataclass(frozen=True, eq=False)
class Dataset:
    """N labelled images of one split, as uint8 pixels at several square sizes.

    All splits and subsets share one store of pixels, which may be memory-mapped: `rows` says which images are meant.
    """

    store: Mapping[int, NDArray[np.uint8]]
    originals: NDArray[np.uint8] | list[Path]
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    split: str
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The side lengths in pixels at which the images are there."""
        return tuple(self.store)

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for RGB."""
        return next(iter(self.store.values())).shape[3]

    def batch(self, size: int, indices: NDArray[np.int64] | Sequence[int] | slice = slice(None)) -> NDArray[np.uint8]:
        """A copy of the images at these positions of the split (all of them by default), uint8 [n, size, size, C]."""
        return self.store[size].take(self.rows[indices], axis=0)

    def original(self, index: int) -> NDArray[np.uint8] | Path:
        """The image at this position as it was found: a file, or uint8 [H, W, C] at its own size."""
        return self.originals[int(self.rows[index])]

    def subset(self, indices: NDArray[np.int64] | Sequence[int]) -> Dataset:
        """The images at these positions, in that order; no pixel is copied."""
        chosen = np.asarray(indices, dtype=np.int64)
        names = tuple(self.names[int(index)] for index in chosen)
        return replace(self, rows=self.rows[chosen], labels=self.labels[chosen], names=names)


@dataclass(frozen=True, eq=False)
class Splits:
    """The three splits; `leaked` (bool [n_test]) marks test images that repeat a training or validation image.

    `notes` are sentences for the report: what was left out, held out, repeated or uneven.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    leaked: NDArray[np.bool_]
    notes: tuple[str, ...]


class Refused(DataError):
    """The data has problems; the message shows the first few, `problems` holds a sentence for each."""

    def __init__(self, place: str, problems: Sequence[str], advice: str) -> None:
        shown = [f"  {problem}" for problem in problems[:SHOWN]]
        if len(problems) > SHOWN:
            shown.append(f"  … and {len(problems) - SHOWN} more")
        listing = "\n".join([f"{len(problems)} problems in {place}{advice}:", *shown])
        super().__init__(f"{problems[0]}{advice}" if len(problems) == 1 else listing)
        self.problems = tuple(problems)


def prepare(
    source: Source,
    sizes: Sequence[int],
    *,
    seed: int = 0,
    skip_corrupt: bool = False,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Splits:
    """Decodes every image once, at each of the square `sizes` (pixels), audits the data and completes its splits.

    `progress(done, total)` is told of the images decoded; packs of files are kept in `cache` (default: `cache_folder`).
    Raises Refused, a DataError, with all problems at once: `skip_corrupt` leaves out images that cannot be read, but
    nothing makes up for a class without images. Raises FlyweightError if the cache cannot be written.
    """
    packed = pack(source, sorted(set(sizes)), cache, progress or (lambda done, total: None))
    rows = np.arange(len(source))
    if skip_corrupt:
        rows = np.setdiff1d(rows, list(packed.damaged))
    labels, splits = source.labels[rows], source.splits[rows]
    unreadable = [] if skip_corrupt else list(packed.damaged.values())
    problems = class_problems(labels, splits, source.classes) + split_problems(labels, splits, source.classes)
    if unreadable or problems:
        advice = " (--skip-corrupt leaves out what cannot be read)" if unreadable else ""
        raise Refused(str(source.root), unreadable + problems, advice)
    return _split(source, packed, rows, seed)


def _split(source: Source, packed: Pack, rows: NDArray[np.int64], seed: int) -> Splits:
    """The splits of the images in `rows`, with the notes on them."""
    given = source.splits[rows]
    missing = missing_splits(given)
    repeated = np.zeros(len(rows), dtype=np.bool_)
    if missing:
        pool = trainable(given)
        repeated[pool] = twins(packed.thumbs[rows[pool]]) >= 0
    splits = complete(given, source.labels[rows], repeated, seed)
    train, validation, test = (
        _dataset(source, packed, rows[splits == name], name) for name in ("train", "validation", "test")
    )
    seen = np.concatenate([train.rows, validation.rows])
    twin_of_test = twins(packed.thumbs[test.rows], packed.thumbs[seen])
    twin_of_validation = twins(packed.thumbs[validation.rows], packed.thumbs[train.rows])
    held_out = [part for part in (validation, test) if part.split in missing]
    notes = [
        *source.notes,
        *(f"left out: {fault}" for fault in packed.damaged.values()),
        *(f"{len(part)} {part.split} images were held out of training" for part in held_out),
        _repeats(test, source, twin_of_test, seen, "they are scored, and reported apart"),
        _repeats(validation, source, twin_of_validation, train.rows, "selection may be flattered by them"),
        imbalance(train.labels, source.classes),
    ]
    return Splits(train, validation, test, twin_of_test >= 0, tuple(note for note in notes if note))


def _dataset(source: Source, packed: Pack, rows: NDArray[np.int64], split: str) -> Dataset:
    names = tuple(source.names[int(row)] for row in rows)
    return Dataset(packed.pixels, source.images, rows, source.labels[rows], source.classes, split, names)


def _repeats(
    part: Dataset, source: Source, twin: NDArray[np.int64], others: NDArray[np.int64], consequence: str
) -> str:
    """A note on the images of a split that repeat one of the `others` (rows of the source), or nothing."""
    found = np.flatnonzero(twin >= 0)
    if not len(found):
        return ""
    pairs = [f"{part.names[index]} is {source.names[others[twin[index]]]}" for index in found[:SHOWN]]
    more = ", …" if len(found) > SHOWN else ""
    return (
        f"{len(found)} of the {len(part)} {part.split} images repeat an image seen in training "
        f"({', '.join(pairs)}{more}): {consequence}"
    )
