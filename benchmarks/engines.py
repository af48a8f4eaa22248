"""Two networks with ImageNet weights in every runtime: which one ships, and how much faster it is than eager PyTorch.

    python -m benchmarks.engines FLOWERS WEIGHTS [--threads 2] [--json]

WEIGHTS holds squeezenet1_0_imagenet.safetensors and mobilenet_v1_075_192_imagenet.safetensors, FLOWERS are photographs
in train/ and test/. Files whose int8 ranges come from a fifth of the training photographs may ship where they give at
least 95 % of the float network's answers on the others; the test photographs are scored once, at the end. All files run
in processes of their own, in interleaved rounds. What ships is chosen by one race, and judged by a second.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flyweight.bench.engines import engines, installed
from flyweight.bench.environment import environment
from flyweight.bench.peak import peaks
from flyweight.bench.race import Entry, Timing, race
from flyweight.benching import as_it_is, entries_of
from flyweight.costs import cost
from flyweight.data import open_source, prepare
from flyweight.export.task import Task
from flyweight.export.verify import answers
from flyweight.exporting import Outcome, Subject, outcomes
from flyweight.foreign import read_weights, take
from flyweight.preprocess import Preprocess
from flyweight.search.meter import AUTO, engines_for
from flyweight.terminal import print_table
from flyweight.train.loop import logits
from flyweight.zoo import build, spec_of

KEPT = 0.95  # of the float network's answers
IMAGENET = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
NETS: dict[str, tuple[str, dict[str, Any], tuple[tuple[float, ...], tuple[float, ...]]]] = {
    "squeezenet1_0": ("squeezenet1_0_imagenet", {"size": 224}, IMAGENET),
    "mobilenet_v1_075": (
        "mobilenet_v1_075_192_imagenet",
        {"size": 192, "padding": "same"},
        ((127.5,) * 3, (127.5,) * 3),
    ),
}


def subject_of(name: str, weights: Path, flowers: str) -> tuple[Subject, Any]:
    """A network with the photographs, and those of the test; its own answers are the labels.

    It was trained on none of them, so the more judge it, and the fewer place its ranges.
    """
    file, args, (mean, std) = NETS[name]
    net = build(spec_of(name, **args)).eval()
    take(net, read_weights(weights / f"{file}.safetensors"))
    preprocess = Preprocess((args["size"],) * 2, 3, mean, std)
    splits = prepare(open_source(flowers), [args["size"]])
    classes = tuple(map(str, range(1000)))

    def named(data: Any) -> Any:
        return replace(data, labels=logits(net, data, preprocess).argmax(1).numpy(), classes=classes)

    clean = splits.test.subset(np.flatnonzero(~splits.leaked))
    return Subject(Task(net, preprocess, classes), named(splits.validation), named(splits.train)), named(clean)


def exported(subject: Subject, names: Sequence[str], seconds: float) -> list[Outcome]:
    """Each engine's file in both precisions: the fastest that keeps enough of the answers, else the nearest."""
    found = []
    forms = subject.forms(subject.repaired(seconds, limit=1 - KEPT))
    for outcome in outcomes(subject, names, forms, tolerance=1 - KEPT, say=say):
        say(f"{outcome.told}{'' if outcome.proven else ' (too few)'}")
        found += [outcome] if outcome.exported else []
    return found


def say(text: str) -> None:
    """Beside the table."""
    print(text, file=sys.stderr, flush=True)


def tested(outcome: Outcome, test: Any, true: np.ndarray) -> float:
    """The share of the float network's answers that a file gives on the test photographs."""
    assert outcome.exported is not None
    run = engines()[outcome.engine].start(outcome.exported, 2)
    return float((answers(run, test, outcome.exported.preprocess).argmax(1) == true).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("flowers")
    parser.add_argument("weights", type=Path)
    parser.add_argument("--nets", nargs="*", default=list(NETS))
    parser.add_argument("--engines", nargs="*")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repair", type=float, default=300.0, help="seconds for int8, half for fine-tuning")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    names = asked.engines or list(engines_for(AUTO))
    report: dict[str, Any] = {"environment": environment(asked.threads), "peaks": peaks(asked.threads), "nets": {}}
    for name in asked.nets:
        subject, test = subject_of(name, asked.weights, asked.flowers)
        found = exported(subject, names, asked.repair)
        report["nets"][name] = measured(subject, test, found, asked)
    if asked.json:
        print(json.dumps(report, indent=2))
        return
    for name, told in report["nets"].items():
        print(f"\n{name}: {told['verdict']}")
        print_table(told["rows"])


def measured(subject: Subject, test: Any, found: Sequence[Outcome], asked: argparse.Namespace) -> dict[str, Any]:
    """Two races of everything, eager and compiled PyTorch included: what the first chooses, what the second says."""
    reference = [name for name in ("pytorch", "pytorch-compiled") if name in installed()]
    entries = [Entry(each.engine, each.exported, asked.threads) for each in found if each.exported]
    entries += entries_of([as_it_is(subject)], reference, [asked.threads])
    pixels = subject.validation.batch(subject.task.preprocess.size[0], range(32))
    first = race(entries, pixels, asked.seconds, asked.rounds, (1, 8, 32), say)
    second = race(entries, pixels, asked.seconds, asked.rounds, (), say)
    shipped = min((i for i, each in enumerate(found) if each.proven), key=lambda i: first[i].p50)
    rivals = [again for again, each in zip(second, [*found, None], strict=False) if each and each.proven]
    again = [each.p50 for each in second]
    eager = len(found)
    true = logits(subject.task.net, test, subject.task.preprocess).argmax(1).numpy()
    kept = [(tested(each, test, true), each.parity.agreement) for each in found if each.parity]
    kept += [(1.0, 1.0)] * len(reference)
    macs = cost(subject.task.net).macs  # type: ignore[arg-type]
    rows = [row(*each, macs) for each in zip(first, second, kept, strict=True)]
    slower, faster = again[shipped] / min(each.p50 for each in rivals), again[eager] / again[shipped]
    verdict = (
        f"ships {found[shipped].engine} {found[shipped].format}; in the second race {slower:.3f} times the best "
        f"that keeps enough, and {faster:.2f} times as fast as eager"
    )
    return {"verdict": verdict, "slower": slower, "faster": faster, "n": len(test), "rows": rows, "macs": macs}


def row(first: Timing, second: Timing, kept: tuple[float, float], macs: int) -> dict[str, Any]:
    """Of both races."""
    if first.failed:
        return {"engine": first.engine, "precision": first.format, "failed": first.failed}
    low, high = (f"{end:.2f}" for end in first.spread)
    told = {"engine": first.engine, "precision": first.format, "p50 ms": f"{first.p50:.2f}", "rounds": f"{low}-{high}"}
    told |= {"again": f"{second.p50:.2f}", "p95": f"{first.p95:.2f}", "p99": f"{first.p99:.2f}", "n": first.n}
    told |= {"cold ms": f"{first.cold_ms:.0f}", "MB": f"{first.peak_bytes / 1e6:.0f}", "bytes": first.file_bytes}
    told |= {f"/s by {batch}": f"{rate:.0f}" for batch, rate in first.throughput.items()}
    told |= {"kept, test": f"{100 * kept[0]:.1f} %", "judged": f"{100 * kept[1]:.1f} %"}
    return told | {"GMAC/s": f"{macs / first.p50 / 1e6:.0f}"}


if __name__ == "__main__":
    main()
