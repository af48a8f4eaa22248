"""Latency: many single-picture runs, interleaved when several files compete, so that a noisy moment hits all alike."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from flyweight.bench.engines import onnxruntime as engine

Run = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one picture: percentiles over `n` runs."""

    p50: float
    p95: float
    p99: float
    engine: str
    threads: int
    n: int

    def to_json(self) -> dict[str, float | int | str]:
        """As in result.json."""
        return asdict(self)


def _timed(run: Run, image: np.ndarray, seconds: float, least: int) -> list[float]:
    """Run times in seconds: at least `least` of them and at least `seconds` in all."""
    times: list[float] = []
    total = 0.0
    while total < seconds or len(times) < least:
        start = time.perf_counter()
        run(image)
        times.append(time.perf_counter() - start)
        total += times[-1]
    return times


def latencies(
    models: Sequence[bytes], image: np.ndarray, threads: int, seconds: float = 0.5, rounds: int = 5
) -> list[Latency]:
    """The latency of each ONNX model for one picture, uint8 [1, H, W, C], `seconds` each, in interleaved rounds."""
    runs = [engine.load(model, threads) for model in models]
    return interleaved(runs, [engine.NAME] * len(runs), image, threads, seconds, rounds)


def interleaved(
    runs: Sequence[Run], engines: Sequence[str], image: np.ndarray, threads: int, seconds: float, rounds: int
) -> list[Latency]:
    """The same of functions that take pictures, and of what engines they are."""
    for run in runs:
        _timed(run, image, 0.02, 3)
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, own in zip(runs, times, strict=True):
            own += _timed(run, image, seconds / rounds, 3)
    return [_summary(own, name, threads) for own, name in zip(times, engines, strict=True)]


def latency(model: bytes, image: np.ndarray, threads: int, seconds: float = 0.5) -> Latency:
    """The latency of one ONNX model for one picture, uint8 [1, H, W, C]."""
    return latencies([model], image, threads, seconds)[0]


def _summary(times: list[float], engine: str, threads: int) -> Latency:
    p50, p95, p99 = (round(float(ms), 4) for ms in np.percentile(np.array(times) * 1000, (50, 95, 99)))
    return Latency(p50, p95, p99, engine, threads, len(times))
