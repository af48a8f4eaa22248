"""The page that classifies in the browser: its resampling, its answers in Chromium, and its runtime in node."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flyweight.bench.engines import Run, engine, lacking, onnxruntime_web, read_export
from flyweight.classifier import Classifier
from flyweight.create import create_model
from flyweight.errors import FlyweightError, UsageError
from flyweight.export import web
from flyweight.export.int8 import SCHEMES
from flyweight.export.targets import target
from flyweight.export.task import Task
from flyweight.exported import Exported
from flyweight.preprocess import Preprocess
from scripts.chromium import COMMAND, Browser, chromium, served

PAGE = Path(web.__file__).parent
PHOTOGRAPHS = sorted((Path(__file__).parent / "golden" / "photographs").glob("*.jpg"))
CLASSES = ("<b>bold</b> & co", *(f"flower {i}" for i in range(11)))


@pytest.fixture(scope="module")
def node() -> str:
    found = shutil.which("node")
    if not found:
        pytest.skip("node is not here")
    return found


@pytest.fixture(scope="module")
def runtime() -> None:
    if reason := web.lack():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def task() -> Task:
    torch.manual_seed(0)
    net = create_model("mobilenet_v1", num_classes=len(CLASSES), width=0.25, size=96).eval()
    with torch.no_grad():
        next(each for each in reversed(list(net.modules())) if hasattr(each, "weight")).weight.mul_(300)  # type: ignore[operator, union-attr]
    return Task(net, Preprocess((96, 80), 3, (120.0,) * 3, (60.0,) * 3), CLASSES)


@pytest.fixture(scope="module", params=["float32", "int8"])
def folder(request: pytest.FixtureRequest, task: Task, runtime: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the network, as it is given away."""
    if request.param == "int8":
        pixels = np.stack([task.preprocess.pixels(path) for path in PHOTOGRAPHS])
        task = task.quantised(SCHEMES[0], pixels)
    folder = tmp_path_factory.mktemp("web")
    target("web").export(task).written(folder)
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not shutil.which(COMMAND):
        pytest.skip(f"{COMMAND} is not here (Debian: apt-get install chromium)")
    with chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(scope="module")
def photographs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Real ones; the last is large, and lies on its side by its EXIF tag."""
    found = list(PHOTOGRAPHS)
    if os.environ.get("FLYWEIGHT_TEST_DATA"):
        flowers = request.getfixturevalue("real_data") / "flowers12" / "test"
        found = [next(iter(sorted(each.glob("*.jpg")))) for each in sorted(flowers.iterdir())[:3]]
    turned = tmp_path_factory.mktemp("turned") / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90°
    with Image.open(found[0]) as image:
        image.resize((2500, 1700)).save(turned, quality=95, exif=exif)  # the page reads it in several strips
    return [*found, turned]


@pytest.fixture(scope="module")
def wasm() -> Any:
    """The engine, where it can be used."""
    if reason := lacking(onnxruntime_web):
        pytest.skip(reason)
    return engine("onnxruntime-web")


@cache
def in_wasm(file: Path) -> Run:
    """One process for each file."""
    return engine("onnxruntime-web").start(read_export(file), 1)


def expected(folder: Path, path: Path) -> dict[str, float]:
    """Probabilities by class: predict's in float32; int8 is rounded otherwise in WebAssembly, so there the engine's."""
    file = next(folder.glob("model*.onnx"))
    classifier, exported = Classifier(file), read_export(file)
    if exported.format == "float32":
        answers = classifier.predict_proba(path)[0]
    else:
        answers = in_wasm(file)(exported.preprocess.pixels(path)[None])[0]
    return dict(zip(CLASSES, map(float, answers), strict=True))


@pytest.mark.parametrize("isolated", [True, False], ids=["with headers", "plain server"])
def test_the_page_answers_as_predict_does(
    folder: Path, browser: Browser, photographs: list[Path], wasm: Any, isolated: bool
) -> None:
    with served(folder, isolated) as address:
        browser.open(address)
        assert browser.value("crossOriginIsolated") == isolated
        threads = min(2, len(os.sched_getaffinity(0))) if isolated else 1
        assert browser.value("document.getElementById('threads').textContent").startswith(f"{threads} thread")
        for path in photographs:
            browser.choose(path)
            answers, right = browser.answers(), expected(folder, path)
            assert list(answers) == sorted(right, key=lambda name: -right[name])[: len(answers)]
            assert answers == pytest.approx({name: right[name] for name in answers}, abs=1e-4)
        assert browser.requests()
        assert all(url.startswith(address) for url in browser.requests())
        assert browser.complaints() == []


def test_what_is_no_picture_is_said(folder: Path, browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("no picture")
    with served(folder, isolated=False) as address:
        browser.open(address)
        browser.choose(tmp_path / "notes.jpg", "notes.jpg is no picture")
        assert browser.answers() == {}
        browser.choose(PHOTOGRAPHS[0])
        assert len(browser.answers()) == 5


def test_a_picture_can_be_dropped(folder: Path, browser: Browser) -> None:
    classifier = Classifier(next(folder.glob("model*.onnx")))
    with served(folder, isolated=False) as address:
        browser.open(address)
        data = {"items": [], "files": [str(PHOTOGRAPHS[0])], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            browser.do("Input.dispatchDragEvent", type=kind, x=100, y=200, data=data)
        browser.until("Answered")
        assert next(iter(browser.answers())) == classifier.predict(PHOTOGRAPHS[0])[0]


RESIZE = """
import { readFileSync } from "node:fs";
const [module, file, ...sizes] = process.argv.slice(1);
const { coloured, resized } = await import(module);
const [height, width, h, w, channels] = sizes.map(Number);
process.stdout.write(resized(coloured(readFileSync(file), channels), [height, width], [h, w], channels));
"""


def in_node(node: str, rgba: np.ndarray, size: tuple[int, int], channels: int, folder: Path) -> np.ndarray:
    """What resize.js makes of uint8 [H, W, 4]."""
    rgba.tofile(folder / "rgba")
    shutil.copy(PAGE / "resize.js", folder / "resize.mjs")
    numbers = map(str, (*rgba.shape[:2], *size, channels))
    command = [node, "--input-type=module", "--eval", RESIZE, folder / "resize.mjs", folder / "rgba", *numbers]
    done = subprocess.run(command, capture_output=True, check=True)
    return np.frombuffer(done.stdout, np.uint8).reshape(*size, channels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 1), (5, 7)),
        ((100, 80), (224, 192)),
        ((333, 257), (224, 224)),
        ((333, 332), (224, 224)),
        ((90, 200), (100, 96)),
        ((64, 301), (64, 31)),
        ((301, 64), (31, 64)),
        ((32, 32), (32, 32)),
        ("photograph", (160, 128)),
    ],
)
def test_resampling_is_pillows_to_the_bit(
    node: str, shape: tuple[int, int] | str, size: tuple[int, int], channels: int, tmp_path: Path
) -> None:
    if shape == "photograph":
        rgba = np.array(Image.open(PHOTOGRAPHS[0]).convert("RGBA"))
    else:
        rgba = np.random.default_rng(0).integers(0, 256, (*shape, 4), dtype=np.uint8)
        rgba[: len(rgba) // 2] = (rgba[: len(rgba) // 2] > 127) * 255  # the ends of the scale, side by side
    pixels = Preprocess(size, channels, (0.0,), (1.0,)).pixels(rgba)
    np.testing.assert_array_equal(in_node(node, rgba, size, channels, tmp_path), pixels)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_engine_answers_as_the_file_does(folder: Path, wasm: Any, threads: int) -> None:
    path = next(folder.glob("model*.onnx"))
    exported = read_export(path)
    pixels = np.stack([exported.preprocess.pixels(each) for each in PHOTOGRAPHS])
    answers = wasm.start(exported, threads)(pixels)
    assert answers.dtype == np.float32
    np.testing.assert_allclose(answers.sum(axis=1), 1, atol=1e-5)
    if exported.format == "float32":
        np.testing.assert_allclose(answers, Classifier(path).answers(pixels), atol=1e-4)


def test_what_the_engine_cannot_run_is_said(wasm: Any, task: Task) -> None:
    with pytest.raises(FlyweightError, match="onnxruntime-web ended: Can't create a session"):
        wasm.start(Exported("onnx", "float32", {"model.onnx": b"none"}, task.preprocess, CLASSES), 1)


HOLD = """
import sys
from pathlib import Path
from flyweight.bench.engines import engine, read_export
run = engine("onnxruntime-web").start(read_export(Path(sys.argv[1])), 1)
print("ready", flush=True)
sys.stdin.read()
"""


def test_the_process_ends_with_the_one_that_started_it(folder: Path, wasm: Any) -> None:
    command = [sys.executable, "-c", HOLD, next(folder.glob("model*.onnx"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        if not children.exists():
            pytest.skip("/proc does not list children here")
        (child,) = map(int, children.read_text().split())
        parent.send_signal(signal.SIGKILL)
    for _ in range(200):
        if not Path(f"/proc/{child}").exists():
            return
        time.sleep(0.05)
    raise AssertionError("node is still there")


def test_a_missing_runtime_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Task) -> None:
    monkeypatch.delenv(web.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="onnxruntime-web is not here: npm install onnxruntime-web"):
        target("web").export(task)
    monkeypatch.setenv(web.VARIABLE, str(tmp_path))
    with pytest.raises(UsageError, match=r"where ort\.wasm\.bundle\.min\.mjs is not"):
        target("web").export(task)


def test_the_runtime_is_found_upwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dist, below = tmp_path / "node_modules" / "onnxruntime-web" / "dist", tmp_path / "a" / "b"
    for each in (dist, below):
        each.mkdir(parents=True)
    for name in web.RUNTIME:
        (dist / name).touch()
    monkeypatch.delenv(web.VARIABLE, raising=False)
    monkeypatch.chdir(below)
    assert web.runtime() == dist
