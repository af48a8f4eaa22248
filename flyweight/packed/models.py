"""What is expected of a weight, given the weights before it: one model for both directions.

A tensor is seen as planes [K, O, I], one for each position of its kernels, in turn; within a plane, rows in growing
batches. Each batch is coded by what all earlier ones have taught. Given symbols, a function here writes them; given
None, it reads them.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from flyweight.packed.coder import Coder, Histogram, Ints, alike
from flyweight.packed.damage import DamagedError

PATTERN = 8  # so many earlier positions of its own kernel tell whether a weight is zero
DENSITIES = np.array([32, 41, 51, 64, 81, 102, 128])  # 64ths: an input channel's share of weights against the mean
TENDENCIES = 16  # classes of what the neighbours let expect of a value
LOW = 16  # a code is coded as its quotient by LOW in context, then the rest given the quotient
MOST = 4096  # levels of a codebook
LONGEST = 64  # kernel positions; longer kernels are seen as so many more input channels


def planes(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """(K, O, I, kernel width) of a tensor (O, I, height, width); of any other, one plane of (O, all the rest)."""
    if len(shape) == 4 and shape[2] * shape[3] <= LONGEST:
        return shape[2] * shape[3], shape[0], shape[1], shape[3]
    rows = shape[0] if shape else 1
    return 1, rows, math.prod(shape) // rows, 1


def to_planes(values: NDArray) -> NDArray:
    """A tensor as planes [K, O, I]."""
    k, rows, columns, _ = planes(values.shape)
    return np.ascontiguousarray(values.reshape(rows, columns, k).transpose(2, 0, 1))


def from_planes(values: NDArray, shape: tuple[int, ...]) -> NDArray:
    """The inverse of `to_planes`."""
    return np.ascontiguousarray(values.transpose(1, 2, 0)).reshape(shape)


def batches(rows: int, first: int, before: int, share: int) -> Iterator[slice]:
    """Slices of the rows: each one `share`-th of what came before, `before` counted in, but at least `first`."""
    start = 0
    while start < rows:
        end = min(rows, start + max(first, (start + before) // share))
        yield slice(start, end)
        start = end


def mask(coder: Coder, shape: tuple[int, int, int], given: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """Which weights of the planes are not zero.

    Expected from the earlier positions of the same kernel, then from the input channel's share so far.
    """
    count, rows, columns = shape
    found = np.empty(shape, np.bool_)
    pattern = np.ones((rows, columns), np.int64)
    seen = np.zeros(columns, np.int64)
    total = 0
    classes = len(DENSITIES) + 1
    whole = Histogram("mask", alike(1), 2)
    for k in range(count):
        bound = 2 << min(k, PATTERN)
        held = np.bitwise_count(np.arange(bound)).astype(np.int64)
        number = Histogram("mask", alike(PATTERN + 2), 2, whole)
        kernel = Histogram("mask", held, 2, number)
        histogram = Histogram("mask", np.arange(bound * classes) // classes, 2, kernel)
        for batch in batches(rows, max(1, 256 // columns, rows // 16 if k else 1), 0, 4):
            coded = k * rows + batch.start  # weights seen of each input channel
            contexts = (pattern[batch] * classes + _density(seen, coded, total)).ravel()
            flat = None if given is None else given[k, batch].ravel().astype(np.int64)
            symbols = coder.code(histogram, contexts, flat)
            histogram.learn(contexts, symbols)
            there = symbols.reshape(-1, columns)
            found[k, batch] = there != 0
            seen += there.sum(axis=0)
            total = int(seen.sum())
        pattern = pattern << 1 | found[k]
        if k >= PATTERN:
            pattern = (pattern & (1 << PATTERN) - 1) | 1 << PATTERN
    return found


def _density(seen: Ints, coded: int, total: int) -> Ints:
    """A class for each input channel: of how many weights so far are not zero, against the mean of all channels."""
    if total == 0:
        return np.full(len(seen), DENSITIES.searchsorted(64, "right"))
    size = coded * len(seen)
    return DENSITIES.searchsorted(64 * (seen * size + 4 * total) // (total * (coded + 4)), "right")


def codes(
    coder: Coder, there: NDArray[np.bool_], width: int, levels: int, zero: int, given: NDArray[np.uint16] | None
) -> NDArray[np.uint16]:
    """Codes 0 … levels − 1 of the weights that are there, [K, O, I] of kernels so wide; elsewhere 0.

    Codes are ranks of values, and those below `zero` stand for negative ones: neighbours in a kernel, and the sum over
    an input channel, tell which sign and size to expect. Raises DamagedError for a code beyond.
    """
    count, rows, columns = there.shape
    high = -(-levels // LOW)
    upper = Histogram("codes", alike(TENDENCIES), high, Histogram("codes", alike(1), high))
    lower = Histogram("codes", alike(high), LOW)
    found, signed = np.zeros(there.shape, np.uint16), np.zeros(there.shape, np.int16)
    channel = _Channels(columns)
    for k in range(count):
        for batch in batches(rows, max(1, 256 // columns), k * rows, 5):
            places = there[k, batch]
            tendency = channel.tendency(_neighbours(signed, k, batch, width))
            contexts = np.clip(tendency + TENDENCIES // 2, 0, TENDENCIES - 1)[places]
            symbols = None if given is None else given[k, batch][places].astype(np.int64)
            highs = coder.code(upper, contexts, None if symbols is None else symbols // LOW)
            lows = coder.code(lower, highs, None if symbols is None else symbols % LOW)
            upper.learn(contexts, highs)
            lower.learn(highs, lows)
            values = highs * LOW + lows
            if values.max(initial=0) >= levels:
                raise DamagedError("has a code beyond its codebook")
            ranks = values - zero
            found[k, batch][places] = values
            signed[k, batch][places] = ranks + (ranks >= 0)
            channel.learn(signed[k, batch].astype(np.int64), len(values))
    return found


class _Channels:
    """What is known of the signed ranks so far: their sum and size in each input channel, their mean size in all."""

    def __init__(self, count: int) -> None:
        self.sums, self.sizes = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self.size, self.number = 50, 1

    def learn(self, signed: Ints, number: int) -> None:
        sizes = np.abs(signed).sum(axis=0)
        self.sums += signed.sum(axis=0)
        self.sizes += sizes
        self.size += int(sizes.sum())
        self.number += number

    def tendency(self, neighbours: Ints) -> Ints:
        """How far up from zero a value is expected, in thirds of the mean size."""
        mean = max(16 * self.size // self.number, 1)  # in 16ths
        return 24 * neighbours // mean + 96 * self.sums // (16 * self.sizes + 6 * mean)


def _neighbours(signed: NDArray[np.int16], k: int, batch: slice, width: int) -> Ints:
    """Of each weight, twice the neighbours to the left and above in its kernel and once those across."""
    total = np.zeros(signed[k, batch].shape, np.int64)
    column = k % width
    for back, weight, exists in (
        (1, 2, column > 0),
        (width, 2, True),
        (width + 1, 1, column > 0),
        (width - 1, 1, 0 < column + 1 < width),
    ):
        if exists and 0 < back <= k and width > 1:
            total += weight * signed[k - back, batch].astype(np.int64)
    return total
