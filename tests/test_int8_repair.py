"""Int8 that holds: calibration, equalisation, bias correction, layers left in float, fake quantisation, what ships."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx as onnx_format
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from flyweight.bench.engines import onnxruntime as engine
from flyweight.bench.measure import Latency
from flyweight.compress.equalise import correct_biases, edges, equalise, smooth
from flyweight.compress.precision import FLOAT, Variant, choose
from flyweight.compress.qat import fake_quantised, fine_tune, rounded, rounded_weight
from flyweight.compress.repair import Form, Repair, Way, divergence, errors, fastest, frontier, repair
from flyweight.compress.step import Context
from flyweight.create import create_model
from flyweight.data import open_source, prepare
from flyweight.data.dataset import Dataset
from flyweight.errors import UsageError
from flyweight.export import int8, onnx
from flyweight.export.calibration import BINS, CALIBRATORS, Histogram, limits, observe
from flyweight.fold import fold_batchnorm
from flyweight.graph import trace
from flyweight.ops import GlobalAvgPool
from flyweight.preprocess import Preprocess
from flyweight.train.inputs import normalise
from flyweight.train.loop import Clock, logits
from flyweight.train.recipe import Recipe

CLASSES = ["a", "b", "c"]
GREY = Preprocess((28, 28), 1, (72.0,), (90.0,))
SHAPE = (1, 28, 28)
PER_CHANNEL, PER_TENSOR = int8.schemes()[0], int8.schemes()[2]


@pytest.fixture(scope="module")
def pictures() -> tuple[Dataset, Dataset]:
    """A few real pictures for training and for validation."""
    splits = prepare(open_source("demo"), [28])
    return splits.train.subset(range(1500)), splits.validation.subset(range(500))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def separable(data: Dataset) -> nn.Module:
    """A chain of depthwise and pointwise layers whose three answers all occur on these pictures."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(),
        nn.Conv2d(16, 32, 1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1, groups=32), nn.ReLU(),
        nn.Conv2d(32, 32, 1), nn.ReLU(), GlobalAvgPool(), nn.Linear(32, 3),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for leaf in net:
            if isinstance(leaf, nn.Conv2d):
                nn.init.kaiming_normal_(leaf.weight)
        last = net[-1]
        assert isinstance(last, nn.Linear)
        last.weight.div_(logits(net, data, GREY).std(0)[:, None])
        last.bias.sub_(logits(net, data, GREY).mean(0))
    return net


def planted(net: nn.Module, factor: float = 1000.0) -> None:
    """One channel so many times larger, and so many times less of it read: the network stays what it is."""
    with torch.no_grad():
        for first, second in ((0, 2), (2, 4), (4, 6)):
            writes, reads = net[first], net[second]  # type: ignore[index]
            writes.weight[3] *= factor
            writes.bias[3] *= factor
            if reads.groups > 1:
                reads.weight[3] /= factor
            else:
                reads.weight[:, 3] /= factor


def form(net: nn.Module, images: np.ndarray) -> Form:
    model, names = onnx.export_named(net, GREY, CLASSES)
    return Form(net, model, names, images)


def way(net: nn.Module, images: np.ndarray, scheme: int8.Scheme, calibrator: str = "min-max") -> Way:
    return Way.of(form(net, images), scheme, calibrator)


def run(model: onnx_format.ModelProto, images: np.ndarray) -> np.ndarray:
    return engine.load(model.SerializeToString(), 1)(images)


def agreement(net: nn.Module, found: np.ndarray, data: Dataset) -> float:
    return float((logits(net, data, GREY).argmax(1).numpy() == found.argmax(1)).mean())


# Calibration


def histogram(values: np.ndarray) -> Histogram:
    low, high = float(values.min()), float(values.max())
    return Histogram(low, high, np.histogram(values, np.linspace(low, high, BINS + 1))[0])


@pytest.mark.parametrize(("calibrator", "most"), [("percentile", 10), ("mse", 38), ("entropy", 20)])
def test_calibrators_cut_what_is_far_away_and_keep_what_is_even(calibrator: str, most: float) -> None:
    rng = np.random.default_rng(0)
    bulk = np.maximum(rng.normal(size=200_000), 0)
    low, high = CALIBRATORS[calibrator](histogram(np.append(bulk, 40.0)))
    assert low <= 0
    assert bulk.max() * 0.6 < high < most
    low, high = CALIBRATORS[calibrator](histogram(rng.uniform(-1, 3, 200_000)))
    assert low == pytest.approx(-1, abs=0.1)
    assert high == pytest.approx(3, abs=0.3)


def test_observing_sees_every_float_value(pictures: tuple[Dataset, Dataset]) -> None:
    train, _ = pictures
    images = train.batch(28, slice(0, 20))
    model = onnx.export(separable(train), GREY, CLASSES)
    seen, ends = observe(model, images), limits(model, images)
    pixels = (images.astype(np.float32) - 72) / 90
    assert ends["v1"] == pytest.approx((pixels.min(), pixels.max()))
    assert set(seen) == set(ends) == {name for node in model.graph.node[1:] for name in node.output}
    assert all((each.lowest, each.highest) == ends[name] for name, each in seen.items())
    assert all(each.counts.sum() > 0 for each in seen.values())


def test_every_named_scheme_runs_with_every_calibrator(pictures: tuple[Dataset, Dataset]) -> None:
    train, validation = pictures
    net, images = separable(validation), validation.batch(28)
    made, true = form(net, train.batch(28, slice(0, 32))), logits(net, validation, GREY).argmax(1).numpy()
    covered = {calibrator: made.ranges(calibrator) for calibrator in CALIBRATORS}
    for scheme in int8.NAMED.values():
        assert int8.scheme_named(scheme.name) == scheme
        for calibrator, ends in covered.items():
            placed = Way(made, scheme, calibrator, ends).placed()
            grids = int8.grids(placed).values()
            assert {grid.low for grid in grids} == {-128 if scheme.signed else 0}
            assert {grid.zero_point in (0, 128) for grid in grids} == {True} or not scheme.symmetric
            least = 0.8 if scheme.weight_bits == 7 or not int8.overflows() else 0.0
            assert (run(int8.shortened(placed), images).argmax(1) == true).mean() > least, (scheme, calibrator)


def test_an_unknown_scheme_is_an_error_that_names_the_others() -> None:
    with pytest.raises(UsageError, match="no scheme 'int4'; there are int8 per-channel s8 symmetric"):
        int8.scheme_named("int4")


# Equalisation

NETS: dict[str, dict[str, Any]] = {
    "mobilenet_v1_cifar": {"width": 0.25},
    "mobilenet_v2": {"stem": "cifar", "width": 0.35},
    "resnet8_cifar": {},
    "se_resnet20_cifar": {},
    "shufflenet_v1_g3_cifar": {"width": 0.25},
    "shufflenet_v2_050": {"stem": "cifar"},
    "squeezenet1_1": {"stem": "cifar"},
    "mobilenet_v3_small": {"stem": "cifar"},
}


def uneven(name: str, **args: Any) -> nn.Module:
    """A network in float64 whose folded kernels differ much by channel."""
    torch.manual_seed(0)
    net = create_model(name, num_classes=5, size=32, **args).double().eval()
    for leaf in net.modules():
        if isinstance(leaf, nn.BatchNorm2d):
            assert leaf.running_mean is not None
            assert leaf.running_var is not None
            leaf.weight.data = torch.exp(torch.randn_like(leaf.weight))
            leaf.bias.data = torch.randn_like(leaf.bias)
            leaf.running_mean.normal_()
            leaf.running_var.uniform_(0.5, 2)
    return fold_batchnorm(net, (3, 32, 32))


def spread(net: nn.Module) -> float:
    """The mean over kernels of the deviation of log₂ of their rows' ranges."""
    rows = [leaf.weight.detach().flatten(1).abs().amax(1) for leaf in net.modules() if isinstance(leaf, nn.Conv2d)]
    return float(torch.stack([torch.log2(each[each > 0]).std() for each in rows]).mean())


@pytest.mark.parametrize("name", NETS)
def test_equalisation_changes_kernels_but_no_answer(name: str) -> None:
    net = uneven(name, **NETS[name]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as trained
    x = torch.randn(3, 3, 32, 32, dtype=torch.double)
    with torch.no_grad():
        expected = net(x)
    assert expected.std() > 0
    for even in (equalise(net, (3, 32, 32)), smooth(net, x[:1])):
        with torch.no_grad():
            torch.testing.assert_close(even(x), expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
        both = zip(net.parameters(), even.parameters(), strict=True)
        assert sum(not torch.allclose(a, b, rtol=0.01) for a, b in both) > 0


def test_equalisation_makes_ranges_alike() -> None:
    net = uneven("mobilenet_v1_cifar", width=0.5)
    assert spread(equalise(net, (3, 32, 32))) < 0.6 * spread(net)


def test_through_relu6_only_what_no_input_drives_to_the_clip_is_scaled() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU6(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6(),
        nn.Conv2d(8, 4, 1), GlobalAvgPool(), nn.Linear(4, 3),
    ).double().eval()  # fmt: skip
    depthwise = net[2]
    assert isinstance(depthwise, nn.Conv2d)
    assert depthwise.bias is not None
    with torch.no_grad():
        depthwise.weight[:4] = 0.002 * torch.randn(4, 1, 3, 3)  # at most 0.002 · 6 · 9 · a few: never near 6
        depthwise.weight[4:] = 2.0
        depthwise.bias[:] = torch.tensor([0.1, 0.0, -0.01, 0.02, 0.0, 1.0, 2.0, 3.0])
        for leaf in (net[0], net[4]):
            leaf.weight[1] *= 7  # type: ignore[union-attr, operator, index]
    equal = equalise(net, (3, 8, 8))
    scaled = equal[2]  # type: ignore[index]
    grown = (scaled.weight / depthwise.weight).flatten(1).mean(1)
    assert (grown[:4] > 3).all()
    assert (grown[4:] == 1).all()
    x = 10 * torch.randn(64, 3, 8, 8, dtype=torch.double)
    with torch.no_grad():
        assert (net[:2](x) == 6).any()
        assert (net[:4](x) == 6).any()
        torch.testing.assert_close(equal(x), net(x), rtol=1e-10, atol=1e-10)


def test_a_curved_activation_has_no_edge() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.SiLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    assert edges(net, trace(net, (3, 8, 8))) == []


def test_a_planted_range_collapses_int8_per_tensor_and_equalisation_repairs_it(
    pictures: tuple[Dataset, Dataset],
) -> None:
    train, validation = pictures
    net, images = separable(validation), train.batch(28, slice(0, 64))
    before = agreement(net, run(way(net, images, PER_TENSOR).placed(), validation.batch(28)), validation)
    planted(net)
    bad = agreement(net, run(way(net, images, PER_TENSOR).placed(), validation.batch(28)), validation)
    equal = equalise(net, SHAPE)
    repaired = agreement(net, run(way(equal, images, PER_TENSOR).placed(), validation.batch(28)), validation)
    assert before > 0.9
    assert bad < 0.75
    assert repaired > 0.9


def test_smoothing_makes_activations_alike(pictures: tuple[Dataset, Dataset]) -> None:
    train, validation = pictures
    net, images = separable(validation), train.batch(28, slice(0, 64))
    planted(net, 30)
    true = logits(net, validation, GREY).softmax(1).numpy()
    even = smooth(net, normalise(torch.from_numpy(images), GREY))
    before, after = form(net, images), form(even, images)
    for name in ("1", "5"):  # read by depthwise kernels: all channels reach as far as the largest
        with torch.no_grad():
            x = normalise(torch.from_numpy(images), GREY)
            reach = even[: int(name) + 1](x).amax((0, 2, 3))  # type: ignore[index]
        assert reach.max() == pytest.approx(before.values[before.names[name]].highest, rel=1e-4)
        assert (reach[reach > 0] > 0.99 * reach.max()).float().mean() > 0.8

    def error(made: Form) -> float:
        return divergence(true, run(Way.of(made, PER_CHANNEL, "min-max").placed(), validation.batch(28)))

    assert error(after) < 0.3 * error(before)


# Bias correction


def test_bias_correction_reduces_the_mean_error(pictures: tuple[Dataset, Dataset]) -> None:
    train, validation = pictures
    net, images = separable(validation), train.batch(28, slice(0, 256))
    made = way(net, images, PER_TENSOR, "mse")
    fake = fake_quantised(net, made.form.model, made.placed(), made.form.names, PER_TENSOR)
    true = logits(net, validation, GREY)
    before = (logits(fake, validation, GREY) - true).mean(0).abs()
    correct_biases(fake, net, normalise(torch.from_numpy(images), GREY))
    after = (logits(fake, validation, GREY) - true).mean(0).abs()
    assert after.sum() < 0.5 * before.sum()
    file = replace(made, form=form(fake.net, images)).placed()
    assert agreement(net, run(file, validation.batch(28)), validation) > 0.9


# Layers in float


def test_named_layers_stay_float(pictures: tuple[Dataset, Dataset]) -> None:
    train, validation = pictures
    net, images = separable(validation), train.batch(28, slice(0, 32))
    made = way(net, images, PER_CHANNEL)
    layers = {name: made.form.names[name] for name in ("2", "4")}
    file = int8.shortened(replace(made, kept=tuple(layers.values())).placed())
    kinds = {each.name: each.data_type for each in file.graph.initializer}
    dequantised = {node.output[0]: kinds.get(node.input[0]) for node in file.graph.node if "Dequant" in node.op_type}
    found = [
        kinds.get(node.input[1], dequantised.get(node.input[1]))
        for node in file.graph.node
        if node.op_type in int8.LAYERS
    ]
    whole, full = TensorProto.INT8, TensorProto.FLOAT
    assert found == [whole, full, full, whole, whole, whole]
    assert agreement(net, run(file, validation.batch(28)), validation) > 0.9


def test_the_layer_that_hurts_most_is_found(pictures: tuple[Dataset, Dataset]) -> None:
    train, validation = pictures
    net, images = separable(validation), train.batch(28, slice(0, 64))
    with torch.no_grad():
        net[4].weight[5] *= 300  # type: ignore[union-attr, operator, index]
        net[4].bias[5] = -1e4  # type: ignore[union-attr, operator, index]
    made = way(net, images, PER_TENSOR)
    found = errors(made, images, run(made.form.model, images))
    assert len(found) == 6
    assert next(iter(found)) == made.form.names["4"]
    assert list(found.values()) == sorted(found.values(), reverse=True)


# Fake quantisation


@pytest.mark.parametrize("signed", [False, True])
def test_fake_quantisation_rounds_as_onnx_runtime_does(signed: bool) -> None:
    kind, low, high = (np.int8, -128, 127) if signed else (np.uint8, 0, 255)
    grid = int8.Grid(float(np.float32(0.0371)), -7 if signed else 13, low, high)
    rng = np.random.default_rng(0)
    ties = (np.arange(-300, 300) + 0.5).astype(np.float32) * np.float32(0.0371)
    x = np.concatenate(
        [rng.normal(scale=4, size=100_000).astype(np.float32), ties, np.array([0, 1e9, -1e9], np.float32)]
    )
    scale = numpy_helper.from_array(np.array(grid.scale, np.float32), "s")
    zero = numpy_helper.from_array(np.array(grid.zero_point, kind), "z")
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [len(x)]) for name in ("image", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [scale, zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    np.testing.assert_array_equal(rounded(torch.from_numpy(x), grid).numpy(), run(model, x))


@pytest.mark.parametrize("scheme", [PER_CHANNEL, PER_TENSOR], ids=lambda scheme: scheme.name)
def test_fake_kernels_are_those_of_the_file(scheme: int8.Scheme, pictures: tuple[Dataset, Dataset]) -> None:
    train, validation = pictures
    net = separable(validation)
    made = way(net, train.batch(28, slice(0, 32)), scheme)
    stored = int8.quantised_weights(made.placed())
    of = {node.output[0]: node.input[1] for node in made.form.model.graph.node if node.op_type in int8.LAYERS}
    assert len(stored) == 6
    for name, leaf in net.named_children():
        if isinstance(leaf, nn.Conv2d | nn.Linear):
            fake = rounded_weight(leaf.weight, scheme).detach().numpy()
            np.testing.assert_allclose(stored[of[made.form.names[name]]], fake, rtol=2e-7)


@pytest.mark.parametrize("scheme", int8.schemes(), ids=lambda scheme: scheme.name)
def test_a_fake_quantised_network_answers_as_its_file(scheme: int8.Scheme, pictures: tuple[Dataset, Dataset]) -> None:
    train, validation = pictures
    net, images = separable(validation), train.batch(28, slice(0, 64))
    made = way(net, images, scheme)
    fake = fake_quantised(net, made.form.model, made.placed(), made.form.names, scheme)
    true = logits(net, validation, GREY).softmax(1).numpy()
    file, ours = run(made.placed(), validation.batch(28)), logits(fake, validation, GREY).softmax(1).numpy()
    assert np.abs(file - ours).mean() < 0.4 * np.abs(file - true).mean()


def test_gradients_go_straight_through_and_stop_where_values_are_clamped() -> None:
    x = torch.tensor([-1.0, 0.2, 0.7, 30.0], requires_grad=True)
    rounded(x, int8.Grid(0.1, 0, 0, 255)).backward(torch.ones(4))
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 0]
    weight = torch.randn(4, 3, requires_grad=True)
    rounded_weight(weight, PER_CHANNEL).sum().backward()
    assert weight.grad is not None
    assert (weight.grad == 1).all()


def test_fine_tuning_brings_the_answers_back(pictures: tuple[Dataset, Dataset]) -> None:
    train, validation = pictures
    net, images = separable(validation), train.batch(28, slice(0, 64))
    planted(net, 8)
    train, validation = (labelled(each, net) for each in pictures)
    made = way(net, images, PER_TENSOR)
    fake = fake_quantised(net, made.form.model, made.placed(), made.form.names, PER_TENSOR)
    true = logits(net, validation, GREY).softmax(1).numpy()
    before = divergence(true, logits(fake, validation, GREY).softmax(1).numpy())
    fine_tune(fake, net, Context(train, validation, GREY, Recipe(flip=False), threads=1), Clock(epochs=1), 0.005)
    after = divergence(true, logits(fake, validation, GREY).softmax(1).numpy())
    assert after < 0.5 * before


# What ships


def latency(ms: float) -> Latency:
    return Latency(ms, ms, ms, "onnxruntime", 1, 1)


def row(name: str, size: int, ms: float, accuracy: float) -> Variant:
    return Variant(name, bytes(size), latency(ms), accuracy, {}, 0.0)


def test_nothing_ships_that_is_larger_slower_and_worse() -> None:
    full = row(FLOAT, 400, 1.0, 0.940)
    bad = row("repaired", 130, 0.60, 0.938)
    good = row("plain", 100, 0.59, 0.939)
    assert frontier([full, bad, good]) == [full, good]
    for rows in ([full, bad, good], [good, bad, full], [bad, full, good]):
        assert fastest(rows, 0.937) is good
        assert choose(frontier(rows)) is good
    assert fastest([full, bad, good], 0.9395) is full


def test_of_files_about_as_fast_the_most_accurate_ships() -> None:
    full = row(FLOAT, 400, 1.0, 0.940)
    rows = [full, row("plain", 100, 0.60, 0.937), row("better", 101, 0.61, 0.939), row("slower", 101, 0.70, 0.9395)]
    assert fastest(rows, 0.936).format == "better"


def test_what_ships_is_never_beaten() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        rows = [row(str(i), rng.randint(1, 6), rng.randint(1, 6), rng.randint(1, 6) / 10) for i in range(5)]
        rows[0].format = FLOAT
        for chosen in (fastest(rows, rng.random()), choose(frontier(rows))):
            ours = (len(chosen.model), chosen.latency.p50, -chosen.val_top1)
            for each in rows:
                theirs = (len(each.model), each.latency.p50, -each.val_top1)
                assert theirs == ours or any(a > b for a, b in zip(theirs, ours, strict=True))


def labelled(data: Dataset, net: nn.Module) -> Dataset:
    """The pictures with the network's own answers for labels, so that it is always right."""
    return replace(data, labels=logits(net, data, GREY).argmax(1).numpy(), classes=tuple(CLASSES))


def test_a_network_is_repaired_step_by_step(pictures: tuple[Dataset, Dataset]) -> None:
    net = separable(pictures[1])
    planted(net)
    train, validation = (labelled(each, net) for each in pictures)
    context = Context(train, validation, GREY, Recipe(flip=False), threads=1)
    found = repair(net, context, Repair(limit=0.05, race=0.02, schemes=(PER_TENSOR,)))
    names = [each.name for each in found.attempts]
    assert names[:3] == [FLOAT, PER_TENSOR.name, f"{PER_TENSOR.name}, equalised"]
    full, plain = found.attempts[:2]
    assert (full.val_top1, full.agreement, full.divergence) == (1.0, 1.0, 0.0)
    assert plain.val_top1 < 0.8
    assert found.attempts[-1].val_top1 >= 0.95
    assert all(each.latency.n > 0 for each in found.attempts)
    assert found.chosen.val_top1 >= 0.95
    assert set(plain.to_json()) >= {"name", "val_top1", "agreement", "divergence", "size_bytes", "latency_ms"}


def test_layers_go_to_float_where_nothing_else_helps(pictures: tuple[Dataset, Dataset]) -> None:
    net = separable(pictures[1])
    train, validation = (labelled(each, net) for each in pictures)
    context = Context(train, validation, GREY, Recipe(flip=False), threads=1)
    found = repair(net, context, Repair(limit=0.0, race=0.02, schemes=(PER_TENSOR,)))
    counts = [len(each.kept) for each in found.attempts if each.kept]
    assert counts[:2] == [1, 2]
    assert set(found.attempts[-1].kept) <= {name for name, _ in net.named_children()}
    sizes = [len(each.model) for each in found.attempts]
    assert sizes[-1] > sizes[1]


def test_a_network_that_holds_is_not_repaired(pictures: tuple[Dataset, Dataset]) -> None:
    net = separable(pictures[1])
    train, validation = (labelled(each, net) for each in pictures)
    context = Context(train, validation, GREY, Recipe(flip=False), threads=1)
    found = repair(net, context, Repair(limit=0.5, race=0.02))
    even = [f"{each.name}, {'smoothed' if each.per_channel else 'equalised'}" for each in int8.schemes()]
    assert [each.name for each in found.attempts] == [FLOAT, *(scheme.name for scheme in int8.schemes()), *even]
