"""The main job: from labelled pictures and a budget to the classifier that ships."""

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flyweight import __version__, shipping, stages
from flyweight.data import Source, Splits, absolute, open_source, prepare
from flyweight.data.split import held_out_count
from flyweight.errors import ParityError
from flyweight.export.verify import Parity
from flyweight.job import FILE, Job, Stopwatch, check_free, guarded, load, new_folder
from flyweight.records import Listener, Records, decoding, seconds_spent
from flyweight.run import Run
from flyweight.search.budget import Budget, parse_time
from flyweight.search.meter import DEFAULT, Elsewhere, engines_for
from flyweight.search.space import Candidate, input_sizes, pretrained_size
from flyweight.search.strategy import Rung
from flyweight.search.supply import AUTO, FETCH_SHARE, NONE, suits, supply
from flyweight.search.survey import cost_all
from flyweight.ship import write_json
from flyweight.teacher import teach
from flyweight.train.platform import check_threads


def fit(
    data: str | Path,
    budget: str | Sequence[str],
    time: str | float = "10m",
    out: str | Path | None = None,
    threads: int = 1,
    seed: int = 0,
    skip_corrupt: bool = False,
    listener: Listener | None = None,
    pretrained: str | Path | None = None,
    engine: str = DEFAULT,
    device: str | Path | None = None,
) -> Run:
    """Trains, compresses, exports, verifies and measures the best classifier of `data` within `budget`.

    `data`: a folder of class folders, "cifar10:PATH", "idx:PATH" or "demo". `budget`: limits such as "latency<=2ms,
    size<=500KB" (latency in ms on `threads` cores, sizes in bytes, accuracies as fractions). `time` bounds the whole
    job: seconds or "10m". The run's folder (docs/run-folder.md) is `out`, by default runs/<data>-<time>; `listener` is
    told of each record as it is made. `pretrained` adds candidates that start from weights: of a model.safetensors, or
    with "auto" published ones, where none are cached downloaded; "none" adds nothing, and by default those that are
    cached serve (docs/weights.md). `engine` is the runtime to budget and to ship for, or "auto" for the fastest of
    those that are installed; `device` the latency table of another machine, from `flyweight profile` there, to budget
    for.

    A budget that no candidate meets is no error here: the nearest is shipped and `Run.met` is false. Raises UsageError
    (a bad budget, a missing path), DataError (the data is refused), ParityError (the export answers otherwise than the
    network).
    """
    job = _job(data, budget, time, threads, seed, skip_corrupt, pretrained)
    job = _targeted(job, engine, device)
    if out is not None:
        check_free(Path(out))
    watch = Stopwatch()
    source = open_source(job.source)
    job = _supplied(job, source)
    splits = _prepared(job, source, listener)
    folder = new_folder(Path(out) if out is not None else None, source.name)
    write_json(folder / FILE, job.to_json())
    return _guarded(folder, job, source, splits, watch, listener)


def resume(folder: str | Path, listener: Listener | None = None) -> Run:
    """Goes on with an interrupted run in the time that it has left; a finished one is opened. Raises UsageError."""
    folder = Path(folder)
    job = load(folder / FILE, "fit", Job)
    if (folder / "result.json").exists():
        return Run(folder)
    watch = Stopwatch(seconds_spent(folder))
    source = open_source(job.source)
    for donor in stages.donors(job):
        donor.check()
    splits = _prepared(job, source, listener)
    return _guarded(folder, job, source, splits, watch, listener)


@dataclass(frozen=True)
class Outlook:
    """What a job would do: all candidates with their fate so far, the order of trying, the rungs and the seconds.

    The order is by one assumed speed of training; the job measures each family's own. `notes` say what there is to be
    said of weights to start from.
    """

    pool: list[Candidate]
    order: list[Candidate]
    rungs: list[Rung]
    seconds: dict[str, float]
    notes: Sequence[str]


def outlook(
    data: str | Path,
    budget: str | Sequence[str],
    time: str | float = "10m",
    threads: int = 1,
    pretrained: str | Path | None = None,
) -> Outlook:
    """A dry run: costs every candidate exactly and plans the time, without decoding, measuring or training anything.

    With `pretrained` "auto", weights are downloaded as `fit` does it: what there is decides which candidates there are.
    """
    job = _job(data, budget, time, threads, 0, False, pretrained)
    source = open_source(job.source)
    job = _supplied(job, source)
    pool = stages.pool_of(job, source, _sizes(job, source))
    cost_all(pool, Budget.parse(job.budget))
    order = stages.in_order(job, len(source), [candidate for candidate in pool if candidate.status != "dropped"])
    held_out = held_out_count(len(source))
    seconds = {
        "measuring": job.seconds * stages.MEASURE_SHARE,
        "trials": job.seconds * stages.TRIAL_SHARE,
        "compressing and verifying": stages.reserve(job.seconds, source, held_out, held_out, 1.0),
    }
    seconds["final training"] = job.seconds - sum(seconds.values())
    return Outlook(pool, order, stages.rungs(len(order), job.seconds), seconds, job.notes)


def _job(
    data: str | Path,
    budget: str | Sequence[str],
    time: str | float,
    threads: int,
    seed: int,
    skip_corrupt: bool,
    pretrained: str | Path | None,
) -> Job:
    text = budget if isinstance(budget, str) else ", ".join(budget)
    Budget.parse(text)  # a bad budget is told before anything is opened
    check_threads(threads)
    seconds = parse_time(time)
    options = {"budget": text, "time": f"{seconds:g}s", "threads": str(threads), "seed": str(seed)}
    if pretrained is not None:
        named = pretrained in (AUTO, NONE)
        options["pretrained"] = str(pretrained) if named else str(Path(pretrained).absolute())
    words = ["flyweight", "fit", str(data), *(word for key, value in options.items() for word in (f"--{key}", value))]
    command = shlex.join(words + ["--skip-corrupt"] * skip_corrupt)
    asked = options.get("pretrained")
    return Job(absolute(data), text, seconds, threads, seed, skip_corrupt, __version__, command, asked)


def _targeted(job: Job, engine: str, device: str | Path | None) -> Job:
    """The job with what it ships for. Raises UsageError where that cannot be had."""
    engines_for(engine)
    words = [] if engine == DEFAULT else ["--engine", engine]
    if device is not None:
        device = str(Path(device).absolute())
        Elsewhere.on(Path(device), engine, job.threads)
        words += ["--device", device]
    return replace(job, engine=engine, device=device, command=shlex.join([*shlex.split(job.command), *words]))


def _supplied(job: Job, source: Source) -> Job:
    """The job with the weights that its candidates may start from. Raises FlyweightError where a file is none."""
    budget = Budget.parse(job.budget)
    found = supply(job.pretrained, lambda spec: suits(spec, source, budget), FETCH_SHARE * job.seconds)
    told = [f"candidates also start from the weights {donor.told()}" for donor in found.donors]
    return replace(job, weights=[donor.to_json() for donor in found.donors], notes=(*told, *found.notes))


def _prepared(job: Job, source: Source, listener: Listener | None) -> Splits:
    sizes = _sizes(job, source)
    return prepare(source, sizes, seed=job.seed, skip_corrupt=job.skip_corrupt, progress=decoding(listener))


def _sizes(job: Job, source: Source) -> tuple[int, ...]:
    """The sides at which the pictures are decoded."""
    own = (pretrained_size(donor.spec(), source.size) for donor in stages.donors(job))
    return tuple(dict.fromkeys((*input_sizes(source.size), *own)))


def _guarded(
    folder: Path, job: Job, source: Source, splits: Splits, watch: Stopwatch, listener: Listener | None
) -> Run:
    """Carries the job out."""
    with guarded(folder, f"flyweight fit --resume {shlex.quote(str(folder))}"):
        records = Records(folder, lambda: watch.elapsed, listener)
        return _carry_out(stages.Work(folder, job, Budget.parse(job.budget), source, splits, records, watch))


def _carry_out(work: stages.Work) -> Run:
    """The story of the job."""
    stages.introduce(work)
    pool = stages.survey_candidates(work)
    winner = stages.race(work, pool)
    net, preprocess = stages.train_winner(work, winner, teach(work, pool, winner))
    net, shipped, counted = shipping.compress(work, net, preprocess)
    parity = shipping.verify(work, net, preprocess, shipped)
    if not parity.passed:
        raise ParityError(
            f"the exported file agrees with the trained network on {100 * parity.agreement:.2f} % of {parity.n} "
            f"validation pictures ({100 * parity.exported_top1:.2f} % right against "
            f"{100 * parity.pytorch_top1:.2f} %), outside the tolerance of {100 * parity.tolerance:.2f} points"
            f"{_apart(parity)}; nothing was shipped, the records are in {work.folder}"
        )
    shipping.finish(work, pool, winner, net, preprocess, shipped, counted)
    shutil.rmtree(work.folder / "state", ignore_errors=True)
    return Run(work.folder)


def _apart(parity: Parity) -> str:
    """The picture that shows it best."""
    return f", or with probabilities up to {parity.worst['difference']:.2g} apart" if parity.worst else ""
