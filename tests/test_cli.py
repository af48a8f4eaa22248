"""The command line as people meet it: real processes, exit codes, one clear sentence, nothing heavy until needed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flyweight.create import create_model
from flyweight.export import onnx
from flyweight.preprocess import Preprocess


def run(
    *words: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flyweight", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=120)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as flyweight ships it, of an untrained network."""
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    net = create_model("resnet8_cifar", num_classes=3, width=0.5).eval()
    preprocess = Preprocess((32, 32), 3, (120.0,) * 3, (60.0,) * 3)
    path.write_bytes(onnx.export(net, preprocess, ["cat", "dog", "cow & calf"]).SerializeToString())
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["fit", "--help"], ["predict", "--help"]])
def test_help_and_version_import_nothing_heavy(words: list[str]) -> None:
    probe = (
        "import sys; sys.argv = ['flyweight', *sys.argv[1:]]\n"
        "from flyweight.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: code = stop.code\n"
        "else: code = 0\n"
        "heavy = {'torch', 'onnxruntime', 'onnx', 'numpy', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)), code, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", probe, *words], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "[] 0"
    assert "flyweight" in done.stdout.lower()


def test_predict_needs_no_torch(model: Path, picture: Path) -> None:
    probe = (
        "import sys; sys.modules['torch'] = None; sys.modules['onnx'] = None\nfrom flyweight.cli import main; main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, "predict", model, picture], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(picture))


def test_predict_as_json(model: Path, picture: Path) -> None:
    done = run("predict", model, picture, picture, "--top", "2", "--json")
    rows = json.loads(done.stdout)
    assert [row["image"] for row in rows] == [str(picture)] * 2
    assert len(rows[0]["top"]) == 2
    assert rows[0]["top"][0]["probability"] >= rows[0]["top"][1]["probability"]


def test_models_are_listed() -> None:
    done = run("models", "squeeze*", "--json")
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["squeezenet1_1"]["params"] == 1_235_496
    assert "squeezenet1_1" in run("models").stdout


def test_cost_by_layer_adds_up() -> None:
    value = json.loads(
        run("cost", "mobilenet_v1", "--width", "0.5", "--resolution", "160", "--per-layer", "--json").stdout
    )
    assert value["input"] == [3, 160, 160]
    assert value["flops"] == 2 * value["macs"] == 2 * sum(layer["macs"] for layer in value["layers"])
    assert value["params"] == sum(layer["params"] for layer in value["layers"]) == 1_331_592
    text = run("cost", "mobilenet_v1", "--width", "0.5", "--resolution", "160", "--per-layer").stdout
    assert "1,331,592" in text
    assert "head.fc" in text


def test_a_dry_run_trains_nothing(tmp_path: Path) -> None:
    done = run("fit", "demo", "--budget", "size<=100KB, macs<=5M", "--time", "2m", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "dropped: " in done.stdout
    assert "trial 1" in done.stdout
    assert list(tmp_path.iterdir()) == []
    value = json.loads(run("fit", "demo", "--budget", "macs<=5M", "--dry-run", "--json").stdout)
    assert {c["status"] for c in value["candidates"]} == {"dropped", "not tried"}


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["fit"], 2, "which pictures"),
        (["fit", "demo"], 2, "latency<=2ms"),
        (["fit", "demo", "--budget", "speed<=3"], 2, "latency<=2ms"),
        (["fit", "nowhere", "--budget", "size<=1MB"], 2, "nowhere does not exist"),
        (["fit", "zip:nowhere", "--budget", "size<=1MB"], 2, "cifar10"),
        (["fit", "demo", "--budget", "size<=1MB", "--time", "soon"], 2, "'soon' is no time"),
        (["fit", "demo", "--budget", "size<=1MB", "--threads", "0"], 2, "--threads"),
        (["fit", "demo", "--budget", "size<=1MB", "--colour"], 2, "--colour"),
        (["fit", "demo", "--resume", "x"], 2, "--resume"),
        (["fit", "--resume", "nowhere"], 2, "nowhere"),
        (["fit", "--resume", "x", "--pretrained", "auto"], 2, "--resume"),
        (
            ["fit", "demo", "--budget", "size<=1MB", "--pretrained", "no.safetensors"],
            2,
            "no.safetensors does not exist",
        ),
        (["embed", "resnet18", "demo", "--format", "csv"], 2, "--format is npy or parquet, not 'csv'"),
        (["cost", "resnet1"], 2, "resnet18"),
        (["cost", "resnet18", "--resolution", "0"], 2, "0 x 0 pixels"),
        (["models", "nothing*"], 2, "no model matches"),
        (["report", "nowhere"], 2, "nowhere"),
        (["predict", "nowhere", "x.jpg"], 2, "nowhere does not exist"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_wrong_requests_get_one_sentence(words: list[str], code: int, says: str, tmp_path: Path) -> None:
    done = run(*words, cwd=tmp_path)
    assert (done.returncode, says in done.stderr) == (code, True), done.stderr
    assert done.stderr.startswith("flyweight: ")
    assert "Traceback" not in done.stderr


def test_wrong_pictures_and_models_get_one_sentence(model: Path, picture: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(picture.read_bytes()[:100])
    other = tmp_path / "other.onnx"
    other.write_bytes(b"no model")
    cases = [
        (run("predict", model, broken), 4, "broken.jpg"),
        (run("predict", model, tmp_path / "absent.jpg"), 2, "absent.jpg"),
        (run("predict", other, picture), 1, "other.onnx"),
        (run("predict", tmp_path / "no.onnx", picture), 2, "no.onnx"),
        (run("predict", tmp_path, picture), 2, "result.json"),
        (run("predict", model, picture, "--top", "0"), 2, "--top"),
    ]
    for done, code, says in cases:
        assert (done.returncode, says in done.stderr) == (code, True), done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    done = run("fit", "demo", "--budget", "size<=1MB", "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "is not empty" in done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("words", [(), ("weights",)])
def test_no_words_print_the_help_alone(words: tuple[str, ...]) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert "Usage" in done.stdout + done.stderr
    assert "flyweight: " not in done.stderr
