"""How fast networks train at 32 px, batch 128, beside plain PyTorch: python -m benchmarks.train_speed --json

The baseline is eager PyTorch in its default layout, float32, Adam. Each side is a process of its own, which waits while
the other measures one step; a round is one step of each. Prints a table, with --json also JSON on stdout.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.input_speed import batches
from flyweight.costs import cost
from flyweight.data import open_source, prepare
from flyweight.net import Spec
from flyweight.search.space import FROM_SCRATCH
from flyweight.train.platform import cores, faster_precision, keep_freed_memory, precision
from flyweight.train.recipe import Recipe, preprocess_for
from flyweight.zoo import build, spec_of

NETS = ("mobilenet_v1_cifar", "shufflenet_v1_g3_cifar", "squeezenet1_1", "resnet20_cifar", "resnext50_32x4d")
BATCH, SIZE, CLASSES = 128, 32, 10
WARM_UP, PEAK_SIDE, PEAK_ROUNDS = 2, 2048, 5
PASSES = 3  # one forward, two backward: by input and by weight


def spec(name: str) -> Spec:
    """A network in its form for pictures of 32 pixels, as it is trained from scratch."""
    return spec_of(name, size=SIZE, stem="cifar", num_classes=CLASSES, **FROM_SCRATCH)


def stepper(net: nn.Module, optimiser: torch.optim.Optimizer, layout: torch.memory_format) -> Callable[[], None]:
    """A training step on random pictures."""
    x = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=layout)
    labels = torch.randint(CLASSES, (BATCH,))

    def step() -> None:
        F.cross_entropy(net(x).float(), labels).backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def serve(pipe: Connection, name: str, ours: bool, threads: int) -> None:
    """A process that makes a step whenever asked, and tells the seconds; first it tells its precision."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net, mode = build(spec(name)).train(), "float32"
    if ours:
        keep_freed_memory()
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimiser: torch.optim.Optimizer = torch.optim.SGD(
            net.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=True
        )
        step = stepper(net, optimiser, torch.channels_last)
        mode = faster_precision(net, step)
    else:
        step = stepper(net, torch.optim.Adam(net.parameters(), lr=1e-3), torch.contiguous_format)
    with precision(net, mode):
        for _ in range(WARM_UP):
            step()
        pipe.send(mode)
        while pipe.recv():
            start = time.perf_counter()
            step()
            pipe.send(time.perf_counter() - start)


def measure(name: str, rounds: int, threads: int, peak: float) -> dict[str, Any]:
    """Images a second of both sides, and their ratio round by round."""
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe() for _ in range(2)]
    sides = [
        context.Process(target=serve, args=(far, name, ours, threads), daemon=True)
        for (_, far), ours in zip(ends, (True, False), strict=True)
    ]
    pipes = [near for near, _ in ends]
    modes = []
    for side, pipe in zip(sides, pipes, strict=True):  # one after the other, so that neither disturbs the other
        side.start()
        modes.append(pipe.recv())
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for pipe, found in zip(pipes, seconds, strict=True):
            pipe.send(True)
            found.append(pipe.recv())
    for side, pipe in zip(sides, pipes, strict=True):
        pipe.send(False)
        side.join()
    ratios = [baseline / ours for ours, baseline in zip(*seconds, strict=True)]
    speeds = [BATCH / statistics.median(found) for found in seconds]
    flops = 2 * PASSES * cost(spec(name)).macs
    return {
        "net": name,
        "precision": modes[0],
        "threads": threads,
        "ours": round(speeds[0], 1),
        "baseline": round(speeds[1], 1),
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "n": rounds},
        "share_of_peak": round(flops * speeds[0] / peak, 3),
    }


def matmul_peak() -> float:
    """Floating-point operations a second of a large bfloat16 product of matrices, the best of a few."""
    a, b = (torch.randn(PEAK_SIDE, PEAK_SIDE).bfloat16() for _ in range(2))
    best = float("inf")
    for _ in range(PEAK_ROUNDS):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * PEAK_SIDE**3 / best


def input_speed(data: str) -> dict[str, Any]:
    """Batches of the usual recipe on one core."""
    train = prepare(open_source(data), [SIZE]).train
    recipe = Recipe()
    return {"data": data, **batches(train, preprocess_for(recipe, train.batch(SIZE, slice(0, 2000))), recipe)}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--data", default="demo", help="small pictures, for the speed of the input")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peak, rows = matmul_peak(), []
    print(f"bfloat16 matmul: {peak / 1e9:.0f} GFLOP/s with {options.threads} thread(s)", file=sys.stderr)
    for name in options.nets.split(","):
        row = measure(name, options.rounds, options.threads, peak)
        ratio = row["ratio"]
        print(
            f"{name} ({row['precision']}): {row['ours']} images/s, baseline {row['baseline']}; {ratio['median']:.2f} "
            f"times ({ratio['min']:.2f} to {ratio['max']:.2f}, n {ratio['n']}), {row['share_of_peak']:.0%} of the peak",
            file=sys.stderr,
        )
        rows.append(row)
    found = {"rows": rows, "matmul_flops": round(peak), "input": input_speed(options.data)}
    print(f"input: {found['input']['median']:.0f} images/s on one core", file=sys.stderr)
    if options.json:
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
