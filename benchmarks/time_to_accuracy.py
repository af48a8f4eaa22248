"""Seconds to 78.64 % of CIFAR-10's test pictures for MobileNetV1, ours against ten epochs of the baseline recipe.

Each part is run by itself and adds to the figures in --out; the table is of all that is there:

python -m benchmarks.time_to_accuracy cifar10:PATH --out FILE --choose 90 120 150   # by validation accuracy
python -m benchmarks.time_to_accuracy cifar10:PATH --out FILE --time 120 --seeds 0 1 2    # the test, once for each seed
python -m benchmarks.time_to_accuracy cifar10:PATH --out FILE --throughput          # of both, interleaved
python -m benchmarks.time_to_accuracy cifar10:PATH --out FILE --accuracy-at 2400 --seeds 0 1 2
python -m benchmarks.time_to_accuracy cifar10:PATH --out FILE --baseline-run        # its ten epochs, some 40 minutes

"Seconds to" are the wall-clock seconds of a training that was given --time, all that it measures and builds beforehand
included, and whose final test accuracy reaches the target; reading the data is not in them, nor is the test. The time
is chosen on pictures that were held out of training; with it the network is then trained on all 50,000. The baseline's
seconds are ten epochs at its throughput. `--set field=value` changes a field of our recipe. JSON on stdout.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flyweight.cli.options import read_settings
from flyweight.create import create_model
from flyweight.data import Dataset, Splits, open_source, prepare
from flyweight.train.loop import Clock, Training, logits, score, train
from flyweight.train.recipe import BASELINE, BASELINE_EPOCHS, Recipe, preprocess_for, recipe_for
from flyweight.training import changed

NET, SIZE, TARGET = "mobilenet_v1_cifar", 32, 0.7864
# Pictures that a training scores now and then while its time runs, which decides nothing.
WATCHED = 500
ROUNDS, ROUND_SECONDS = 7, 10.0
Row = dict[str, Any]


def everything(splits: Splits) -> Dataset:
    """The training pictures together with those that were held out of them."""
    a, b = splits.train, splits.validation
    rows, labels = (np.concatenate([getattr(a, name), getattr(b, name)]) for name in ("rows", "labels"))
    return replace(a, rows=rows, labels=labels, names=a.names + b.names)


def training(data: Dataset, watched: Dataset, recipe: Recipe, clock: Clock, seed: int) -> Training:
    """A training of a fresh network."""
    torch.manual_seed(seed)
    net = create_model(NET, num_classes=len(data.classes), size=SIZE)
    preprocess = preprocess_for(recipe, data.batch(SIZE, slice(0, 2000)))
    return Training(net, data, watched, preprocess, recipe, clock, seed, note=_say)


def trained(splits: Splits, recipe: Recipe, clock: Clock, seed: int, tested: bool) -> Row:
    """One training from its first to its last second, scored on the test pictures or on those held out."""
    data = everything(splits) if tested else splits.train
    job = training(data, splits.validation.subset(range(WATCHED)), recipe, clock, seed)
    start = time.perf_counter()
    found = train(job)
    seconds = time.perf_counter() - start
    asked = splits.test if tested else splits.validation
    accuracy, _ = score(logits(job.net, asked, job.preprocess), asked.labels)
    row = {"seed": seed, "given": clock.seconds, "seconds": seconds, "epochs": found.epochs, "mode": job.mode}
    _say(f"seed {seed}: {100 * accuracy:.2f} % of {len(asked)} after {found.epochs:.2f} epochs in {seconds:.1f} s")
    return {**row, "on": asked.split, "n": len(asked), "top1": accuracy}


def burst(splits: Splits, recipe: Recipe, seconds: float) -> float:
    """Images a second of a training that runs for so long."""
    job = training(splits.train, splits.validation.subset(range(1)), recipe, Clock(seconds=seconds), 0)
    found = train(job)
    return found.steps * recipe.batch_size / found.seconds


def serve(splits: Splits, recipe: Recipe) -> None:
    """Answers each line on stdin with the images a second of one burst."""
    for _ in sys.stdin:
        print(json.dumps(burst(splits, recipe, ROUND_SECONDS)), flush=True)


def throughput(data: str, changes: list[str]) -> dict[str, Any]:
    """Images a second of both, in turns, each in a process of its own, since an allocator once tuned stays so."""
    base = [sys.executable, "-m", "benchmarks.time_to_accuracy", data, "--serve"]
    sides = {"ours": [*base, "ours", *(word for each in changes for word in ("--set", each))]}
    sides["baseline"] = [*base, "baseline"]
    workers = {name: _worker(words) for name, words in sides.items()}
    found: dict[str, list[float]] = {name: [] for name in sides}
    try:
        for turn in range(ROUNDS + 1):
            for name, worker in workers.items():
                speed = _ask(worker)
                if turn:  # the first warms up
                    found[name].append(speed)
            _say(", ".join(f"{name} {speeds[-1]:.0f}" for name, speeds in found.items() if speeds))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    ratios = [a / b for a, b in zip(found["ours"], found["baseline"], strict=True)]
    return {name: spread(speeds) for name, speeds in {**found, "ratio": ratios}.items()}


def _worker(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _ask(worker: subprocess.Popen[str]) -> float:
    assert worker.stdin
    assert worker.stdout
    worker.stdin.write("\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def spread(found: list[float]) -> Row:
    """Median and range."""
    return {"median": statistics.median(found), "min": min(found), "max": max(found), "n": len(found)}


def summary(parts: dict[str, Any]) -> dict[str, Any]:
    """What the parts come to."""
    found: dict[str, Any] = {}
    rows = parts.get("time", [])
    if rows:
        reached = sum(row["top1"] >= TARGET for row in rows)
        found["reached"] = f"{reached} of {len(rows)}"
        found["seconds"] = spread([row["seconds"] for row in rows])
        found["top1"] = spread([row["top1"] for row in rows])
    if "throughput" in parts:
        found["baseline_seconds"] = BASELINE_EPOCHS * 50_000 / parts["throughput"]["baseline"]["median"]
    if rows and "throughput" in parts:
        found["of_the_baseline's_time"] = found["seconds"]["median"] / found["baseline_seconds"]
    if parts.get("accuracy_at"):
        found["top1_in_its_time"] = spread([row["top1"] for row in parts["accuracy_at"]])
    if "baseline_run" in parts:
        found["baseline_top1"] = parts["baseline_run"]["top1"]
    return found


def show(parts: dict[str, Any]) -> None:
    """A table on stderr, JSON on stdout."""
    for part in ("choose", "time", "accuracy_at"):
        for row in parts.get(part, []):
            told = (
                f"{row['given']:g} s given, seed {row['seed']}: {100 * row['top1']:.2f} % of {row['n']} ({row['on']})"
            )
            _say(f"{part:12} {told}, {row['epochs']:.2f} epochs in {row['seconds']:.1f} s")
    for name, speeds in parts.get("throughput", {}).items():
        _say(f"{name:12} {speeds['median']:.4g} ({speeds['min']:.4g} to {speeds['max']:.4g}, n = {speeds['n']})")
    print(json.dumps({**parts, "summary": summary(parts)}, indent=2))


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--out", type=Path, help="a JSON file that the parts are gathered in")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--choose", type=float, nargs="+", metavar="SECONDS", default=[])
    parser.add_argument("--time", type=float, metavar="SECONDS")
    parser.add_argument("--accuracy-at", type=float, metavar="SECONDS")
    parser.add_argument("--throughput", action="store_true")
    parser.add_argument("--baseline-run", action="store_true")
    parser.add_argument("--serve", choices=["ours", "baseline"], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Runs the parts that were asked for."""
    asked = options()
    ours = changed(recipe_for(SIZE), read_settings(asked.set))
    parts: dict[str, Any] = json.loads(asked.out.read_text()) if asked.out and asked.out.exists() else {}
    if asked.throughput:
        parts["throughput"] = throughput(asked.data, asked.set)
    splits = prepare(open_source(asked.data), [SIZE])
    if asked.serve:
        serve(splits, ours if asked.serve == "ours" else BASELINE)
        return
    for key, given, tested in (
        ("choose", asked.choose, False),
        ("time", [asked.time] if asked.time else [], True),
        ("accuracy_at", [asked.accuracy_at] if asked.accuracy_at else [], True),
    ):
        for seconds in given:
            for seed in asked.seeds:
                row = trained(splits, ours, Clock(seconds=seconds), seed, tested)
                parts.setdefault(key, []).append({**row, "recipe": asked.set})
    if asked.baseline_run:
        parts["baseline_run"] = trained(splits, BASELINE, Clock(epochs=BASELINE_EPOCHS), asked.seeds[0], True)
    if asked.out:
        asked.out.write_text(json.dumps(parts, indent=2) + "\n")
    show(parts)


if __name__ == "__main__":
    main()
