"""Packed files from the main job, and `flyweight compress`, end to end on real pictures."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import flyweight
from flyweight import training
from flyweight.compressing import Request, compress_run
from flyweight.data import open_source
from flyweight.errors import FlyweightError, UsageError
from flyweight.records import read_records

LIMIT = 6500


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `flyweight train`."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    training.train_network(training.Request("demo", "resnet8_cifar", {"width": 0.25}, seconds=4.0), folder)
    return folder


def pictures() -> list[np.ndarray]:
    source = open_source("demo")
    assert isinstance(source.images, np.ndarray)
    return list(source.images[:40])


def test_a_size_that_only_a_packed_file_keeps(tmp_path: Path) -> None:
    run = flyweight.fit("demo", f"size<={LIMIT}B", time="12s", out=tmp_path / "run")
    assert run.met, run.result["budget"]
    shipped = run.result["shipped"]
    data = (run.folder / "model.fly").read_bytes()
    assert (shipped["file"], shipped["size_bytes"]) == ("model.fly", len(data))
    assert shipped["sha256"] == hashlib.sha256(data).hexdigest()
    assert len(data) <= LIMIT < (run.folder / "model.onnx").stat().st_size
    assert flyweight.open_packed(run.folder / "model.fly").onnx() == (run.folder / "model.onnx").read_bytes()
    winner = next(each for each in run.result["candidates"] if each["status"] == "winner")
    assert winner["packed"]
    records = read_records(run.folder / "records.jsonl")
    steps = [record for record in records if record["kind"] == "compression"]
    assert [record["step"] for record in steps] == ["cluster"]
    assert steps[-1]["after"]["packed_bytes"] <= LIMIT < steps[-1]["before"]["packed_bytes"]
    formats = {record["format"]: record for record in records if record["kind"] == "variant"}
    assert formats[shipped["format"]]["chosen"]
    assert formats[shipped["format"]]["val_top1"] == run.result["validation"]["top1"]
    by_fly = flyweight.open_packed(run.folder / "model.fly").predict_proba(pictures())
    np.testing.assert_array_equal(run.predict_proba(pictures()), by_fly)
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "What each step of compression bought and cost" in page
    assert "`model.fly` is the same classifier packed" in (run.folder / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_a_trained_network_is_compressed_to_a_size(trained: Path, tmp_path: Path) -> None:
    result = compress_run(Request(str(trained), size=8_000, drop=1 - 1e-9, macs=0.6, seconds=1.0), tmp_path / "small")
    assert result["status"] == "met"
    assert result["shipped"]["size_bytes"] == (tmp_path / "small" / "model.fly").stat().st_size <= 8_000
    before = json.loads((trained / "result.json").read_text(encoding="utf-8"))
    assert result["winner"]["macs"] <= 0.6 * before["network"]["macs"]
    assert result["validation"]["before"] == pytest.approx(before["validation"]["top1"], abs=0.01)
    records = read_records(tmp_path / "small" / "records.jsonl")
    steps = [record for record in records if record["kind"] == "compression"]
    assert [record["step"] for record in steps] == ["prune", "cluster"]
    assert steps[0]["after"] == steps[1]["before"] | {"latency_ms": steps[0]["after"]["latency_ms"]}
    assert steps[0]["after"]["latency_ms"] > 0
    assert len(flyweight.load(tmp_path / "small").predict(pictures())) == 40


def test_without_a_size_the_smallest_that_loses_little(trained: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flyweight", "compress", trained, "--max-drop", "5", "--time", "1s", "--json",
         "--out", tmp_path / "small"], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["validation"]["before"] - result["validation"]["top1"] <= 0.05
    assert result["shipped"]["size_bytes"] < 0.2 * result["float_bytes"]


def test_what_cannot_be_kept_is_told(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(FlyweightError, match="clustering cannot bring the packed file to 884 B"):
        compress_run(Request(str(trained), size=900, seconds=1.0), tmp_path / "tiny")
    with pytest.raises(UsageError, match="is no finished run"):
        compress_run(Request(str(tmp_path)), tmp_path / "none")
    with pytest.raises(UsageError, match="--max-drop is in points"):
        compress_run(Request(str(trained), drop=1.5), tmp_path / "wrong")
    assert not (tmp_path / "none").exists()
    assert not (tmp_path / "wrong").exists()
