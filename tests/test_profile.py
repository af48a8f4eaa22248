"""The latency table: kernels of every network, a known machine recovered, files, and one real engine."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import flyweight
from flyweight import ops
from flyweight.bench.kernels import FREE, MAKE, RULES, Kernel, Probe, kernels, picture_shape
from flyweight.bench.profile import Meter, Part, Table, Timing, Whole, corrected, covering, profile
from flyweight.bench.regression import work
from flyweight.costs import graph_cost
from flyweight.errors import FlyweightError, UsageError
from flyweight.export.task import Task
from flyweight.graph import SHAPES, Graph, GraphError, trace
from flyweight.net import Spec
from flyweight.profiling import Checked, read_request, shares, summary, task
from flyweight.zoo import list_models, spec_of, structure, usual_spec

RATES = np.array([2e-3, 2e-8, 1e-7, 2e-7, 3e-7])  # ms for being called, a MAC, a value read and written, a weight
SOME = ("mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2", "squeezenet1_1", "resnet18", "googlenet")


def graph_of(name: str) -> Graph:
    spec = usual_spec(name)
    with torch.device("meta"):
        return trace(structure(spec).eval(), spec.input)


def law(kernel: Kernel) -> float:
    """A machine whose kernels take time in proportion to their work, depthwise ones three times as much."""
    return float(work(kernel) @ RATES) * (3.0 if kernel.kind == "depthwise convolution" else 1.0)


def unruly(kernel: Kernel) -> float:
    """The same where channels that fill no block of 8 take half as long again, and some sizes suit better."""
    ragged = any(shape[0] % 8 for shape in kernel.inputs)
    return law(kernel) * (1.5 if ragged else 1.0) * math.exp(0.4 * math.sin(math.log(kernel.output[0])))


class KnownMachine:
    """A meter of such a machine; in whole networks everything takes `slower` times as long."""

    engine, format, threads, version = "known", "float32", 1, "1"

    def __init__(self, law: Callable[[Kernel], float] = law, slower: float = 1.0) -> None:
        self.law, self.slower = law, slower

    def kernel(self, kernel: Kernel) -> Timing:
        return Timing(kernel, self.law(kernel), 0.0)

    def nets(self, tasks: Sequence[Task]) -> Whole:
        whole = Whole(tasks, [])
        whole.times = [[self.slower * sum(map(self.law, kernels(each.graph)))] for each in tasks]
        whole.round = lambda: None  # type: ignore[method-assign]
        return whole


def silent(share: float) -> None:
    pass


@pytest.mark.parametrize("name", list_models())
def test_kernels_hold_all_the_work_of_a_network(name: str) -> None:
    graph = graph_of(name)
    own = kernels(graph)
    assert sum(each.macs for each in own if each.weights) == graph_cost(graph).macs
    assert not [each for each in own if each.kind == "batch norm" and each.activation]
    begun = sum(not isinstance(node.leaf, FREE) for node in graph.nodes)
    assert len(own) - 1 <= begun


def test_every_leaf_that_costs_something_has_a_rule() -> None:
    assert set(SHAPES) - set(RULES) == set(FREE)


def test_a_leaf_without_a_rule_fails_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(RULES, ops.ChannelShuffle)
    with pytest.raises(GraphError, match="ChannelShuffle"):
        kernels(graph_of("shufflenet_v2"))


def test_an_activation_joins_what_it_alone_reads() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.relu, self.add = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), ops.Add()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.conv(x))
            return self.add(x, self.relu(x))

    told = [(each.kind, each.activation) for each in kernels(trace(Twice(), (3, 8, 8)))]
    assert told == [("picture", ""), ("convolution", ""), ("activation", "ReLU"), ("add", "")]
    chain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    assert [(each.kind, each.activation) for each in kernels(trace(chain, (3, 8, 8)))][1:] == [("convolution", "ReLU")]


@pytest.fixture(scope="module")
def spent() -> dict[Kernel, float]:
    return shares(map(usual_spec, SOME))


def test_a_probe_computes_its_kernel(spent: dict[Kernel, float]) -> None:
    chosen = covering(spent, 60)
    assert {each.kind for each in chosen} == {each.kind for each in spent}
    for kernel in chosen:
        with torch.device("meta"):
            whole, without = (trace(Probe(kernel, each), picture_shape(kernel)) for each in (True, False))
            made = MAKE[kernel.kind](kernel)
        of_whole, of_rest = graph_cost(whole), graph_cost(without)
        assert of_whole.macs - of_rest.macs == (kernel.macs if kernel.weights else 0)
        assert kernel.output in whole.shapes.values()
        assert any(type(node.leaf) is type(made) for node in whole.nodes)


@pytest.mark.parametrize(("own", "median", "most"), [(law, 0.01, 0.05), (unruly, 0.06, 0.25)])
def test_a_known_machine_is_recovered(
    spent: dict[Kernel, float], own: Callable[[Kernel], float], median: float, most: float
) -> None:
    order = covering(spent, 150)
    part = profile(KnownMachine(own), order, [], 60, silent)  # type: ignore[arg-type]
    assert len(part.timings) == 150
    left = [each for each in spent if each not in set(order)]
    errors = [abs(part.predict([each]) / own(each) - 1) for each in left]
    assert len(left) > 50
    assert np.median(errors) < median
    assert np.quantile(errors, 0.9) < most


def test_factors_correct_what_whole_networks_show(spent: dict[Kernel, float]) -> None:
    nets = [task(spec_of(name, size=size, num_classes=10)) for name in SOME[:4] for size in (32, 64, 96)]
    part = profile(KnownMachine(slower=1.5), covering(spent, 100), nets, 60, silent)  # type: ignore[arg-type]
    graph = graph_of("resnet18")
    assert part.predict(kernels(graph)) / sum(map(law, kernels(graph))) == pytest.approx(1.5, abs=0.2)
    again = corrected(part, [], [])
    assert (again.factors, again.each) == ({}, 0.0)


def tiny(engine: str = "known") -> Table:
    kernel = Kernel("linear", ((8,),), (4,))
    return Table(
        {"processor": "another"}, (Part(engine, "1", "float32", 1, (Timing(kernel, 0.5, 0.01),), {"linear": 1.1}),)
    )


def test_a_table_is_carried_to_another_machine(tmp_path: Path, spent: dict[Kernel, float]) -> None:
    part = profile(KnownMachine(), covering(spent, 80), [], 60, silent)  # type: ignore[arg-type]
    table = Table({"processor": "another"}, (part,))
    table.write(tmp_path / "deep" / "table.json")
    read = Table.read(tmp_path / "deep" / "table.json")
    graph = graph_of("resnet18")
    assert read == table
    assert read.predict(graph, "known", "float32", 1) == table.predict(graph, "known", "float32", 1) > 0


@pytest.mark.parametrize("asked", [("onnxruntime", "float32", 1), ("known", "int8", 1), ("known", "float32", 2)])
def test_what_was_not_measured_is_named(asked: tuple[str, str, int]) -> None:
    with pytest.raises(UsageError, match=r"known float32 on 1 thread"):
        tiny().predict(graph_of("resnet18"), *asked)


def test_a_kind_that_was_not_measured_is_named() -> None:
    with pytest.raises(UsageError, match="no picture on known"):
        tiny().predict(graph_of("resnet18"), "known", "float32", 1)


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"version": 99}', '{"version": 1}', '{"version": 1, "parts": 3}'])
def test_damaged_and_foreign_files_are_refused(tmp_path: Path, damage: str) -> None:
    (tmp_path / "table.json").write_text(damage)
    with pytest.raises(FlyweightError, match=r"table\.json .*flyweight profile"):
        Table.read(tmp_path / "table.json")


@pytest.mark.parametrize("change", [{"kind": 3}, {"output": None}, {"colour": "red"}])
def test_damaged_kernels_are_refused(tmp_path: Path, change: dict) -> None:
    path = tmp_path / "table.json"
    tiny().write(path)
    told = json.loads(path.read_text())
    told["parts"][0]["timings"][0]["kernel"] |= change
    path.write_text(json.dumps(told))
    with pytest.raises(FlyweightError, match="damaged"):
        Table.read(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.json cannot be read"):
        Table.read(tmp_path / "absent.json")


@pytest.mark.parametrize("format", ["float32", "int8"])
def test_a_real_engine_is_foretold_within_a_factor(format: str) -> None:
    spec = spec_of("resnet8_cifar", num_classes=10)
    meter = Meter("onnxruntime", format, 1)
    part = profile(meter, shares([spec]), [], 60, silent)
    whole = meter.nets([task(spec)])
    whole.round()
    measured = whole.ms()[0]
    assert measured / 4 < part.predict(kernels(task(spec).graph)) < 4 * measured


def test_a_request_is_read() -> None:
    request = read_request("onnxruntime", "float32, int8", "1,2", "3m", 0)
    assert [(each.format, each.threads) for each in request.meters()] == [
        ("float32", 1), ("float32", 2), ("int8", 1), ("int8", 2)
    ]  # fmt: skip
    for wrong in ({"threads": "0"}, {"threads": "two"}, {"formats": "float16"}, {"time": "soon"}):
        asked = {"engines": "onnxruntime", "formats": "float32", "threads": "1", "time": "3m", **wrong}
        with pytest.raises(UsageError):
            read_request(**asked, check=0).meters()


def test_errors_are_summed_up_by_part() -> None:
    rows = [Checked("a", "known", "float32", 1, 1.1, 1.0), Checked("b", "known", "float32", 1, 0.7, 1.0)]
    rows.append(Checked("a", "known", "int8", 1, 2.0, 1.0))
    assert [(each["format"], each["n"], each["median"]) for each in summary(rows)] == [
        ("float32", 2, 0.2), ("int8", 1, 1.0)
    ]  # fmt: skip


def test_a_job_budgets_for_the_machine_of_a_table(tmp_path: Path) -> None:
    every = covering(shares(map(usual_spec, list_models())), 150)
    part = profile(KnownMachine(), every, [], 60, silent)  # type: ignore[arg-type]
    parts = tuple(replace(part, engine="onnxruntime", format=format) for format in ("float32", "int8"))
    path = tmp_path / "there.json"
    Table({"processor": "another"}, parts).write(path)
    run = flyweight.fit("demo", "latency<=100s, size<=2MB", time=8, out=tmp_path / "run", device=path)
    latency, spec = run.result["latency_ms"], Spec.from_json(run.result["winner"]["spec"])
    with torch.device("meta"):
        own = kernels(trace(structure(spec).eval(), spec.input))
    assert (latency["engine"], latency["n"]) == ("onnxruntime", 0)  # said by the table, not measured
    assert latency["p50"] == pytest.approx(sum(map(law, own)), rel=0.5)
    assert json.loads((run.folder / "run.json").read_text())["device"] == str(path)
    with pytest.raises(UsageError, match="does not know litert on 1 core"):
        flyweight.fit("demo", "size<=2MB", time=8, out=tmp_path / "c", engine="litert", device=path)
