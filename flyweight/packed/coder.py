"""Entropy coding in whole numbers alone: interleaved rANS over adaptive histograms, many symbols at a time in numpy.

The coder is range asymmetric numeral systems (Duda, arXiv:1311.2540) with LANES states in turn, as in Giesen,
arXiv:1402.3392. No float takes part, so a file decodes to the same symbols on every machine and with every numpy.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flyweight.packed.damage import DamagedError

Ints = NDArray[np.int64]

BITS = 16  # a histogram's frequencies sum to 1 << BITS; a word of the stream has as many bits
ONE = 1 << BITS
LANES = 128
STRENGTH = 64  # how many symbols the parent's opinion of a context counts for


class Histogram:
    """Frequencies of `symbols` symbols in each of several contexts, which learn from what has been coded.

    A context that has seen little believes its parent: `up[c]` is the parent's context for context c, and at the top
    stands that all symbols are alike. `name` tells what is coded with it, for those who count bytes.
    """

    def __init__(self, name: str, up: Ints, symbols: int, parent: "Histogram | None" = None) -> None:
        self.name = name
        self.up, self.symbols, self.parent = up, symbols, parent
        self.counts = np.zeros((len(up), symbols), np.int64)

    def learn(self, contexts: Ints, symbols: Ints) -> None:
        """Counts symbols seen in contexts, here and in all above."""
        found = np.bincount(contexts * self.symbols + symbols, minlength=self.counts.size)
        self.counts += found.reshape(self.counts.shape)
        if self.parent is not None:
            self.parent.learn(self.up[contexts], symbols)

    def refresh(self) -> None:
        """Expects what was counted so far; a coder asks for it before it codes."""
        if self.parent is None:
            prior = np.full((1, self.symbols), ONE // self.symbols)
        else:
            self.parent.refresh()
            prior = self.parent.table
        self._expect((self.counts << BITS) + STRENGTH * prior.take(self.up, axis=0))

    def _expect(self, weights: Ints) -> None:
        """Weights [C, S] as frequencies ≥ 1 that sum to ONE in each context, each where the one before ends."""
        contexts, symbols = weights.shape
        sums = weights.cumsum(axis=1)
        starts = np.zeros((contexts, symbols + 1), np.int64)
        starts[:, 1:-1] = sums[:, :-1] * (ONE - symbols) // sums[:, -1:] + np.arange(1, symbols)
        starts[:, -1] = ONE
        self.table = starts[:, 1:] - starts[:, :-1]
        self.widths = self.table.ravel()
        self.starts = (starts[:, :-1] + (np.arange(contexts) << BITS)[:, None]).ravel()


def alike(contexts: int) -> Ints:
    """So many contexts that believe the same, the parent's only one."""
    return np.zeros(contexts, np.int64)


class Coder(Protocol):
    """What models are written against, once for both directions."""

    def code(self, histogram: Histogram, contexts: Ints, symbols: Ints | None) -> Ints:
        """Symbols [n] in their contexts: an encoder writes those that it is given, a decoder is given none."""
        ...

    def bits(self, widths: Ints, values: Ints | None) -> Ints:
        """Values of so many bits each, as they are."""
        ...

    def plain(self, length: int, given: bytes | None) -> bytes:
        """So many bytes, as they are."""
        ...


class Decoder:
    """Reads what `compress.pack.Encoder` wrote: `words` of the entropy coder and `raw` bytes. Raises DamagedError."""

    def __init__(self, words: bytes, raw: bytes) -> None:
        self.words = np.frombuffer(words, "<u2").astype(np.int64)
        self.raw = raw
        if len(self.words) < 2 * LANES:
            raise DamagedError("has a coded part that ends too early")
        self.states = self.words[:LANES] << BITS | self.words[LANES : 2 * LANES]
        self.at, self.raw_at = 2 * LANES, 0

    def code(self, histogram: Histogram, contexts: Ints, symbols: Ints | None = None) -> Ints:
        histogram.refresh()
        found = np.empty(len(contexts), np.int64)
        starts, widths = histogram.starts, histogram.widths
        floor = contexts << BITS
        second = starts[2 * contexts + 1] if histogram.symbols == 2 else None
        for begin in range(0, len(contexts), LANES):
            part = slice(begin, begin + LANES)
            base = floor[part]
            states = self.states[: len(base)]
            slots = (states & (ONE - 1)) + base
            if second is None:
                places = starts.searchsorted(slots, "right") - 1
            else:  # the same, in half the time
                places = 2 * contexts[part] + (slots >= second[part])
            states = widths[places] * (states >> BITS) + slots - starts[places]
            low = (states < ONE).nonzero()[0]
            if len(low):
                fresh = self.words[self.at : self.at + len(low)]
                if len(fresh) < len(low):
                    raise DamagedError("has a coded part that ends too early")
                states[low] = states[low] << BITS | fresh
                self.at += len(low)
            self.states[: len(base)] = states
            found[part] = places
        return found - contexts * histogram.symbols

    def bits(self, widths: Ints, values: Ints | None = None) -> Ints:
        length = -(-int(widths.sum()) // 8)
        table = np.unpackbits(np.frombuffer(self.plain(length), np.uint8))
        first = np.cumsum(widths) - widths
        found = np.zeros(len(widths), np.int64)
        for bit in range(int(widths.max(initial=0))):
            more = (bit < widths).nonzero()[0]
            found[more] = found[more] << 1 | table[first[more] + bit]
        return found

    def plain(self, length: int, given: bytes | None = None) -> bytes:
        found = self.raw[self.raw_at : self.raw_at + length]
        if len(found) < length:
            raise DamagedError("has a raw part that ends too early")
        self.raw_at += length
        return found

    def close(self) -> None:
        """Raises DamagedError where not all was read, or where the states are not those that coding began with."""
        if self.at != len(self.words) or self.raw_at != len(self.raw) or (self.states != ONE).any():
            raise DamagedError("has a coded part that does not end as it should")
