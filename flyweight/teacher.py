"""A larger network that a job with time to spare trains first, for what it answers to the training pictures."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.numpy import load_file, save
from torch import Tensor

from flyweight.records import Record
from flyweight.search.space import Candidate
from flyweight.stages import Work, start, training_of
from flyweight.train.checkpoint import write_atomically
from flyweight.train.loop import Clock, Diverged, logits, train

# A teacher has this share of the final training's time. It must be so much larger than the winner, see every picture
# about so often, and leave time for the winner to see it so often; with fewer pictures it would know them by heart. Its
# answers are probabilities at this temperature.
SHARE, LEAST_WIDER, TEACHER_EPOCHS, STUDENT_EPOCHS, TEACHABLE = 0.3, 1.5, 10, 50, 20_000
SOFTNESS = 2.0


def teach(work: Work, pool: Sequence[Candidate], winner: Candidate) -> Tensor | None:
    """A larger network's answers to the training pictures, where the time allows to train one: [pictures, classes].

    They are its probabilities at a raised temperature, the mean of each picture and its mirror image where the winner
    may see those. Computed once, they cost the winner's own training nothing. None too where the larger one diverges.
    """
    chosen, trial = work.records.find("winner"), work.records.find("trial", name=winner.name)
    assert chosen is not None
    if trial is None or winner.weights is not None or len(work.splits.train) < TEACHABLE:
        return None
    seconds = SHARE * chosen["seconds"]
    teacher = teacher_of(pool, winner, (trial["epochs"] or 0.0) / trial["seconds"], seconds)
    if teacher is None:
        return None
    place = work.folder / "state" / "answers.safetensors"
    record = work.records.find("teacher") or _trained(work, teacher, seconds, chosen["flip"], place)
    return None if record["val_top1"] is None else torch.from_numpy(load_file(place)["answers"])


def teacher_of(pool: Sequence[Candidate], winner: Candidate, pace: float, seconds: float) -> Candidate | None:
    """The widest form of the winner that learns enough in `seconds`; None where there is no time for a teacher.

    `pace` is the winner's, in epochs a second; that of wider forms is taken to fall as their MACs rise.
    """
    if pace * seconds * (1 - SHARE) / SHARE < STUDENT_EPOCHS:
        return None
    most = winner.macs * pace * seconds / TEACHER_EPOCHS
    wider = [
        candidate
        for candidate in pool
        if candidate.spec.family == winner.spec.family
        and candidate.spec.input == winner.spec.input
        and LEAST_WIDER * winner.macs <= candidate.macs <= most
    ]
    return max(wider, key=lambda candidate: candidate.macs, default=None)


def _trained(work: Work, teacher: Candidate, seconds: float, mirrored: bool, place: Path) -> Record:
    """Trains the teacher, leaves its answers at `place`, and its record."""
    net, preprocess = start(work, teacher)
    job = training_of(work, teacher, net, preprocess, "teacher", Clock(seconds=seconds))
    job.checkpoint = work.folder / "state" / "teacher.safetensors"
    job.recipe = replace(job.recipe, flip=mirrored)
    found: dict[str, float | None] = {"epochs": None, "val_top1": None}
    try:
        trained = train(job)
        outputs = logits(net, work.splits.train, preprocess)
        if mirrored:
            outputs = (outputs + logits(net, work.splits.train, preprocess, mirror=True)) / 2
        write_atomically(place, save({"answers": (outputs / SOFTNESS).softmax(dim=1).numpy()}))
        found = {"epochs": trained.epochs, "val_top1": trained.accuracy}
    except Diverged as error:
        work.records.say(f"{teacher.name} teaches nothing: {error}")
    record = work.records.write("teacher", name=teacher.name, seconds=round(job.clock.spent, 1), **found)
    work.watch.ends("train")
    return record
