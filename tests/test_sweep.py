"""Studies: the points are what was asked for, their conditions are equal, and a killed sweep goes on."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flyweight import fitting, training
from flyweight.cli.options import read_value, read_values
from flyweight.errors import FlyweightError, UsageError
from flyweight.records import read_records
from flyweight.report.curves import draw
from flyweight.sweep import RECIPE, affordable_epochs, points_of, resume, sweep, training_seconds
from flyweight.sweep import Study as Asked

VARY = {"squeeze_ratio": [0.25, 0.5], "bypass": ["none", "simple"]}


def study(**changes: Any) -> Asked:
    values = {
        "model": "squeezenet1_1", "source": "demo", "vary": VARY, "fixed": {}, "seeds": 1, "seconds": 60.0,
        "epochs": None, "threads": 1, "skip_corrupt": False, "version": "0", "command": "",
    }  # fmt: skip
    return Asked(**{**values, **changes})


def test_every_combination_is_a_point_with_its_own_spec() -> None:
    points = points_of(study(), (32, 32), 3, 10)
    assert [tuple(point.settings.values()) for point in points] == [
        (0.25, "none"), (0.25, "simple"), (0.5, "none"), (0.5, "simple"),
    ]  # fmt: skip
    assert all(point.spec.args["squeeze_ratio"] == point.settings["squeeze_ratio"] for point in points)
    assert points[0].facts["params"] < points[2].facts["params"]
    assert {point.spec.args["stem"] for point in points} == {"cifar"}


def test_a_field_of_the_recipe_and_the_resolution_can_be_varied() -> None:
    points = points_of(
        study(vary={"label_smoothing": [0, 0.1], "resolution": [24, 32]}, fixed={"width": 0.25}), (32, 32), 3, 10
    )
    assert [point.recipe.label_smoothing for point in points] == [0, 0, 0.1, 0.1]
    assert [point.spec.input for point in points] == [(3, 24, 24), (3, 32, 32)] * 2
    assert {point.spec.args["width"] for point in points} == {0.25}


@pytest.mark.parametrize(
    ("vary", "fixed", "said"),
    [
        ({}, {}, "what is to be varied"),
        ({"width": [1.0]}, {}, "two or more different values"),
        ({"width": [1.0, 1.0]}, {}, "two or more different values"),
        ({"width": [0.5, 1.0]}, {"width": 0.5}, "both varied and fixed"),
        ({"depth_of_field": [1, 2]}, {}, "takes no 'depth_of_field'"),
        ({"bypass": ["none", "sideways"]}, {}, "bypass is one of"),
        ({"label_smoothing": ["much", "little"]}, {}, "takes a float, not 'much'"),
        ({"flip": [0, 1]}, {}, "takes a bool, not 0"),
    ],
)
def test_what_cannot_be_varied_is_told_before_anything_is_trained(
    vary: dict[str, list[Any]], fixed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        sweep("squeezenet1_1", "demo", vary, fixed=fixed, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_epochs_fill_the_time_and_no_more() -> None:
    paces = [{"epoch_seconds": 2.0, "scoring_seconds": 0.1}, {"epoch_seconds": 5.0, "scoring_seconds": 0.2}]
    epochs = affordable_epochs(paces, 3, 600.0)
    needed = 3 * sum(training_seconds(pace, epochs) for pace in paces)
    assert 590 < needed <= 600
    with pytest.raises(UsageError, match="raise --time"):
        affordable_epochs(paces, 3, 0.05)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that was killed by SIGKILL after its first training, and then taken up again."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    words = ["squeezenet1_1", "demo", "--vary", "squeeze_ratio=0.25,0.5", "--arg", "width=0.125", "--seeds", "2"]
    command = [sys.executable, "-m", "flyweight", "sweep", *words, "--epochs", "0.4", "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not _runs(out):
        assert process.poll() is None, "the sweep ended before its first training was recorded"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(_runs(out)) < 4
    (out / "before.json").write_text(json.dumps(_runs(out)))
    resume(out)
    return out


def _runs(out: Path) -> list[dict[str, Any]]:
    return [record for record in read_records(out / "records.jsonl") if record["kind"] == "run"]


def test_a_killed_sweep_goes_on_without_redoing_what_is_finished(finished: Path) -> None:
    runs, before = _runs(finished), json.loads((finished / "before.json").read_text())
    assert runs[: len(before)] == before
    assert sorted((run["name"], run["seed"]) for run in runs) == [
        (f"squeeze_ratio={ratio}", seed) for ratio in (0.25, 0.5) for seed in (0, 1)
    ]


def test_all_trainings_have_equal_conditions(finished: Path) -> None:
    assert len({run["steps"] for run in _runs(finished)}) == 1
    assert len([record for record in read_records(finished / "records.jsonl") if record["kind"] == "plan"]) == 1


def test_the_results_are_the_means_of_the_runs(finished: Path) -> None:
    result = json.loads((finished / "results.json").read_text())
    runs = _runs(finished)
    for point in result["points"]:
        scores = [run["val_top1"] for run in runs if run["name"] == point["name"]]
        assert point["val_top1"] == pytest.approx(sum(scores) / 2)
        assert (point["lowest"], point["highest"], point["n"]) == (min(scores), max(scores), 2)
        assert point["latency_ms"] > 0
    assert result["points"][0]["macs"] < result["points"][1]["macs"]
    with (finished / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["squeeze_ratio"] for row in rows] == ["0.25", "0.5"]
    assert float(rows[0]["val_top1"]) == result["points"][0]["val_top1"]
    for name in ("accuracy.svg", "cost.svg"):
        assert (finished / name).read_text().count("squeeze_ratio") >= 1


def test_the_figures_are_the_same_each_time(finished: Path, tmp_path: Path) -> None:
    draw(tmp_path, json.loads((finished / "results.json").read_text()))
    for name in ("accuracy.svg", "cost.svg"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_a_sweep_whose_time_is_over_says_what_is_missing(finished: Path) -> None:
    kept = (finished / "records.jsonl").read_text()
    lines = [line for line in kept.splitlines() if '"kind": "run"' not in line]
    (finished / "records.jsonl").write_text("\n".join(lines) + "\n")
    try:
        with pytest.raises(FlyweightError, match="ended before 4 of 4 trainings"):
            resume(finished, time=0.5)
    finally:
        (finished / "records.jsonl").write_text(kept)


def test_a_folder_without_a_sweep_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing that flyweight sweep can resume"):
        resume(tmp_path)


@pytest.mark.parametrize(("asked", "go_on"), [("fit", fitting.resume), ("train", training.resume)])
def test_a_folder_of_another_command_is_told(tmp_path: Path, asked: str, go_on: Callable[[Path], object]) -> None:
    other = {"fit": "train", "train": "fit"}[asked]
    (tmp_path / "run.json").write_text(json.dumps({"verb": other}))
    (tmp_path / "result.json").write_text("{}")  # though finished
    with pytest.raises(UsageError, match=rf"another command: flyweight {other} --resume"):
        go_on(tmp_path)


RECIPES = Path(__file__).parents[1] / "examples" / "studies.sh"
STUDIES = [line.split(")")[0] for line in RECIPES.read_text().splitlines() if ") " in line and " run " in line]


@pytest.mark.parametrize("name", STUDIES)
def test_every_recipe_can_be_built(name: str, tmp_path: Path) -> None:
    """The script's own line, run with a flyweight that writes down what it was given."""
    fake = tmp_path / "flyweight"
    fake.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["sh", str(RECIPES), name, "demo", "--time", "1m"]
    words = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    assert words[0] == "sweep"
    assert words[2] == "demo"
    assert words[-2:] == ["--time", "1m"]
    options = list(zip(words[3:-2:2], words[4:-2:2], strict=True))
    vary = {key: read_values(text) for flag, each in options if flag == "--vary" for key, text in [each.split("=")]}
    fixed = {key: read_value(text) for flag, each in options if flag == "--arg" for key, text in [each.split("=")]}
    points = points_of(study(model=words[1], vary=vary, fixed=fixed), (32, 32), 3, 10)
    assert len({json.dumps(point.facts) for point in points}) > 1 or set(vary) <= RECIPE
