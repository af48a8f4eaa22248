"""Runtimes measured in processes of their own; the cost card; the verbs; which engine a job ships for."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

import flyweight
from flyweight import benching
from flyweight.bench.card import card
from flyweight.bench.engines import engine, engines, installed, lacking
from flyweight.bench.peak import peaks
from flyweight.bench.race import Entry, Runner, Timing, race
from flyweight.benching import Request, as_it_is, bench
from flyweight.cli.options import numbers
from flyweight.costs import cost
from flyweight.create import create_model
from flyweight.data import open_source, prepare
from flyweight.errors import FlyweightError, UsageError
from flyweight.export.targets import targets
from flyweight.export.task import Task
from flyweight.exported import Exported
from flyweight.exporting import Subject
from flyweight.preprocess import Preprocess
from flyweight.search.meter import AUTO, Here, engines_for, quick
from flyweight.weights import net_bytes

GREY = Preprocess((28, 28), 1, (72.0,), (90.0,))


@pytest.fixture(scope="module")
def subject() -> Subject:
    splits = prepare(open_source("demo"), [28])
    net = create_model("resnet8_cifar", num_classes=10, in_chans=1, width=0.25, size=28).eval()
    return Subject(Task(net, GREY, splits.train.classes), splits.train, splits.validation)


def file_of(subject: Subject) -> Exported:
    return targets()["onnx"].export(subject.task)


def test_files_are_measured_by_turns_and_answer_in_their_own_processes(subject: Subject, tmp_path: Path) -> None:
    entries = [Entry("onnxruntime", file_of(subject), 1), Entry("pytorch", as_it_is(subject), 1)]
    pixels = subject.validation.batch(28, range(4))
    found = race(entries, pixels, seconds=0.1, rounds=3, batches=(1, 4))
    for each in found:
        assert not each.failed
        assert 0 < each.p50 <= each.p95 <= each.p99 < each.cold_ms
        assert len(each.rounds) == 3
        assert each.spread[0] <= each.p50 <= each.spread[1]
        assert set(each.throughput) == {"1", "4"}
        assert each.file_bytes > 5000
        assert Timing.from_json(json.loads(json.dumps(each.to_json()))) == each
    assert 20e6 < found[0].peak_bytes < found[1].peak_bytes  # torch alone takes more than a hundred megabytes
    for number, entry in enumerate(entries):
        with Runner(entry, tmp_path / str(number)) as run:
            np.testing.assert_allclose(run(pixels), subject.reference[:4], atol=1e-5)


def test_what_fails_says_why_and_holds_up_nothing(subject: Subject) -> None:
    good, bad = file_of(subject), Exported("onnx", "float32", {"model.onnx": b"no model"}, GREY, ("a",))
    pixels = subject.validation.batch(28, range(1))
    wrong, right = race([Entry("onnxruntime", bad, 1), Entry("onnxruntime", good, 1)], pixels, 0.05, 2)
    assert "onnxruntime, float32, 1 thread: ended with 1: " in wrong.failed
    assert wrong.to_json()["p50"] is None
    assert right.p50 < math.inf


def test_a_process_that_is_killed_is_told(subject: Subject, tmp_path: Path) -> None:
    with Runner(Entry("onnxruntime", file_of(subject), 1), tmp_path) as run:
        run.process.kill()
        with pytest.raises(FlyweightError, match="ended with -9"):
            run(subject.validation.batch(28, range(1)))


def test_the_card_states_shares_of_what_is_possible(subject: Subject) -> None:
    possible = peaks(1)
    assert 1e8 < possible["float32"] < 1e13
    counted = cost(subject.task.net)  # type: ignore[arg-type]
    timing = Timing("onnxruntime", "onnx", "float32", 1, 1000, p50=1000 * counted.macs / possible["float32"])
    told = card(counted, [timing, Timing("ncnn", "ncnn", "int8", 1, 9, failed="it did")], {1: possible})
    for format, engine_name, of in (
        ("float32, clustered, packed", "onnxruntime", 0.5),
        ("int8 per-channel u8", "onnxruntime", 0.25),
        ("float32", "openvino-bf16", None),  # whose peak was not measured
    ):
        half = Timing(engine_name, "onnx", format, 1, 9, p50=2000 * counted.macs / possible["float32"])
        rate = {"float32": possible["float32"], "int8": 2 * possible["float32"]}
        (row,) = card(counted, [half], {1: rate})["engines"]
        assert row["of_peak"] == of
    assert told["flops"] == 2 * told["macs"] == 2 * counted.macs
    assert [row["of_peak"] for row in told["engines"]] == [pytest.approx(1), None]
    assert told["file_bytes"] == {"onnx, float32": 1000}


def test_bench_writes_a_runs_card(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(net_bytes(subject.task.net, GREY, subject.task.classes))  # type: ignore[arg-type]
    (tmp_path / "run.json").write_text('{"source": "demo", "seed": 0, "skip_corrupt": false}')
    monkeypatch.setattr(benching, "FORMATS", ("float32",))
    request = Request(("onnxruntime", "pytorch"), (1,), seconds=0.05, rounds=2)
    (told,) = bench([tmp_path], request)
    assert {row["engine"] for row in told["engines"]} == {"onnxruntime", "pytorch"}
    assert all(row["agreement"] == 1 for row in told["engines"])
    assert json.loads((tmp_path / "card.json").read_text()) == told


def test_bench_of_a_file_takes_the_engines_that_open_it(subject: Subject, tmp_path: Path) -> None:
    path = file_of(subject).written(tmp_path)
    (told,) = bench([path], Request(("onnxruntime",), (1,), 0.05, 2))
    assert [row["engine"] for row in told["engines"]] == ["onnxruntime"]
    with pytest.raises(UsageError, match="none of the engines pytorch opens"):
        bench([path], Request(("pytorch",), (1,), 0.05, 2))
    with pytest.raises(UsageError, match=r"of no kind that an engine opens: these end in .*\.onnx"):
        bench([tmp_path / "preprocess.json"], Request())


def test_what_cannot_be_used_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no engine 'tensorrt'; there are executorch, litert"):
        Request(("tensorrt",)).chosen()
    with pytest.raises(UsageError, match="--threads takes whole numbers"):
        numbers("1,two", "--threads")
    monkeypatch.setattr(engines()["openvino"], "NEEDS", ("no_such_module",))
    assert lacking(engines()["openvino"]) == "no_such_module is not installed: pip install 'flyweight[openvino]'"
    with pytest.raises(UsageError, match="the engine openvino cannot be used: no_such_module"):
        engine("openvino")
    assert "openvino" not in engines_for(AUTO)


def test_no_engine_is_imported_before_it_is_used() -> None:
    import subprocess

    code = (
        "import sys, flyweight.bench.engines as e; e.engines();"
        "print([m for m in ('torch', 'openvino', 'ncnn', 'ai_edge_litert', 'executorch') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_candidates_are_measured_in_the_fastest_of_several_engines(subject: Subject) -> None:
    names = quick(tuple(name for name in ("onnxruntime", "litert") if name in installed()))
    picture = subject.validation.batch(28, [0])
    (both,) = Here(names, 1)([subject.task], picture)
    alone = [Here((name,), 1)([subject.task], picture)[0] for name in names]
    assert both.size in {each.size for each in alone}
    assert both.ms < 3 * min(each.ms for each in alone)


def test_a_job_ships_for_the_engine_that_it_is_asked_for(tmp_path: Path) -> None:
    if "litert" not in installed():
        pytest.skip("ai_edge_litert is not installed")
    run = flyweight.fit("demo", "size<=2MB", time=10, out=tmp_path / "run", engine="litert")
    shipped = run.result["shipped"]
    assert shipped["engine"] == run.result["latency_ms"]["engine"] == "litert"
    assert shipped["file"] in ("model.tflite", "model_int8.tflite")
    assert (run.folder / shipped["file"]).stat().st_size == shipped["size_bytes"]
    assert (run.folder / "model.onnx").stat().st_size > 1000
    told = json.loads((run.folder / "card.json").read_text())
    assert {row["engine"] for row in told["engines"]} == {"litert", "pytorch"}
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert 'id="runtimes"' in page
    picture = np.zeros((28, 28, 1), np.uint8)
    again = flyweight.load(run.folder).predict_proba(picture)
    assert again.shape == (1, 10)
    assert again.sum() == pytest.approx(1, abs=1e-3)
