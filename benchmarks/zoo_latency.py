"""The latency of every model: its float32 ONNX file, untrained, at its usual input, one picture, on one thread.

python -m benchmarks.zoo_latency [PATTERN] [--rounds 5] [--seconds 0.5] [--threads 1] [--out docs/data/latency.json]

Each round measures every model once, so that a noisy moment of the machine hits one round of a model, not all of them;
leave the machine alone meanwhile. Prints a table on stderr and JSON on stdout, and writes that JSON to --out.
`python -m scripts.models_page` then puts the figures into docs/models.md.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flyweight.bench.environment import environment
from flyweight.bench.measure import Latency, latencies
from flyweight.export import onnx
from flyweight.preprocess import Preprocess
from flyweight.zoo import build, list_models, usual_spec
from scripts.models_page import LATENCY


def picture(side: int, channels: int) -> np.ndarray:
    """Noise, uint8 [1, side, side, channels]."""
    return np.random.default_rng(0).integers(0, 256, (1, side, side, channels), dtype=np.uint8)


def write(name: str, path: Path) -> None:
    """A model with first weights as an ONNX file."""
    torch.manual_seed(0)
    spec = usual_spec(name)
    channels, side, _ = spec.input
    classes = [str(i) for i in range(spec.args["num_classes"])]
    model = onnx.export(build(spec).eval(), Preprocess.of(picture(side, channels)), classes)
    path.write_bytes(model.SerializeToString())


def measure(name: str, folder: Path, threads: int, seconds: float) -> Latency:
    """One round of one model; only its own session is in memory."""
    path = folder / f"{name}.onnx"
    if not path.exists():
        write(name, path)
    channels, side, _ = usual_spec(name).input
    return latencies([path.read_bytes()], picture(side, channels), threads, seconds, rounds=1)[0]


def summary(found: list[Latency]) -> dict[str, float]:
    """The median of the rounds' medians, their range, and the runs in all."""
    medians = [each.p50 for each in found]
    return {
        "p50_ms": round(statistics.median(medians), 4),
        "low_ms": min(medians),
        "high_ms": max(medians),
        "p95_ms": round(statistics.median(each.p95 for each in found), 4),
        "n": sum(each.n for each in found),
    }


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="*")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each model in each round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=LATENCY)
    options = parser.parse_args()
    names = list_models(options.pattern)
    found: dict[str, list[Latency]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(options.rounds):
            for name in names:
                found[name].append(measure(name, Path(folder), options.threads, options.seconds))
            print(f"round {i + 1} of {options.rounds}", file=sys.stderr, flush=True)
    models = {name: summary(rounds) for name, rounds in found.items()}
    for name, each in sorted(models.items(), key=lambda item: item[1]["p50_ms"]):
        times = f"{each['p50_ms']:9.3f} ms  {each['low_ms']:9.3f} to {each['high_ms']:9.3f}  n = {each['n']}"
        print(f"{name:<26}{times}", file=sys.stderr)
    words = f"'{options.pattern}' --rounds {options.rounds} --seconds {options.seconds:g} --threads {options.threads}"
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.zoo_latency {words}",
        "environment": environment(options.threads),
        "rounds": options.rounds,
        "models": models,
    }
    text = json.dumps(result, indent=1) + "\n"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8", newline="\n")
    print(text, end="")


if __name__ == "__main__":
    main()
