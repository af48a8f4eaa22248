"""A trained network for many runtimes: no file leaves that has not shown, in its own runtime, the network's answers."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flyweight.bench.engines import engines, lacking, precision, read_export
from flyweight.bench.race import Entry, Runner
from flyweight.compress.precision import CLOSE, NOTABLY
from flyweight.compress.repair import Attempt, Repair, Repaired, repair
from flyweight.compress.step import Context, repair_recipe
from flyweight.data import Dataset, open_source, prepare
from flyweight.errors import FlyweightError, ParityError, UsageError
from flyweight.export.targets import Target, target, targets
from flyweight.export.task import Int8, Task
from flyweight.export.verify import Parity, answers, gate, temperature
from flyweight.exported import FLOAT, Exported
from flyweight.job import FILE, check_free
from flyweight.net import Net
from flyweight.preprocess import Preprocess
from flyweight.records import Listener, decoding
from flyweight.ship import write_json
from flyweight.train.loop import logits
from flyweight.train.platform import cores
from flyweight.units import percent
from flyweight.weights import load_net, load_preprocess, read_tensors

INT8 = "int8"
FORMATS = (FLOAT, INT8)
# Of the int8 forms, how many an engine tries: its kernels round otherwise than those they were made for, and are fast
# for others.
FORMS = 3
PROBE_SECONDS = 0.1  # of measuring each
REPAIR_SECONDS = 60.0  # for an int8 that holds
MOST_SAID = 300  # characters of what a converter says
Say = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """A trained network in float32, and the pictures that place its int8 ranges and judge what is made of it."""

    task: Task
    train: Dataset
    validation: Dataset
    seed: int = 0

    @cached_property
    def reference(self) -> np.ndarray:
        """The network's own probabilities [N, classes] of the validation pictures."""
        outputs = logits(self.task.net, self.validation, self.task.preprocess)
        return torch.softmax(outputs / self.task.temperature, 1).numpy()

    def repaired(self, seconds: float, limit: float = CLOSE) -> Repaired:
        """Its int8 forms as ONNX files, repaired for so many seconds where they lose more than `limit` of accuracy.

        Half of that is for the fine-tuning. Of few pictures one wrong is no loss to speak of.
        """
        preprocess, recipe = self.task.preprocess, repair_recipe(self.task.preprocess.size[0])
        context = Context(self.train, self.validation, preprocess, recipe, seed=self.seed, threads=cores())
        settings = Repair(
            limit=max(limit, 1 / len(self.validation)),
            seconds=seconds / 2,
            fine_tune=seconds / 2,
            temperature=self.task.temperature,
        )
        return repair(self.task.net, context, settings)

    def forms(self, found: Repaired) -> dict[str, list[Task]]:
        """By precision, its forms for any engine.

        Of int8 what ships for ONNX Runtime, the nearest of signed and of unsigned activations, then those next to it.
        """
        ways = sorted((each for each in found.attempts if each.way), key=lambda each: each.divergence)
        ways.sort(key=lambda each: each is not found.chosen)
        first = {each.way.scheme.signed: each for each in reversed(ways) if each.way}
        picked = [each for each in ways if each in (found.chosen, *first.values())]
        picked += [each for each in ways if each not in picked]
        return {FLOAT: [self.task], INT8: [self._form(each) for each in picked[:FORMS]]}

    def made(self, formats: Sequence[str], seconds: float, say: "Say") -> dict[str, list[Task]]:
        """Its forms in the precisions that are asked for; int8 may be repaired for so many seconds."""
        if INT8 not in formats:
            return {FLOAT: [self.task]}
        say("quantising")
        return {format: tasks for format, tasks in self.forms(self.repaired(seconds)).items() if format in formats}

    def _form(self, attempt: Attempt) -> Task:
        way = attempt.way
        assert way is not None
        how = Int8(way.scheme, way.ranges, way.form.pictures, way.kept, attempt.name)
        return replace(self.task, net=way.form.net, int8=how)


def open_subject(path: Path, data: str | None = None, listener: Listener | None = None) -> Subject:
    """The network of a run's folder, or of a model.safetensors with `data`, and its pictures.

    Pictures of other classes than the network's judge it by its own answers. Raises UsageError where network or
    pictures are not there.
    """
    weights = path / "model.safetensors" if path.is_dir() else path
    if weights.suffix != ".safetensors" or not weights.is_file():
        raise UsageError(f"{path} is neither a run's folder with a model.safetensors nor such a file")
    net, preprocess = load_net(weights), load_preprocess(weights)
    job = _job(weights.with_name(FILE), data)
    source = open_source(job["source"])
    if source.channels != preprocess.channels:
        raise UsageError(f"{job['source']} has {source.channels} channels and {weights} takes {preprocess.channels}")
    told, skip = decoding(listener), job["skip_corrupt"]
    splits = prepare(source, [preprocess.size[0]], seed=job["seed"], skip_corrupt=skip, progress=told)
    classes = _classes(weights, net)
    train, validation = splits.train, splits.validation
    if tuple(source.classes) != classes:
        train, validation = (_named_by(net, each, preprocess, classes) for each in (train, validation))
    degree = temperature(logits(net, validation, preprocess).numpy(), validation.labels)
    return Subject(Task(net, preprocess, classes, degree), train, validation, job["seed"])


def _job(file: Path, data: str | None) -> dict[str, Any]:
    """Which pictures, and how they were split."""
    job: dict[str, Any] = {"seed": 0, "skip_corrupt": False}
    if file.is_file():
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            job |= {key: told[key] for key in ("source", *job) if key in told}
        except (ValueError, TypeError) as error:
            raise FlyweightError(f"{file} is damaged: {error}") from error
    if data is not None:
        job["source"] = data
    if "source" not in job:
        raise UsageError(f"which pictures is it to be judged by? There is no {file}, so name them: --data DATA")
    return job


def _classes(weights: Path, net: Net) -> tuple[str, ...]:
    """As the file names them, or the config.json beside it, or else by number."""
    metadata, config = read_tensors(weights)[1], weights.with_name("config.json")
    if "classes" in metadata:
        return tuple(json.loads(metadata["classes"]))
    if config.is_file():
        return tuple(json.loads(config.read_text(encoding="utf-8"))["label_names"])
    return tuple(map(str, range(net.num_classes)))


def _named_by(net: Net, data: Dataset, preprocess: Preprocess, classes: tuple[str, ...]) -> Dataset:
    """The pictures with the network's own answers for labels."""
    return replace(data, labels=logits(net, data, preprocess).argmax(1).numpy(), classes=classes)


@dataclass(frozen=True)
class Outcome:
    """What became of a file for one engine; `exported` is None where it could not be made, as `failed` says.

    `ms` is a first measurement of one picture.
    """

    target: str
    engine: str
    format: str
    seconds: float
    exported: Exported | None = None
    parity: Parity | None = None
    ms: float = float("inf")
    failed: str = ""

    @property
    def proven(self) -> bool:
        """Whether it answers as the network does."""
        return self.parity is not None and self.parity.passed

    @property
    def told(self) -> str:
        """In a sentence."""
        if self.parity is None:
            return f"{self.target}, {self.format}: {self.failed}"
        lost = 100 * (self.parity.pytorch_top1 - self.parity.exported_top1)
        return (
            f"{self.target}, {self.format}: {percent(self.parity.agreement)} of the network's answers in "
            f"{self.engine}, {-lost:+.2f} points"
        )

    def to_json(self) -> dict[str, Any]:
        """As in export.json."""
        parity = None if self.parity is None else self.parity.to_json()
        files = {} if self.exported is None else {name: len(data) for name, data in self.exported.files.items()}
        about = {"target": self.target, "engine": self.engine, "format": self.format, "proven": self.proven}
        return about | {"files": files, "seconds": round(self.seconds, 2), "parity": parity, "failed": self.failed}


def prove(engine: str, tasks: Sequence[Task], subject: Subject, tolerance: float | None = None) -> Outcome:
    """Of several forms of a network the fastest that answers in an engine as the network does; else the nearest.

    Of several about as fast it is the first.
    """
    tried = tasks if target(engines()[engine].TARGET).QUICK else tasks[:1]
    found = [_proof(engine, task, subject, tolerance) for task in tried]
    proven = [each for each in found if each.proven]
    if not proven:
        return max(found, key=_agreement)
    bar = min(each.ms for each in proven)
    return next(each for each in proven if NOTABLY * each.ms <= bar)


def _agreement(outcome: Outcome) -> float:
    return -1.0 if outcome.parity is None else outcome.parity.agreement


def _proof(engine: str, task: Task, subject: Subject, tolerance: float | None) -> Outcome:
    start, to = time.perf_counter(), target(engines()[engine].TARGET)

    def outcome(**values: Any) -> Outcome:
        return Outcome(to.NAME, engine, task.format, time.perf_counter() - start, **values)

    try:
        exported = to.export(task)
        with tempfile.TemporaryDirectory() as folder, Runner(Entry(engine, exported, cores()), Path(folder)) as run:
            stated = read_export(run.path).preprocess  # what a reader of the written files will do to his pictures
            found = answers(run, subject.validation, stated)
            first = subject.validation.batch(task.preprocess.size[0], [0])
            ms = float(np.median(run.timed(first, PROBE_SECONDS)["ms"]))
    except UsageError:
        raise
    except Exception as error:  # converters raise their own classes, and often at length
        return outcome(failed=" ".join(str(error).split())[:MOST_SAID] or type(error).__name__)
    exact = precision(engine, task.format) == FLOAT
    parity = gate(subject.reference, found, subject.validation, exact, tolerance)
    return outcome(exported=exported, parity=parity, ms=ms)


def usable(names: Sequence[str]) -> list[Target]:
    """The targets of these names, or all that can be used here. Raises UsageError for one that cannot."""
    if not names:
        return [each for each in targets().values() if _lack(each) is None]
    for each in map(target, names):
        if reason := _lack(each):
            raise UsageError(f"{each.NAME} cannot be exported: {reason}")
    return [target(name) for name in names]


def _lack(to: Target) -> str | None:
    """The parity gate needs the runtime as much as the converter."""
    return lacking(to) or lacking(engines()[to.ENGINE])


def outcomes(
    subject: Subject,
    names: Sequence[str],
    forms: Mapping[str, Sequence[Task]],
    tolerance: float | None = None,
    say: Say = print,
) -> Iterator[Outcome]:
    """A file for each engine in each precision, proven or not, as they come."""
    for name in names:
        for format, tasks in forms.items():
            if format == FLOAT or target(engines()[name].TARGET).INT8:
                say(f"exporting for {name}, {format}")
                yield prove(name, tasks, subject, tolerance)


def export_run(
    path: Path,
    to: Sequence[str] = (),
    formats: Sequence[str] = FORMATS,
    out: Path | None = None,
    data: str | None = None,
    tolerance: float | None = None,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Exports a run's network to targets (all that can be used here, where none is named); what stands in export.json.

    Each proven file stands in a folder of its own in `out` (default: the run's `exports`). Raises UsageError for a
    target that cannot be used, ParityError where a file does not answer as the network does: such files are not left.
    """
    chosen = usable(to)
    if unknown := set(formats) - {*FORMATS}:
        raise UsageError(f"there is no precision {min(unknown)!r}; there are {', '.join(FORMATS)}")
    folder = out or (path if path.is_dir() else path.parent) / "exports"
    check_free(folder)
    say = teller(listener)
    subject = open_subject(path, data, listener)
    found: list[Outcome] = []
    forms = subject.made(formats, REPAIR_SECONDS, say)
    for outcome in outcomes(subject, [each.ENGINE for each in chosen], forms, tolerance, say):
        say(outcome.told)
        found.append(outcome)
        if outcome.proven:
            assert outcome.exported is not None
            outcome.exported.written(folder / place(outcome))
    summary = {"run": str(path), "folder": str(folder), "n": len(subject.validation)}
    summary |= {"exports": [{**each.to_json(), "place": place(each) if each.proven else None} for each in found]}
    if any(each.proven for each in found):
        write_json(folder / "export.json", summary)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    if wrong := [each for each in found if not each.proven]:
        raise ParityError(_told(wrong, subject))
    return summary


def place(outcome: Outcome) -> str:
    """The name of an export's folder."""
    return outcome.target if outcome.format == FLOAT else f"{outcome.target}-{INT8}"


def _told(wrong: Sequence[Outcome], subject: Subject) -> str:
    """What did not answer as the network does, with the worst example."""
    lines = []
    for each in wrong:
        if each.parity is None or each.parity.worst is None:
            lines.append(each.told)
            continue
        worst, classes = each.parity.worst, subject.task.classes
        lines.append(
            f"{each.told}; most on {worst['name']}, {classes[worst['trained']]} to the network and "
            f"{classes[worst['exported']]} to the file"
        )
    return "not exported, since the answers differ too much: " + "; ".join(lines)


def teller(listener: Listener | None) -> Say:
    """Tells a listener in sentences."""
    return lambda text: listener({"kind": "log", "message": text}) if listener else None
