"""Frozen features: what is written, and what a probe and the nearest neighbour make of them."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from flyweight import foreign
from flyweight.create import create_model
from flyweight.data import open_source, prepare
from flyweight.errors import UsageError
from flyweight.features import Features, embed, judge, linear_probe, nearest_neighbours, write
from flyweight.net import Net
from flyweight.preprocess import Preprocess
from flyweight.pretrained import choose
from flyweight.weights import net_bytes
from flyweight.zoo import build

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
        ("unknown", "give a run's folder, a model.safetensors, or the name of a network that weights are published of"),
        ("unpublished", "no weights of nin are published, but of"),
    ],
)
def test_the_command_tells_what_is_wrong(tmp_path: Path, case: str, told: str) -> None:
    net = small_net() if case != "colour" else create_model("airbench94", num_classes=10, width=0.25, size=28)
    preprocess = {"bare": None, "colour": Preprocess((28, 28), 3, (72.0,) * 3, (90.0,) * 3)}.get(case, GREY)
    (tmp_path / "model.safetensors").write_bytes(net_bytes(net, preprocess))
    out = tmp_path if case == "full" else tmp_path / "features"
    model = {"unknown": "mobilenet_v4", "unpublished": "nin"}.get(case, str(tmp_path / "model.safetensors"))
    command = [sys.executable, "-m", "flyweight", "embed", model, "demo"]
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
    assert told["files"] == ["features.npy", "features.csv"]
    assert told["n"] > 1000


@pytest.fixture
def three() -> list[Features]:
    rng = np.random.default_rng(0)
    return [split(rng.normal(size=(n, 5)), [i % 2 for i in range(n)], name) for n, name in ((4, "train"), (3, "test"))]


def test_parquet_holds_the_same_as_npy_and_csv(tmp_path: Path, three: list[Features]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    (file,) = write(tmp_path, three, ["<a>", "ö"], "parquet")
    write(tmp_path, three, ["<a>", "ö"])
    table = parquet.read_table(file)
    assert table.column_names == ["split", "class", "picture", "feature"]
    assert str(table.schema.field("feature").type).replace("element", "item") == "fixed_size_list<item: float>[5]"
    assert np.array_equal(np.array(table["feature"].to_pylist(), np.float32), np.load(tmp_path / "features.npy"))
    rows = list(csv.DictReader((tmp_path / "features.csv").read_text(encoding="utf-8").splitlines()))
    for name in ("split", "class", "picture"):
        assert table[name].to_pylist() == [row[name] for row in rows]


def test_without_pyarrow_parquet_says_how_to_get_it(
    tmp_path: Path, three: list[Features], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"pip install 'flyweight\[parquet\]'"):
        write(tmp_path, three, ["a", "b"], "parquet")
    assert list(tmp_path.iterdir()) == []


def test_a_published_network_is_taken_by_its_name(tmp_path: Path) -> None:
    """Its weights, its size, its mean and deviation."""
    source = choose("mobilenet_v2_050")
    net = build(source.spec()).eval()
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / source.file).write_bytes(save(foreign.give(net, "timm")))
    rng = np.random.default_rng(0)
    for name in ("left", "right"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(rng.integers(0, 256, (230, 226, 3), np.uint8)).save(tmp_path / "photos" / name / f"{i}.png")
    command = [sys.executable, "-m", "flyweight", "embed", "mobilenet_v2_050", "photos", "--out", "found"]
    environment = {**os.environ, "FLYWEIGHT_WEIGHTS": str(tmp_path / "weights")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "1280 values for each picture" in done.stdout
    assert "timm's mobilenetv2_050.lamb_in1k (licence: apache-2.0" in done.stdout
    rows = list(csv.DictReader((tmp_path / "found" / "features.csv").read_text(encoding="utf-8").splitlines()))
    with Image.open(tmp_path / "photos" / rows[0]["picture"]) as picture:
        small = np.asarray(picture.resize((224, 224), Image.Resampling.BILINEAR), np.float32) / 255
    x = torch.from_numpy((small - np.float32(source.mean)) / np.float32(source.std)).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = net.forward_head(net.forward_features(x), pre_logits=True).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "found" / "features.npy")[:1], expected, rtol=1e-3, atol=1e-4)
