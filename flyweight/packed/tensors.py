"""How a tensor is written: its form, a list of words in the header, and the same walk for writing and reading.

["bytes"]                 as it is
["floats", size]          float32: exponents in the entropy coder, of sign and fraction the first 1 to 3 bytes
["ints"]                  int32: the length of each number in the entropy coder, its digits as they are
["codes", levels]         a codebook in ascending order, then each value's place in it
["grid", levels]          the same, of a codebook of multiples of a float32 step
["sparse", *form]         which values are not zero, then those alone ("floats", "codes" or "grid")
["parts", form, form …]   one form for each input channel (axis 1)
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flyweight.packed import models
from flyweight.packed.coder import Coder, Histogram, Ints, alike
from flyweight.packed.damage import DamagedError

Form = list[Any]

DTYPES = {name: np.dtype(name).newbyteorder("<") for name in ("float32", "float16", "int8", "uint8", "int32", "int64")}
PARTS = 4  # input channels up to which each may have a form of its own
FIRST = 64  # numbers in the first batch
FARTHEST = 1 << 15  # multiple of a step
DIVISORS = 8  # of the least value, among which a step is looked for
POSITIONS = 16  # classes of a place in a codebook: steps between neighbours are longer towards the ends


class Numbers:
    """What the file's tensors have in common: the exponents of its floats, the lengths of its whole numbers."""

    def __init__(self) -> None:
        self.exponents = Histogram("exponents", alike(1), 256)
        self.lengths = Histogram("lengths", alike(1), 33)
        self.steps, self.gaps = (
            Histogram("codebook", np.zeros(POSITIONS, np.int64), 33, Histogram("codebook", alike(1), 33)) for _ in "ab"
        )


def keys(values: NDArray) -> NDArray[np.unsignedinteger]:
    """The bits of values as unsigned numbers in the values' order: no two values share one, −0 and NaN included."""
    bits = values.view(f"<u{values.itemsize}")
    sign = bits.dtype.type(1 << 8 * values.itemsize - 1)
    if values.dtype.kind == "f":
        return np.where(bits & sign, ~bits, bits | sign)
    return bits ^ sign if values.dtype.kind == "i" else bits


def values_of(found: NDArray[np.unsignedinteger], dtype: np.dtype) -> NDArray:
    """The inverse of `keys`."""
    sign = found.dtype.type(1 << 8 * dtype.itemsize - 1)
    if dtype.kind == "f":
        return np.where(found & sign, found ^ sign, ~found).view(dtype)
    return (found ^ sign if dtype.kind == "i" else found).view(dtype)


def tensor(
    coder: Coder, numbers: Numbers, form: Form, dtype: np.dtype, shape: tuple[int, ...], given: NDArray | None
) -> NDArray:
    """Writes the tensor that is given, or reads one. Raises DamagedError."""
    match form:
        case ["bytes"]:
            size = dtype.itemsize * math.prod(shape)
            data = coder.plain(size, None if given is None else given.tobytes())
            return np.frombuffer(data, dtype).reshape(shape)
        case ["floats", 1 | 2 | 3 as size] if dtype == np.float32:
            flat = None if given is None else given.ravel()
            return _floats(coder, numbers, size, math.prod(shape), flat).reshape(shape)
        case ["ints"] if dtype == np.int32:
            return _ints(coder, numbers, math.prod(shape), None if given is None else given.ravel()).reshape(shape)
        case ["codes" | "grid", int()] | ["sparse", "floats", 1 | 2 | 3] | ["sparse", "codes" | "grid", int()]:
            return _weights(coder, numbers, form, dtype, shape, given)
        case ["parts", *forms] if len(shape) > 1 and len(forms) == shape[1] <= PARTS:
            part = (shape[0], 1, *shape[2:])
            found = [
                tensor(coder, numbers, each, dtype, part, None if given is None else given[:, i : i + 1])
                for i, each in enumerate(forms)
                if isinstance(each, list) and each[:1] != ["parts"]
            ]
            if len(found) == len(forms):
                return np.concatenate(found, axis=1)
    raise DamagedError(f"writes a {dtype.name} tensor of shape {list(shape)} in an unknown form")


def _weights(
    coder: Coder, numbers: Numbers, form: Form, dtype: np.dtype, shape: tuple[int, ...], given: NDArray | None
) -> NDArray:
    """A tensor as planes: where its values are, and which."""
    count, rows, columns, width = models.planes(shape)
    planes = None if given is None else models.to_planes(given)
    there = np.ones((count, rows, columns), np.bool_)
    if form[0] == "sparse":
        is_there = None if planes is None else keys(planes) != keys(np.zeros(1, dtype))
        there = models.mask(coder, (count, rows, columns), is_there)
    found = np.zeros(there.shape, dtype)
    kind, levels = form[-2], form[-1]
    if kind in ("floats", "grid") and dtype != np.float32:
        raise DamagedError(f"writes {dtype.name} values as float32")
    if kind == "floats":
        found[there] = _floats(coder, numbers, levels, int(there.sum()), None if planes is None else planes[there])
        return models.from_planes(found, shape)
    if not 1 <= levels <= models.MOST or dtype.itemsize > 4:
        raise DamagedError(f"has a codebook of {levels} values of {dtype.name}")
    given_book = None if planes is None else np.unique(keys(planes[there])).astype(np.int64)
    if kind == "grid":
        book = _grid(coder, numbers, levels, given_book)
    else:
        book = _ascending(coder, numbers.steps, levels, 8 * dtype.itemsize, given_book)
    zero = int(book.searchsorted(int(keys(np.zeros(1, dtype))[0])))
    places = None if planes is None or given_book is None else given_book.searchsorted(keys(planes)).astype(np.uint16)
    codes = models.codes(coder, there, width, levels, zero, places)
    found[there] = values_of(book.astype(f"<u{dtype.itemsize}"), dtype)[codes[there]]
    return models.from_planes(found, shape)


def _floats(coder: Coder, numbers: Numbers, size: int, count: int, given: NDArray | None) -> NDArray:
    """float32 values: exponents as this tensor and all before it let expect, of the other 24 bits `size` bytes."""
    bits = None if given is None else np.ascontiguousarray(given).view("<u4").astype(np.int64)
    histogram = Histogram("exponents", alike(1), 256, numbers.exponents)
    rest = None
    if bits is not None:
        others = (bits >> 8 & 1 << 23 | bits & (1 << 23) - 1).astype("<u4").view(np.uint8).reshape(-1, 4)
        rest = others[:, 3 - size : 3].tobytes()
    data = np.frombuffer(coder.plain(size * count, rest), np.uint8)
    exponents = _learned(coder, histogram, np.zeros(count, np.int64), None if bits is None else bits >> 23 & 255)
    read = np.zeros((count, 4), np.uint8)
    read[:, 3 - size : 3] = data.reshape(-1, size)
    found = read.view("<u4")[:, 0]
    sign = (found & np.uint32(1 << 23)) << np.uint32(8)
    return (sign | exponents.astype("<u4") << np.uint32(23) | found & np.uint32((1 << 23) - 1)).view("<f4")


def _ints(coder: Coder, numbers: Numbers, count: int, given: NDArray | None) -> NDArray:
    """int32 values: the length of 2 |x| − (x < 0) in binary digits, then the digits below the first."""
    zigzag = None if given is None else (given.astype(np.int64) << 1) ^ (given.astype(np.int64) >> 63)
    histogram = Histogram("lengths", alike(1), 33, numbers.lengths)
    found = _lengthy(coder, histogram, np.zeros(count, np.int64), zigzag)
    return (found >> 1 ^ -(found & 1)).astype("<i4")


def _grid(coder: Coder, numbers: Numbers, count: int, given: Ints | None) -> Ints:
    """The keys of multiples of a step: the step's bits, then which multiples there are. Raises DamagedError."""
    known = None if given is None else step_of(values_of(given.astype("<u4"), np.dtype("<f4")))
    assert given is None or known is not None, "the form was chosen for a tensor that is no grid"
    bits = coder.bits(np.array([32]), None if known is None else known.view("<u4").astype(np.int64))
    step = bits.astype("<u4").view("<f4")
    multiples = None
    if given is not None:
        multiples = np.rint(values_of(given.astype("<u4"), np.dtype("<f4")) / step).astype(np.int64) + FARTHEST
    places = _ascending(coder, numbers.gaps, count, FARTHEST.bit_length() + 1, multiples) - FARTHEST
    with np.errstate(all="ignore"):
        found = keys(places.astype("<f4") * step).astype(np.int64)
    if not np.isfinite(step[0]) or (np.diff(found) <= 0).any():
        raise DamagedError("has a codebook of multiples of no such step")
    return found


def step_of(values: NDArray) -> NDArray | None:
    """The float32 [1] whose whole multiples the ascending values are, exactly; None where none is found."""
    there = values[values != 0]
    if not len(there) or not np.isfinite(there).all() or np.signbit(values[values == 0]).any():
        return None
    least = np.abs(there).min(keepdims=True)
    with np.errstate(all="ignore"):
        for divisor in range(1, DIVISORS + 1):
            near = least / np.float32(divisor)
            for step in (near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf))):
                multiples = np.rint(values / step)
                if (np.abs(multiples) < FARTHEST).all() and (multiples * step == values).all():
                    return step
    return None


def _ascending(coder: Coder, histogram: Histogram, count: int, bits: int, given: Ints | None) -> Ints:
    """Unsigned numbers of so many bits, each larger than the one before. Raises DamagedError for one beyond."""
    first = coder.bits(np.array([bits]), None if given is None else given[:1])
    positions = np.arange(count - 1) * POSITIONS // max(count - 1, 1)
    steps = _lengthy(coder, histogram, positions, None if given is None else np.diff(given) - 1)
    found = np.concatenate([first, first + np.cumsum(steps + 1)])
    if int(found[-1]) >> bits:
        raise DamagedError("has a codebook beyond its type's range")
    return found


def _lengthy(coder: Coder, histogram: Histogram, contexts: Ints, given: Ints | None) -> Ints:
    """Numbers from 0 to 2³² − 1: their length in binary digits, then the digits below the first."""
    lengths = None if given is None else np.array([int(each).bit_length() for each in given], np.int64)
    lengths = _learned(coder, histogram, contexts, lengths)
    rests = np.maximum(lengths - 1, 0)
    top = np.where(lengths > 0, 1 << rests, 0)
    return top | coder.bits(rests, None if given is None else given - top)


def _learned(coder: Coder, histogram: Histogram, contexts: Ints, given: Ints | None) -> Ints:
    """Symbols in growing batches, each as all before let expect."""
    found = np.empty(len(contexts), np.int64)
    for batch in models.batches(len(contexts), FIRST, 0, 4):
        found[batch] = coder.code(histogram, contexts[batch], None if given is None else given[batch])
        histogram.learn(contexts[batch], found[batch])
    return found
