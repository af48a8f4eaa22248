"""The parity gate: the exported file must answer as the trained network does, on real pictures from raw bytes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from flyweight.data import Dataset
from flyweight.preprocess import Preprocess

AGREEMENT, APART = 0.999, 0.01
POINT = 0.01
BATCH = 64
Z95 = 1.959964


@dataclass(frozen=True)
class Parity:
    """The outcome: `agreement` is the share of equal answers; the interval is of the paired accuracy difference.

    `tolerance` is the largest loss of accuracy that passes; for float32, where answers must be equal, the largest share
    of other answers.
    """

    n: int
    agreement: float
    pytorch_top1: float
    exported_top1: float
    interval: tuple[float, float]
    tolerance: float
    passed: bool
    worst: Mapping[str, Any] | None = None
    """The picture whose probabilities differ most: `{name, trained, exported, difference}`: what both
    answer, as indices of classes, and the largest difference of a probability."""

    def to_json(self) -> dict[str, Any]:
        """As a `parity` record."""
        return asdict(self) | {"interval": list(self.interval)}


def answers(run: Callable[[np.ndarray], np.ndarray], data: Dataset, preprocess: Preprocess) -> np.ndarray:
    """Probabilities [N, classes] of an exported file for the pictures as they lie on the disk, preprocessed anew."""
    return np.concatenate([run(pixels) for pixels in raw_batches(data, preprocess)])


def prepared_answers(run: Callable[[np.ndarray], np.ndarray], data: Dataset, size: int) -> np.ndarray:
    """Probabilities [N, classes] of an exported file for the pictures as they were prepared at `size` pixels."""
    starts = range(0, len(data), BATCH)
    return np.concatenate([run(data.batch(size, slice(start, start + BATCH))) for start in starts])


def raw_batches(data: Dataset, preprocess: Preprocess) -> Iterator[np.ndarray]:
    """uint8 [n, H, W, C] batches, each picture read from its source again: no pack, no cache."""
    for start in range(0, len(data), BATCH):
        indices = range(start, min(start + BATCH, len(data)))
        yield np.stack([preprocess.pixels(data.original(index)) for index in indices])


def gate(
    reference: np.ndarray, exported: np.ndarray, data: Dataset, exact: bool, tolerance: float | None = None
) -> Parity:
    """`compare` for probabilities [N, classes] of the pictures in `data`, and the worst example.

    Where they are to be exact no probability may differ by more than APART either: few pictures lie so near to the
    border of two answers that another way to resize shows in these. Answers that are no numbers never pass.
    """
    parity = compare(reference.argmax(axis=1), exported.argmax(axis=1), data.labels, exact, tolerance)
    apart = np.nan_to_num(np.abs(reference - exported).max(axis=1), nan=np.inf)
    at = int(apart.argmax())
    worst = {
        "name": data.names[at],
        "trained": int(reference[at].argmax()),
        "exported": int(exported[at].argmax()),
        "difference": float(apart[at]),
    }
    near = apart[at] <= APART if exact else bool(np.isfinite(exported).all())
    return replace(parity, worst=worst, passed=parity.passed and bool(near))


def compare(
    reference: np.ndarray, exported: np.ndarray, labels: np.ndarray, exact: bool, tolerance: float | None = None
) -> Parity:
    """The gate over answers [N] of the trained network and of the exported file.

    Exact, as float32 must be: at least 99.9 % equal answers. Else, for int8 and bfloat16: accuracy lower by at most one
    point, or by what the paired 95 % interval cannot tell from nothing, whichever is more; or by at most `tolerance`,
    where it is given.
    """
    right, right_too = reference == labels, exported == labels
    difference = right_too.astype(float) - right.astype(float)
    half = Z95 * float(difference.std()) / len(labels) ** 0.5
    mean = float(difference.mean())
    agreement = float((reference == exported).mean())
    allowed = 1 - AGREEMENT if exact else max(POINT, half) if tolerance is None else tolerance
    passed = agreement >= AGREEMENT if exact else -mean <= allowed
    return Parity(
        n=len(labels),
        agreement=agreement,
        pytorch_top1=float(right.mean()),
        exported_top1=float(right_too.mean()),
        interval=(mean - half, mean + half),
        tolerance=round(allowed, 6),
        passed=passed,
    )


def temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T that minimises the cross-entropy of softmax(logits / T) (Guo et al., arXiv:1706.04599, section 4.2).

    Found by golden-section search over log T in [−3, 3], on which the loss has one minimum in 1 / T.
    """

    def loss(log_t: float) -> float:
        scaled = logits / np.exp(log_t)
        top = scaled.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(scaled - top).sum(axis=1)) + top[:, 0]
        return float((log_sum - scaled[np.arange(len(labels)), labels]).mean())

    low, high = -3.0, 3.0
    golden = (np.sqrt(5) - 1) / 2
    for _ in range(40):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return float(np.exp((low + high) / 2))


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion."""
    p, z2 = hits / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * np.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return min(p, float(centre - half)), max(p, float(centre + half))  # rounding must not put p outside
