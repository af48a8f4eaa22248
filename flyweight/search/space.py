"""The candidates: every family of the zoo over its widths and the input sizes, with exact costs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flyweight import zoo
from flyweight.compress.estimate import CLUSTERED
from flyweight.costs import NetCost, cost
from flyweight.graph import GraphError
from flyweight.net import Net, Spec
from flyweight.search.budget import Budget
from flyweight.search.donor import Donor
from flyweight.units import budget_value
from flyweight.zoo import spec_of

# Up to this side, networks start with a stem that keeps the size; their original stems would leave nothing to see.
SMALL = 48
SMALLEST = 16
# Training from scratch in minutes needs normalised layers and, at that length, no dropout.
FROM_SCRATCH = {"norm": "batch", "drop_rate": 0.0}
# Below this share of the size that weights were trained at, what they know of shapes and textures is lost.
LEAST_OF_OWN = 0.55
PHOTO_SIZES = (64, 96, 128, 160, 192, 224)


@dataclass
class Candidate:
    """A network that might meet the budget, what is known of it so far, and what became of it."""

    name: str
    spec: Spec
    cost: NetCost | None = None
    size_bytes: int | None = None
    packed: bool = False
    """Whether it keeps to the size only when clustered and packed: the size is then an estimate."""
    latency_ms: float | None = None
    status: str = "not tried"
    why: str = ""
    val_top1: float | None = None
    epochs: float | None = None
    weights: Donor | None = None
    """The weights it starts from, if any."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates; 0 before the cost is known."""
        return self.cost.macs if self.cost else 0

    def measured(self) -> dict[str, float]:
        """What is known, under the names of budget limits; the memory at one byte a value, or four when clustered."""
        values: dict[str, float | None] = {"latency": self.latency_ms, "size": self.size_bytes}
        if self.cost:
            values |= {
                "macs": self.cost.macs,
                "params": self.cost.params,
                "memory": self.cost.memory_bytes(4 if self.packed else 1),
            }
        return {name: value for name, value in values.items() if value is not None}

    def recall(self, record: Mapping[str, Any]) -> None:
        """Takes up what an earlier measurement recorded."""
        self.size_bytes, self.packed, self.latency_ms = (record[key] for key in ("size_bytes", "packed", "latency_ms"))
        self.status, self.why = record["status"], record["why"]

    def drop(self, why: str) -> None:
        """Takes the candidate out of the race."""
        self.status, self.why = "dropped", why

    def to_json(self) -> dict[str, Any]:
        """As in result.json."""
        return {
            "name": self.name,
            "spec": self.spec.to_json(),
            "params": self.cost.params if self.cost else None,
            "macs": self.cost.macs if self.cost else None,
            "memory_bytes": self.cost.memory_bytes(1) if self.cost else None,
            "size_bytes": self.size_bytes,
            "packed": self.packed,
            "latency_ms": self.latency_ms,
            "status": self.status,
            "why": self.why,
            "val_top1": self.val_top1,
            "epochs": self.epochs,
            "weights": self.weights.name if self.weights else None,
        }


def input_sizes(native: tuple[int, int]) -> tuple[int, ...]:
    """The square input sizes worth trying for pictures of `native` (height, width).

    For small ones their own and about three quarters of it, for photographs three common sizes up to their own.
    """
    side = max(SMALLEST, min(native))
    if side <= SMALL:
        smaller = round(side * 0.75 / 4) * 4
        return (smaller, side) if smaller >= 16 else (side,)
    fitting = [size for size in PHOTO_SIZES if size <= side]
    if len(fitting) < 2:
        return tuple(sorted({*fitting, side}))
    return tuple(fitting[: min(len(fitting), 4)])


def candidates(sizes: Sequence[int], channels: int, classes: int) -> list[Candidate]:
    """Every family's candidates at its widths, for each input size: not yet costed."""
    found: list[Candidate] = []
    for family in zoo.families().values():
        for size in sizes:
            form = "small" if size <= SMALL else "large"
            stem = {"stem": "cifar"} if form == "small" else {}
            for name in family.CANDIDATES[form]:
                for width in family.WIDTHS:
                    args = {"num_classes": classes, "in_chans": channels, "width": width, **stem, **FROM_SCRATCH}
                    found.append(Candidate(f"{name} x{width:g} @{size}", spec_of(name, size=size, **args)))
    return found


def pretrained_size(spec: Spec, native: tuple[int, int]) -> int:
    """The side at which pretrained weights start: their own, but no larger than the pictures of `native` size."""
    return max(SMALLEST, min(max(spec.input[1:]), max(native)))


def adapted(spec: Spec, sizes: Sequence[int], channels: int, classes: int) -> list[Spec]:
    """A trained network at each size between about half and all of its own, without dropout, for these classes."""
    own = max(spec.input[1:])
    fitting = {size for size in sizes if LEAST_OF_OWN * own <= size <= own} or {max(sizes)}
    form = spec.with_args(num_classes=classes, in_chans=channels, drop_rate=0.0)
    return [replace(form, input=(channels, size, size)) for size in sorted(fitting, reverse=True)]


def pretrained_candidates(donor: Donor, sizes: Sequence[int], channels: int, classes: int) -> list[Candidate]:
    """Candidates that start from given weights; each says from which."""
    return [
        Candidate(
            f"{spec.family} x{spec.args.get('width', 1.0):g} @{spec.input[1]} from {donor.name}", spec, weights=donor
        )
        for spec in adapted(donor.spec(), sizes, channels, classes)
    ]


def estimate_cost(candidate: Candidate, net: Net | None = None) -> None:
    """Fills in the exact cost, or drops the candidate if its network cannot take so small an input.

    `net` is its network, where that is built already.
    """
    try:
        candidate.cost = cost(net or candidate.spec, candidate.spec.input)
    except GraphError:
        candidate.drop(f"needs larger pictures than {candidate.spec.input[1]} pixels")


def screen(candidate: Candidate, budget: Budget) -> None:
    """Drops what its cost alone rules out: MACs, parameters, memory, or more weights than the file may have bytes."""
    if candidate.cost is None:
        return
    limit = budget.limit("size")  # int8: a byte a weight, before scales, names and nodes
    candidate.packed = limit is not None and not limit.met(candidate.cost.weight_values)
    measured = candidate.measured()
    measured.setdefault("size", candidate.cost.weight_values * (4 * CLUSTERED if candidate.packed else 1))
    broken = budget.broken(measured)
    if broken:
        candidate.drop(", ".join(shortfall(limit.name, measured[limit.name], limit.value) for limit in broken))


def shortfall(name: str, measured: float, limit: float) -> str:
    """Why a limit is broken, in words with numbers."""
    return f"{name} {budget_value(name, measured)} is over {budget_value(name, limit)}"


def ranked(pool: Sequence[Candidate], ideal_macs: Callable[[str], float], packing: float = 1.0) -> list[Candidate]:
    """The order in which to try: family by family in turn, in each the candidates nearest to its ideal MACs first.

    `ideal_macs(family)` is what the time given can train well; below it capacity is lost, above it epochs. The family
    that can train most comes first. What must be clustered and packed counts as `packing` times as far.
    """

    def distance(candidate: Candidate) -> float:
        ratio = max(candidate.macs, 1) / ideal_macs(candidate.spec.family)
        return max(ratio, 1 / ratio) * (packing if candidate.packed else 1.0)

    def place(queue: list[Candidate]) -> tuple[float, float]:
        return -ideal_macs(queue[0].spec.family), distance(queue[0])

    by_family: dict[str, list[Candidate]] = {}
    for candidate in sorted(pool, key=distance):
        by_family.setdefault(candidate.spec.family, []).append(candidate)
    queues = sorted(by_family.values(), key=place)
    order: list[Candidate] = []
    for turn in range(max((len(queue) for queue in queues), default=0)):
        order += [queue[turn] for queue in queues if turn < len(queue)]
    return order
