"""A machine's latency table: kernels measured on its engines, from which a network's latency there is predicted.

The latency of a network is the sum of its kernels', each kind's corrected by a factor from a few whole networks: in a
network values come from the cache of the layer before, layouts change on the way, and weights come from further away
than those of a kernel that runs alone again and again.
"""

import importlib.metadata
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from flyweight.bench.engines import Run, engine
from flyweight.bench.kernels import PICTURE, Kernel, Probe, kernels, picture_shape
from flyweight.bench.regression import Array, Regression, features
from flyweight.errors import FlyweightError, UsageError
from flyweight.export import int8
from flyweight.export.targets import target
from flyweight.export.task import Task
from flyweight.exported import FLOAT
from flyweight.graph import Graph, Shape
from flyweight.preprocess import Preprocess

VERSION = 1
INT8 = "int8"
FORMATS = (FLOAT, INT8)
KERNEL_SECONDS = 0.06  # of running each kernel
NET_SECONDS, ROUNDS = 0.3, 5  # of running each whole network, in so many rounds
LEAST_RUNS, MOST_RUNS = 7, 100
CALIBRATION = 2  # pictures: only the speed of an int8 network is wanted
TIES = 0.1  # how strongly a kind's factor is held to one, against the relative errors of whole networks
TIES_BESIDE = 0.01  # the same of what comes beside the kernels, to nothing
EACH = 0.005  # ms: about what lies between two kernels
FETCH = 2.5e-8  # ms: about what it takes to fetch a byte of weights
LEAST_OF_KIND = 4
FLAG = 2.0  # how far kernels are apart that differ in a flag, in powers of e of a size


@dataclass(frozen=True)
class Timing:
    """What a kernel takes in milliseconds, and the standard error of that."""

    kernel: Kernel
    ms: float
    error: float


@dataclass(frozen=True)
class Part:
    """What was measured on one engine.

    `factors` correct the sum of the kernels of a kind; `each` and `weight` are what a kernel and a weight take beside,
    in milliseconds: what lies between two kernels of a network, and from where weights come, is in no measurement of
    one.
    """

    engine: str
    version: str
    format: str
    threads: int
    timings: tuple[Timing, ...] = field(repr=False)
    factors: Mapping[str, float]
    each: float = 0.0
    weight: float = 0.0

    @property
    def key(self) -> tuple[str, str, int]:
        """What is asked for: engine, format, threads."""
        return self.engine, self.format, self.threads

    @cached_property
    def _regressions(self) -> dict[str, Regression]:
        by_kind: dict[str, list[Timing]] = defaultdict(list)
        for each in self.timings:
            by_kind[each.kernel.kind].append(each)
        return {kind: _regression(own) for kind, own in by_kind.items()}

    def by_kind(self, wanted: Sequence[Kernel]) -> dict[str, float]:
        """Milliseconds of all kernels of a kind, uncorrected. Raises UsageError where none of the kind was measured."""
        grouped: dict[str, list[Kernel]] = defaultdict(list)
        for kernel in wanted:
            grouped[kernel.kind].append(kernel)
        for kind in grouped:
            if kind not in self._regressions:
                raise UsageError(f"the table has no {kind} on {self.engine}: measure longer, with --time")
        return {kind: float(self._regressions[kind].predict(own).sum()) for kind, own in grouped.items()}

    def predict(self, wanted: Sequence[Kernel]) -> float:
        """Milliseconds of a network of these kernels."""
        own = sum(self.factors.get(kind, 1.0) * ms for kind, ms in self.by_kind(wanted).items())
        return own + self.each * len(wanted) + self.weight * sum(kernel.weights for kernel in wanted)

    def to_json(self) -> dict[str, Any]:
        """As in the table's file."""
        return {**asdict(self), "timings": [asdict(each) for each in self.timings]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Part":
        """The inverse of `to_json`."""
        rows = value["timings"]
        timings = tuple(Timing(Kernel.from_json(row["kernel"]), float(row["ms"]), float(row["error"])) for row in rows)
        return cls(**{**value, "timings": timings})


@dataclass(frozen=True)
class Table:
    """A machine's parts, one for each engine, format and number of threads."""

    environment: Mapping[str, Any]
    parts: tuple[Part, ...]

    def part(self, engine: str, format: str, threads: int) -> Part:
        """Raises UsageError where that was not measured."""
        for part in self.parts:
            if part.key == (engine, format, threads):
                return part
        there = ", ".join(_told(*part.key) for part in self.parts)
        wanted = _told(engine, format, threads)
        raise UsageError(f"the table has no {wanted}, only {there}: measure that with flyweight profile")

    def predict(self, graph: Graph, engine: str, format: str, threads: int) -> float:
        """Milliseconds for one picture. Raises UsageError as `part` does, GraphError for a leaf without a rule."""
        return self.part(engine, format, threads).predict(kernels(graph))

    def write(self, path: Path) -> None:
        """As JSON."""
        told = {"version": VERSION, "environment": self.environment, "parts": [each.to_json() for each in self.parts]}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(told) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Table":
        """Raises UsageError where there is no such file, FlyweightError where it is damaged or of another kind."""
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(
                f"{path} cannot be read ({error.strerror}): flyweight profile writes such a table"
            ) from error
        except ValueError as error:
            raise FlyweightError(f"{path} is no JSON: write the table again with flyweight profile") from error
        version = told.get("version") if isinstance(told, dict) else None
        if version != VERSION:
            raise FlyweightError(f"{path} is no latency table of version {VERSION}: write one with flyweight profile")
        try:
            return cls(told["environment"], tuple(Part.from_json(each) for each in told["parts"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FlyweightError(f"{path} is damaged ({error!r}): write it again with flyweight profile") from error


def _told(engine: str, format: str, threads: int) -> str:
    return f"{engine} {format} on {threads} thread(s)"


def _regression(timings: Sequence[Timing]) -> Regression:
    ms, errors = (np.array([getattr(each, name) for each in timings]) for name in ("ms", "error"))
    return Regression([each.kernel for each in timings], ms, errors)


@dataclass(frozen=True)
class Meter:
    """Measures on one engine, in this process."""

    engine: str
    format: str
    threads: int

    @property
    def version(self) -> str:
        """Of the engine's package."""
        return importlib.metadata.version(engine(self.engine).NEEDS[0])

    def kernel(self, kernel: Kernel) -> Timing:
        """A kernel's time: that of its probe less that of the same without it, run in turn."""
        shape = picture_shape(kernel)
        wholes = (True,) if kernel.kind == PICTURE else (True, False)
        tasks = [_task(Probe(kernel, whole), shape) for whole in wholes]
        runs = [self.start(task) for task in tasks]
        times = _interleaved(runs, _pictures(shape, 1), KERNEL_SECONDS)
        less = times[1] if len(times) > 1 else 0.0
        low, high = np.quantile(times[0] - less, (0.25, 0.75))
        ms = float(np.median(times[0]) - np.median(less))
        return Timing(kernel, ms, float((high - low) / np.sqrt(len(times[0]))))

    def nets(self, tasks: Sequence[Task]) -> "Whole":
        """Whole networks, ready to be measured."""
        return Whole(tasks, [self.start(task) for task in tasks])

    def start(self, task: Task) -> Run:
        """A network in this format, ready to run."""
        if self.format == INT8:
            task = task.quantised(int8.schemes()[0], _pictures(task.shape, CALIBRATION))
        known = engine(self.engine)
        return known.start(target(known.TARGET).export(task), self.threads)


class Whole:
    """Networks that are measured in rounds: between kernels, so that what slows the machine slows both."""

    def __init__(self, tasks: Sequence[Task], runs: Sequence[Run]) -> None:
        self.tasks, self.runs = tasks, runs
        self.times: list[list[float]] = [[] for _ in runs]

    def round(self) -> None:
        """Runs each for a while."""
        for own, run, task in zip(self.times, self.runs, self.tasks, strict=True):
            own += [*_interleaved([run], _pictures(task.shape, 1), NET_SECONDS / ROUNDS)[0]]

    def ms(self) -> list[float]:
        """Of each network."""
        return [float(np.median(own)) for own in self.times]


def _task(net: nn.Module, shape: Shape) -> Task:
    channels, height, width = shape
    preprocess = Preprocess((height, width), channels, (127.0,) * channels, (64.0,) * channels)
    return Task(net.eval(), preprocess, ())


def _pictures(shape: Shape, n: int) -> np.ndarray:
    """Noise, uint8 [n, H, W, C]."""
    return np.random.default_rng(0).integers(0, 256, (n, *shape[1:], shape[0]), dtype=np.uint8)


def _interleaved(runs: Sequence[Run], picture: np.ndarray, seconds: float) -> Array:
    """Milliseconds [runs, n], one after the other in turn, for about so many seconds in all."""
    first = [_timed(run, picture) for run in runs]
    n = int(np.clip(500 * seconds / sum(first), LEAST_RUNS, MOST_RUNS))
    return np.array([[_timed(run, picture) for run in runs] for _ in range(n)]).T


def _timed(run: Run, picture: np.ndarray) -> float:
    """Milliseconds of a run that follows another of the same, whose values the caches still hold."""
    run(picture)
    start = time.perf_counter()
    run(picture)
    return 1000 * (time.perf_counter() - start)


def covering(shares: Mapping[Kernel, float], most: int) -> list[Kernel]:
    """Up to `most` kernels, such that early ones stand for what networks spend their time in (`shares` of it).

    A few of each kind come first, then kinds have parts as the roots of their shares.
    """
    by_kind: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in shares:
        by_kind[kernel.kind].append(kernel)
    due: list[tuple[float, Kernel]] = []
    for own in by_kind.values():
        share = np.array([shares[each] for each in own])
        spread = enumerate(_spread(own, share, most))
        due += [((i + 1) / share.sum() ** 0.5 if i >= LEAST_OF_KIND else 0.0, each) for i, each in spread]
    return [kernel for _, kernel in sorted(due, key=lambda each: each[0])][:most]


def _spread(every: Sequence[Kernel], share: Array, most: int) -> list[Kernel]:
    """The next is always that whose distance to the nearest before it, times share^¼, is largest."""
    sizes, flags = (np.array(each) for each in zip(*map(features, every), strict=True))
    places = np.hstack([sizes, FLAG * flags])
    distance, chosen = np.ones(len(every)), []
    for i in range(min(most, len(every))):
        next_one = int(np.argmax(distance * share**0.25))
        chosen.append(every[next_one])
        away = np.sqrt(((places - places[next_one]) ** 2).sum(1))
        distance = np.minimum(distance, away) if i else away
    return chosen


Progress = Callable[[float], None]


def profile(meter: Meter, chosen: Iterable[Kernel], nets: Sequence[Task], seconds: float, progress: Progress) -> Part:
    """A part from as many of the chosen kernels as the seconds allow, and factors from whole networks."""
    whole = meter.nets(nets)
    begun, done = time.monotonic(), 0  # without the networks' building, which would leave short times no kernel
    timings: list[Timing] = []
    for kernel in chosen:
        spent = (time.monotonic() - begun) / seconds
        if spent > 1:
            break
        if spent >= done / ROUNDS:
            whole.round()
            done += 1
        progress(spent)
        timings.append(meter.kernel(kernel))
    part = Part(meter.engine, meter.version, meter.format, meter.threads, tuple(timings), {})
    return corrected(part, [kernels(task.graph) for task in nets], whole.ms())


def corrected(part: Part, nets: Sequence[Sequence[Kernel]], measured: Sequence[float]) -> Part:
    """The part with factors a for each kind, b · EACH for each kernel and c · FETCH for each byte of weights.

    Such that Σ over nets (predicted / measured − 1)² + TIES · Σ (aₖ − 1)² + TIES_BESIDE · (b² + c²) is least.
    """
    sums = [part.by_kind(own) for own in nets]
    kinds = sorted({kind for each in sums for kind in each})
    fetched = FETCH * (4 if part.format == FLOAT else 1)
    rows = [
        [*(each.get(kind, 0.0) for kind in kinds), EACH * len(own), fetched * sum(kernel.weights for kernel in own)]
        for each, own in zip(sums, nets, strict=True)
    ]
    share = np.array(rows).reshape(len(nets), len(kinds) + 2) / np.array(measured)[:, None]
    ties, prior = (np.array([value] * len(kinds) + [beside] * 2) for value, beside in ((TIES, TIES_BESIDE), (1.0, 0.0)))
    left = share.T @ share + np.diag(ties)
    *factors, each, weight = np.linalg.solve(left, share.T @ np.ones(len(nets)) + ties * prior).tolist()
    return replace(part, factors=dict(zip(kinds, factors, strict=True)), each=EACH * each, weight=fetched * weight)
