"""Studies: one network varied along a few axes, every point trained under equal conditions.

The points see the same pictures, in the same order for one seed, for the same number of epochs: as many as let the
whole sweep end in its time, by each point's measured pace. Accuracy is that on the validation pictures; the test
pictures stay unseen.
"""

import json
import re
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from flyweight import __version__
from flyweight.bench.environment import environment
from flyweight.compress.precision import calibration_sample
from flyweight.data import Source, Splits, absolute, open_source, prepare
from flyweight.errors import FlyweightError, UsageError
from flyweight.job import Stopwatch, check_free, guarded, load, new_folder
from flyweight.net import Spec
from flyweight.preprocess import Preprocess
from flyweight.records import Listener, Records, decoding, seconds_spent
from flyweight.report.study import write_study
from flyweight.search.budget import parse_time
from flyweight.search.meter import DEFAULT, Here
from flyweight.search.space import FROM_SCRATCH, SMALL, Candidate, estimate_cost
from flyweight.search.survey import measure
from flyweight.ship import write_json
from flyweight.train.loop import Clock, Diverged, Trained, Training, train
from flyweight.train.platform import check_threads, cores
from flyweight.train.recipe import Recipe, recipe_for
from flyweight.training import changed
from flyweight.zoo import build, spec_of

FILE = "sweep.json"
RECIPE = {each.name for each in fields(Recipe)}
# Pictures that place the int8 ranges of untrained networks, and that give the mean and deviation of pixels.
CALIBRATION, STATISTICS = 8, 2000
# The share of the time that finding the paces may take, and the longest and shortest that one is watched, in seconds.
PACE_SHARE, PACE_LONGEST, PACE_SHORTEST = 0.05, 5.0, 0.5
# The share of the time that is planned for: paces vary.
PLANNED = 0.93
# Scorings that a training reports at most (train.loop reports no more often than each 25th of it).
MOST_SCORINGS = 25

Settings = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """What `flyweight sweep` was asked to do. `vary` and `fixed` name arguments of the network, fields of Recipe, or
    "resolution". With `epochs` there is no limit of time."""

    model: str
    source: str
    vary: Mapping[str, Sequence[Any]]
    fixed: Mapping[str, Any]
    seeds: int
    seconds: float
    epochs: float | None
    threads: int
    skip_corrupt: bool
    version: str
    command: str
    verb: str = "sweep"


@dataclass
class Point:
    """One combination of the varied values."""

    settings: Settings
    spec: Spec
    recipe: Recipe
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its varied values, as records and people name it."""
        return ", ".join(f"{key}={value}" for key, value in self.settings.items()) or self.spec.family


def sweep(
    model: str,
    data: str | Path,
    vary: Mapping[str, Sequence[Any]],
    time: str | float = "20m",
    seeds: int = 3,
    fixed: Mapping[str, Any] | None = None,
    epochs: float | None = None,
    out: str | Path | None = None,
    threads: int = 1,
    skip_corrupt: bool = False,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Trains `model` at every combination of the values in `vary`, with `seeds` seeds each, within `time` in
    all, or with `epochs` for as many epochs each, however long that takes.

    `vary` and `fixed` name arguments of the network (`squeeze_ratio`, `width`, `se` …), fields of
    `flyweight.train.recipe.Recipe` (`label_smoothing` …) or `resolution`. Returns what stands in results.json, as
    docs/studies/README.md tells. Raises UsageError for what cannot be built, before anything is trained.
    """
    check_threads(threads)
    if seeds < 1:
        raise UsageError(f"--seeds must be at least 1, not {seeds}")
    if epochs is not None and epochs <= 0:
        raise UsageError(f"--epochs must be above 0, not {epochs:g}")
    fixed = dict(fixed or {})
    _check_names(vary, fixed)
    source, seconds = absolute(data), parse_time(time)
    study = Study(model, source, dict(vary), fixed, seeds, seconds, epochs, threads, skip_corrupt, __version__, "")
    study = replace(study, command=_command(study))
    if out is not None:
        check_free(Path(out))
    _points(study)  # what cannot be built is told before a folder is made
    folder = new_folder(Path(out) if out is not None else None, f"sweep-{model}")
    write_json(folder / FILE, asdict(study))
    return _carry_out(folder, study, listener)


def resume(folder: str | Path, time: str | float | None = None, listener: Listener | None = None) -> dict[str, Any]:
    """Goes on with an interrupted sweep: finished trainings stay as they are. `time` is a new limit for all of it."""
    study = load(Path(folder) / FILE, "sweep", Study)
    if time is not None:
        study = replace(study, seconds=parse_time(time), epochs=None)
    return _carry_out(Path(folder), study, listener)


def _check_names(vary: Mapping[str, Sequence[Any]], fixed: Mapping[str, Any]) -> None:
    if not vary:
        raise UsageError("what is to be varied? --vary width=0.25,0.5,1.0")
    for name, values in vary.items():
        if name in fixed:
            raise UsageError(f"{name} is both varied and fixed: choose one")
        if len(set(map(repr, values))) < max(2, len(values)):
            raise UsageError(f"--vary {name} needs two or more different values, not {', '.join(map(str, values))}")


def _command(study: Study) -> str:
    words = ["flyweight", "sweep", study.model, study.source]
    for name, values in study.vary.items():
        words += ["--vary", f"{name}={','.join(map(_written, values))}"]
    for name, value in study.fixed.items():
        words += ["--arg", f"{name}={_written(value)}"]
    limit = ["--epochs", f"{study.epochs:g}"] if study.epochs else ["--time", f"{study.seconds:g}s"]
    words += ["--seeds", str(study.seeds), *limit, "--threads", str(study.threads)]
    return shlex.join(words + ["--skip-corrupt"] * study.skip_corrupt)


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _carry_out(folder: Path, study: Study, listener: Listener | None) -> dict[str, Any]:
    """The story of a sweep."""
    watch = Stopwatch(seconds_spent(folder))
    with guarded(folder, f"flyweight sweep --resume {shlex.quote(str(folder))}"):
        source, points = _points(study)
        sizes = sorted({point.spec.input[1] for point in points})
        splits = prepare(source, sizes, skip_corrupt=study.skip_corrupt, progress=decoding(listener))
        records, machine = Records(folder, lambda: watch.elapsed, listener), environment(study.threads)
        write_json(folder / "environment.json", machine)
        course = _Course(study, folder, splits, records, watch, machine)
        for point in points:
            course.survey(point)
        epochs = course.plan(points)
        for seed in range(study.seeds):
            for point in points:
                course.run(point, seed, epochs)
        return course.finish(points)


def _points(study: Study) -> tuple[Source, list[Point]]:
    source = open_source(study.source)
    return source, points_of(study, source.size, source.channels, len(source.classes))


def points_of(study: Study, native: tuple[int, int], channels: int, classes: int) -> list[Point]:
    """Every combination of the varied values, for pictures of `native` (height, width). Raises UsageError."""
    points = []
    for values in product(*study.vary.values()):
        settings = dict(zip(study.vary, values, strict=True))
        chosen = {**study.fixed, **settings}
        side = min(native)
        small = {"stem": "cifar"} if chosen.get("resolution", side) <= SMALL else {}
        args = {name: value for name, value in chosen.items() if name not in RECIPE and name != "resolution"}
        args = {**FROM_SCRATCH, **small, **args, "num_classes": classes, "in_chans": channels}
        usual = side if small else min(side, spec_of(study.model, **args).input[1])
        changes = {name: value for name, value in chosen.items() if name in RECIPE}
        spec = spec_of(study.model, size=int(chosen.get("resolution", usual)), **args)
        points.append(Point(settings, spec, changed(recipe_for(spec.input[1]), changes)))
    for point in points:
        _check(point)
    return points


def _check(point: Point) -> None:
    candidate = Candidate(point.name, point.spec)
    estimate_cost(candidate)
    if candidate.cost is None:
        raise UsageError(f"{point.name}: {point.spec.family} {candidate.why}")
    point.facts = {
        "params": candidate.cost.params,
        "macs": candidate.cost.macs,
        "weight_bytes": candidate.cost.weight_bytes("float32"),
    }


@dataclass
class _Course:
    """A sweep under way."""

    study: Study
    folder: Path
    splits: Splits
    records: Records
    watch: Stopwatch
    machine: dict[str, Any]
    mode: str | None = None

    def survey(self, point: Point) -> None:
        """Measures the exported graph of a point, and the pace of its training."""
        record = self.records.find("point", name=point.name)
        if record is None:
            self.records.progress(f"measuring {point.name}", 0.0)
            candidate, train_split = Candidate(point.name, point.spec), self.splits.train
            pictures = self._sample(point, CALIBRATION)
            measure(candidate, train_split.classes, pictures, Here((DEFAULT,), self.study.threads))
            facts = {**point.facts, "file_bytes": candidate.size_bytes, "latency_ms": candidate.latency_ms}
            record = self.records.write(
                "point", name=point.name, settings=point.settings, spec=point.spec.to_json(), **facts
            )
        point.facts = {key: record[key] for key in (*point.facts, "file_bytes", "latency_ms")}

    def plan(self, points: Sequence[Point]) -> float:
        """The epochs of every training: as many as let the sweep end in its time."""
        record = self.records.find("plan")
        if record is not None:
            self.mode = record["mode"]
            return record["epochs"]
        self.mode = self._first_mode(points)
        epochs = self.study.epochs or self._affordable(points)
        self.records.write("plan", epochs=epochs, mode=self.mode)
        count = len(points) * self.study.seeds
        self.records.say(f"{count} trainings of {epochs:.3g} epochs each, all computed in {self.mode}")
        return epochs

    def _first_mode(self, points: Sequence[Point]) -> str | None:
        """The precision that is fastest for the first point, in which all are trained."""
        job = self._training(points[0], 0, Clock(seconds=PACE_SHORTEST), None)
        self._trained(points[0], job)
        return job.mode

    def _affordable(self, points: Sequence[Point]) -> float:
        watched = min(PACE_LONGEST, max(PACE_SHORTEST, PACE_SHARE * self.study.seconds / len(points)))
        for point in points:
            if self._paced(point) is None:
                self._pace(point, watched)
        paces = [pace for pace in map(self._paced, points) if pace]
        return affordable_epochs(paces, self.study.seeds, PLANNED * self.study.seconds - self.watch.elapsed)

    def _pace(self, point: Point, seconds: float) -> None:
        """Watches a short training, whose result is thrown away."""
        began = time.perf_counter()
        trained = self._trained(point, self._training(point, 0, Clock(seconds=seconds), self.mode))
        wall = time.perf_counter() - began
        if trained:
            epoch_seconds = trained.seconds / max(trained.epochs, 1e-9)
            scoring = max(0.0, wall - trained.seconds)
            self.records.write("pace", name=point.name, epoch_seconds=epoch_seconds, scoring_seconds=scoring)

    def _paced(self, point: Point) -> dict[str, Any] | None:
        return self.records.find("pace", name=point.name)

    def run(self, point: Point, seed: int, epochs: float) -> None:
        """One training, unless it was finished before or the time does not suffice."""
        if self.records.find("run", name=point.name, seed=seed) is not None:
            return
        pace = self._paced(point)
        needed = training_seconds(pace, epochs) if pace else 0.0
        if not self.study.epochs and self.watch.elapsed + needed > self.study.seconds * (2 - PLANNED):
            self.records.write("skipped", name=point.name, seed=seed, seconds=round(needed, 1))
            return
        job = self._training(point, seed, Clock(epochs=epochs), self.mode)
        state = self.folder / "state"
        job.checkpoint = state / f"{_file_name(point.name)}-{seed}.safetensors"  # of this training, and of no other
        trained = self._trained(point, job)
        figures = ("accuracy", "loss", "steps", "seconds")
        values = {key: getattr(trained, key) if trained else None for key in figures}
        self.records.write("run", name=point.name, seed=seed, val_top1=values.pop("accuracy"), **values)
        shutil.rmtree(state, ignore_errors=True)

    def _trained(self, point: Point, job: Training) -> Trained | None:
        try:
            return train(job)
        except Diverged as error:
            self.records.say(f"{point.name}: {error}")
            return None

    def _training(self, point: Point, seed: int, clock: Clock, mode: str | None) -> Training:
        torch.manual_seed(seed)
        net, preprocess = build(point.spec), Preprocess.of(self._sample(point, STATISTICS))

        def progress(share: float) -> None:
            self.records.progress(f"{point.name}, seed {seed}", share)

        return Training(
            net=net,
            data=self.splits.train,
            validation=self.splits.validation,
            preprocess=preprocess,
            recipe=point.recipe,
            clock=clock,
            seed=seed,
            progress=progress,
            note=self.records.say,
            mode=mode,
        )

    def _sample(self, point: Point, count: int) -> Any:
        train_split = self.splits.train
        return train_split.batch(point.spec.input[1], calibration_sample(len(train_split), 0, count))

    def finish(self, points: Sequence[Point]) -> dict[str, Any]:
        """Writes what came of it; tells what is missing."""
        study, folder, records = self.study, self.folder, self.records
        plan = records.find("plan")
        assert plan is not None
        rows = [_row(point, [run for run in records.all("run") if run["name"] == point.name]) for point in points]
        count = len(points) * study.seeds
        missing = count - sum(row["n"] + row["diverged"] for row in rows)
        result = {
            **asdict(study),
            "planned": plan["epochs"],
            "precision": plan["mode"],
            "train": len(self.splits.train),
            "validation": len(self.splits.validation),
            "processor": self.machine["processor"],
            "cores": cores(),
            "seconds": round(self.watch.elapsed, 1),
            "missing": missing,
            "points": rows,
        }
        write_json(folder / "results.json", result)
        write_study(folder, result)
        shutil.rmtree(folder / "state", ignore_errors=True)
        if missing:
            raise FlyweightError(
                f"the time ended before {missing} of {count} trainings: the machine was slower than when it was "
                f"measured. What is finished stands in {folder}; the rest: flyweight sweep --resume "
                f"{shlex.quote(str(folder))} --time with more than {study.seconds:g}s"
            )
        return {**result, "folder": str(folder)}


def _file_name(name: str) -> str:
    return re.sub("[^A-Za-z0-9.=]+", "-", name)


def training_seconds(pace: Mapping[str, Any], epochs: float) -> float:
    """How long a training takes at this pace, scorings of the validation pictures included."""
    return epochs * pace["epoch_seconds"] + min(MOST_SCORINGS, 1 + epochs) * pace["scoring_seconds"]


def affordable_epochs(paces: Sequence[Mapping[str, Any]], seeds: int, seconds: float) -> float:
    """The most epochs, to three digits, that trainings at these paces can have in `seconds`. Raises UsageError."""
    low, high = 0.0, 1e5
    for _ in range(60):
        middle = (low + high) / 2
        needed = seeds * sum(training_seconds(pace, middle) for pace in paces)
        low, high = (middle, high) if needed <= seconds else (low, middle)
    epochs = float(f"{low:.3g}")
    if not paces or epochs < 0.01:
        raise UsageError("the time does not suffice for a hundredth of an epoch of each training: raise --time")
    return epochs


def _row(point: Point, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A point with the accuracies of its trainings, by seed; those that diverged have none."""
    scores = [run["val_top1"] for run in sorted(runs, key=lambda run: run["seed"]) if run["val_top1"] is not None]
    spread = {"val_top1": mean(scores), "lowest": min(scores), "highest": max(scores)} if scores else {}
    empty = {"val_top1": None, "lowest": None, "highest": None}
    counts = {"n": len(scores), "diverged": len(runs) - len(scores), "each": scores}
    return {"name": point.name, "settings": point.settings, **point.facts, **empty, **spread, **counts}
