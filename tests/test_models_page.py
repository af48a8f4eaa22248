"""docs/models.md is what its generator writes from the registry and the measured latencies."""

import json
import re

import pytest

from benchmarks.zoo_latency import summary
from flyweight import zoo
from flyweight.bench.measure import Latency
from scripts.models_page import COLUMNS, LATENCY, PAGE, page, row, section

MEASURED = json.loads(LATENCY.read_text(encoding="utf-8"))


def test_the_page_is_up_to_date() -> None:
    assert page(MEASURED) == PAGE.read_text(encoding="utf-8"), "python -m scripts.models_page writes it anew"


def test_every_model_has_a_line_and_every_family_a_paper() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == zoo.list_models()
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    assert list(sections) == list(zoo.families())
    assert all("](https://arxiv.org/abs/" in about and "\nReference: " in about for about in sections.values())


def test_the_latencies_are_those_of_registered_models() -> None:
    assert set(MEASURED["models"]) <= set(zoo.variants())
    assert all(
        each["low_ms"] <= each["p50_ms"] <= each["high_ms"] and each["n"] > 0 for each in MEASURED["models"].values()
    )
    assert {"processor", "versions", "threads"} <= set(MEASURED["environment"])


@pytest.mark.parametrize(
    ("name", "classes", "params"), [("squeezenet1_1", 1000, 1_235_496), ("resnet20_cifar", 10, 269_722)]
)
def test_a_line_says_what_is_counted(name: str, classes: int, params: int) -> None:
    assert zoo.usual_spec(name).args["num_classes"] == classes
    measured = {"p50_ms": 6.787, "low_ms": 6.754, "high_ms": 6.877}
    cells = dict(zip(COLUMNS, row(name, measured).strip("| ").split(" | "), strict=True))
    assert cells["name"] == f"`{name}`"
    assert cells["params"] == f"{params:,}"
    assert cells["latency"] == "6.79 ms (6.75 ms to 6.88 ms)"
    assert row(name, None).endswith("| – |")


def test_a_family_is_introduced_by_its_file() -> None:
    text = section("mobilenet_v1", zoo.families()["mobilenet_v1"], {})
    assert text.startswith("## mobilenet_v1\nMobileNets: Efficient Convolutional Neural Networks")
    assert "[arXiv:1704.04861](https://arxiv.org/abs/1704.04861)" in text
    assert "\nReference: timm mobilenetv1_100.\n" in text


def test_rounds_are_summed_up_by_the_median_of_their_medians() -> None:
    rounds = [Latency(p50, p50 + 1, p50 + 2, "onnxruntime", 1, 10) for p50 in (5.0, 9.0, 4.0)]
    assert summary(rounds) == {"p50_ms": 5.0, "low_ms": 4.0, "high_ms": 9.0, "p95_ms": 6.0, "n": 30}
