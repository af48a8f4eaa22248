"""Files and networks measured in every runtime that is here: `flyweight bench`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flyweight.bench.card import FILE as CARD
from flyweight.bench.card import card
from flyweight.bench.engines import engine, engines, installed, opening, read_export
from flyweight.bench.environment import environment
from flyweight.bench.peak import peaks
from flyweight.bench.race import Entry, Timing, race
from flyweight.costs import cost
from flyweight.errors import FlyweightError, UsageError
from flyweight.export.targets import targets
from flyweight.exported import FLOAT, Exported
from flyweight.exporting import FORMATS, REPAIR_SECONDS, Outcome, Say, Subject, open_subject, outcomes, teller, usable
from flyweight.net import Net
from flyweight.records import Listener
from flyweight.search.meter import BROWSER
from flyweight.ship import write_json
from flyweight.train.platform import check_threads
from flyweight.weights import net_bytes

PYTORCH = "pytorch"


@dataclass(frozen=True)
class Request:
    """What `flyweight bench` is asked: which engines (all that are here, where none is named), on how many cores.

    Each file is measured for `seconds` in `rounds` by turns, and then with each of `batches` pictures at once. `data`
    are pictures for a network that has no run's.
    """

    engines: tuple[str, ...] = ()
    threads: tuple[int, ...] = (1,)
    seconds: float = 1.0
    rounds: int = 5
    batches: tuple[int, ...] = ()
    data: str | None = None

    def chosen(self) -> list[str]:
        """The names of the engines. Raises UsageError for one that cannot be used."""
        for threads in self.threads:
            check_threads(threads)
        return [engine(name).NAME for name in self.engines] or [name for name in installed() if name != BROWSER]


def bench(paths: Sequence[Path], request: Request, listener: Listener | None = None) -> list[dict[str, Any]]:
    """The card of each path: a run's folder or a model.safetensors in every form, or an exported file as it is.

    A run's card is also written into its folder. Raises UsageError for what cannot be measured.
    """
    chosen, found = request.chosen(), []
    for path in paths:
        if path.is_dir() or path.suffix == ".safetensors":
            found.append(_network(path, chosen, request, listener))
        else:
            found.append(_file(path, chosen, request, listener))
    return found


def _network(path: Path, chosen: Sequence[str], request: Request, listener: Listener | None) -> dict[str, Any]:
    subject, say = open_subject(path, request.data, listener), teller(listener)
    wanted = [name for name in chosen if name != BROWSER and engines()[name].TARGET in targets()]
    usable([engines()[name].TARGET for name in wanted])
    proven: list[Outcome] = []
    for outcome in outcomes(subject, wanted, subject.made(FORMATS, REPAIR_SECONDS, say), say=say):
        say(outcome.told)
        proven += [outcome] if outcome.proven else []
    timings = race_of(subject, proven, chosen, request, say)
    assert isinstance(subject.task.net, Net)
    made = card(cost(subject.task.net), timings, {threads: peaks(threads) for threads in request.threads})
    made = {"model": str(path), "environment": environment(request.threads[0]), **made}
    agreement = {(each.engine, each.format): each.parity.agreement for each in proven if each.parity}
    for row in made["engines"]:
        row["agreement"] = agreement.get((row["engine"], row["format"]), 1.0)
    if path.is_dir():
        write_json(path / CARD, made)
    return made


def race_of(
    subject: Subject, proven: Sequence[Outcome], chosen: Sequence[str], request: Request, say: Say
) -> list[Timing]:
    """All proven files of a network, each in its engine, and the network itself in those of PyTorch."""
    pairs = [(each.engine, each.exported) for each in proven if each.exported]
    entries = [Entry(*pair, count) for pair in pairs for count in request.threads]
    entries += entries_of([as_it_is(subject)], chosen, request.threads)
    pixels = subject.validation.batch(subject.task.preprocess.size[0], range(min(32, len(subject.validation))))
    return race(entries, pixels, request.seconds, request.rounds, request.batches, say)


def as_it_is(subject: Subject) -> Exported:
    """The network for PyTorch, from its tensors."""
    task, net = subject.task, subject.task.net
    assert isinstance(net, Net)
    files = {"model.safetensors": net_bytes(net, task.preprocess, task.classes)}
    return Exported(PYTORCH, FLOAT, files, task.preprocess, task.classes)


def entries_of(files: Sequence[Exported], chosen: Sequence[str], threads: Sequence[int]) -> list[Entry]:
    """Each file in the engines that run its target's files."""
    pairs = [(name, each) for name in chosen for each in files if each.target == engines()[name].TARGET]
    return [Entry(name, each, count) for name, each in pairs for count in threads]


def _file(path: Path, chosen: Sequence[str], request: Request, listener: Listener | None) -> dict[str, Any]:
    """An exported file in all the chosen engines that open it, with grey pictures, since it knows no others."""
    openers = [name for name in opening(path) if name in chosen]
    if not openers:
        raise UsageError(f"none of the engines {', '.join(chosen)} opens {path}: {', '.join(opening(path))} would")
    exported = read_export(path)
    height, width = exported.preprocess.size
    pixels = np.full((1, height, width, exported.preprocess.channels), 127, np.uint8)
    entries = [Entry(name, exported, count) for name in openers for count in request.threads]
    timings = race(entries, pixels, request.seconds, request.rounds, request.batches, teller(listener))
    if all(each.failed for each in timings):
        raise FlyweightError(f"{path} cannot be measured: {timings[0].failed}")
    rows = [each.to_json() for each in timings]
    return {"model": str(path), "environment": environment(request.threads[0]), "engines": rows}
