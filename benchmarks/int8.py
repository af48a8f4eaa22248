"""What int8 costs a MobileNetV1 on CIFAR-10: python -m benchmarks.int8 cifar10:PATH --run FOLDER --json

Without --run it trains the network first (--epochs). The network is quantised anew for each of several calibration
seeds (--seeds), with other pictures each time. Every attempt is one row: accuracy, agreement with the float file and
divergence on the validation pictures, bytes, latency. What ships is chosen by these rows, and then scored on the test
pictures once, beside the float file: accuracy with 95 % Wilson intervals, the pictures won and lost, and the interval
of the paired difference. --limit -100 is never held: it tries everything there is, and chooses the most accurate.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flyweight.bench.engines import onnxruntime as engine
from flyweight.bench.environment import environment
from flyweight.compress.repair import Attempt, Repair, Repaired, repair
from flyweight.compress.step import Context
from flyweight.data import open_source, prepare
from flyweight.data.dataset import Dataset
from flyweight.export.verify import Z95, answers, temperature, wilson
from flyweight.preprocess import Preprocess
from flyweight.train.loop import logits
from flyweight.train.platform import cores
from flyweight.train.recipe import recipe_for
from flyweight.training import Request, train_network
from flyweight.weights import load_net, load_preprocess

POINTS = 100


@dataclass(frozen=True)
class Outcome:
    """One calibration seed: all attempts, and what the chosen one does on test pictures that none of them has seen."""

    seed: int
    found: Repaired
    test: dict[str, Any]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """A run of the output."""
        rows = [each.to_json() for each in self.found.attempts]
        return {"seed": self.seed, "seconds": round(self.seconds, 1), "attempts": rows,
                "chosen": self.found.chosen.name, "test": self.test}  # fmt: skip


def trained(options: argparse.Namespace) -> Path:
    """The model.safetensors to quantise: given, or trained now."""
    if options.run is not None:
        return options.run / "model.safetensors" if options.run.is_dir() else options.run
    folder = Path(tempfile.mkdtemp(prefix="flyweight-int8-")) / "run"
    args = {} if options.width is None else {"width": options.width}
    train_network(Request(options.data, options.model, args=args, epochs=options.epochs, seed=options.seed), folder)
    print(f"trained: {folder}", file=sys.stderr)
    return folder / "model.safetensors"


def outcomes(weights: Path, options: argparse.Namespace) -> list[Outcome]:
    """What each calibration seed gives; the splits are the same for all."""
    net, preprocess = load_net(weights), load_preprocess(weights)
    size = preprocess.size[0]
    splits = prepare(open_source(options.data), [size], seed=options.seed)
    softness = temperature(logits(net, splits.validation, preprocess).numpy(), splits.validation.labels)
    settings = Repair(
        limit=options.limit / POINTS, seconds=options.seconds, fine_tune=options.fine_tune, temperature=softness
    )
    done = []
    for seed in range(options.seeds):
        start, recipe = time.perf_counter(), recipe_for(size)
        context = Context(splits.train, splits.validation, preprocess, recipe, seed=seed, threads=options.threads)
        found = repair(net, context, settings)
        seconds = time.perf_counter() - start
        done.append(Outcome(seed, found, tested(found, splits.test, preprocess), seconds))
        show(done[-1])
    return done


def tested(found: Repaired, test: Dataset, preprocess: Preprocess) -> dict[str, Any]:
    """The chosen file and the float file on the test pictures; `won` and `lost` are those that one of them gets."""
    files = {"float32": found.attempts[0], "chosen": found.chosen}
    right = {}
    for name, attempt in files.items():
        right[name] = answers(engine.load(attempt.model, cores()), test, preprocess).argmax(1) == test.labels
    rows = {
        name: {"top1": float(each.mean()), "ci95": wilson(int(each.sum()), len(test))} for name, each in right.items()
    }
    difference = right["chosen"].astype(float) - right["float32"]
    half, mean = Z95 * float(difference.std()) / len(test) ** 0.5, float(difference.mean())
    won, lost = int((difference > 0).sum()), int((difference < 0).sum())
    return {"n": len(test), **rows, "won": won, "lost": lost,
            "difference": mean, "difference_ci95": [mean - half, mean + half]}  # fmt: skip


def line(attempt: Attempt, full: Attempt) -> str:
    """A row as text."""
    points = POINTS * (attempt.val_top1 - full.val_top1)
    return (
        f"{attempt.name:<62}{POINTS * attempt.val_top1:7.2f} {points:+6.2f} {POINTS * attempt.agreement:7.2f}"
        f" {attempt.divergence:9.5f} {len(attempt.model):10,} {attempt.latency.p50:8.3f}"
    )


def show(outcome: Outcome) -> None:
    """The table, as text on stderr."""
    found, test = outcome.found, outcome.test
    print(f"\ncalibration seed {outcome.seed}, {outcome.seconds:.0f} s", file=sys.stderr)
    head = f"{'':<62}{'top-1':>7} {'points':>6} {'agrees':>7} {'KL':>9} {'bytes':>10} {'ms':>8}"
    print(head, *(line(each, found.attempts[0]) for each in found.attempts), sep="\n", file=sys.stderr)
    print(f"chosen: {found.chosen.name}", file=sys.stderr)
    for name in ("float32", "chosen"):
        low, high = test[name]["ci95"]
        print(f"test, {name}: {POINTS * test[name]['top1']:.2f} % ({POINTS * low:.2f} to {POINTS * high:.2f}, "
              f"n = {test['n']:,})", file=sys.stderr)  # fmt: skip
    low, high = (POINTS * end for end in test["difference_ci95"])
    print(f"difference: {POINTS * test['difference']:+.2f} points ({low:+.2f} to {high:+.2f}, paired: "
          f"{test['won']} won, {test['lost']} lost)", file=sys.stderr)  # fmt: skip


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="such as cifar10:cifar-10-python.tar.gz")
    parser.add_argument("--run", type=Path, help="a training's folder, or a model.safetensors")
    parser.add_argument("--model", default="mobilenet_v1_cifar")
    parser.add_argument("--width", type=float)
    parser.add_argument("--epochs", type=float, default=40)
    parser.add_argument("--limit", type=float, default=0.3, help="points of accuracy that int8 may lose")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no further attempt begins after")
    parser.add_argument("--fine-tune", type=float, default=300, help="seconds, if all else fails; 0: never")
    parser.add_argument("--threads", type=int, default=1, help="that latency is measured on")
    parser.add_argument("--seed", type=int, default=0, help="of the training and the splits")
    parser.add_argument("--seeds", type=int, default=3, help="of calibration")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    done = outcomes(trained(options), options)
    points = [POINTS * each.test["difference"] for each in done]
    print(f"\nover {len(done)} calibration seeds: {np.mean(points):+.2f} points on the test pictures "
          f"({min(points):+.2f} to {max(points):+.2f})", file=sys.stderr)  # fmt: skip
    if options.json:
        command, machine = " ".join(sys.argv[1:]), environment(options.threads)
        runs = [each.to_json() for each in done]
        print(json.dumps({"command": command, "environment": machine, "runs": runs}, indent=2))


if __name__ == "__main__":
    main()
