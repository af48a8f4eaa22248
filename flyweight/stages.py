"""The stages of the main job. Each reads what earlier ones recorded, so an interrupted job goes on where it was."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flyweight.bench.environment import environment
from flyweight.compress.precision import calibration_sample
from flyweight.data import Source, Splits
from flyweight.errors import FlyweightError
from flyweight.export import int8
from flyweight.job import Job, Stopwatch
from flyweight.net import Net
from flyweight.preprocess import Preprocess
from flyweight.records import Records
from flyweight.search.budget import Budget
from flyweight.search.donor import Donor
from flyweight.search.meter import DEFAULT, Elsewhere, Here, Meter, engines_for, quick
from flyweight.search.space import Candidate, candidates, input_sizes, pretrained_candidates, ranked
from flyweight.search.strategy import Rung, halve, plan
from flyweight.search.survey import cost_all, judge, measure, training_speed
from flyweight.ship import write_json
from flyweight.train.loop import Clock, Diverged, Training, logits, score, train
from flyweight.train.platform import cores
from flyweight.train.recipe import FINE_TUNING, recipe_for
from flyweight.units import percent
from flyweight.zoo import build

# Shares of the time given: measuring candidates, and trying them. What compressing and verifying need is set aside; the
# final training has the rest.
MEASURE_SHARE, TRIAL_SHARE = 0.08, 0.2
# Only where so many seconds go into measuring are the families' speeds of training measured too.
WORTH_SPEEDS = 10.0
# A candidate suits the time if its final training sees every picture about this often, and so many pictures in all
# where there are few; a first trial sees 1/48 of that.
EPOCHS_WANTED, PICTURES_WANTED, FIRST_TRIAL, SHORTEST_TRIAL = 12, 50_000, 1 / 48, 3.0
# Forward multiply-accumulates a second and core that training reaches on a current CPU, for families whose own speed is
# not measured: only the order of trying depends on it.
TRAINING_MACS = 12e9
# Of the time of a job, what clustering its winner has, where the size of the budget asks for more than int8. What must
# be clustered is to be so many times nearer to the ideal, and comes last where it would have fewer seconds than these.
SMALL_SHARE, PACKING, WORTH_PACKING = 0.15, 2.0, 15.0
# Seconds that a race takes for each engine, whose files are written, proven and measured; what slow files take beside,
# for which only jobs of so many seconds have time.
RACED, SLOWLY, WORTH_SLOW = 8.0, 60.0, 600.0
DOING = {"trial": "trying", "teacher": "training as a teacher", "final": "training"}
MOST_RESTARTS = 3
# The share in the targets that a teacher's answers have.
DISTILLED = 0.5
# Mirroring that costs a network more of its accuracy than this, and more than chance, changes what pictures mean.
MIRROR_LOSS = 0.03
# Pictures that place the int8 ranges of untrained networks, that give the mean and deviation of pixels, and the scale
# of a network without norms.
CALIBRATION, STATISTICS, SCALED = 8, 2000, 32
# Pictures that place the ranges of the trained network, and the seconds that reading and resizing one takes.
CALIBRATED, READING_ARRAY, READING_FILE = 256, 0.0001, 0.004
# Candidates nearest to the budget that are measured where none meets it.
NEAREST = 5


@dataclass
class Work:
    """What the stages of one job share."""

    folder: Path
    job: Job
    budget: Budget
    source: Source
    splits: Splits
    records: Records
    watch: Stopwatch

    @cached_property
    def engines(self) -> tuple[str, ...]:
        """The runtimes that it may ship for; of several, slow ones only where there is time to write their files."""
        found = self.device.engines if self.device else engines_for(self.job.engine)
        return found if self.job.seconds >= WORTH_SLOW else quick(found)

    @cached_property
    def device(self) -> Elsewhere | None:
        """The machine that it budgets for, where it is another one."""
        job = self.job
        return None if job.device is None else Elsewhere.on(Path(job.device), job.engine, job.threads)

    @cached_property
    def meter(self) -> Meter:
        """How fast candidates are."""
        return self.device or Here(quick(self.engines), self.job.threads)

    @property
    def left(self) -> float:
        """Seconds of the time given that remain."""
        return self.job.seconds - self.watch.elapsed


def final_seconds(seconds: float) -> float:
    """What measuring and trying leave of a job's time."""
    return seconds * (1 - MEASURE_SHARE - TRIAL_SHARE)


def reserve(seconds: float, source: Source, validation: int, test: int, milliseconds: float) -> float:
    """Seconds to set aside for compressing, verifying and reporting, for a network of this latency."""
    each = milliseconds / 1000
    files = 2 * len(int8.SCHEMES)  # each scheme plain and equalised
    quantising = files * (0.6 + 2 * CALIBRATED * each)
    scoring = (files + 3) * validation * 1.5 * each + test * each
    reading = (validation + test) * (READING_ARRAY if isinstance(source.images, np.ndarray) else READING_FILE)
    return min(0.4 * seconds, 4 + 0.01 * seconds + quantising + scoring + reading)


def needed(work: Work, milliseconds: float) -> float:
    """`reserve` for this job, and what a race of engines takes."""
    seconds = work.job.seconds
    own = reserve(seconds, work.source, len(work.splits.validation), len(work.splits.test), milliseconds)
    if work.engines == (DEFAULT,):
        return own
    slow = len(work.engines) - len(quick(work.engines))
    return min(0.6 * seconds, own + RACED * (len(work.engines) + 1) + SLOWLY * slow)


def rungs(count: int, seconds: float) -> list[Rung]:
    """The trials for `count` candidates in a job of `seconds`."""
    return plan(count, seconds * TRIAL_SHARE, max(SHORTEST_TRIAL, final_seconds(seconds) * FIRST_TRIAL))


def introduce(work: Work) -> None:
    """Records the job, the data and the machine."""
    if work.records.find("job") is None:
        job = work.job
        work.records.write(
            "job",
            source=job.source,
            budget=str(work.budget),
            time=job.seconds,
            threads=job.threads,
            seed=job.seed,
            version=job.version,
            command=job.command,
        )
        work.records.write("data", **data_summary(work.job.source, work.source, work.splits))
        for note in job.notes:
            work.records.say(note)
    else:
        _forget_unfinished_trial(work.records)
        work.records.say(f"going on after {work.watch.elapsed:.0f} s")
    write_json(work.folder / "environment.json", environment(work.job.threads))
    work.watch.ends("data")


def _forget_unfinished_trial(records: Records) -> None:
    """Drops the epochs of a trial that was interrupted: it will be done again from its start."""
    position = None
    for record, begin in records.positions():
        if record["kind"] == "epoch" and record["stage"] == "trial":
            position = begin if position is None else position
        elif record["kind"] != "log":
            position = None
    if position is not None:
        records.cut(position)


def data_summary(name: str, source: Source, splits: Splits) -> dict[str, Any]:
    """As in result.json."""
    return {
        "source": name,
        "name": source.name,
        "classes": list(source.classes),
        "channels": source.channels,
        "train": len(splits.train),
        "validation": len(splits.validation),
        "test": len(splits.test),
        "licence": source.licence,
        "notes": list(splits.notes),
    }


def survey_candidates(work: Work) -> list[Candidate]:
    """All candidates with exact costs, and as many measured as there is time to try, in the order of trying."""
    splits = work.splits
    pool = pool_of(work.job, work.source, splits.train.sizes)
    cost_all(pool, work.budget)
    known = {record["name"] for record in work.records.all("candidate")}
    dropped = [candidate for candidate in pool if candidate.status == "dropped"]
    for candidate in dropped:
        if candidate.name not in known:
            work.records.write("candidate", **candidate.to_json())
    work.records.say(f"{len(pool)} candidates, of which {len(dropped)} fall by their cost alone")
    alive = [candidate for candidate in pool if candidate.status != "dropped"]
    begun, share = work.watch.elapsed, work.job.seconds * MEASURE_SHARE
    if share > WORTH_SPEEDS:
        measure_speeds(work, alive, share / 2)
    order = in_order(work.job, len(splits.train), alive, _speeds(work.records))
    trials, entrants = rungs(len(order), work.job.seconds), 0
    wanted = trials[0].candidates if trials else 1
    while order:
        candidate = order.pop(0)
        if entrants == wanted:  # more could not be tried
            candidate.why = f"{wanted} suited the time better, and more could not be tried"
        elif work.watch.elapsed - begun > (share if entrants else 2 * share):
            candidate.why = "there was no time to measure it"
        else:
            _measure(work, candidate)
            entrants += candidate.status != "dropped"
            if candidate.status == "dropped":
                order = next_of_family(order, candidate)
            work.records.progress("measuring candidates", max((work.watch.elapsed - begun) / share, entrants / wanted))
    work.watch.ends("search")
    return pool


def next_of_family(order: Sequence[Candidate], dropped: Candidate) -> list[Candidate]:
    """Where a candidate falls, the next of its family takes its turn."""
    alike = [each for each in order if each.spec.family == dropped.spec.family and each.weights == dropped.weights]
    return [*alike[:1], *(each for each in order if each not in alike[:1])]


def pool_of(job: Job, source: Source, sizes: Sequence[int]) -> list[Candidate]:
    """Every candidate for pictures decoded at these sizes, those that start from weights first; not yet costed."""
    channels, classes = source.channels, len(source.classes)
    pool = candidates(input_sizes(source.size), channels, classes)
    ahead = [each for donor in donors(job) for each in pretrained_candidates(donor, sizes, channels, classes)]
    return ahead + pool


def donors(job: Job) -> list[Donor]:
    """The weights that candidates start from."""
    return [Donor.from_json(each) for each in job.weights]


def measure_speeds(work: Work, pool: Sequence[Candidate], seconds: float) -> None:
    """Records how fast families train here, each by its likeliest candidate, as many as `seconds` allow."""
    begun = work.watch.elapsed
    for candidate in in_order(work.job, len(work.splits.train), pool):
        known = candidate.spec.family in _speeds(work.records)
        if not known and work.watch.elapsed - begun < seconds:
            speed = training_speed(candidate, recipe_for(candidate.spec.input[1]).batch_size)
            family = candidate.spec.family
            work.records.write("speed", family=family, name=candidate.name, macs_per_second=round(speed))


def _speeds(records: Records) -> dict[str, float]:
    """Forward MACs a second with which families train here, of those that were measured."""
    return {record["family"]: record["macs_per_second"] for record in records.all("speed")}


def in_order(
    job: Job, images: int, pool: Sequence[Candidate], speeds: Mapping[str, float] | None = None
) -> list[Candidate]:
    """Those that start from weights first, for what they know; both as `ranked` has them, by the families' speeds."""
    seen = images * EPOCHS_WANTED  # what knows much already needs no more pictures than that

    def ideal(family: str, pictures: int) -> float:
        return (speeds or {}).get(family, TRAINING_MACS * cores()) * final_seconds(job.seconds) / pictures

    def order(those: Sequence[Candidate]) -> list[Candidate]:
        first = ranked([each for each in those if each.weights], lambda family: ideal(family, seen), PACKING)
        anew = [each for each in those if each.weights is None]
        return first + ranked(anew, lambda family: ideal(family, max(seen, PICTURES_WANTED)), PACKING)

    if SMALL_SHARE * job.seconds > WORTH_PACKING:
        return order(pool)
    return order([each for each in pool if not each.packed]) + order([each for each in pool if each.packed])


def _measure(work: Work, candidate: Candidate) -> None:
    """Measures and judges one candidate, unless the records already hold it."""
    record = work.records.find("candidate", name=candidate.name)
    if record is not None and record["latency_ms"] is not None:
        candidate.recall(record)
        return
    limit, pictures = work.budget.limit("size"), _sample(work, candidate, CALIBRATION)
    most = limit.value if limit and DEFAULT in work.engines else inf  # what is packed runs in ONNX Runtime alone
    measure(candidate, work.splits.train.classes, pictures, work.meter, most)
    judge(candidate, work.budget)
    work.records.write("candidate", **candidate.to_json())


def _nearest(work: Work, pool: list[Candidate]) -> Candidate:
    """The candidate that misses the budget by the least, where none meets it."""
    by_cost = sorted(pool, key=lambda candidate: work.budget.excess(candidate.measured()))
    for candidate in by_cost[:NEAREST]:
        if candidate.latency_ms is None and candidate.cost is not None:
            _measure(work, candidate)
    measured = [candidate for candidate in pool if candidate.latency_ms is not None]
    nearest = min(measured, key=lambda candidate: work.budget.excess(candidate.measured()))
    excess = work.budget.excess(nearest.measured())
    work.records.say(f"no candidate meets the budget; {nearest.name} misses it by the least ({100 * excess:.0f} %)")
    return nearest


def race(work: Work, pool: list[Candidate]) -> Candidate:
    """The candidate to train: the best of the trials, or the nearest where none can meet the budget."""
    chosen = work.records.find("winner")
    if chosen is not None:
        return next(candidate for candidate in pool if candidate.name == chosen["name"])
    entrants = [candidate for candidate in pool if candidate.status != "dropped" and candidate.latency_ms is not None]
    entrants = in_order(work.job, len(work.splits.train), entrants, _speeds(work.records))
    if not entrants:
        winner = _nearest(work, pool)
    else:
        trials = rungs(len(entrants), work.job.seconds)
        for candidate in entrants[trials[0].candidates if trials else 1 :]:
            candidate.why = "there was no time to try it"
        evaluate = partial(_trial, work, last=len(trials) - 1)
        order = halve(entrants, trials, evaluate, final_seconds(work.job.seconds))
        winner = (order or entrants)[0]
    _tell_losers(pool, winner)
    small = SMALL_SHARE * work.job.seconds * winner.packed
    seconds = max(0.3 * work.left, work.left - needed(work, winner.latency_ms or 0.0) - small, SHORTEST_TRIAL)
    work.records.write("winner", name=winner.name, seconds=round(seconds, 1), flip=_may_mirror(work, winner))
    work.watch.ends("search")
    return winner


def _may_mirror(work: Work, winner: Candidate) -> bool:
    """Whether the final training mirrors half of the pictures: where the winner's last trial shows no harm in it."""
    trial = work.records.find("trial", name=winner.name)
    if trial is None or trial["mirrored_top1"] is None:
        work.records.say("pictures are not mirrored: no trial has shown that this does no harm")
        return False
    harmless = mirroring_is_harmless(trial, len(work.splits.validation))
    straight, mirrored = percent(trial["val_top1"]), percent(trial["mirrored_top1"])
    found = f"gets {straight} of the validation pictures right and {mirrored} of their mirror images"
    work.records.say(f"pictures are {'' if harmless else 'not '}mirrored: without that, a network {found}")
    return harmless


def mirroring_is_harmless(trial: Mapping[str, Any], n: int) -> bool:
    """Whether left and right tell nothing, by a trial that did not mirror and was scored on `n` pictures both ways.

    Clearly worse on mirror images (digits, arrows, shoes that all point one way): then mirroring teaches what is wrong.
    """
    straight, mirrored = trial["val_top1"], trial["mirrored_top1"]
    chance = 2 * (straight * (1 - straight) / n) ** 0.5
    return mirrored >= straight - max(MIRROR_LOSS, chance)


def _tell_losers(pool: list[Candidate], winner: Candidate) -> None:
    winner.status, winner.why = "winner", winner.why if winner.status == "dropped" else "best by its trials"
    for candidate in pool:
        if candidate.status == "tried" and candidate.val_top1 is not None:
            better = winner.val_top1 is not None and candidate.val_top1 > winner.val_top1
            lost = "gained too little by a longer trial, after" if better else "beaten in a trial of"
            candidate.why = candidate.why or f"{lost} {candidate.epochs:.2g} epochs"


def _trial(work: Work, candidate: Candidate, rung: int, seconds: float, last: int) -> float | None:
    """The validation accuracy of a short training; None where its loss diverges.

    A trial that saw fewer pictures than the one before, in twice the time, was disturbed by something else on the
    machine: it is repeated once, since such a moment must not decide.
    """
    record = work.records.find("trial", name=candidate.name, rung=rung)
    if record is None:
        found = _tried(work, candidate, seconds, rung == last)
        before = work.records.find("trial", name=candidate.name, rung=rung - 1)
        if before is not None and 0 < (found["epochs"] or 0) < (before["epochs"] or 0):
            work.records.say(f"the trial of {candidate.name} is repeated: the machine was busy with something else")
            found = _tried(work, candidate, seconds, rung == last)
        record = work.records.write("trial", name=candidate.name, rung=rung, seconds=round(seconds, 2), **found)
    candidate.status, candidate.val_top1, candidate.epochs = "tried", record["val_top1"], record["epochs"]
    if candidate.val_top1 is None:
        candidate.why = "its loss diverged"
    return candidate.val_top1


def _tried(work: Work, candidate: Candidate, seconds: float, last: bool) -> dict[str, Any]:
    """What a short training finds: epochs, accuracy, in the last rung that on mirror images too, and its precision.

    Accuracies are None where the loss diverges. The precision that was fastest in the first trial serves all.
    """
    net, preprocess = start(work, candidate)
    job = training_of(work, candidate, net, preprocess, "trial", Clock(seconds=seconds))
    earlier = work.records.find("trial")
    job.recipe, job.mode = replace(job.recipe, flip=False), earlier.get("precision") if earlier else None
    try:
        trained = train(job)
    except Diverged as error:
        work.records.say(f"{candidate.name} is out: {error}")
        return {"epochs": None, "val_top1": None, "mirrored_top1": None, "precision": job.mode}
    found = {"epochs": trained.epochs, "val_top1": trained.accuracy, "mirrored_top1": None, "precision": job.mode}
    if last:
        found["mirrored_top1"], _ = score(logits(net, job.validation, preprocess, mirror=True), job.validation.labels)
    return found


def start(work: Work, candidate: Candidate) -> tuple[Net, Preprocess]:
    """A network with its first weights, always the same for one seed, and its preprocessing."""
    torch.manual_seed(work.job.seed)
    net, sample = build(candidate.spec), _sample(work, candidate, STATISTICS)
    if candidate.weights is None:
        return net, Preprocess.of(sample)
    preprocess, changes = candidate.weights.into(net, sample[:SCALED])
    for change in changes:
        work.records.say(f"{candidate.name}: {change}")
    return net, preprocess


def _sample(work: Work, candidate: Candidate, count: int) -> np.ndarray:
    """Training pictures at a candidate's size, always the same for one seed."""
    train_split = work.splits.train
    return train_split.batch(candidate.spec.input[1], calibration_sample(len(train_split), work.job.seed, count))


def training_of(
    work: Work, candidate: Candidate, net: Net, preprocess: Preprocess, stage: str, clock: Clock
) -> Training:
    """A candidate's training that leaves its records under the name of the stage: "trial", "teacher" or "final"."""

    def emit(values: dict[str, Any]) -> None:
        work.records.write("epoch", stage=stage, name=candidate.name, **values)

    def progress(share: float) -> None:
        work.records.progress(f"{DOING[stage]} {candidate.name}", share)

    return Training(
        net=net,
        data=work.splits.train,
        validation=work.splits.validation,
        preprocess=preprocess,
        recipe=recipe_for(candidate.spec.input[1]) if candidate.weights is None else FINE_TUNING,
        clock=clock,
        seed=work.job.seed,
        emit=emit,
        progress=progress,
        note=work.records.say,
        records=work.records,
    )


def train_winner(work: Work, winner: Candidate, answers: Tensor | None) -> tuple[Net, Preprocess]:
    """The final training, in the time recorded for it; a diverging loss starts it again at half the learning rate.

    `answers` are a teacher's to the training pictures, whose time was taken from the winner's.
    """
    record, teacher = work.records.find("winner"), work.records.find("teacher")
    assert record is not None
    given = record["seconds"] - (teacher["seconds"] if teacher else 0.0)
    while True:
        restarts = work.records.all("restart")
        seconds = restarts[-1]["seconds"] if restarts else given
        net, preprocess = start(work, winner)
        job = training_of(work, winner, net, preprocess, "final", Clock(seconds=seconds))
        job.checkpoint = work.folder / f"state/final-{len(restarts)}.safetensors"  # each attempt goes on with its own
        rate = job.recipe.learning_rate / 2 ** len(restarts)
        job.recipe = replace(job.recipe, flip=record["flip"], learning_rate=rate, distil=DISTILLED)
        job.answers = answers
        try:
            trained = train(job)
            break
        except Diverged as error:
            if len(restarts) == MOST_RESTARTS:
                raise FlyweightError(
                    f"training {winner.name} diverges at every learning rate tried: {error}"
                ) from error
            left = max(0.3 * seconds, seconds - job.clock.spent)
            work.records.write("restart", name=winner.name, seconds=round(left, 1), why=str(error))
    winner.val_top1, winner.epochs = trained.accuracy, trained.epochs
    work.watch.ends("train")
    return net, preprocess
