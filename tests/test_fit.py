"""The main job end to end on real pictures: what it leaves, what stops it, and how it goes on after a kill."""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import save

import flyweight
from flyweight import foreign, pretrained, ship, shipping, stages
from flyweight.create import create_model
from flyweight.data import open_source
from flyweight.errors import DataError, FlyweightError, ParityError, UsageError
from flyweight.fitting import outlook
from flyweight.job import FILE, Job
from flyweight.preprocess import Preprocess
from flyweight.pretrained import Source
from flyweight.records import Record, Records, read_records, seconds_spent
from flyweight.search import donor
from flyweight.search.donor import open_donor
from flyweight.search.space import Candidate
from flyweight.ship import write_json
from flyweight.weights import load_net, net_bytes
from flyweight.zoo import build, spec_of

FORMATS = ("png", "jpg", "webp", "bmp", "gif")
BUDGET = "latency<=20ms, size<=200KB"


def photos(place: Path, per_class: int = 24) -> Path:
    """A folder of class folders: pictures of three garments in five formats and many sizes, some grey, most tinted."""
    source = open_source("demo")
    assert isinstance(source.images, np.ndarray)
    rng = np.random.default_rng(0)
    for label, name in ((1, "trousers"), (8, "bags & more"), (9, "<boots>")):
        (place / name).mkdir(parents=True)
        for i, index in enumerate(np.flatnonzero(source.labels == label)[:per_class]):
            grey = source.images[index, :, :, 0]
            colour = np.stack([grey, grey // 2, 255 - grey], axis=-1) if i % 3 else grey
            width, height = (int(side) for side in rng.integers(64, 120, 2))
            Image.fromarray(colour).resize((width, height)).save(place / name / f"{i}.{FORMATS[i % len(FORMATS)]}")
    return place


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLYWEIGHT_CACHE", str(tmp_path / "cache"))


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "flyweight", *map(str, words)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[flyweight.Run, Path]:
    """A finished run on a folder of pictures of different sizes and formats."""
    place = tmp_path_factory.mktemp("job")
    data = photos(place / "photos")
    before = digests(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLYWEIGHT_CACHE", str(place / "cache"))
        run = flyweight.fit(data, BUDGET, time="16s", out=place / "run")
    assert digests(data) == before, "the user's files are only read"
    return run, data


def test_it_leaves_what_is_documented(finished: tuple[flyweight.Run, Path]) -> None:
    run, _ = finished
    left = {path.name for path in run.folder.iterdir()}
    documented = (Path(__file__).parents[1] / "docs" / "run-folder.md").read_text(encoding="utf-8")
    assert left == {
        "model.onnx", "model.safetensors", "config.json", "predict.py", "result.json", "records.jsonl", "report.html",
        "environment.json", "MODEL_CARD.md", "run.json", "card.json",
    }  # fmt: skip
    assert all(f"`{name}`" in documented for name in left)
    for kind in {record["kind"] for record in read_records(run.folder / "records.jsonl")}:
        assert f"| `{kind}` |" in documented


def test_the_result_is_complete_and_consistent(finished: tuple[flyweight.Run, Path]) -> None:
    run, data = finished
    result = run.result
    shipped = run.folder / result["shipped"]["file"]
    assert result["shipped"]["size_bytes"] == shipped.stat().st_size
    assert result["shipped"]["sha256"] == hashlib.sha256(shipped.read_bytes()).hexdigest()
    assert [line["name"] for line in result["budget"]] == ["latency", "size"]
    assert result["budget"][1]["measured"] == shipped.stat().st_size
    assert (result["status"] == "met") == all(line["met"] for line in result["budget"]) == run.met
    counts = {split: result["data"][split] for split in ("train", "validation", "test")}
    assert sum(counts.values()) == sum(path.is_file() for path in data.rglob("*"))
    assert result["test"]["n"] == counts["test"]
    assert result["test"]["ci95"][0] <= result["test"]["top1"] <= result["test"]["ci95"][1]
    assert sum(
        result["seconds"][stage] for stage in ("data", "search", "train", "compress", "verify")
    ) == pytest.approx(result["seconds"]["total"], rel=0.1)
    winners = [candidate for candidate in result["candidates"] if candidate["status"] == "winner"]
    assert [winner["name"] for winner in winners] == [result["winner"]["name"]]
    assert all(candidate["why"] for candidate in result["candidates"]), "each says why"
    tested = next(record for record in read_records(run.folder / "records.jsonl") if record["kind"] == "test")
    confusion = np.array(tested["confusion"])
    assert confusion.sum() == result["test"]["n"]
    assert np.trace(confusion) == round(result["test"]["top1"] * result["test"]["n"])


def test_it_ends_in_time(finished: tuple[flyweight.Run, Path]) -> None:
    result = finished[0].result
    assert result["seconds"]["total"] <= 3 * result["time_limit"], "a hang, not a slow machine, is what this notices"


def test_what_ships_is_what_was_trained(finished: tuple[flyweight.Run, Path]) -> None:
    run, _ = finished
    onnx.checker.check_model(onnx.load_model_from_string((run.folder / "model.onnx").read_bytes()), full_check=True)
    net = load_net(run.folder / "model.safetensors")
    assert net.spec is not None
    assert net.spec.to_json() == run.result["winner"]["spec"]
    config = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
    assert config["label_names"] == run.result["data"]["classes"] == list(run.classifier.classes)


def test_every_way_to_predict_answers_the_same(finished: tuple[flyweight.Run, Path]) -> None:
    run, data = finished
    pictures = sorted(path for path in data.rglob("*") if path.is_file())[::5]
    assert len({path.suffix for path in pictures}) > 1
    answers = run.predict(pictures)
    opened = [Image.open(path) for path in pictures]
    assert flyweight.load(run.folder).predict(opened) == answers
    for image in opened:
        image.close()
    np.testing.assert_allclose(run.predict_proba(pictures).sum(axis=1), 1, atol=1e-5)
    alone = subprocess.run(
        [sys.executable, "-I", run.folder / "predict.py", *pictures], capture_output=True, text=True, check=True
    )
    assert [
        line.removeprefix(f"{path} ").rsplit(" ", 1)[0]
        for path, line in zip(pictures, alone.stdout.splitlines(), strict=True)
    ] == answers
    spoken = subprocess.run(
        command("predict", run.folder, *pictures, "--json"), capture_output=True, text=True, check=True
    )
    assert [row["top"][0]["class"] for row in json.loads(spoken.stdout)] == answers


def test_the_report_names_the_classes_safely(finished: tuple[flyweight.Run, Path]) -> None:
    page = (finished[0].folder / "report.html").read_text(encoding="utf-8")
    assert "&lt;boots&gt;" in page
    assert "<boots>" not in page


def test_a_finished_run_is_opened_not_repeated(finished: tuple[flyweight.Run, Path]) -> None:
    run, data = finished
    before = digests(run.folder)
    assert flyweight.resume(run.folder).result == run.result
    with pytest.raises(UsageError, match="already holds a run"):
        flyweight.fit(data, BUDGET, time="10s", out=run.folder)
    assert digests(run.folder) == before


def test_a_budget_that_nothing_meets_ships_the_nearest(tmp_path: Path) -> None:
    done = subprocess.run(
        command("fit", "demo", "--budget", "size<=2KB", "--time", "10s", "--out", tmp_path / "run"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3, done.stderr
    assert "size is" in done.stderr.splitlines()[-1]
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert result["status"] == "not met"
    nearest = min(result["candidates"], key=lambda candidate: candidate["size_bytes"] or float("inf"))
    assert result["winner"]["name"] == nearest["name"]
    assert (tmp_path / "run" / "model.onnx").exists()


def test_damaged_pictures_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    data = photos(tmp_path / "photos", per_class=12)
    whole = data / "trousers" / "1.jpg"
    whole.write_bytes(whole.read_bytes()[:200])
    before = digests(data)
    with pytest.raises(DataError, match=r"1\.jpg .*--skip-corrupt"):
        flyweight.fit(data, BUDGET, time="10s", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    done = subprocess.run(
        command("fit", data, "--budget", BUDGET, "--out", tmp_path / "run"), capture_output=True, text=True
    )
    assert (done.returncode, "1.jpg" in done.stderr, "Traceback" in done.stderr) == (4, True, False)
    run = flyweight.fit(data, BUDGET, time="8s", out=tmp_path / "run", skip_corrupt=True)
    assert any("1.jpg" in note for note in run.result["data"]["notes"])
    assert digests(data) == before


def wait_for(folder: Path, kind: str, after: float, process: subprocess.Popen[str]) -> None:
    """Until the run has a record of this kind that was made when it had worked for longer than `after` seconds."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        if any(record["kind"] == kind and record["at"] > after for record in read_records(folder / "records.jsonl")):
            return
        time.sleep(0.05)
    raise AssertionError(f"no {kind} record in time")


def stopped(words: list[str], folder: Path, kind: str, how: signal.Signals) -> list[Record]:
    """The records of a job that a signal ended a second after its next record of this kind."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(folder, kind, seconds_spent(folder), process)
    time.sleep(1)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130)
    assert "Traceback" not in errors
    if how != signal.SIGKILL:
        assert f"--resume {folder}" in errors
    return read_records(folder / "records.jsonl")


def test_stopped_again_and_again_it_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    # Shorter jobs have no time for trials. This budget leaves float32 to ship where so short a training makes a network
    # that int8 answers too differently for.
    words, again = command("fit", "demo", "--budget", "params<=200k", "--time", "40s", "--out", folder), None
    lives = [
        ("candidate", signal.SIGKILL),
        ("trial", signal.SIGTERM),
        ("winner", signal.SIGINT),
        ("log", signal.SIGKILL),
    ]
    before: list[Record] = []
    for kind, how in lives:  # "log": it says that it goes on, in the final training
        found = stopped(again or words, folder, kind, how)
        assert lasting(found)[: len(lasting(before))] == lasting(before), "no record is lost"
        before, again = found, command("fit", "--resume", folder)
    done = subprocess.run(command("fit", "--resume", folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = read_records(folder / "records.jsonl")
    assert lasting(after)[: len(lasting(before))] == lasting(before), "no record is lost"
    epochs = [record["epoch"] for record in after if record["kind"] == "epoch" and record["stage"] == "final"]
    assert epochs == sorted(set(epochs)), "nor made twice"
    for kind in ("candidate", "trial", "winner", "job", "data"):
        made = [(r["kind"], r.get("name"), r.get("rung")) for r in after if r["kind"] == kind]
        assert len(made) == len(set(made)), "none is made twice"
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert max(record["at"] for record in before) <= result["seconds"]["total"]
    assert not (folder / "state").exists()


def lasting(records: list[Record]) -> list[Record]:
    """Without what a training reports after its last checkpoint, which is made again with the steps that are."""
    return [record for record in records if record["kind"] not in ("epoch", "log")]


def test_a_full_disk_gets_one_sentence(tmp_path: Path) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    done = subprocess.run(
        command("fit", "demo", "--budget", "size<=200KB", "--time", "12s", "--out", tmp_path / "run"),
        capture_output=True, text=True, preexec_fn=small_files,
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "cannot be written" in last
    assert "--resume" in last
    assert "Traceback" not in done.stderr


def test_an_export_that_answers_otherwise_is_not_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = shipping.answers
    monkeypatch.setattr(
        shipping, "answers", lambda run, data, preprocess: np.roll(honest(run, data, preprocess), 1, axis=1)
    )
    with pytest.raises(ParityError, match="nothing was shipped"):
        flyweight.fit("demo", "params<=200k", time="8s", out=tmp_path / "run")
    assert not (tmp_path / "run" / "model.onnx").exists()
    assert ParityError.exit_code == 5


@pytest.mark.parametrize(
    ("straight", "mirrored", "n", "flip"),
    [(0.9, 0.88, 1000, True), (0.9, 0.2, 1000, False), (0.9, 0.84, 1000, False), (0.9, 0.84, 50, True)],
)
def test_pictures_are_mirrored_only_where_it_does_no_harm(straight: float, mirrored: float, n: int, flip: bool) -> None:
    trial = {"val_top1": straight, "mirrored_top1": mirrored}
    assert stages.mirroring_is_harmless(trial, n) is flip


def test_cifar10_and_fashion_mnist_open(real_data: Path, fashion_mnist: Path, tmp_path: Path) -> None:
    for data, shape in (
        (f"cifar10:{real_data / 'cifar-10-python.tar.gz'}", (50_000, 10_000)),
        (f"idx:{fashion_mnist}", (60_000, 10_000)),
    ):
        source = open_source(data)
        assert ((source.splits == "train").sum(), (source.splits == "test").sum()) == shape


def test_flowers_find_their_repeats(real_data: Path, tmp_path: Path) -> None:
    """The test images that repeat training images are scored apart."""
    data = tmp_path / "flowers"
    for split, count in (("train", 12), ("test", 20)):
        for kind in ("daisy", "iris", "pansy"):
            (data / split / kind).mkdir(parents=True)
            for path in sorted((real_data / "flowers12" / split / kind).iterdir())[:count]:
                shutil.copy(path, data / split / kind)
    planted = next((data / "train" / "iris").iterdir())
    shutil.copy(planted, data / "test" / "iris" / "again.jpg")
    run = flyweight.fit(data, "size<=300KB", time="10s", out=tmp_path / "run")
    clean = run.result["test_clean"]
    assert clean["duplicates"] >= 1
    assert clean["n"] + clean["duplicates"] == run.result["test"]["n"]


def test_environment_is_recorded(finished: tuple[flyweight.Run, Path]) -> None:
    environment = json.loads((finished[0].folder / "environment.json").read_text(encoding="utf-8"))
    assert environment["cores"] == os.cpu_count()
    assert set(environment["versions"]) >= {"torch", "onnxruntime", "numpy"}


@pytest.mark.parametrize(("epochs", "repeated"), [((1.0, 2.0), False), ((1.0, 0.1, 2.1), True), ((1.0, None), False)])
def test_a_disturbed_trial_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: tuple[float | None, ...], repeated: bool
) -> None:
    found = iter({"epochs": each, "val_top1": each and each / 10, "mirrored_top1": None} for each in epochs)
    monkeypatch.setattr(stages, "_tried", lambda work, candidate, seconds, last: next(found))
    work = SimpleNamespace(records=Records(tmp_path, lambda: 0.0))
    candidate = Candidate("resnet8_cifar", spec_of("resnet8_cifar"))
    for rung in (0, 1):
        accuracy = stages._trial(work, candidate, rung, 3.0, last=1)
    assert accuracy == (epochs[-1] and epochs[-1] / 10)
    assert next(found, None) is None
    assert any("repeated" in record["message"] for record in work.records.all("log")) is repeated


def test_a_job_starts_from_weights(tmp_path: Path) -> None:
    weights = tmp_path / "earlier.safetensors"
    torch.manual_seed(0)
    net = create_model("airbench94", num_classes=4, in_chans=3, width=0.25, size=28)  # for other classes and channels
    weights.write_bytes(net_bytes(net, Preprocess((28, 28), 3, (72.5,) * 3, (90.0,) * 3)))
    run = flyweight.fit("demo", "params<=200k", time="8s", out=tmp_path / "run", pretrained=weights)
    records = [json.loads(line) for line in (run.folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    told = [record["message"] for record in records if record["kind"] == "log"]
    assert any("the classifier for 4 classes was dropped" in message for message in told)
    assert any("kernels were summed for grey" in message for message in told)
    assert run.result["winner"]["name"].endswith(" from earlier"), "so short a job trains the first candidate"
    job = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
    assert job["pretrained"] == str(weights)
    assert job["command"].endswith(f"--pretrained {weights}")
    assert job["weights"] == run.result["weights"]["found"]
    assert job["weights"][0]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    from_it = [candidate["name"] for candidate in run.result["candidates"] if candidate["weights"] == "earlier"]
    assert from_it == [name for name in (c["name"] for c in run.result["candidates"]) if name.endswith(" from earlier")]
    card = (run.folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert f"Fine-tuned from the weights earlier (file {weights.name}, sha256 " in card
    assert "Licence of these weights: not known." in card


def tiny_source(monkeypatch: pytest.MonkeyPatch) -> Source:
    """A table of published weights with one entry: MobileNetV1 at a quarter of its width, for 96 pixels."""
    args = {"width": 0.25, "size": 96}
    entry = Source("mobilenet_v1", "timm", "tiny.test", hub="timm/tiny.test", args=args, bytes=2_000_000)
    entry = replace(entry, size=(96, 96), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), licence="apache-2.0")
    for module in (pretrained, donor):
        monkeypatch.setattr(module, "table", lambda: {"mobilenet_v1": (entry,)})
    return entry


def test_what_ships_names_the_weights_and_their_licence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached weights serve unasked; so short a job trains the first candidate, which starts from them."""
    entry = tiny_source(monkeypatch)
    cached = tmp_path / "weights" / entry.file
    cached.parent.mkdir()
    cached.write_bytes(save(foreign.give(build(entry.spec()), "timm")))
    monkeypatch.setenv("FLYWEIGHT_WEIGHTS", str(cached.parent))
    data = photos(tmp_path / "photos", per_class=12)
    run = flyweight.fit(data, "size<=1MB", time="8s", out=tmp_path / "run")
    assert " from tiny.test" in run.result["winner"]["name"]
    assert run.result["winner"]["weights"] == {
        "name": "tiny.test",
        "library": "timm",
        "licence": "apache-2.0",
        "address": entry.address,
        "path": str(cached),
        "sha256": hashlib.sha256(cached.read_bytes()).hexdigest(),
    }
    card = (run.folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert f"Fine-tuned from timm's weights tiny.test ({entry.address}, file tiny.test.safetensors" in card
    assert "Licence of these weights: apache-2.0." in card
    assert "random weights" not in card
    told = [record["message"] for record in read_records(run.folder / "records.jsonl") if record["kind"] == "log"]
    assert f"candidates also start from the weights timm's tiny.test (licence: apache-2.0; {cached})" in told
    assert "tiny.test" in (run.folder / "report.html").read_text(encoding="utf-8")
    preprocess = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))["preprocess"]
    assert preprocess["mean"] == pytest.approx([127.5, 102, 76.5])


def test_offline_the_job_starts_anew_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_source(monkeypatch)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    data = photos(tmp_path / "photos", per_class=12)
    run = flyweight.fit(data, "size<=1MB", time="8s", out=tmp_path / "run", pretrained="auto")
    (note,) = run.result["weights"]["notes"]
    assert note.startswith("no weights are cached; cannot reach 127.0.0.1:9 (")
    assert run.result["weights"] == {"asked": "auto", "found": [], "notes": [note]}
    records = read_records(run.folder / "records.jsonl")
    assert note in [record["message"] for record in records if record["kind"] == "log"]
    assert run.result["winner"]["weights"] is None
    assert "From random weights, so no licence" in (run.folder / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_a_job_goes_on_only_with_the_same_weights(tmp_path: Path) -> None:
    weights = tmp_path / "earlier.safetensors"
    net = create_model("airbench94", num_classes=4, in_chans=1, width=0.25, size=28)
    weights.write_bytes(net_bytes(net, Preprocess((28, 28), 1, (72.0,), (90.0,))))
    job = Job(
        "demo", BUDGET, 8.0, 1, 0, False, flyweight.__version__, "", str(weights), [open_donor(weights).to_json()]
    )
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / FILE, job.to_json())
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    with pytest.raises(UsageError, match=r"earlier\.safetensors is not the file that the job started from"):
        flyweight.resume(tmp_path / "run")
    weights.unlink()
    with pytest.raises(UsageError, match=r"earlier\.safetensors, which the job starts from, is gone"):
        flyweight.resume(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


def test_a_dry_run_shows_what_starts_from_weights(tmp_path: Path) -> None:
    weights = tmp_path / "earlier.safetensors"
    net = create_model("airbench94", num_classes=4, in_chans=1, width=0.25, size=28)
    weights.write_bytes(net_bytes(net, Preprocess((28, 28), 1, (72.0,), (90.0,))))
    shown = outlook("demo", "macs<=20M", pretrained=weights)
    assert shown.order[0].name == "airbench x0.25 @28 from earlier"
    assert list(shown.notes) == [f"candidates also start from the weights earlier ({weights})"]


@pytest.mark.parametrize(("licence", "told"), [("bsd-3-clause", "bsd-3-clause."), (None, "not stated by torchvision.")])
def test_a_licence_that_nobody_states_is_not_invented(licence: str | None, told: str) -> None:
    file = {"path": "/a/net.pth", "sha256": "0123", "address": "https://a.example/net.pth"}
    text = ship._origin({"name": "NET.V1", "library": "torchvision", "licence": licence, **file})
    assert text.startswith("Fine-tuned from torchvision's weights NET.V1 (https://a.example/net.pth, file net.pth, ")
    assert text.endswith(f"Licence of these weights: {told}")


@pytest.mark.parametrize("fault", ["missing", "bare", "damaged"])
def test_weights_that_cannot_be_started_from_are_told_before_anything_is_done(tmp_path: Path, fault: str) -> None:
    weights = tmp_path / "weights.safetensors"
    if fault == "bare":
        weights.write_bytes(net_bytes(create_model("resnet8_cifar", num_classes=10)))
    if fault == "damaged":
        weights.write_bytes(b"no tensors")
    with pytest.raises(FlyweightError, match=r"weights\.safetensors"):
        flyweight.fit("demo", BUDGET, time="8s", out=tmp_path / "run", pretrained=weights)
    assert not (tmp_path / "run").exists()
