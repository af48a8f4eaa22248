"""What is wrong or remarkable about labelled images: classes that lack images, images that repeat, imbalance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

# Two images repeat each other if the 16 x 16 grey thumbnails differ by at most 3 grey levels (root mean square) and by
# at most 8 % of their contrast. On Oxford's flowers the repeats lie below 1.3 levels and all else above 5; on CIFAR-10
# and Fashion-MNIST the pairs that these limits admit are repeats to the eye, while 8 % alone admits any two trousers.
MAX_LEVELS = 3.0
MAX_OF_CONTRAST = 0.08
# Below this standard deviation a thumbnail is as good as plain, and plain images look all alike without being repeats.
MIN_CONTRAST = 2.0
MAX_IMBALANCE = 10
ROUNDING = 0.1  # grey levels; what float32 may lose in a distance
THUMB = 16
BLOCK = 256


def twins(a: NDArray[np.uint8], b: NDArray[np.uint8] | None = None) -> NDArray[np.int64]:
    """For each thumbnail of `a` (uint8 [n, 16, 16]) the index in `b` of the nearest image that it repeats, or -1.

    A mirror image is a repeat, too. Without `b`, the repeats are sought among the others of `a`.
    """
    found = np.full(len(a), -1, dtype=np.int64)
    flat, mirrored = _flat(a), _flat(a[:, :, ::-1])
    others = flat if b is None else _flat(b)
    coarse, coarse_others = _coarse(flat), _coarse(others)
    limits = np.minimum(MAX_LEVELS, MAX_OF_CONTRAST * _contrast(flat))
    for block, window in _candidates(flat.mean(1), others.mean(1)):
        itself = block[:, None] == window if b is None else np.zeros((len(block), 1), dtype=np.bool_)
        _, distance = _nearest(coarse[block], coarse_others[window], itself)
        likely = distance <= limits[block] + ROUNDING
        block, itself = block[likely], itself[likely]
        for view in (mirrored, flat):
            nearest, distance = _nearest(view[block], others[window], itself)
            close = distance <= limits[block]
            found[block[close]] = window[nearest[close]]
            limits[block[close]] = distance[close]
    return found


def _candidates(
    means: NDArray[np.float32], others: NDArray[np.float32]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Blocks of rows, each with the rows of the others that they may repeat.

    The means of two images differ by no more than their root mean square difference, so others with means too far off
    need no comparison; in the order of the means, a block has few that are left.
    """
    order, order_others = np.argsort(means), np.argsort(others)
    sorted_others = others[order_others]
    for start in range(0, len(means), BLOCK):
        block = order[start : start + BLOCK]
        bounds = [means[block[0]] - MAX_LEVELS, means[block[-1]] + MAX_LEVELS]
        low, high = np.searchsorted(sorted_others, bounds)
        if low < high:
            yield block, order_others[low:high]


def _nearest(
    rows: NDArray[np.float32], others: NDArray[np.float32], itself: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Of each row the nearest other and the root mean square difference to it, inf if there is none but `itself`."""
    # The squared distances but for |row|², which decides nothing within a row.
    distances = (others**2).sum(1) - 2 * (rows @ others.T)
    distances[np.broadcast_to(itself, distances.shape)] = np.inf
    nearest = distances.argmin(1)
    # Anew, since the sums above lose digits.
    exact = np.sqrt(((rows - others[nearest]) ** 2).mean(1))
    exact[np.isinf(distances[np.arange(len(rows)), nearest])] = np.inf
    return nearest, exact


def class_problems(labels: NDArray[np.int64], splits: NDArray[np.str_], classes: Sequence[str]) -> list[str]:
    """What makes the data unfit to train on: one class only, a class without images, a class that a split lacks."""
    if len(classes) < 2:
        return [f"there is one class only ({classes[0]}): at least two are needed"]
    problems: list[str] = []
    for label, name in enumerate(classes):
        own = splits[labels == label]
        lacking = [split or "the data" for split in np.unique(splits) if not (own == split).any()]
        if not len(own):
            problems.append(f"the class {name} has no images: add some, or remove it")
        elif lacking:
            problems.append(f"the class {name} has no images in {' or '.join(lacking)}: add some there")
    return problems


def imbalance(labels: NDArray[np.int64], classes: Sequence[str]) -> str:
    """A note if the largest class has more than ten times the images of the smallest, or nothing."""
    counts = np.bincount(labels, minlength=len(classes))
    most, least = int(counts.argmax()), int(counts.argmin())
    if counts[most] <= MAX_IMBALANCE * counts[least]:
        return ""
    return (
        f"the classes are uneven: {classes[most]} has {counts[most]} training images, "
        f"{classes[least]} has {counts[least]}"
    )


def _flat(thumbs: NDArray[np.uint8]) -> NDArray[np.float32]:
    # About zero, so that the products stay small and lose fewer digits.
    return thumbs.reshape(len(thumbs), THUMB * THUMB).astype(np.float32) - 128


def _coarse(flat: NDArray[np.float32]) -> NDArray[np.float32]:
    """Means of groups of 8 pixels, the same for an image and its mirror image.

    Their root mean square difference is at most that of the images, so most images can be told apart by these alone.
    """
    pooled = flat.reshape(-1, THUMB // 2, 2, THUMB // 2, 2).mean((2, 4))
    return ((pooled + pooled[:, :, ::-1])[:, :, : THUMB // 4] / 2).reshape(len(flat), THUMB**2 // 8)


def _contrast(flat: NDArray[np.float32]) -> NDArray[np.float32]:
    """The standard deviation of each thumbnail; -inf for what is as good as plain and repeats nothing."""
    contrast = flat.std(1)
    contrast[contrast < MIN_CONTRAST] = -np.inf
    return contrast
