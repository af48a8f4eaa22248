"""How fast an untrained network's files run: in engines of this machine, or by another machine's latency table."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from flyweight.bench.engines import engine, engines, installed
from flyweight.bench.measure import interleaved
from flyweight.bench.profile import Table
from flyweight.errors import UsageError
from flyweight.export.targets import target, targets
from flyweight.export.task import Task
from flyweight.exported import FLOAT, Exported
from flyweight.graph import Graph

MEASURE_SECONDS = 0.15
DEFAULT, AUTO = "onnxruntime", "auto"
BROWSER = "onnxruntime-web"  # for web pages: measured and shipped when it is asked for


@dataclass(frozen=True)
class Found:
    """What the fastest of several engines makes of a network: milliseconds for one picture, and the file's bytes."""

    ms: float
    size: int


class Meter(Protocol):
    """Gives, for each form of a network, what its fastest engine makes of it; `picture` is uint8 [1, H, W, C]."""

    def __call__(self, forms: Sequence[Task], picture: np.ndarray) -> list[Found]: ...


@dataclass(frozen=True)
class Here:
    """Measures on this machine, in this process."""

    engines: tuple[str, ...]
    threads: int

    def __call__(self, forms: Sequence[Task], picture: np.ndarray) -> list[Found]:
        files = [written(name, form) for form in forms for name in self.engines]
        names = self.engines * len(forms)
        runs = [engines()[name].start(file, self.threads) for name, file in zip(names, files, strict=True)]
        speeds = interleaved(runs, names, picture, self.threads, MEASURE_SECONDS, rounds=3)
        found = [Found(speed.p50, file.size) for speed, file in zip(speeds, files, strict=True)]
        per_form = len(self.engines)
        return [min(found[i : i + per_form], key=lambda each: each.ms) for i in range(0, len(found), per_form)]


@dataclass(frozen=True)
class Elsewhere:
    """Asks the latency table of another machine; the bytes are those of ONNX files."""

    table: Table
    engines: tuple[str, ...]
    threads: int

    @classmethod
    def on(cls, path: Path, asked: str, threads: int) -> "Elsewhere":
        """By a table's file, in one of its engines or, for "auto", in all whose files can be proven here.

        Raises UsageError where the table does not know the engine on so many cores.
        """
        table = Table.read(path)
        known = {part.engine for part in table.parts if part.threads == threads}
        engines = tuple(name for name in engines_for(asked) if name in known)
        if not engines:
            told = ", ".join(sorted(f"{part.engine} on {part.threads}" for part in table.parts))
            raise UsageError(f"{path} does not know {asked} on {threads} core(s), only {told}: choose among these")
        return cls(table, engines, threads)

    def __call__(self, forms: Sequence[Task], picture: np.ndarray) -> list[Found]:
        return [Found(self.fastest(form), written(DEFAULT, form).size) for form in forms]

    def fastest(self, form: Task) -> float:
        """Milliseconds of a network in the engine that runs it fastest there."""
        return min(self.foretold(form.graph, form.format, name) for name in self.engines)

    def foretold(self, graph: Graph, format: str, engine: str) -> float:
        """Milliseconds of a traced network there. Raises UsageError where the table lacks the precision."""
        return self.table.predict(graph, engine, FLOAT if format == FLOAT else "int8", self.threads)


def written(engine: str, form: Task) -> Exported:
    """A network as a file for an engine."""
    return target(engines()[engine].TARGET).export(form)


def engines_for(asked: str) -> tuple[str, ...]:
    """The engines that a job may ship for. Raises UsageError for one that is not there."""
    if asked != AUTO:
        return (engine(asked).NAME,)
    return tuple(name for name, each in installed().items() if each.TARGET in targets() and name != BROWSER)


def quick(names: Sequence[str]) -> tuple[str, ...]:
    """Those engines whose files take milliseconds to write: what candidates are measured in, where there are any."""
    return tuple(name for name in names if targets()[engines()[name].TARGET].QUICK) or tuple(names)
