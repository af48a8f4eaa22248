"""The cost card: what a network costs by counting and by measuring, each figure under its own name."""

from collections.abc import Mapping, Sequence
from typing import Any

from flyweight.bench.engines import precision
from flyweight.bench.peak import INT8
from flyweight.bench.race import Timing
from flyweight.costs import NetCost
from flyweight.exported import FLOAT

FILE = "card.json"


def card(counted: NetCost, timings: Sequence[Timing], peak: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """As in card.json: `peak` holds, by threads and precision, the multiply-accumulates a second that are possible.

    `of_peak` of a row is the share of these that the network reaches: MACs / (latency · peak).
    """
    measured = [each for each in timings if not each.failed]
    return {
        "macs": counted.macs,
        "flops": 2 * counted.macs,
        "params": counted.params,
        "memory_bytes": {FLOAT: counted.memory_bytes(4), INT8: counted.memory_bytes(1)},
        "file_bytes": {f"{each.target}, {each.format}": each.file_bytes for each in measured},
        "peak_macs_per_second": {str(threads): dict(rates) for threads, rates in peak.items()},
        "engines": [{**each.to_json(), "of_peak": _share(counted.macs, each, peak)} for each in timings],
    }


def _share(macs: int, timing: Timing, peak: Mapping[int, Mapping[str, float]]) -> float | None:
    if timing.failed or timing.threads not in peak:
        return None
    used = precision(timing.engine, timing.format).partition(",")[0]  # of "float32, clustered, packed" the first word
    rate = peak[timing.threads].get(INT8 if used.startswith(INT8) else used)
    return None if rate is None else round(1000 * macs / (timing.p50 * rate), 4)
