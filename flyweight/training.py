"""One network trained on labelled pictures, in one process or, under torchrun, in several."""

import json
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flyweight import __version__
from flyweight.bench.environment import environment
from flyweight.compress.precision import calibration_sample
from flyweight.costs import cost
from flyweight.data import Dataset, Source, Splits, absolute, open_source, prepare
from flyweight.errors import FlyweightError, UsageError
from flyweight.job import FILE, Stopwatch, check_free, guarded, load, new_folder
from flyweight.net import Net, Spec
from flyweight.preprocess import Preprocess
from flyweight.pretrained import choose, fetch
from flyweight.records import Listener, Records, decoding, seconds_spent
from flyweight.search.budget import parse_time
from flyweight.search.donor import Donor, find_donor, open_donor
from flyweight.ship import write_json, write_network
from flyweight.shipping import top1
from flyweight.stages import SCALED, STATISTICS, data_summary
from flyweight.train.device import choose_device
from flyweight.train.distributed import Group, Lost, joined
from flyweight.train.faults import is_out_of_memory
from flyweight.train.loop import Clock, Trained, Training, logits, train
from flyweight.train.platform import check_threads, cores
from flyweight.train.recipe import BASELINE_EPOCHS, Recipe, preprocess_for, recipe_named
from flyweight.zoo import build, smallest_input, spec_of

EPOCHS = 10.0  # where neither epochs nor a time are given
SCORED = 10_000  # training pictures that are scored in the end


@dataclass(frozen=True)
class Request:
    """What `flyweight train` is asked to do; `args` are the network's, `changes` the recipe's fields.

    `pretrained` is a run's folder, a model.safetensors, the name of a network, or "auto" for the best published weights
    of this one. Without `recipe` it is the default, or with weights that for fine-tuning; without `seconds` the clock
    counts `epochs`.
    """

    source: str
    model: str
    args: Mapping[str, Any] = field(default_factory=dict)
    resolution: int | None = None
    epochs: float | None = None
    seconds: float | None = None
    recipe: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    threads: int | None = None
    pretrained: str | None = None
    device: str = "auto"
    sync_batchnorm: bool = False
    skip_corrupt: bool = False
    checkpoint_seconds: float = 15.0
    verb: str = "train"
    version: str = __version__


@dataclass
class _Work:
    """What the parts of one training share; only the process that writes has records."""

    folder: Path
    request: Request
    group: Group
    source: Source
    spec: Spec
    recipe: Recipe
    donor: Donor | None
    splits: Splits
    watch: Stopwatch
    records: Records | None


def train_network(request: Request, out: Path | None = None, listener: Listener | None = None) -> dict[str, Any]:
    """Trains a network and leaves it, with its scores, in a new folder; what stands in its result.json.

    Raises UsageError for what cannot be built, before anything is made; DataError where the pictures are refused.
    """
    _check(request)
    with joined() as group:
        if out is not None and group.first:
            check_free(out)
        request = replace(request, source=absolute(request.source))
        plan = _plan(request)
        splits = _splits(request, plan[0], plan[1], listener)
        folder = Path(group.from_first(str(new_folder(out, f"train-{request.model}")) if group.first else ""))
        if group.first:
            write_json(folder / FILE, asdict(request))
        return _carry_out(_Work(folder, request, group, *plan, splits, Stopwatch(), None), listener)


def resume(folder: Path, listener: Listener | None = None) -> dict[str, Any]:
    """Goes on with an interrupted training; of a finished one, its result. Raises UsageError where there is none."""
    request, spent = load(folder / FILE, "train", Request), seconds_spent(folder)
    if (folder / "result.json").exists():
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))
    with joined() as group:
        plan = _plan(request)
        splits = _splits(request, plan[0], plan[1], listener)
        return _carry_out(_Work(folder, request, group, *plan, splits, Stopwatch(spent), None), listener)


def duration(epochs: float | None, time: str | None) -> tuple[float | None, float | None]:
    """The `epochs` and `seconds` of a request. Raises UsageError where both are given or one is no duration."""
    if epochs is not None and time is not None:
        raise UsageError("--epochs and --time exclude each other: give one")
    if epochs is not None and epochs <= 0:
        raise UsageError(f"--epochs must be more than 0, not {epochs:g}")
    return epochs, None if time is None else parse_time(time)


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with some fields changed. Raises UsageError for an unknown field or a value of another kind."""
    for name, value in changes.items():
        if name not in {each.name for each in fields(Recipe)}:
            raise UsageError(f"a recipe has no {name!r}; it has {', '.join(each.name for each in fields(Recipe))}")
        kind = type(getattr(recipe, name))
        taken = {float: (int, float), tuple: (list, tuple)}.get(kind, kind)
        if not isinstance(value, taken) or isinstance(value, bool) != (kind is bool):
            raise UsageError(f"{name} of a recipe takes a {kind.__name__}, not {value!r}")
    return replace(recipe, **{name: tuple(v) if isinstance(v, list) else v for name, v in changes.items()})


def _check(request: Request) -> None:
    """What can be told before anything is opened."""
    if request.threads is not None:
        check_threads(request.threads)
    choose_device(request.device)
    spec_of(request.model)


def _plan(request: Request) -> tuple[Source, Spec, Recipe, Donor | None]:
    """The pictures, the network, the recipe and the weights to start from. Raises UsageError where they do not fit."""
    source = open_source(request.source)
    args = {**request.args, "num_classes": len(source.classes), "in_chans": source.channels}
    donor = _donor(request, args)
    if donor is not None and donor.source is not None:
        args = {**donor.source.args, **args}
    usual = spec_of(request.model, **args)
    side = request.resolution or usual.input[1]
    if request.resolution is None and usual.args.get("stem") == "cifar":
        side = min(side, max(source.size))
    spec = spec_of(request.model, size=side, **args)
    if side < smallest_input(spec):
        raise UsageError(f"{request.model} cannot take pictures of {side} pixels: --resolution {smallest_input(spec)}")
    name = request.recipe or ("default" if donor is None else "fine-tuning")
    return source, spec, changed(recipe_named(name, side), request.changes), donor


def _donor(request: Request, args: Mapping[str, Any]) -> Donor | None:
    if request.pretrained is None:
        return None
    if request.pretrained != "auto":
        return find_donor(request.pretrained)
    found = choose(request.model, **args)
    return open_donor(fetch(found), found)


def _splits(request: Request, source: Source, spec: Spec, listener: Listener | None) -> Splits:
    told, skip = decoding(listener), request.skip_corrupt
    return prepare(source, [spec.input[1]], seed=request.seed, skip_corrupt=skip, progress=told)


def _carry_out(work: _Work, listener: Listener | None) -> dict[str, Any]:
    """The story of a training."""
    with _told(work):
        if work.group.first:
            work.records = Records(work.folder, lambda: work.watch.elapsed, listener)
            _introduce(work, work.records)
        net, preprocess = _start(work)
        job = _training(work, net, preprocess)
        trained = train(job)
        if not work.group.first:
            return {}
        return _finish(work, job, trained)


@contextmanager
def _told(work: _Work) -> Iterator[None]:
    """Within it an interruption, a lost process, and too little memory or disk become one sentence."""
    words = ["flyweight", "train", "--resume", str(work.folder)]
    if work.group.size > 1:
        words = ["torchrun", "--nproc-per-node", str(work.group.local), "-m", *words]
    again = shlex.join(words)
    with guarded(work.folder, again):
        try:
            yield
        except Lost as error:
            raise FlyweightError(f"{error}; go on with: {again}") from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise FlyweightError(f"there is not enough memory: close other programs, then {again}") from error


def _introduce(work: _Work, records: Records) -> None:
    if records.find("job") is None:
        records.write("job", **asdict(work.request), spec=work.spec.to_json(), training=work.recipe.to_json())
        records.write("data", **data_summary(work.request.source, work.source, work.splits))
    else:
        records.say(f"going on after {work.watch.elapsed:.0f} s")
    write_json(work.folder / "environment.json", environment(work.request.threads or cores()))


def _start(work: _Work) -> tuple[Net, Preprocess]:
    """The network with its first weights, always the same for one seed, and its preprocessing."""
    torch.manual_seed(work.request.seed)
    data, side = work.splits.train, work.spec.input[1]
    net = build(work.spec)
    sample = data.batch(side, calibration_sample(len(data), work.request.seed, STATISTICS))
    if work.donor is None:
        return net, preprocess_for(work.recipe, sample)
    preprocess, changes = work.donor.into(net, sample[:SCALED])
    for change in [f"starting from the weights {work.donor.told()}", *changes]:
        if work.records and work.records.find("log", message=change) is None:
            work.records.say(change)
    return net, preprocess


def _training(work: _Work, net: Net, preprocess: Preprocess) -> Training:
    request, records = work.request, work.records
    job = Training(
        net=net,
        data=work.splits.train,
        validation=work.splits.validation,
        preprocess=preprocess,
        recipe=work.recipe,
        clock=_clock(request),
        seed=request.seed,
        checkpoint=work.folder / "state" / "training.safetensors",
        records=records,
        checkpoint_seconds=request.checkpoint_seconds,
        threads=request.threads,
        device=request.device,
        sync_batchnorm=request.sync_batchnorm,
    )
    if records is not None:
        job.emit = _writer(records, request.model)
        job.note = records.say
        job.progress = lambda share: records.progress(f"training {request.model}", share)
    return job


def _writer(records: Records, name: str) -> Callable[[dict[str, Any]], None]:
    def write(values: dict[str, Any]) -> None:
        records.write("epoch", stage="final", name=name, **values)

    return write


def _clock(request: Request) -> Clock:
    if request.seconds is not None:
        return Clock(seconds=request.seconds)
    return Clock(epochs=request.epochs or (BASELINE_EPOCHS if request.recipe == "baseline" else EPOCHS))


def _finish(work: _Work, job: Training, trained: Trained) -> dict[str, Any]:
    """Scores the kept weights, on the test pictures this once, and writes what the training leaves."""
    assert isinstance(job.net, Net)
    splits, preprocess = work.splits, job.preprocess
    write_network(work.folder, job.net, work.request.model, preprocess, splits.train.classes)
    seen = splits.train.subset(calibration_sample(len(splits.train), work.request.seed, SCORED))
    right = _right(job.net, splits.test, preprocess)
    counted = cost(job.net)
    result: dict[str, Any] = {
        "version": __version__,
        "verb": work.request.verb,
        "folder": str(work.folder),
        "data": data_summary(work.request.source, work.source, splits),
        "network": {
            "name": work.request.model,
            "spec": work.spec.to_json(),
            "params": counted.params,
            "macs": counted.macs,
            "weights": work.donor.to_json() if work.donor else None,
        },
        "recipe": work.recipe.to_json(),
        "train": top1(_right(job.net, seen, preprocess)),
        "validation": {"top1": trained.accuracy, "loss": trained.loss, "n": len(splits.validation)},
        "test": top1(right),
        "epochs": trained.epochs,
        "steps": trained.steps,
        "seconds": {"total": round(work.watch.elapsed, 2), "training": round(trained.seconds, 2)},
        "precision": job.mode,
        "processes": work.group.size,
        "threads": torch.get_num_threads(),
        "device": choose_device(work.request.device).type,
        "seed": work.request.seed,
    }
    if splits.leaked.any() and not splits.leaked.all():
        result["test_clean"] = top1(right[~splits.leaked]) | {"duplicates": int(splits.leaked.sum())}
    write_json(work.folder / "result.json", result)
    shutil.rmtree(work.folder / "state", ignore_errors=True)
    return result


def _right(net: Net, data: Dataset, preprocess: Preprocess) -> np.ndarray:
    """bool [N]: which pictures the network names rightly."""
    return logits(net, data, preprocess).argmax(1).numpy() == data.labels
