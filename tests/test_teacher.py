"""A larger network teaches the one that ships, where the time allows to train both."""

from pathlib import Path

import pytest
import torch

from flyweight import stages, teacher
from flyweight.data import Splits, open_source, prepare
from flyweight.job import Job, Stopwatch
from flyweight.records import Records
from flyweight.search.budget import Budget
from flyweight.search.space import Candidate, candidates, estimate_cost
from flyweight.train.loop import Clock, Diverged, Training, logits, score, train
from flyweight.train.recipe import Recipe

SECONDS = 2 * 8.0


@pytest.fixture(scope="module")
def pool() -> list[Candidate]:
    found = [each for each in candidates([24, 28], 1, 10) if each.spec.family in ("airbench", "resnet")]
    for each in found:
        estimate_cost(each)
    return found


def of(pool: list[Candidate], name: str) -> Candidate:
    return next(each for each in pool if each.name == name)


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (40, None),  # of which the winner would keep too few
        (100, "airbench94 x0.45 @28"),
        (1000, "airbench94 x1 @28"),
    ],
)
def test_the_teacher_is_the_widest_that_there_is_time_for(
    pool: list[Candidate], epochs: float, expected: str | None
) -> None:
    winner, seconds = of(pool, "airbench94 x0.25 @28"), 100.0
    found = teacher.teacher_of(pool, winner, epochs / seconds, teacher.SHARE * seconds)
    assert (found.name if found else None) == expected
    if found:
        seen = epochs * teacher.SHARE * winner.macs / found.macs
        assert seen >= teacher.TEACHER_EPOCHS


@pytest.fixture(scope="module")
def splits() -> Splits:
    return prepare(open_source("demo"), [24, 28])


def work(folder: Path, splits: Splits, name: str) -> stages.Work:
    """A job that has chosen its winner."""
    job, source, watch = Job("demo", "params<=200k", 60.0, 1, 0, False, "", ""), open_source("demo"), Stopwatch()
    (folder / "state").mkdir()
    records = Records(folder, lambda: watch.elapsed)
    records.write("trial", name=name, rung=0, seconds=1.0, epochs=20.0, val_top1=0.5, mirrored_top1=0.5)
    records.write("winner", name=name, seconds=SECONDS / teacher.SHARE, flip=False)
    return stages.Work(folder, job, Budget.parse(job.budget), source, splits, records, watch)


def test_what_a_teacher_knows_is_learnt_once(
    pool: list[Candidate], splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "TEACHABLE", 100)
    winner = of(pool, "airbench94 x0.125 @28")
    under_way = work(tmp_path, splits, winner.name)
    answers = teacher.teach(under_way, pool, winner)
    assert answers is not None
    assert answers.shape == (len(splits.train), 10)
    torch.testing.assert_close(answers.sum(dim=1), torch.ones(len(answers)))
    assert score(answers, splits.train.labels)[0] > 0.3, "it has learned, and the order is that of the pictures"
    taught = under_way.records.find("teacher")
    assert taught is not None
    assert of(pool, taught["name"]).macs > winner.macs
    monkeypatch.setattr(teacher, "train", None)  # interrupted and resumed, the job trains it no more
    again = teacher.teach(under_way, pool, winner)
    assert again is not None
    assert torch.equal(again, answers)


def test_a_teacher_that_diverges_teaches_nothing_and_ends_no_job(
    pool: list[Candidate], splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(job: Training) -> None:
        raise Diverged("the loss became nan")

    monkeypatch.setattr(teacher, "TEACHABLE", 100)
    monkeypatch.setattr(teacher, "train", diverge)
    winner = of(pool, "airbench94 x0.125 @28")
    under_way = work(tmp_path, splits, winner.name)
    assert teacher.teach(under_way, pool, winner) is None
    monkeypatch.setattr(teacher, "train", None)  # nor is it tried again after an interruption
    assert teacher.teach(under_way, pool, winner) is None
    assert any("teaches nothing" in record["message"] for record in under_way.records.all("log"))


def test_each_family_s_speed_of_training_is_measured_once(
    pool: list[Candidate], splits: Splits, tmp_path: Path
) -> None:
    narrow = [of(pool, name) for name in ("airbench94 x0.125 @28", "airbench94 x0.25 @28", "resnet8_cifar x0.25 @28")]
    under_way = work(tmp_path, splits, narrow[0].name)
    stages.measure_speeds(under_way, narrow, 60.0)
    found = {record["family"]: record["macs_per_second"] for record in under_way.records.all("speed")}
    assert len(found) == len(under_way.records.all("speed")) == 2, "one of each family"
    assert all(speed > 1e6 for speed in found.values())
    stages.measure_speeds(under_way, narrow, 60.0)
    assert len(under_way.records.all("speed")) == 2, "nor again after an interruption"
    assert stages._speeds(under_way.records) == found


def test_few_pictures_have_no_teacher(pool: list[Candidate], splits: Splits, tmp_path: Path) -> None:
    winner = of(pool, "airbench94 x0.125 @28")
    assert len(splits.train) < teacher.TEACHABLE
    assert teacher.teach(work(tmp_path, splits, winner.name), pool, winner) is None


def test_a_network_learns_what_its_teacher_says(pool: list[Candidate], splits: Splits, tmp_path: Path) -> None:
    """A teacher that is sure of the next class everywhere, and a student that hears nothing else."""
    winner = of(pool, "airbench94 x0.125 @28")
    net, preprocess = stages.start(work(tmp_path, splits, winner.name), winner)
    wrong = (splits.train.labels + 1) % 10
    job = Training(net, splits.train, splits.validation, preprocess, Recipe(distil=1.0), Clock(epochs=3))
    job.answers = torch.nn.functional.one_hot(torch.from_numpy(wrong), 10).float()
    accuracy = train(job).accuracy
    assert accuracy < 0.1
    outputs = logits(net, splits.validation, preprocess)
    assert score(outputs, (splits.validation.labels + 1) % 10)[0] > 0.5
