"""Scoring a classifier: known figures, real files in real processes, classes matched by name."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flyweight import evaluation
from flyweight.create import create_model
from flyweight.data import open_source, prepare
from flyweight.errors import FlyweightError, UsageError
from flyweight.evaluation import calibration_error, scores
from flyweight.export import onnx
from flyweight.net import Net
from flyweight.preprocess import Preprocess
from flyweight.ship import write_network
from flyweight.train.inputs import normalise

# 4 pictures of 3 classes: right, right, wrong, wrong (the truth second).
PROBABILITIES = np.array([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1], [0.0, 0.6, 0.4]])
LABELS = np.array([0, 1, 1, 2])


@pytest.fixture(scope="module")
def splits():
    """Real pictures: the data that comes along."""
    return prepare(open_source("demo"), [28])


@pytest.fixture(autouse=True)
def prepared_once(splits, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's pictures are the same each time."""
    real = evaluation.prepare
    monkeypatch.setattr(evaluation, "ROUND_SECONDS", 0.02)
    monkeypatch.setattr(
        evaluation, "prepare", lambda source, *a, **k: splits if source.root.name == "demo" else real(source, *a, **k)
    )


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, splits) -> Path:
    """What a run leaves of its network: a classifier of the demo's pictures by a linear map fitted to them."""
    folder = tmp_path_factory.mktemp("run")
    write(folder, splits, linear(splits), splits.train.classes)
    return folder


def linear(splits) -> Net:
    """A small net whose classifier is fitted to its untrained features: real answers without a training."""
    torch.manual_seed(0)
    net = create_model("squeezenet1_1", num_classes=10, in_chans=1, size=28, stem="cifar", norm="batch", width=0.25)
    preprocess = Preprocess.of(splits.train.batch(28))
    data = splits.train.subset(np.arange(1500))
    x = normalise(torch.from_numpy(data.batch(28)), preprocess)
    net.train()
    with torch.no_grad():
        for _ in range(3):
            net(x[:500])
        net.eval()
        targets = torch.eye(10)[torch.from_numpy(data.labels)]
        final = net.get_classifier()
        maps = net.forward_head(net.forward_features(x), pre_logits=True)
        maps = maps.mean(dim=(2, 3)) if maps.ndim == 4 else maps
        values = torch.cat([maps, torch.ones(len(x), 1)], 1)
        found = torch.linalg.lstsq(values, 10 * targets).solution
        final.weight.copy_(found[:-1].T.reshape(final.weight.shape))  # type: ignore[union-attr]
        final.bias.copy_(found[-1])  # type: ignore[union-attr]
    return net


def write(folder: Path, splits, net: Net, classes: tuple[str, ...]) -> None:
    preprocess = Preprocess.of(splits.train.batch(28))
    write_network(folder, net, "squeezenet1_1", preprocess, classes)
    (folder / "model.onnx").write_bytes(onnx.export(net, preprocess, list(classes)).SerializeToString())


def evaluate(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flyweight", "evaluate", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_known_answers_have_known_scores() -> None:
    found = scores(PROBABILITIES, LABELS, ("a", "b", "c"))
    assert found["top1"] == 0.5
    assert found["top5"] == 1.0
    assert found["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 1, 0]]
    assert [each["n"] for each in found["classes"]] == [1, 2, 1]
    assert [each["recall"] for each in found["classes"]] == [1.0, 0.5, 0.0]
    assert [each["precision"] for each in found["classes"]] == [0.5, 0.5, None]
    low, high = found["ci95"]
    assert low < 0.5 < high


def test_top_5_is_among_the_five_most_probable() -> None:
    rows = np.tile(np.linspace(0.3, 0.0, 8), (8, 1))
    assert scores(rows, np.arange(8), tuple("abcdefgh"))["top5"] == 5 / 8


def test_calibration_error_is_that_of_the_paper() -> None:
    # One picture in each of the bins of 0.9, 0.7 and two in that of 0.6: gaps 0.1, 0.3 and |0 − 1.2|.
    assert calibration_error(PROBABILITIES, LABELS) == pytest.approx((0.1 + 0.3 + 1.2) / 4)
    sure = np.tile([0.8, 0.2], (10, 1))
    assert calibration_error(sure, np.array([0] * 8 + [1] * 2)) == pytest.approx(0.0)
    assert calibration_error(np.tile([1.0, 0.0], (4, 1)), np.ones(4, int)) == 1.0
    # Errors that cancel out over two bins do not within them.
    two = np.array([[0.9, 0.1], [0.6, 0.4]])
    assert calibration_error(two, np.array([1, 0])) == pytest.approx((0.9 + 0.4) / 2)


def test_a_run_and_its_files_score_alike(run_folder: Path, splits) -> None:
    rows: dict[str, dict[str, Any]] = {}
    for name in (".", "model.onnx", "model.safetensors"):
        rows[name] = evaluation.evaluate(run_folder / name, "demo")
    weights, shipped = rows["model.safetensors"], rows["model.onnx"]
    assert rows["."]["model"] == str(run_folder / "model.onnx")
    assert rows["."]["confusion"] == shipped["confusion"]
    assert weights["n"] == shipped["n"] == len(splits.test)
    assert 0.4 < weights["top1"] < 1
    assert abs(weights["top1"] - shipped["top1"]) <= 1 / len(splits.test)
    assert weights["ece"] == pytest.approx(shipped["ece"], abs=0.002)
    assert np.trace(shipped["confusion"]) == pytest.approx(shipped["top1"] * shipped["n"])
    assert shipped["clean"]["n"] == int((~splits.leaked).sum()) if splits.leaked.any() else "clean" not in shipped
    for row in rows.values():
        speed = row["throughput"]["images_per_second"]
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
        assert speed["n"] == evaluation.ROUNDS


def test_text_tells_classes_and_confusion(run_folder: Path) -> None:
    done = evaluate(run_folder, "demo", "--split", "validation")
    assert done.returncode == 0, done.stderr
    for words in ("top-1", "top-5", "calibration error", "images a second", "recall", "a column for each answer"):
        assert words in done.stdout
    assert "validation" in done.stdout
    assert done.stdout.count("Ankle boot") == 3 or done.stdout.lower().count("boot") == 3


def test_classes_are_matched_by_name_not_by_place(run_folder: Path, splits, tmp_path: Path) -> None:
    net, order = linear(splits), np.random.default_rng(1).permutation(10)
    final = net.get_classifier()
    with torch.no_grad():
        final.weight.copy_(final.weight[order].clone())  # type: ignore[union-attr]
        final.bias.copy_(final.bias[order].clone())  # type: ignore[union-attr]
    write(tmp_path, splits, net, tuple(splits.train.classes[i] for i in order))
    here, there = (evaluation.evaluate(each, "demo") for each in (run_folder, tmp_path))
    assert here["top1"] == there["top1"]
    by_name = [{each["name"]: each["recall"] for each in found["classes"]} for found in (here, there)]
    assert by_name[0] == by_name[1]


def test_an_onnx_file_is_scored_without_torch(run_folder: Path) -> None:
    probe = "import sys; sys.modules['torch'] = None\nfrom flyweight.cli import main; main()\n"
    words = ["evaluate", str(run_folder / "model.onnx"), "demo", "--json"]
    done = subprocess.run([sys.executable, "-c", probe, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["confusion"] == evaluation.evaluate(run_folder, "demo")["confusion"]


def test_the_run_s_own_test_pictures_are_scored(
    run_folder: Path, splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"seed": 7}))
    seeds = []
    monkeypatch.setattr(evaluation, "prepare", lambda *a, seed, **k: seeds.append(seed) or splits)
    evaluation.evaluate(tmp_path / "run", "demo")
    evaluation.evaluate(run_folder, "demo")
    assert seeds == [7, 0]
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(FlyweightError, match=r"run.json is damaged"):
        evaluation.evaluate(tmp_path / "run", "demo")


def test_what_does_not_fit_is_one_sentence(run_folder: Path, splits, tmp_path: Path) -> None:
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    write(fewer, splits, linear(splits), (*splits.train.classes[:9], "spaceship"))
    (tmp_path / "alone.safetensors").write_bytes((run_folder / "model.safetensors").read_bytes())
    (tmp_path / "empty").mkdir()
    cases = [
        ((fewer, "demo"), f"demo lacks spaceship and it adds {splits.train.classes[9]}"),
        ((tmp_path / "alone.safetensors", "demo"), "config.json"),
        ((tmp_path / "empty", "demo"), "neither model.onnx nor model.safetensors"),
        ((tmp_path / "no.onnx", "demo"), "no.onnx does not exist"),
        ((run_folder, "demo", "all"), "--split"),
        ((run_folder, "nowhere"), "nowhere does not exist"),
    ]
    for request, says in cases:
        with pytest.raises(UsageError) as found:
            evaluation.evaluate(*request)
        assert says in str(found.value)
    done = evaluate(fewer, "demo")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("flyweight: the classes of demo are not those of ")


def test_channels_that_differ_are_told(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source("demo")
    object.__setattr__(source, "channels", 3)
    monkeypatch.setattr(evaluation, "open_source", lambda data: source)
    with pytest.raises(UsageError, match="3 channels"):
        evaluation.evaluate(run_folder, "demo")
