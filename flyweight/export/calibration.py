"""Where a network's values lie on real pictures, and several rules for the range that 8 bits are to cover."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnxruntime

BATCH, BINS, SAMPLED = 8, 2048, 4096  # pictures at once; of a histogram; values of a picture and tensor in it, about
LEVELS = 256
SHARE = 0.9999  # of the values: what the percentile keeps on each side
CANDIDATES = 64  # ranges that a search compares

Range = tuple[float, float]


@dataclass(frozen=True)
class Histogram:
    """The values of one tensor: their range, and how many of a sample lie in each of `BINS` equal parts of it."""

    lowest: float
    highest: float
    counts: np.ndarray

    @property
    def edges(self) -> np.ndarray:
        """The limits of the parts, [BINS + 1]."""
        return np.linspace(self.lowest, self.highest, len(self.counts) + 1)

    @property
    def centres(self) -> np.ndarray:
        """The middles of the parts, [BINS]."""
        edges = self.edges
        return (edges[:-1] + edges[1:]) / 2


def observe(model: onnx.ModelProto, images: np.ndarray) -> dict[str, Histogram]:
    """What every inner float32 value of an ONNX model holds while `images`, uint8 [N, H, W, C], pass through it."""
    ranges = limits(model, images)
    counts = {name: np.zeros(BINS, np.int64) for name in ranges}

    def count(name: str, values: np.ndarray) -> None:
        step = max(1, values[0].size // SAMPLED) | 1  # odd: an even one would meet few columns of a picture
        counts[name] += np.histogram(values.ravel()[::step], BINS, ranges[name])[0]

    _visit(model, images, count)
    return {name: Histogram(*ranges[name], counts[name]) for name in ranges}


def limits(model: onnx.ModelProto, images: np.ndarray) -> dict[str, Range]:
    """The smallest and the largest value of every inner float32 tensor: the ranges by "min-max", without histograms."""
    found: dict[str, Range] = {}

    def widen(name: str, values: np.ndarray) -> None:
        low, high = found.get(name, (np.inf, -np.inf))
        found[name] = (min(low, float(values.min())), max(high, float(values.max())))

    _visit(model, images, widen)
    return found


def _visit(model: onnx.ModelProto, images: np.ndarray, look: Callable[[str, np.ndarray], None]) -> None:
    """Shows `look` every float32 value of every batch."""
    names = [name for node in model.graph.node for name in node.output]
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
    for start in range(0, len(images), BATCH):
        values = session.run(None, {"image": images[start : start + BATCH]})
        for name, value in zip(names, values, strict=True):
            if isinstance(value, np.ndarray) and value.dtype == np.float32:
                look(name, value)


def min_max(values: Histogram) -> Range:
    """All values."""
    return values.lowest, values.highest


def percentile(values: Histogram) -> Range:
    """All but the outermost 0.01 % on each side."""
    share = np.cumsum(values.counts) / values.counts.sum()
    first, last = np.searchsorted(share, [1 - SHARE, SHARE])
    return float(values.edges[first]), float(values.edges[min(int(last) + 1, len(share))])


def mse(values: Histogram) -> Range:
    """The range, shrunk as a whole towards zero, with the least mean squared error of the values in 8 bits."""
    return min(_shrunk(values), key=lambda ends: _squared_error(values, ends))


def _shrunk(values: Histogram) -> list[Range]:
    shares = np.arange(CANDIDATES, CANDIDATES // 8, -1) / CANDIDATES
    return [(float(share * values.lowest), float(share * values.highest)) for share in shares]


def _squared_error(values: Histogram, ends: Range) -> float:
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    step = (high - low) / (LEVELS - 1)
    if not step:
        return 0.0
    x = values.centres
    rounded = np.clip(np.round(x / step), np.round(low / step), np.round(high / step)) * step
    return float((values.counts * (x - rounded) ** 2).sum())


def entropy(values: Histogram) -> Range:
    """The range with the least Kullback-Leibler divergence of the values' distribution from its 8-bit form.

    Cut values count at the range's ends; those around zero, which 8 bits hold exactly, do not count (Migacz, "8-bit
    inference with TensorRT", GTC 2017).
    """
    counts = np.where((values.edges[:-1] <= 0) & (values.edges[1:] >= 0), 0, values.counts)
    if not counts.any():
        return min_max(values)
    others = replace(values, counts=counts)
    return min(_shrunk(values), key=lambda ends: _divergence(others, ends))


def _divergence(values: Histogram, ends: Range) -> float:
    """KL(P ‖ Q): P the counts with the cut ones at the ends, Q the same spread evenly over the bins of each level."""
    x, counts = values.centres, values.counts.astype(np.float64)
    inside = (x >= ends[0]) & (x <= ends[1])
    if not inside.any():
        return np.inf
    first, last = np.flatnonzero(inside)[[0, -1]]
    kept = counts[first : last + 1]
    p = kept.copy()
    p[0] += counts[:first].sum()
    p[-1] += counts[last + 1 :].sum()
    level = np.arange(len(kept)) * LEVELS // len(kept)
    held = np.bincount(level, weights=kept > 0)
    q = np.where(kept > 0, (np.bincount(level, weights=kept) / np.maximum(held, 1))[level], 0.0)
    p, q = p / p.sum(), q / max(q.sum(), 1.0)
    there = p > 0
    return float((p[there] * np.log(p[there] / np.maximum(q[there], 1e-9))).sum())


CALIBRATORS: Mapping[str, Callable[[Histogram], Range]] = {
    "min-max": min_max,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
}


def ranges(values: Mapping[str, Histogram], calibrator: str) -> dict[str, Range]:
    """The range of each tensor by one of `CALIBRATORS`."""
    return {name: CALIBRATORS[calibrator](each) for name, each in values.items()}
