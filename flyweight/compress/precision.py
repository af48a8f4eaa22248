"""Which precision ships: float32 or one of the int8 schemes, by measured accuracy, latency and size."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flyweight.bench.engines import precision
from flyweight.bench.measure import Latency
from flyweight.costs import NetCost
from flyweight.exported import FLOAT, Exported

PACKED = "packed"
# int8 may lose this much validation accuracy; and schemes this close to the best are told apart by speed.
TOLERATED, CLOSE = 0.01, 0.003
# Less than this share of another's time is notably less.
NOTABLY = 0.95


@dataclass
class Variant:
    """The winner in one precision, measured: `measured` under the names of budget limits."""

    format: str
    model: bytes
    latency: Latency
    val_top1: float
    measured: dict[str, float]
    excess: float
    agrees: bool = True
    """Whether it answers closely enough as the trained network does, by the parity gate's tolerance."""
    why: str = ""
    packed: bytes | None = None
    """The packed file that ships in place of the model."""
    exported: Exported | None = None
    """What ships in place of the model, for another runtime than ONNX Runtime."""

    @property
    def precision(self) -> str:
        """What its layers are computed in."""
        return precision(self.latency.engine, self.format)

    @property
    def size(self) -> int:
        """Bytes of what ships."""
        if self.exported is not None:
            return self.exported.size
        return len(self.packed or self.model)

    def to_json(self, chosen: bool) -> dict[str, Any]:
        """As a `variant` record."""
        return {
            "format": self.format,
            "size_bytes": self.size,
            "latency_ms": self.latency.p50,
            "engine": self.latency.engine,
            "val_top1": self.val_top1,
            "chosen": chosen,
            "why": self.why,
        }


def measures(counted: NetCost, precision: str, size: int, milliseconds: float, accuracy: float) -> dict[str, float]:
    """The values of an exported file under the names of budget limits."""
    return {
        "latency": milliseconds,
        "size": size,
        "memory": counted.memory_bytes(value_bytes(precision)),
        "macs": counted.macs,
        "params": counted.params,
        "accuracy": accuracy,
    }


def value_bytes(precision: str) -> int:
    """Bytes of one weight or activation while it runs."""
    return 4 if precision.startswith(FLOAT) else 1


def choose(variants: Sequence[Variant]) -> Variant:
    """The variant to ship, with every variant's `why` filled in.

    Only what agrees with the trained network can ship. Of what does and meets the budget (else misses it by the least),
    int8 or bfloat16 is preferred while it loses at most a point of validation accuracy to float32 and is not slower
    here.
    """
    usable = [variant for variant in variants if variant.agrees] or list(variants)
    least = min(variant.excess for variant in usable)
    fitting = [variant for variant in usable if variant.excess <= least]
    for variant in variants:
        if not variant.agrees:
            variant.why = "its answers differ too much from the trained network's"
        elif variant.excess > least:
            variant.why = "outside the budget"
    rounded = best([variant for variant in fitting if variant.precision != FLOAT])
    full = best([variant for variant in fitting if variant.precision == FLOAT])
    chosen = _full_or_rounded(full, rounded)
    for variant in fitting:
        variant.why = variant.why or _compared(variant, chosen)
    return chosen


def best(variants: Sequence[Variant]) -> Variant | None:
    """The fastest of those whose accuracy is close to the best; of several about as fast the most accurate."""
    highest = max((variant.val_top1 for variant in variants), default=0.0)
    close = [variant for variant in variants if variant.val_top1 >= highest - CLOSE]
    bar = min((variant.latency.p50 for variant in close), default=0.0)
    near = [variant for variant in close if NOTABLY * variant.latency.p50 <= bar]
    return max(near, key=lambda variant: (variant.val_top1, -variant.latency.p50), default=None)


def _full_or_rounded(full: Variant | None, rounded: Variant | None) -> Variant:
    if full is None or rounded is None:
        only = rounded or full
        assert only is not None
        only.why = "shipped: the only precision within the budget" if full is None else "shipped"
        return only
    name = "int8" if rounded.precision.startswith("int8") else rounded.precision
    loss = full.val_top1 - rounded.val_top1
    if loss > TOLERATED:
        full.why = f"shipped: {name} loses {100 * loss:.2f} points"
        return full
    if rounded.latency.p50 > full.latency.p50:
        full.why = f"shipped: {name} is slower here ({rounded.latency.p50:.3g} ms against {full.latency.p50:.3g} ms)"
        return full
    faster, smaller = full.latency.p50 / rounded.latency.p50, full.size / rounded.size
    size = f" and {smaller:.1f} times smaller" if smaller > 1.05 else ""
    rounded.why = f"shipped: {faster:.1f} times faster{size} than float32 at {-100 * loss:+.2f} points"
    return rounded


def _compared(variant: Variant, chosen: Variant) -> str:
    points = 100 * (variant.val_top1 - chosen.val_top1)
    return f"{points:+.2f} points and {variant.latency.p50 / chosen.latency.p50:.2f} times the time of what ships"


def calibration_sample(n: int, seed: int, most: int) -> np.ndarray:
    """Positions of up to `most` training pictures, seeded and sorted."""
    return np.sort(np.random.default_rng(seed).permutation(n)[:most])
