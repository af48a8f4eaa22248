"""One runtime with one file in a process of its own, which answers and measures itself when told to.

A fresh process for each, so that no runtime's threads, allocator or peak memory are another's. What it is told comes as
lines of JSON on the standard input, what it says leaves as lines of JSON on what was the standard output: runtimes
print there too, so that goes to the standard error instead.
"""

import importlib
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from flyweight.bench.engines import Run, engine, read_export

WARM_UP = 3


def main(name: str, path: str, threads: int) -> None:
    """Starts an engine on a file and serves until the input ends."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _keep_to(threads)
    own = engine(name)
    for module in own.NEEDS:
        importlib.import_module(module)
    exported = read_export(Path(path))
    grey = np.full((1, *exported.preprocess.size, exported.preprocess.channels), 127, np.uint8)
    start = time.perf_counter()
    run = own.start(exported, threads)
    run(grey)
    _say(said, cold_ms=1000 * (time.perf_counter() - start))
    for line in sys.stdin:
        _say(said, **_obeyed(run, **json.loads(line)))


def _say(stream: Any, **values: Any) -> None:
    print(json.dumps(values), file=stream, flush=True)


def _keep_to(threads: int) -> None:
    """Some runtimes take all cores whatever they are told; so they have no more of them."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])


def _obeyed(run: Run, pixels: str, answers: str = "", seconds: float = 0.0, batch: int = 1) -> dict[str, Any]:
    """Of pictures uint8 [N, H, W, C] in an .npy: their probabilities into another one, which `answers` names.

    Or, without that, the milliseconds of calls with `batch` pictures, and the process's peak bytes.
    """
    images = np.load(pixels)
    if answers:
        np.save(answers, run(images))
        return {}
    pictures = np.resize(images, (batch, *images.shape[1:]))
    for _ in range(WARM_UP):
        run(pictures)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < WARM_UP:
        start = time.perf_counter()
        run(pictures)
        times.append(1000 * (time.perf_counter() - start))
    return {"ms": times, "peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """The most memory that this process has had; 0 where the system does not say.

    Linux's getrusage would count the process that it was forked from, too.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(each for each in status.read_text().splitlines() if each.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    if importlib.util.find_spec("resource") is None:
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
