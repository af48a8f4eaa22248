"""Which weights a job may start from: those in a file, those that are cached, those that can be downloaded."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from safetensors import SafetensorError, safe_open

from flyweight import data, pretrained
from flyweight.data.pack import cache_folder
from flyweight.errors import FlyweightError
from flyweight.net import Spec
from flyweight.search.budget import Budget
from flyweight.search.donor import Donor, open_donor
from flyweight.search.space import (
    LEAST_OF_OWN,
    SMALL,
    Candidate,
    adapted,
    estimate_cost,
    input_sizes,
    pretrained_size,
    screen,
)

AUTO, NONE = "auto", "none"
# What is downloaded where nothing is cached: at most so many files, together of at most so many bytes, in this share of
# the job's time.
FILES, MOST_BYTES, FETCH_SHARE = 2, 60_000_000, 0.1
FORBIDS_COMMERCE = "-nc"  # in a licence's name; such weights are only taken where somebody names the file

Judge = Callable[[Spec], bool]


@dataclass(frozen=True)
class Supply:
    """The weights to start from, and what there is to be told about them."""

    donors: tuple[Donor, ...] = ()
    notes: tuple[str, ...] = ()


def supply(asked: str | Path | None, judge: Judge, seconds: float) -> Supply:
    """What "auto", "none", a file or None (what is cached, without the network) stand for.

    Of what was not named itself only what `judge` takes. With "auto", and where nothing is cached, small files are
    downloaded within `seconds`; why there are none in the end is told. Raises UsageError, FlyweightError for a file
    that is no weights.
    """
    if asked == NONE:
        return Supply()
    if asked is not None and asked != AUTO:
        return Supply((open_donor(Path(asked)),))
    found = cached(judge)
    if asked is None or found.donors:
        return found
    fetched = fetch_smallest(judge, seconds)
    return Supply(fetched.donors, found.notes + fetched.notes)


def suits(spec: Spec, pictures: data.Source, budget: Budget) -> bool:
    """Whether weights of this network suit the pictures' size and may meet the budget, as far as exact costs tell."""
    own, native = max(spec.input[1:]), pictures.size
    if (own > SMALL) != (min(native) > SMALL) or max(native) < LEAST_OF_OWN * own:
        return False
    sizes = (*input_sizes(native), pretrained_size(spec, native))
    for form in reversed(adapted(spec, sizes, pictures.channels, len(pictures.classes))):
        candidate = Candidate("", form)
        estimate_cost(candidate)
        screen(candidate, budget)
        if candidate.status != "dropped" and not candidate.packed:
            return True
    return False


def cached(judge: Judge) -> Supply:
    """Of each published network the best weights that are there, and all files of ours; what is damaged is told."""
    files = _files()
    donors: list[Donor] = []
    notes: list[str] = []
    for path, source in [*_published(files, judge), *_own(files, judge)]:
        try:
            if source is not None:
                path = pretrained.local(source) or path  # which looks at the checksum
            donors.append(open_donor(path, source))
        except (FlyweightError, OSError) as error:
            notes.append(f"weights that are not used: {error}")
    return Supply(tuple(donors), tuple(notes))


def _files() -> dict[str, Path]:
    """The files in the folder that FLYWEIGHT_WEIGHTS names and in the cache, by name."""
    own = os.environ.get(pretrained.FOLDER)
    found: dict[str, Path] = {}
    for place in (Path(own) if own else None, cache_folder() / "weights"):
        if place and place.is_dir() and os.access(place, os.R_OK | os.X_OK):
            for path in sorted(place.iterdir()):
                found.setdefault(path.name, path)
    return found


def _published(files: dict[str, Path], judge: Judge) -> Iterator[tuple[Path, pretrained.Source | None]]:
    for entries in pretrained.table().values():
        there = (each for each in entries if each.file in files and _may_be_shipped(each))
        best = next((each for each in there if judge(each.spec())), None)
        if best:
            yield files[best.file], best


def _own(files: dict[str, Path], judge: Judge) -> Iterator[tuple[Path, pretrained.Source | None]]:
    published = {each.file for entries in pretrained.table().values() for each in entries}
    for name, path in files.items():
        if path.suffix == ".safetensors" and name not in published and _is_ours(path):
            donor = Donor(path, "")
            if judge(donor.spec()):
                yield path, None


def _is_ours(path: Path) -> bool:
    """Whether a file has a Spec in its metadata."""
    try:
        with safe_open(path, "pt") as file:
            return "spec" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _may_be_shipped(source: pretrained.Source) -> bool:
    return FORBIDS_COMMERCE not in source.licence


def fetch_smallest(judge: Judge, seconds: float) -> Supply:
    """Downloads the smallest published weights that suit, of each family one; why there are none is told."""
    anew = "every candidate starts from random weights"
    wanted = list(_smallest(judge))
    if not wanted:
        return Supply(notes=(f"no published weights suit these pictures and this budget: {anew}",))
    donors: list[Donor] = []
    faults: list[str] = []
    end = time.monotonic() + seconds
    for source in wanted:
        try:
            donors.append(open_donor(_fetched(source, end - time.monotonic()), source))
        except FlyweightError as error:
            faults.append(str(error))
    if donors:
        return Supply(tuple(donors), tuple(f"weights that are not used: {fault}" for fault in faults))
    return Supply(notes=(f"no weights are cached; {faults[0]}; {anew}",))


def _smallest(judge: Judge) -> Iterator[pretrained.Source]:
    """The smallest files first, of each family one."""
    best = [next((each for each in entries if _may_be_shipped(each)), None) for entries in pretrained.table().values()]
    families: set[str] = set()
    total = 0
    for source in sorted((each for each in best if each), key=lambda each: each.bytes):
        family = source.spec().family
        if len(families) == FILES or total + source.bytes > MOST_BYTES:
            return
        if family not in families and judge(source.spec()):
            families.add(family)
            total += source.bytes
            yield source


def _fetched(source: pretrained.Source, seconds: float) -> Path:
    """A source's file, downloaded; raises FlyweightError as soon as there is an error or the time is over.

    A thread, since neither the look-up of a server's name nor a slow line can be given up otherwise. What arrives later
    stays in the cache.
    """
    outcome: list[Path | FlyweightError] = []

    def fetch() -> None:
        try:
            outcome.append(pretrained.fetch(source))
        except FlyweightError as error:
            outcome.append(error)

    thread = Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(max(0.0, seconds))
    if not outcome:
        raise FlyweightError(f"{source.file} did not arrive from {source.host} in time")
    if isinstance(outcome[0], FlyweightError):
        raise outcome[0]
    return outcome[0]
