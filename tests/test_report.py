"""The report: its units, its page from realistic run folders, and what it says about damaged ones."""

import base64
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flyweight.errors import FlyweightError, UsageError
from flyweight.report import page, plots, write_report
from flyweight.report.records import load
from flyweight.units import (
    DASH,
    MINUS,
    TIMES,
    human_bytes,
    human_count,
    human_ms,
    human_seconds,
    percent,
    points,
)

FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
SECTIONS = ["budget", "race", "training", "precision", "parity", "classes", "mistakes", "layers", "data", "use"]
SECTIONS += ["environment"]
VOID = {"meta", "link", "br", "img", "hr", "input"}


# --- run folders -----------------------------------------------------------------------------------------------------


class RunFolder:
    """A run folder to be: `result`, `records` and `environment` as they would be written, open to changes first."""

    def __init__(self, classes: list[str], candidates: int = 30, met: bool = True) -> None:
        rng = np.random.default_rng(0)
        confusion = _confusion(rng, len(classes))
        n, right = int(confusion.sum()), int(np.trace(confusion))
        layers = _layers(len(classes))
        params, macs = (sum(layer[key] for layer in layers) for key in ("params", "macs"))
        rows = _candidates(rng, candidates, params, macs)
        winner = next(row for row in rows if row["status"] == "winner")
        latency = 0.31 if met else 2.4
        self.environment: dict[str, Any] = {
            "machine": "Intel Xeon E5-2686 v4, 2 cores, 8 GB",
            "system": "Linux 6.1 x86_64, glibc 2.36",
            "versions": {"python": "3.11.7", "torch": "2.13.0", "onnxruntime": "1.24.1", "numpy": "2.4.0"},
            "threads": 2,
            "cpu_flags": ["avx2", "fma"],
            "memory_bytes": 8_331_000_000,
        }
        self.result: dict[str, Any] = {
            "version": "0.1.0",
            "status": "met" if met else "not met",
            "data": {
                "source": "idx:/usr/share/datasets/fashion-mnist",
                "name": "fashion-mnist",
                "classes": classes,
                "channels": 1,
                "train": 6 * n,
                "validation": n // 2,
                "test": n,
                "licence": "MIT",
                "notes": ["A tenth of the training images was held out for validation, class by class."],
            },
            "winner": {
                "name": winner["name"],
                "spec": {"family": "mobilenet_v1", "args": {"width": 0.25}, "input": [1, 32, 32], "widths": {}},
                "params": params,
                "macs": macs,
            },
            "budget": [
                {"name": "latency", "op": "<=", "limit": 2.0, "measured": latency, "met": met},
                {"name": "size", "op": "<=", "limit": 500_000, "measured": 182_400, "met": True},
                {"name": "accuracy", "op": ">=", "limit": 0.85, "measured": 0.916, "met": True},
            ],
            "test": {"top1": right / n, "n": n, "ci95": [right / n - 0.006, right / n + 0.005]},
            "validation": {"top1": 0.916, "n": n // 2},
            "latency_ms": {
                "p50": latency,
                "p95": latency * 1.1,
                "p99": latency * 1.3,
                "engine": "ONNX Runtime 1.24.1",
                "threads": 1,
                "n": 500,
            },
            "shipped": {
                "file": "model.onnx",
                "format": "int8 per-channel, unsigned",
                "size_bytes": 182_400,
                "sha256": "0" * 64,
            },
            "candidates": rows,
            "seconds": {"total": 304.2, "data": 6.1, "search": 88.0, "train": 171.4, "compress": 21.0, "verify": 12.5},
            "time_limit": 300,
            "with_more_time": "Ten more minutes would have given the final training 38 epochs instead of 14.",
            "seed": 0,
            "threads": 2,
        }
        self.records: list[dict[str, Any]] = [
            {
                "kind": "job",
                "source": "idx:/usr/share/datasets/fashion-mnist",
                "budget": "latency<=2ms, size<=500KB",
                "time": 300,
                "threads": 2,
                "seed": 0,
                "version": "0.1.0",
                "command": 'flyweight fit idx:/usr/share/datasets/fashion-mnist --budget "latency<=2ms, size<=500KB"',
            },
            {"kind": "data", **self.result["data"]},
            *({"kind": "candidate", **row} for row in rows),
            *_trials(rng, rows),
            *_epochs(rng, "final", winner["name"], 14, 0.916),
            *_variants(winner),
            {
                "kind": "parity",
                "n": n // 2,
                "agreement": 0.9932,
                "pytorch_top1": 0.9172,
                "exported_top1": 0.916,
                "interval": [-0.0031, 0.0007],
                "tolerance": 0.01,
                "passed": True,
            },
            *layers,
            {"kind": "test", "classes": classes, "confusion": confusion.tolist(), "top1": right / n, "n": n},
            *_mistakes(rng, classes),
            {"kind": "log", "message": "wrote the report"},
        ]

    def without(self, *kinds: str) -> "RunFolder":
        self.records = [record for record in self.records if record["kind"] not in kinds]
        return self

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps(self.result), encoding="utf-8")
        (folder / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in self.records), encoding="utf-8")
        (folder / "environment.json").write_text(json.dumps(self.environment), encoding="utf-8")
        return folder


def _confusion(rng: np.random.Generator, classes: int) -> np.ndarray:
    """Counts of 200 images a class (1000 for ten or fewer), mostly right, with neighbours confused."""
    each = 1000 if classes <= 10 else 200
    rows = []
    for truth in range(classes):
        chance = np.full(classes, 0.01 / classes)
        chance[(truth + 1) % classes] += rng.uniform(0.01, 0.08)
        chance[rng.integers(classes)] += rng.uniform(0, 0.06)
        chance[truth] += 1 - chance.sum()
        rows.append(rng.multinomial(each, chance))
    return np.array(rows)


def _candidates(rng: np.random.Generator, count: int, params: int, macs: int) -> list[dict[str, Any]]:
    families = ["MobileNetV1", "SqueezeNet 1.1", "ShuffleNet V1", "ResNet-20"]
    rows: list[dict[str, Any]] = []
    for index in range(count):
        width, size = [0.25, 0.5, 0.75, 1.0][index // 4 % 4], [32, 24, 28][index // 16 % 3]
        cost = float(width**1.7 * (size / 32) ** 2 * rng.uniform(0.8, 2.2))
        row = {
            "name": f"{families[index % 4]} {TIMES}{width:g} at {size} px",
            "spec": {"family": families[index % 4], "args": {"width": width}, "input": [1, size, size], "widths": {}},
            "params": int(params * cost * 8),
            "macs": int(macs * cost * 8),
            "memory_bytes": int(900_000 * cost),
            "size_bytes": int(1_400_000 * cost),
            "latency_ms": round(2.2 * cost, 4),
            "status": "tried",
            "why": "beaten in the second rung",
            "val_top1": round(0.6 + 0.24 * (1 - np.exp(-4 * cost)) + float(rng.normal(0, 0.012)), 4),
            "epochs": 2 if index % 3 else 6,
        }
        if row["latency_ms"] > 2.0:
            row |= {
                "status": "dropped",
                "val_top1": None,
                "epochs": None,
                "why": f"latency {row['latency_ms']:.2f} ms > 2 ms",
            }
        elif index % 5 == 4:
            row |= {"status": "not tried", "val_top1": None, "epochs": None, "why": "no time was left"}
        rows.append(row)
    rows[0] |= {"status": "winner", "params": params, "macs": macs, "why": "best by its trials"}
    rows[0] |= {"val_top1": 0.9172, "epochs": 14.0}
    rows[0] |= {"latency_ms": 0.52, "size_bytes": 860_000}
    return rows


def _epochs(rng: np.random.Generator, stage: str, name: str, count: int, top1: float) -> list[dict[str, Any]]:
    return [
        {
            "kind": "epoch",
            "stage": stage,
            "name": name,
            "epoch": epoch,
            "seconds": 12.2,
            "lr": 0.4 * float(np.sin(np.pi * (epoch - 0.5) / count)),
            "train_loss": 0.4 + 1.9 * float(np.exp(-4 * epoch / count)) + 0.01 * float(rng.normal()),
            "val_loss": 0.45 + 1.7 * float(np.exp(-4 * epoch / count)) + 0.03 * float(rng.normal()),
            "val_top1": top1 - 0.5 * float(np.exp(-5 * epoch / count)) + 0.004 * float(rng.normal()),
        }
        for epoch in range(1, count + 1)
    ]


def _trials(rng: np.random.Generator, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two rungs: everything for two epochs, a third of it for six."""
    records: list[dict[str, Any]] = []
    for row in rows:
        for rung, epochs in ((0, 2), (1, 6)):
            if row["val_top1"] is None or row["epochs"] < epochs:
                continue
            top1 = 0.842 if row["status"] == "winner" else row["val_top1"] - (0.04 if epochs < row["epochs"] else 0)
            records += _epochs(rng, "trial", row["name"], epochs, top1)
            trial = {"name": row["name"], "rung": rung, "seconds": 3.4 * epochs, "epochs": epochs, "val_top1": top1}
            records.append({"kind": "trial", **trial})
    return records


def _variants(winner: dict[str, Any]) -> list[dict[str, Any]]:
    tried = [
        ("float32", 861_000, 0.52, 0.9172, False, "larger and slower than int8 at 0.1 points more"),
        ("int8 per-channel, unsigned", 182_400, 0.31, 0.916, True, "most accurate of the int8 files, and the fastest"),
        ("int8 per-channel, signed", 182_400, 0.98, 0.9158, False, "slower here"),
        ("int8 per-tensor, unsigned", 176_000, 0.30, 0.871, False, "loses 4.6 points"),
    ]
    keys = ("format", "size_bytes", "latency_ms", "val_top1", "chosen", "why")
    return [{"kind": "variant", **dict(zip(keys, row, strict=True))} for row in tried]


def _layers(classes: int) -> list[dict[str, Any]]:
    """A narrow MobileNetV1 on 32 px grey pictures, counted by hand."""
    layers: list[dict[str, Any]] = []

    def add(path: str, leaf: str, shape: list[int], params: int, macs: int) -> None:
        size = int(np.prod(shape))
        record = {
            "path": path,
            "leaf": leaf,
            "shape": shape,
            "params": params,
            "macs": macs,
            "activation_bytes": 4 * size,
        }
        layers.append({"kind": "layer", **record})

    side, width = 32, 8
    add("stem.conv", "Conv2d", [width, side, side], 9 * width, 9 * width * side**2)
    for block, (out, stride) in enumerate([(16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1)]):
        side //= stride
        add(f"stages.{block}.depthwise.conv", "Conv2d", [width, side, side], 9 * width, 9 * width * side**2)
        add(f"stages.{block}.depthwise.act", "ReLU", [width, side, side], 0, 0)
        add(f"stages.{block}.pointwise.conv", "Conv2d", [out, side, side], width * out, width * out * side**2)
        add(f"stages.{block}.pointwise.act", "ReLU", [out, side, side], 0, 0)
        width = out
    add("head.pool", "AdaptiveAvgPool2d", [width], 0, 0)
    add("head.linear", "Linear", [classes], (width + 1) * classes, width * classes)
    return layers


def _mistakes(rng: np.random.Generator, classes: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "kind": "mistake",
            "truth": classes[index % len(classes)],
            "predicted": classes[(index + 1) % len(classes)],
            "probability": round(0.999 - 0.004 * index, 4),
            "name": f"t10k-images-idx3-ubyte[{int(rng.integers(10_000))}]",
            "png": png(rng, 28, 28 if index else 20),
        }
        for index in range(16)
    ]


def png(rng: np.random.Generator, width: int, height: int) -> str:
    """A blurred ring as a PNG in base64."""
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    radius, squeeze = rng.uniform(0.4, 0.8), rng.uniform(0.7, 1.6)
    ring = np.exp(-(((np.hypot(x * squeeze, y) - radius) / 0.18) ** 2)) * 230 + rng.uniform(0, 20, (height, width))
    buffer = io.BytesIO()
    Image.fromarray(ring.astype(np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


# --- reading the page ------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Parses a page strictly: every tag is closed where it should be; gathers ids, links, text and tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text: dict[str, str] = {}
        self.source = text
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            elif key in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                self.references.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        section = self.ids[-1] if self.ids else ""
        self.text[section] = self.text.get(section, "") + data


def read(run: RunFolder, tmp_path: Path) -> Page:
    target = write_report(run.write(tmp_path / "run"))
    assert target == tmp_path / "run" / "report.html"
    return Page(target.read_text(encoding="utf-8"))


def visible(page: Page) -> str:
    return re.sub(r"\s+", " ", " ".join(page.text.values()))


CASES: dict[str, Callable[[], RunFolder]] = {
    "ten classes": lambda: RunFolder(FASHION),
    "two classes": lambda: RunFolder(["cat", "dog"]),
    "twelve classes": lambda: RunFolder([f"flower number {index}" for index in range(12)]),
    "hundred classes": lambda: RunFolder([f"class {index}" for index in range(100)]),
    "not met": lambda: RunFolder(FASHION, met=False),
    "one candidate": lambda: RunFolder(FASHION, candidates=1),
}


@pytest.mark.parametrize("case", CASES)
def test_page_is_whole_and_loads_nothing(case: str, tmp_path: Path) -> None:
    page = read(CASES[case](), tmp_path)
    assert [one for one in page.ids if one in SECTIONS] == SECTIONS
    assert len(page.ids) == len(set(page.ids))
    assert all(one.startswith(("data:", "#")) for one in page.references)
    assert "http:" not in page.source
    assert "https:" not in page.source
    assert "url(http" not in page.source
    assert "@import" not in page.source
    assert "script" not in page.tags
    assert {one[1:] for one in page.references if len(one) > 1 and one.startswith("#")} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", page.source)) <= set(page.ids)
    assert not re.search(r"#(0[1-7]){3}\b", page.source), "a colour without its CSS variable"
    assert len(page.source) < 600_000


def test_headline_and_verdicts(tmp_path: Path) -> None:
    page = read(RunFolder(FASHION), tmp_path)
    text = visible(page)
    top1 = load(tmp_path / "run").result["test"]["top1"]
    assert (
        f"MobileNetV1 {TIMES}0.25 at 32 px, int8 per-channel, unsigned: {top1 * 100:.1f} % on 10,000 test images"
        in text
    )
    assert "0.31 ms, 182 KB" in text
    assert "The budget is met" in text
    assert "nearest one" not in text
    for part in ("≤ 2 ms", "84.5 % to spare", "≤ 500 KB", "63.5 % to spare", "≥ 85.0 %", "6.6 points above"):
        assert part in text, part


def test_not_met_says_what_fell_short(tmp_path: Path) -> None:
    text = visible(read(RunFolder(FASHION, met=False), tmp_path))
    assert "The budget is not met" in text
    assert "this is the nearest one. It falls short in latency, 2.4 ms against ≤ 2 ms (20.0 % over)." in text


def test_layer_sums_are_the_totals(tmp_path: Path) -> None:
    run = RunFolder(FASHION)
    page = read(run, tmp_path)
    layers = [one for one in run.records if one["kind"] == "layer"]
    for key in ("macs", "params"):
        total = sum(one[key] for one in layers)
        assert total == run.result["winner"][key]
        assert page.text[f"sum-{key}"].split()[0] == f"{total:,}"
    assert "do not add up" not in visible(page)


def test_layer_sums_that_differ_from_the_winner_are_reported(tmp_path: Path) -> None:
    run = RunFolder(FASHION)
    run.result["winner"]["macs"] += 1
    assert "The layers do not add up to the winner's totals" in visible(read(run, tmp_path))


@pytest.mark.parametrize("count", [3, 20])
def test_names_are_escaped(count: int, tmp_path: Path) -> None:
    evil = [
        "<script>alert(1)</script>",
        "a \"b\" & 'c' $x^2$",
        "日本 العربية",
        *(f"class {index}" for index in range(count - 3)),
    ]
    run = RunFolder(evil)
    for record in run.records:
        if record["kind"] == "mistake":
            record["name"] = '"><img src=x onerror=alert(1)>.png'
    run.result["data"]["name"] = "</title><script>"
    run.result["data"]["notes"] = ["<b>bold</b>"]
    run.result["candidates"][0]["name"] = run.result["winner"]["name"] = "</svg><script>Net"
    run.environment["machine"] = "<i>machine</i>"
    page = read(run, tmp_path)
    assert "script" not in page.tags
    assert "onerror" not in page.source.replace("onerror=alert(1)&gt;", "")
    assert "<script" not in page.source
    assert "<b>bold" not in page.source
    assert "<i>machine" not in page.source
    text = visible(page)
    assert all(name in text for name in evil)
    assert '"><img src=x onerror=alert(1)>.png' in text


def test_confusion_numbers_and_recalls(tmp_path: Path) -> None:
    run = RunFolder(FASHION)
    page = read(run, tmp_path)
    confusion = next(one["confusion"] for one in run.records if one["kind"] == "test")
    matrix = page.source[page.source.index('<table class="matrix') :]
    body = matrix[matrix.index("<tbody>") : matrix.index("</tbody>")]
    cells = re.findall(r"<td[^>]*>(\d*)</td>", body)
    assert [int(cell or 0) for cell in cells] == [count for row in confusion for count in row]
    for index, row in enumerate(confusion):
        assert percent(row[index] / sum(row)) in visible(page)


def test_many_classes_are_drawn_instead(tmp_path: Path) -> None:
    page = read(CASES["hundred classes"](), tmp_path)
    assert 'class="matrix' not in page.source
    assert "data:image/png" in page.source
    assert "Recall, the ten weakest classes" in visible(page)
    assert "All 100 classes" in visible(page)


def test_missing_parts_are_said_to_be_missing(tmp_path: Path) -> None:
    run = RunFolder(FASHION).without("trial", "epoch", "variant", "parity", "layer", "test", "mistake", "job")
    run.result["latency_ms"] = None
    run.result["budget"] = []
    run.result["candidates"] = []
    run.result["data"] |= {"source": None, "licence": None, "notes": [], "channels": None}
    run.result |= {"with_more_time": None, "time_limit": None, "seed": None, "seconds": {}}
    run.result["winner"]["spec"] = None
    run.environment = {}
    text = visible(read(run, tmp_path))
    for part in (
        "No budget was set",
        "latency was not measured",
        "No candidate was trained for comparison",
        "No epoch was recorded",
        "Only one precision was tried",
        "No comparison with the trained network",
        "No answers per class",
        "No pictures of mistakes",
        "No layers were recorded",
        "not stated",
        "[N, H, W, 3]",
    ):
        assert part in text, part
    assert "None" not in text
    assert "nan" not in text


def test_values_that_are_null_are_dashes(tmp_path: Path) -> None:
    run = RunFolder(FASHION)
    for row in run.result["candidates"]:
        row |= {"latency_ms": None, "params": None, "macs": None}
    run.result["latency_ms"] |= {"p50": None, "p95": None}
    run.result["budget"][0] |= {"measured": None, "met": False}
    run.result["status"] = "not met"
    for record in run.records:
        if record["kind"] == "epoch":
            record |= {"val_loss": None, "lr": float("nan")}
    page = read(run, tmp_path)
    text = visible(page)
    assert "None" not in text
    assert "nan" not in text.lower().split()
    assert "not measured" in text
    assert page.source.count('class="plot"') == 1 + 2  # accuracy against size; the loss and the accuracy of training


def test_all_right_has_no_mistakes(tmp_path: Path) -> None:
    run = RunFolder(["cat", "dog"]).without("mistake")
    for record in run.records:
        if record["kind"] == "test":
            record["confusion"] = [[1000, 0], [0, 1000]]
    run.result["test"] = {"top1": 1.0, "n": 2000, "ci95": [0.998, 1.0]}
    text = visible(read(run, tmp_path))
    assert "100.0 % on 2,000 test images" in text
    assert "every test image was answered rightly" in text


def test_clean_test_images_are_reported(tmp_path: Path) -> None:
    run = RunFolder(FASHION)
    run.result["test_clean"] = {"top1": 0.611, "n": 216, "ci95": [0.544, 0.674], "duplicates": 24}
    assert "61.1 % on the 216 that repeat no training image (54.4 % to 67.4 %); 24 do" in visible(read(run, tmp_path))


def test_a_teacher_is_named(tmp_path: Path) -> None:
    run = RunFolder(FASHION)
    run.result["winner"]["teacher"] = {"name": "airbench94 x1 @28", "epochs": 12.0, "val_top1": 0.931, "seconds": 75.0}
    told = visible(read(run, tmp_path))
    assert "learned from the answers of airbench94 x1 @28, which was trained for" in told
    assert "93.1 % right" in told


def test_what_a_resumed_job_repeats_stands_once(tmp_path: Path) -> None:
    run = RunFolder(FASHION)
    once = load(run.write(tmp_path / "once"))
    kinds = ("epoch", "layer", "mistake", "variant", "parity", "test")
    again = [record for record in run.records if record["kind"] in kinds and record.get("stage") != "trial"]
    run.records += [{**record, "lr": 7.0} if record["kind"] == "epoch" else record for record in again]
    twice = load(run.write(tmp_path / "twice"))
    assert (twice.layers, twice.mistakes, twice.variants) == (once.layers, once.mistakes, once.variants)
    assert [epoch.epoch for epoch in twice.final] == list(range(1, 15))
    assert {epoch.lr for epoch in twice.final} == {7.0}


def test_each_trial_is_a_curve_of_its_own(tmp_path: Path) -> None:
    run = load(RunFolder(FASHION).write(tmp_path / "run"))
    assert sorted({len(curve) for curve in run.trials}) == [2, 6]
    assert all([epoch.epoch for epoch in curve] == list(range(1, len(curve) + 1)) for curve in run.trials)


def _epoch(stage: str, epoch: float, rate: float) -> dict[str, Any]:
    return {"kind": "epoch", "stage": stage, "name": "net", "epoch": epoch, "lr": rate}


def test_short_trials_of_one_network_are_not_joined(tmp_path: Path) -> None:
    run = RunFolder(FASHION).without("trial", "epoch")
    trial = {"kind": "trial", "name": "net", "val_top1": 0.5}
    run.records += [_epoch("trial", 0.25, 1.0), {**trial, "rung": 0}]
    run.records += [
        _epoch("trial", 1.0, 2.0),
        _epoch("trial", 0.5, 3.0),
        _epoch("trial", 1.1, 3.0),
        {**trial, "rung": 1},
    ]
    curves = load(run.write(tmp_path / "run")).trials
    assert [[(one.epoch, one.lr) for one in curve] for curve in curves] == [[(0.25, 1.0)], [(0.5, 3.0), (1.1, 3.0)]]


def test_a_training_that_starts_again_leaves_no_tail(tmp_path: Path) -> None:
    run = RunFolder(FASHION).without("epoch")
    run.records += [_epoch("final", epoch, 0.4) for epoch in (1.0, 2.0, 3.0, 4.0)]
    run.records += [_epoch("final", epoch, 0.2) for epoch in (1.0, 2.0)]
    curve = load(run.write(tmp_path / "run")).final
    assert [(one.epoch, one.lr) for one in curve] == [(1.0, 0.2), (2.0, 0.2)]


def test_the_winner_is_compared_by_its_trial(tmp_path: Path) -> None:
    page = read(RunFolder(FASHION), tmp_path)
    tips = re.findall(r"<title>(1\. [^<]*)</title>", page.source)
    assert [tip.split(": ")[1] for tip in tips] == ["84.2 % after 6 epochs, 0.52 ms", "84.2 % after 6 epochs, 860 KB"]
    assert re.search(r'<tr class="winner">.*?91\.7', page.source, re.DOTALL)


@pytest.mark.parametrize(
    ("precision", "text"), [("float32", "99.9 % of the answers must"), ("int8", "In int8, 0.1 points")]
)
def test_parity_says_what_is_asked(precision: str, text: str, tmp_path: Path) -> None:
    run = RunFolder(FASHION)
    run.result["shipped"]["format"] = precision
    next(record for record in run.records if record["kind"] == "parity")["tolerance"] = 0.001
    assert text in visible(read(run, tmp_path))


def test_mistakes_may_name_classes_by_index(tmp_path: Path) -> None:
    run = RunFolder(FASHION)
    mistake = next(record for record in run.records if record["kind"] == "mistake")
    mistake |= {"truth": 6, "predicted": 0}
    mistakes = load(run.write(tmp_path / "run")).mistakes
    assert (mistakes[0]["truth"], mistakes[0]["predicted"]) == ("Shirt", "T-shirt/top")
    assert [one["probability"] for one in mistakes] == sorted((one["probability"] for one in mistakes), reverse=True)


# --- damage ----------------------------------------------------------------------------------------------------------


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _put(name: str, text: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(text)

    return write


def _change(record: dict[str, Any]) -> Callable[[Path], None]:
    def append(folder: Path) -> None:
        with (folder / "records.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    return append


def _result(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        change(result)
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")

    return rewrite


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no result": (_remove("result.json"), "is not a finished run: it has no result.json"),
    "no records": (_remove("records.jsonl"), "records.jsonl is missing"),
    "no environment": (_remove("environment.json"), "environment.json is missing"),
    "cut result": (_put("result.json", b'{"version": "0.1'), "result.json is damaged: it is not valid JSON"),
    "no object": (_put("environment.json", b"[]"), "environment.json is damaged: it holds no JSON object"),
    "no text": (_put("records.jsonl", b"\xff\xfe\x00"), "records.jsonl is damaged: it is not UTF-8"),
    "cut line": (
        _put("records.jsonl", b'{"kind": "log", "message": "a"}\n{"kind": "lo'),
        "records.jsonl, line 2, is damaged",
    ),
    "no kind": (_put("records.jsonl", b'{"message": "a"}'), "line 1, is damaged: it is no JSON object with a `kind`"),
    "no winner": (_result(lambda result: result.pop("winner")), "`winner` is None, not dict"),
    "text for a number": (
        _result(lambda result: result["candidates"][3].update(macs="many")),
        "`candidates[3]` is damaged: `macs` is 'many'",
    ),
    "budget": (_result(lambda result: result["budget"].append(7)), "`budget[3]` is damaged: it is no JSON object"),
    "confusion": (_change({"kind": "test", "confusion": [[1, 2], [3]]}), "`confusion` is no 10 x 10 table"),
    "picture": (
        _change({"kind": "mistake", "truth": 1, "predicted": 2, "name": "a.png", "png": "javascript:"}),
        "the picture of a.png is no PNG",
    ),
    "class": (
        _change(
            {"kind": "mistake", "truth": 10, "predicted": 2, "name": "a", "png": png(np.random.default_rng(1), 8, 8)}
        ),
        "there is no class 10",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_sentence(damage: str, tmp_path: Path) -> None:
    folder = RunFolder(FASHION).write(tmp_path / "run")
    harm, message = DAMAGE[damage]
    harm(folder)
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        write_report(folder)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")
    assert not (folder / "report.html").exists()


def test_an_unfinished_run_says_how_to_finish_it(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="--resume"):
        write_report(tmp_path)
    with pytest.raises(UsageError, match="not a finished run"):
        write_report(tmp_path / "absent")


def test_an_older_report_is_replaced_and_nothing_else_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(["cat", "dog"], candidates=4).write(tmp_path / "run")
    (folder / "report.html").write_text("old")
    before = {path.name for path in folder.iterdir()}

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(FlyweightError, match="No space left"):
            write_report(folder)
    assert (folder / "report.html").read_text() == "old"
    assert {path.name for path in folder.iterdir()} == before
    write_report(folder)
    assert "cat" in (folder / "report.html").read_text()
    assert {path.name for path in folder.iterdir()} == before


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    folder = RunFolder(FASHION).write(tmp_path / "run")
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (human_bytes, 0, "0 B"),
        (human_bytes, 999, "999 B"),
        (human_bytes, 1000, "1 KB"),
        (human_bytes, 1024, "1.02 KB"),
        (human_bytes, 182_400, "182 KB"),
        (human_bytes, 500_000, "500 KB"),
        (human_bytes, 999_499, "999 KB"),
        (human_bytes, 999_500, "1 MB"),
        (human_bytes, 1_234_567, "1.23 MB"),
        (human_bytes, 7.5e12, "7500 GB"),
        (human_bytes, None, DASH),
        (human_count, 7, "7"),
        (human_count, 272_474, "272 k"),
        (human_count, 12_345_678, "12.3 M"),
        (human_count, 4.1e9, "4.1 G"),
        (human_count, float("nan"), DASH),
        (human_ms, 0, "0 µs"),
        (human_ms, 0.0123, "12.3 µs"),
        (human_ms, 0.09996, "0.1 ms"),
        (human_ms, 0.31, "0.31 ms"),
        (human_ms, 2, "2 ms"),
        (human_ms, 999.9, "1 s"),
        (human_ms, 12_300, "12.3 s"),
        (human_seconds, 0.04, "0.04 s"),
        (human_seconds, 4.21, "4.2 s"),
        (human_seconds, 9.97, "10 s"),
        (human_seconds, 59.6, "1 min"),
        (human_seconds, 125, "2 min 5 s"),
        (human_seconds, 3725, "1 h 2 min"),
        (percent, 0.9126, "91.3 %"),
        (percent, 1, "100.0 %"),
        (percent, 0.9999, ">99.9 %"),
        (percent, 0, "0.0 %"),
        (percent, 0.0001, "<0.1 %"),
        (percent, None, DASH),
        (points, -0.0021, f"{MINUS}0.2 points"),
        (points, 0.034, "+3.4 points"),
        (points, -0.0001, "0.0 points"),
    ],
)
def test_units(write: Callable[[float | None], str], value: float | None, text: str) -> None:
    assert write(value) == text


def test_verdict_tells_the_limit_and_the_measured_value_apart() -> None:
    over = page.verdict({"name": "size", "op": "<=", "limit": 500_000, "measured": 500_100, "met": False})
    assert (over.limit, over.measured, over.margin) == ("≤ 500 KB", "500.1 KB", "<0.1 % over")
    assert over.fill == 1.0
    assert 0.99 < over.mark < 1.0
    floor = page.verdict({"name": "accuracy", "op": ">=", "limit": 0.9, "measured": 0.8999, "met": False})
    assert (floor.limit, floor.measured) == ("≥ 90.00 %", "89.99 %")
    exact = page.verdict({"name": "macs", "op": "<=", "limit": 10**6, "measured": 10**6, "met": True})
    assert (exact.measured, exact.margin, exact.fill, exact.mark) == ("1 M", "exactly at the limit", 1.0, 1.0)


def _point(number: int, x: float, y: float) -> plots.Point:
    return plots.Point(number, x, y, False, "")


def test_pareto_front_is_what_nothing_beats() -> None:
    rng = np.random.default_rng(3)
    cloud = [_point(index, float(x), float(y)) for index, (x, y) in enumerate(rng.uniform(0, 1, (200, 2)).round(1))]
    front = plots.pareto_front(cloud)
    places = {(point.x, point.y) for point in front}
    for point in cloud:
        beaten = any(o.x <= point.x and o.y >= point.y and (o.x, o.y) != (point.x, point.y) for o in cloud)
        assert beaten != ((point.x, point.y) in places)
    assert len(front) == len(places)


def test_labels_do_not_overlap() -> None:
    anchors = [tuple(xy) for xy in np.random.default_rng(4).uniform(0, 120, (40, 2)).tolist()]
    marks = [(x - 4, y - 4, x + 4, y + 4) for x, y in anchors]
    boxes = plots.place_labels(anchors, (16.0, 12.0), marks)
    placed = [box for box in boxes if box is not None]
    assert 5 < len(placed) < 40
    for index, box in enumerate(placed):
        for other in [*placed[:index], *marks]:
            assert box[0] >= other[2] or other[0] >= box[2] or box[1] >= other[3] or other[1] >= box[3]


@pytest.mark.parametrize("count", [1, 3, 12])
def test_labels_in_the_figure_are_beside_their_points(count: int) -> None:
    """Reads the SVG: a number lies within a label's reach of its own point, and covers no point."""
    points = [plots.Point(n, 0.1 * 1.3**n, 0.5 + 0.04 * n, n == count, f"point {n}") for n in range(1, count + 1)]
    svg = plots.race("race", points, [0.2], None, plots.Axis("latency", human_ms, 1.0))
    number = r"(-?[\d.]+)"
    dots = {
        int(n): (float(x), float(y))
        for n, x, y in re.findall(rf'point (\d+)<.*?<use [^>]*?x="{number}" y="{number}"', svg)
    }
    labels = re.findall(rf'<text style="[^"]*(?:bold|700)[^"]*" x="{number}" y="{number}"[^>]*>(\d+)</text>', svg)
    assert sorted(dots) == [int(n) for _, _, n in sorted(labels, key=lambda label: int(label[2]))]
    for x, y, n in ((float(x), float(y) - 4, int(n)) for x, y, n in labels):
        assert 5 < np.hypot(x - dots[n][0], y - dots[n][1]) < 25
        assert all(np.hypot(x - dot[0], y - dot[1]) > 5 for dot in dots.values())


def test_plots_leave_the_global_state_alone(tmp_path: Path) -> None:
    write_report(RunFolder(["cat", "dog"], candidates=4).write(tmp_path / "run"))
    import matplotlib

    assert "matplotlib.pyplot" not in sys.modules
    assert matplotlib.rcParams["svg.fonttype"] == matplotlib.rcParamsDefault["svg.fonttype"]


def test_import_is_cheap_and_free_of_torch(tmp_path: Path) -> None:
    folder = RunFolder(["cat", "dog"], candidates=4).write(tmp_path / "run")
    code = (
        "import sys, pathlib, flyweight.report, flyweight.units\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'jinja2'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "flyweight.report.write_report(pathlib.Path(sys.argv[1]))\n"
        "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "mine = {name for name in sys.modules if name.startswith('flyweight.')}\n"
        "allowed = ('flyweight.report', 'flyweight.errors', 'flyweight.units')\n"
        "assert all(name.startswith(allowed) for name in mine), mine\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=Path(__file__).parents[1])
