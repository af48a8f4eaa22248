"""Before training: which candidates can meet the budget, by exact cost and by measuring their exported graphs."""

import json
import math
import time
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F

from flyweight.compress.estimate import clustered_bytes
from flyweight.export import int8
from flyweight.export.task import Task
from flyweight.preprocess import Preprocess
from flyweight.search.budget import Budget
from flyweight.search.meter import Meter
from flyweight.search.space import Candidate, estimate_cost, screen, shortfall
from flyweight.train.platform import keep_freed_memory, precision, set_threads, usual_precision
from flyweight.units import budget_value
from flyweight.zoo import build, structure

# Enough pictures to place the ranges; these networks are untrained, and only their speed and size are wanted.
CALIBRATION = 8
LATENCY_MARGIN = 0.95


def cost_all(pool: Sequence[Candidate], budget: Budget) -> None:
    """Fills in every candidate's exact cost and drops what its cost alone rules out.

    Building takes most of the time, so networks that differ only in the input's size are built once.
    """
    for _, alike in groupby(sorted(pool, key=_structure), _structure):
        same = list(alike)
        with torch.device("meta"):
            net = structure(same[0].spec)
        for candidate in same:
            estimate_cost(candidate, net)
            screen(candidate, budget)


def _structure(candidate: Candidate) -> str:
    return json.dumps([candidate.spec.family, dict(candidate.spec.args)], sort_keys=True)


def measure(
    candidate: Candidate, classes: Sequence[str], pictures: np.ndarray, meter: Meter, most: float = math.inf
) -> None:
    """Measures size and latency of the untrained network's files: the faster of float32 and int8.

    Where neither keeps to `most` bytes, its size is estimated as what clustering and packing make of the float32 file.
    `pictures` are a few training pictures, uint8 [n, H, W, C], at the candidate's input size.
    """
    net = build(candidate.spec).eval()
    preprocess = Preprocess.of(pictures)
    form = Task(net, preprocess, tuple(classes))
    full, small = meter([form, form.quantised(int8.schemes()[0], pictures)], pictures[:1])
    candidate.size_bytes = min(full.size, small.size)
    candidate.latency_ms = min(full.ms, small.ms)
    if candidate.size_bytes > most:
        candidate.packed, candidate.latency_ms = True, full.ms
        candidate.size_bytes = clustered_bytes(net, preprocess, classes)


def training_speed(candidate: Candidate, batch_size: int) -> float:
    """Forward multiply-accumulates a second with which a candidate trains here: the better of two steps."""
    keep_freed_memory()
    set_threads()
    net = build(candidate.spec).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(batch_size, *candidate.spec.input).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(batch_size, dtype=torch.long)
    seconds = []
    with precision(net, usual_precision()):
        for _ in range(3):  # the first prepares what the others use
            start = time.perf_counter()
            F.cross_entropy(net(x).float(), labels).backward()
            seconds.append(time.perf_counter() - start)
    return candidate.macs * batch_size / min(seconds[1:])


def judge(candidate: Candidate, budget: Budget) -> None:
    """Drops a measured candidate that breaks a limit, or keeps its latency so barely that the next run may not."""
    known = candidate.measured()
    broken = budget.broken(known)
    limit = budget.limit("latency")
    if broken:
        candidate.drop(", ".join(shortfall(each.name, known[each.name], each.value) for each in broken))
    elif limit and candidate.latency_ms and candidate.latency_ms > limit.value * LATENCY_MARGIN:
        shown = budget_value("latency", candidate.latency_ms), budget_value("latency", limit.value)
        candidate.drop(f"latency {shown[0]} is too close to {shown[1]}: measurements vary by about 5 %")
