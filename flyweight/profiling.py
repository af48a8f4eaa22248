"""`flyweight profile`: this machine's latency table over the zoo's kernels, and its error on networks left out."""

import math
import platform
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flyweight.bench.engines import engine
from flyweight.bench.environment import environment
from flyweight.bench.kernels import Kernel, kernels
from flyweight.bench.profile import FORMATS, ROUNDS, Meter, Part, Table, covering, profile
from flyweight.costs import cost
from flyweight.data.cache import cache_folder
from flyweight.errors import UsageError
from flyweight.export.targets import target
from flyweight.export.task import Task
from flyweight.exported import FLOAT
from flyweight.graph import GraphError, trace
from flyweight.net import Spec
from flyweight.preprocess import Preprocess
from flyweight.search.budget import parse_time
from flyweight.search.meter import AUTO, engines_for, quick
from flyweight.search.space import PHOTO_SIZES, candidates
from flyweight.zoo import build, list_models, structure, usual_spec

SMALL_SIZES = (24, 32)
CHANNELS, CLASSES = 3, 10
MOST_MACS = 4e9  # of a network that is measured as a whole
FACTOR_NETS, CHECK_NETS, SAMPLED = 24, 40, 400  # whole networks; networks whose kernels are sampled
MOST_KERNELS = 4000


@dataclass(frozen=True)
class Request:
    """What to measure: every engine in every format that it has on every number of threads, for so many seconds each.

    Without engines those that are installed and whose files are written in milliseconds.
    """

    engines: tuple[str, ...]
    formats: tuple[str, ...]
    threads: tuple[int, ...]
    seconds: float
    check: int = 0
    """How many networks that are left out of the table to measure, and to compare with what it says of them."""

    def meters(self) -> list[Meter]:
        """Raises UsageError for a format that there is not."""
        for name in self.formats:
            if name not in FORMATS:
                raise UsageError(f"there is no format {name!r} to profile; there are {', '.join(FORMATS)}")
        chosen = [engine(name) for name in self.engines or quick(engines_for(AUTO))]
        return [
            Meter(each.NAME, format, threads)
            for each in chosen
            for format in self.formats
            for threads in self.threads
            if format == FLOAT or target(each.TARGET).INT8
        ]


def read_request(engines: str, formats: str, threads: str, time: str, check: int) -> Request:
    """From what stands on a command line, commas between names. Raises UsageError."""
    numbers = _listed(threads)
    if not numbers or not all(each.isdecimal() and int(each) for each in numbers):
        raise UsageError(f"--threads takes numbers of cores with commas between them, not {threads!r}")
    return Request(_listed(engines), _listed(formats), tuple(map(int, numbers)), parse_time(time), check)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(each.strip() for each in text.split(",") if each.strip())


@dataclass(frozen=True)
class Checked:
    """A network that the table was made without: what it foretells and what was measured, in milliseconds."""

    name: str
    engine: str
    format: str
    threads: int
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.predicted / self.measured - 1


def default_path() -> Path:
    """profile-<machine>.json in the cache folder."""
    return cache_folder() / f"profile-{re.sub(r'[^A-Za-z0-9]+', '-', platform.node()).lower() or 'machine'}.json"


def profile_machine(request: Request, progress: Callable[[Mapping[str, Any]], None]) -> tuple[Table, list[Checked]]:
    """The table, and what became of the networks that are to be checked."""
    factor_nets, check_nets, rest = _divided(_pool(), request.check)
    order = covering(shares(rest), MOST_KERNELS)
    parts: list[Part] = []
    checked: list[Checked] = []
    for i, meter in enumerate(meters := request.meters()):

        def heard(share: float, i: int = i) -> None:
            progress({"kind": "progress", "stage": "profile", "share": (i + share) / len(meters)})

        part = profile(meter, order, [task(spec) for spec in factor_nets], request.seconds, heard)
        parts.append(part)
        checked += check(meter, part, check_nets)
    about = environment(max(request.threads))
    del about["threads"]  # which the parts say
    return Table(about, tuple(parts)), checked


def check(meter: Meter, part: Part, specs: Sequence[Spec]) -> list[Checked]:
    """Networks measured as wholes, beside what a part of a table says of them."""
    tasks = [task(spec) for spec in specs]
    whole = meter.nets(tasks)
    for _ in range(ROUNDS):
        whole.round()
    predicted = [part.predict(kernels(each.graph)) for each in tasks]
    rows = zip(map(named, specs), predicted, whole.ms(), strict=True)
    return [Checked(name, *part.key, *both) for name, *both in rows]


def summary(checked: Sequence[Checked]) -> list[dict[str, Any]]:
    """For each engine, format and number of threads: how many networks, the median and 90th percentile of |error|."""

    def key(each: Checked) -> tuple[str, str, int]:
        return each.engine, each.format, each.threads

    rows = []
    for part, own in groupby(sorted(checked, key=key), key):
        errors = [abs(each.error) for each in own]
        median, most = (round(float(each), 4) for each in np.quantile(errors, (0.5, 0.9)))
        told = dict(zip(("engine", "format", "threads"), part, strict=True))
        rows.append({**told, "n": len(errors), "median": median, "p90": most})
    return rows


def task(spec: Spec) -> Task:
    """A network as it is exported, its weights random."""
    channels, height, width = spec.input
    preprocess = Preprocess((height, width), channels, (127.0,) * channels, (64.0,) * channels)
    return Task(build(spec).eval(), preprocess, tuple(map(str, range(CLASSES))))


def named(spec: Spec) -> str:
    """A network's family, its arguments and the side of its pictures."""
    told = [f"{name}={value}" for name, value in spec.args.items() if name not in ("num_classes", "in_chans", "norm")]
    return " ".join([spec.family, *told, f"@{spec.input[1]}"])


def shares(specs: Iterable[Spec]) -> dict[Kernel, float]:
    """The kernels of networks, and the share of a network's effort that they have, summed over the networks."""
    found: dict[Kernel, float] = defaultdict(float)
    for spec in specs:
        with torch.device("meta"):
            net = structure(spec).eval()
        own = kernels(trace(net, spec.input))
        total = sum(kernel.effort for kernel in own)
        for kernel in own:
            found[kernel] += kernel.effort / total
    return found


def _pool() -> list[Spec]:
    """Every candidate of the search at every size, and every model at its usual one, in an order drawn by lot."""
    sizes = [*SMALL_SIZES, *PHOTO_SIZES]
    specs = [each.spec for each in candidates(sizes, CHANNELS, CLASSES)] + [usual_spec(name) for name in list_models()]
    return [specs[i] for i in np.random.default_rng(0).permutation(len(specs))]


def _divided(pool: Sequence[Spec], checked: int) -> tuple[list[Spec], list[Spec], list[Spec]]:
    """Networks for the factors, the check and the kernels: of the first two each family has its share."""
    queues: dict[str, list[Spec]] = {}
    for spec in pool:
        queues.setdefault(spec.family, []).append(spec)
    turns = (spec for row in zip_longest(*queues.values()) for spec in row if spec is not None)
    whole = [*islice(filter(partial(_takes, most_macs=MOST_MACS), turns), FACTOR_NETS + checked)]
    rest = (spec for spec in pool if spec not in whole)
    return whole[:FACTOR_NETS], whole[FACTOR_NETS:], [*islice(filter(_takes, rest), SAMPLED)]


def _takes(spec: Spec, most_macs: float = math.inf) -> bool:
    """Whether the network can take pictures of its size, and needs no more than these multiply-accumulates."""
    try:
        return cost(spec).macs <= most_macs
    except GraphError:
        return False
