"""Frozen features: what is written, and what a probe and the nearest neighbour make of them."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flyweight.create import create_model
from flyweight.data import open_source, prepare
from flyweight.features import Features, embed, judge, linear_probe, nearest_neighbours, write
from flyweight.net import Net
from flyweight.preprocess import Preprocess
from flyweight.weights import net_bytes

GREY = Preprocess((28, 28), 1, (72.0,), (90.0,))


def small_net() -> Net:
    torch.manual_seed(0)
    return create_model("airbench94", num_classes=10, in_chans=1, width=0.25, size=28)


def split(values: np.ndarray, labels: list[int], name: str) -> Features:
    return Features(values.astype(np.float32), np.array(labels), [f"{name}{i}" for i in range(len(labels))], name)


def test_the_probe_finds_a_linear_rule_and_its_penalty_by_the_validation_pictures() -> None:
    rng = np.random.default_rng(0)
    rule = rng.normal(size=(6, 3))

    def draw(n: int, name: str) -> Features:
        x = rng.normal(size=(n, 6))
        return split(x * 10 + 3, list((x @ rule).argmax(axis=1)), name)

    train, validation, test = draw(400, "train"), draw(100, "validation"), draw(200, "test")
    answers, penalty = linear_probe(train, validation, test)
    assert (answers == test.labels).mean() > 0.85
    assert penalty < 1e4


def test_the_nearest_neighbour_is_by_angle() -> None:
    known = split(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), [0, 1, 2], "train")
    asked = split(np.array([[100.0, 1.0], [0.0, 0.1], [3.0, 2.9]]), [0, 1, 2], "test")
    assert nearest_neighbours([known], asked).tolist() == [0, 1, 2]


def test_features_are_what_the_last_layer_reads(tmp_path: Path) -> None:
    splits, net = prepare(open_source("demo"), [28]), small_net().eval()
    train, validation, test = embed(net, splits, GREY)
    pixels = torch.from_numpy(splits.test.batch(28, [5])).float()
    with torch.no_grad():
        logits = net(((pixels - 72) / 90).permute(0, 3, 1, 2))
        fc = net.get_classifier()
        torch.testing.assert_close(fc(torch.from_numpy(test.values[5:6])), logits, rtol=1e-4, atol=1e-4)
    write(tmp_path, [train, validation, test], splits.train.classes)
    values = np.load(tmp_path / "features.npy")
    rows = list(csv.DictReader((tmp_path / "features.csv").read_text(encoding="utf-8").splitlines()))
    assert len(values) == len(rows) == len(train.labels) + len(validation.labels) + len(test.labels)
    position = len(train.labels) + len(validation.labels) + 5
    assert np.array_equal(values[position], test.values[5])
    assert (rows[position]["split"], rows[position]["picture"]) == (test.split, test.names[5])
    assert rows[position]["class"] == splits.test.classes[test.labels[5]]
    judged = judge(train, validation, test)
    assert judged["linear_probe_top1"] > 0.6  # random filters already tell clothes apart
    assert judged["nearest_neighbour_top1"] > 0.5


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("bare", "does not say how pictures are made ready"),
        ("full", "is not an empty folder"),
        ("colour", "has 1 channels and"),
    ],
)
def test_the_command_tells_what_is_wrong(tmp_path: Path, case: str, told: str) -> None:
    net = small_net() if case != "colour" else create_model("airbench94", num_classes=10, width=0.25, size=28)
    preprocess = {"bare": None, "full": GREY, "colour": Preprocess((28, 28), 3, (72.0,) * 3, (90.0,) * 3)}[case]
    (tmp_path / "model.safetensors").write_bytes(net_bytes(net, preprocess))
    out = tmp_path if case == "full" else tmp_path / "features"
    command = [sys.executable, "-m", "flyweight", "embed", str(tmp_path / "model.safetensors"), "demo"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_command_writes_and_judges(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(net_bytes(small_net(), GREY))
    command = [sys.executable, "-m", "flyweight", "embed", "model.safetensors", "demo", "--out", "found", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    told = json.loads(done.stdout)
    assert np.load(tmp_path / told["folder"] / "features.npy").shape[1] == told["features"]
    assert told["n"] > 1000
