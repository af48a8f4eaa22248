"""Files in their runtimes, each in a fresh process, measured in interleaved rounds: a noisy moment hits all alike."""

import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from flyweight.bench.measure import Latency
from flyweight.errors import FlyweightError
from flyweight.exported import Exported


@dataclass(frozen=True)
class Entry:
    """A file, the engine that runs it and on how many cores."""

    engine: str
    exported: Exported
    threads: int

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.engine}, {self.exported.format}, {self.threads} thread{'s' * (self.threads > 1)}"


@dataclass(frozen=True)
class Timing:
    """What was measured of an entry: milliseconds for one picture over `n` runs, of which `rounds` are the medians.

    `cold_ms`: from opening the file to its first answer, the runtime imported. `peak_bytes`: of the process, Python and
    runtime included, at batch 1. `throughput`: pictures a second by the number of them that are given at once.
    """

    engine: str
    target: str
    format: str
    threads: int
    file_bytes: int
    p50: float = math.inf
    p95: float = math.inf
    p99: float = math.inf
    n: int = 0
    rounds: tuple[float, ...] = ()
    cold_ms: float = math.inf
    peak_bytes: int = 0
    throughput: dict[str, float] = field(default_factory=dict)
    failed: str = ""

    @property
    def spread(self) -> tuple[float, float]:
        """The least and the largest median of a round."""
        return min(self.rounds, default=math.inf), max(self.rounds, default=math.inf)

    def latency(self) -> Latency:
        """For one picture."""
        return Latency(self.p50, self.p95, self.p99, self.engine, self.threads, self.n)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Timing":
        """The inverse of `to_json`; what a row says beside it is passed over."""
        known: dict[str, Any] = {each.name: row[each.name] for each in fields(cls) if row.get(each.name) is not None}
        known["rounds"] = tuple(row["rounds"])
        return cls(**known)

    def to_json(self) -> dict[str, Any]:
        """As a row of `flyweight bench --json`; what could not be measured is null."""
        values = asdict(self) | {"rounds": list(self.rounds)}
        return {key: None if value == math.inf else value for key, value in values.items()}


class Runner:
    """A runtime with a file, running in a process of its own; called, it answers pictures as an engine does.

    Raises FlyweightError with its last words where it dies. `path` is the file that it has opened.
    """

    def __init__(self, entry: Entry, folder: Path) -> None:
        self.entry, self.folder = entry, folder
        self.path = entry.exported.written(folder)
        self.words = (folder / "words.txt").open("w+", errors="replace")
        asked = [sys.executable, "-m", "flyweight.bench.worker", entry.engine, str(self.path), str(entry.threads)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(asked, stdin=pipe, stdout=pipe, stderr=self.words, text=True)
        try:
            self.cold_ms: float = self._heard()["cold_ms"]
        except FlyweightError:
            self._ended()
            raise

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        self._ended()

    def _ended(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.words.close()

    def _heard(self) -> dict[str, Any]:
        """The next thing that the process says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.process.wait()
        self.words.seek(0)
        last = [each.strip() for each in self.words.read().splitlines() if each.strip()] or ["it said nothing"]
        raise FlyweightError(f"{self.entry.name}: ended with {self.process.returncode}: {last[-1]}")

    def _told(self, images: np.ndarray, **command: Any) -> dict[str, Any]:
        """What the process says to a command about pictures."""
        assert self.process.stdin is not None
        pixels = self.folder / "pixels.npy"
        np.save(pixels, images)
        with suppress(BrokenPipeError):  # it has died: `_heard` says of what
            self.process.stdin.write(json.dumps({"pixels": str(pixels), **command}) + "\n")
            self.process.stdin.flush()
        return self._heard()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Probabilities [N, classes] of pictures uint8 [N, H, W, C]."""
        path = self.folder / "answers.npy"
        self._told(images, answers=str(path))
        return np.load(path)

    def timed(self, images: np.ndarray, seconds: float, batch: int = 1) -> dict[str, Any]:
        """`ms` of calls with `batch` pictures each, for so many seconds, and the process's `peak_bytes`."""
        return self._told(images, seconds=seconds, batch=batch)


def race(
    entries: Sequence[Entry],
    pixels: np.ndarray,
    seconds: float = 1.0,
    rounds: int = 5,
    batches: Sequence[int] = (),
    say: Callable[[str], None] = lambda text: None,
) -> list[Timing]:
    """The timing of each entry for pictures uint8 [N, H, W, C]: one at a time for `seconds`, in `rounds` by turns.

    An entry that fails says why in its timing and holds up none of the others. `batches` asks for throughput.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = [_Measured(entry) for entry in entries]
        for number, each in enumerate(found):
            say(f"starting {each.entry.name}")
            each.begin(lambda entry, at=folder / str(number): stack.enter_context(Runner(entry, at)))
        for turn in range(rounds):
            say(f"round {turn + 1} of {rounds}")
            for each in found:
                each.time(pixels, seconds / rounds)
        for batch in batches:
            say(f"throughput, {batch} at once")
            for each in found:
                each.measure_throughput(pixels, batch, seconds / 2)
    return [each.timing() for each in found]


class _Measured:
    """An entry while it is measured."""

    def __init__(self, entry: Entry) -> None:
        self.entry, self.failed = entry, ""
        self.runner: Runner | None = None
        self.times: list[list[float]] = []
        self.throughput: dict[str, float] = {}
        self.peak_bytes = 0

    def begin(self, start: Callable[[Entry], Runner]) -> None:
        """One after the other, so that cold starts are alone."""
        try:
            self.runner = start(self.entry)
        except FlyweightError as error:
            self.failed = str(error)

    def _timed(self, pixels: np.ndarray, seconds: float, batch: int) -> list[float]:
        """Milliseconds; none where the process has failed."""
        if self.runner is None or self.failed:
            return []
        try:
            said = self.runner.timed(pixels, seconds, batch)
        except FlyweightError as error:
            self.failed = str(error)
            return []
        if batch == 1:
            self.peak_bytes = said["peak_bytes"]
        return said["ms"]

    def time(self, pixels: np.ndarray, seconds: float) -> None:
        """One round."""
        self.times.append(self._timed(pixels, seconds, 1))

    def measure_throughput(self, pixels: np.ndarray, batch: int, seconds: float) -> None:
        """Pictures a second."""
        if times := self._timed(pixels, seconds, batch):
            self.throughput[str(batch)] = round(1000 * batch / statistics.median(times), 2)

    def timing(self) -> Timing:
        """What has been found."""
        exported = self.entry.exported
        about = (self.entry.engine, exported.target, exported.format, self.entry.threads, exported.size)
        if self.failed or self.runner is None:
            return Timing(*about, failed=self.failed)
        times = np.concatenate([np.array(each) for each in self.times])
        p50, p95, p99 = (round(float(each), 4) for each in np.percentile(times, (50, 95, 99)))
        medians = tuple(round(statistics.median(each), 4) for each in self.times)
        cold = round(self.runner.cold_ms, 2)
        return Timing(*about, p50, p95, p99, len(times), medians, cold, self.peak_bytes, self.throughput)
