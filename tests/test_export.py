"""The exported file: its interface, int8 in all schemes, and the parity gate with planted faults."""

import json
import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx as onnx_format
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from flyweight.bench.engines import onnxruntime as engine
from flyweight.bench.measure import latencies
from flyweight.create import create_model
from flyweight.data import open_source, prepare
from flyweight.data.dataset import Dataset
from flyweight.export import int8, onnx
from flyweight.export.pixels import without_zero_point
from flyweight.export.verify import answers, compare, temperature, wilson
from flyweight.fold import fold_batchnorm
from flyweight.graph import GraphError
from flyweight.ops import GlobalAvgPool, SameConv2d
from flyweight.preprocess import Preprocess
from flyweight.train.loop import logits

CLASSES = ["a", "b", "c"]
GREY = Preprocess((28, 28), 1, (72.0,), (90.0,))


@pytest.fixture(scope="module")
def pictures() -> Dataset:
    """Real pictures: the validation split of the data that comes along."""
    return prepare(open_source("demo"), [28]).validation


def probe(channels: int) -> nn.Module:
    """A network whose answer depends on brightness, on the order of channels and on what is left and right."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=4), nn.ReLU6(), GlobalAvgPool(), nn.Linear(16, 3),
    ).eval()  # fmt: skip


def balanced(net: nn.Module, data: Dataset, preprocess: Preprocess) -> nn.Module:
    """Shifts the last bias so that all three answers occur on these pictures."""
    with torch.no_grad():
        outputs = logits(net, data, preprocess)
        net[-1].weight.div_(outputs.std(0)[:, None])  # type: ignore[index, union-attr, operator]
        net[-1].bias.copy_(-(logits(net, data, preprocess) - net[-1].bias).mean(0))  # type: ignore[index, union-attr, operator]
    return net


def test_the_interface_is_as_documented() -> None:
    model = onnx.export(probe(3), Preprocess((16, 24), 3, (1.5, 2.0, 3.0), (50.0, 60.0, 70.0)), CLASSES)
    image, output = model.graph.input[0], model.graph.output[0]
    shape = [d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim]
    assert (image.name, shape, image.type.tensor_type.elem_type) == (
        "image",
        ["N", 16, 24, 3],
        onnx_format.TensorProto.UINT8,
    )
    assert (output.name, [d.dim_param or d.dim_value for d in output.type.tensor_type.shape.dim]) == (
        "probabilities",
        ["N", 3],
    )
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert metadata["classes"] == CLASSES
    assert metadata["preprocess"] == {
        "size": [16, 24], "channels": 3, "resize": "bilinear", "mean": [1.5, 2.0, 3.0], "std": [50.0, 60.0, 70.0],
    }  # fmt: skip
    assert not any(tensor.external_data for tensor in model.graph.initializer)


@pytest.mark.parametrize("mean", [(120.0, 120.0, 120.0), (123.675, 116.28, 103.53)])
def test_both_ways_to_normalise_are_exact(mean: tuple[float, ...]) -> None:
    preprocess = Preprocess((16, 16), 3, mean, (60.0,) * 3)
    net = probe(3)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    x = ((torch.from_numpy(pixels).float() - torch.tensor(mean)) / 60).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = torch.softmax(net(x), 1).numpy()
    model = onnx.export(net, preprocess, CLASSES)
    np.testing.assert_allclose(engine.load(model.SerializeToString(), 1)(pixels), expected, atol=1e-6)


def test_folding_changes_nothing_but_the_norm() -> None:
    net = probe(3)
    nn.init.uniform_(net[1].running_var, 0.5, 2)  # type: ignore[index, arg-type]
    folded = fold_batchnorm(net, (3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    assert not any(isinstance(leaf, nn.BatchNorm2d) for leaf in folded.modules())
    torch.testing.assert_close(net(x), folded(x))


def test_a_norm_that_shares_its_convolution_is_not_folded() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            from flyweight.ops import Add

            self.conv, self.norm, self.add = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Add()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return self.add(y, self.norm(y))

    net = Shared().eval()
    nn.init.uniform_(net.norm.running_mean)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(net(x), fold_batchnorm(net, (3, 4, 4))(x))


def test_a_leaf_without_a_rule_fails_by_name() -> None:
    with pytest.raises(GraphError, match="Tanh, whose shape is not known"):
        onnx.export(nn.Sequential(nn.Tanh(), GlobalAvgPool()), GREY, CLASSES)


@pytest.mark.parametrize("scheme", int8.schemes(), ids=lambda scheme: scheme.name)
def test_int8_keeps_most_answers_and_shrinks(scheme: int8.Scheme, pictures: Dataset) -> None:
    net = balanced(probe(1), pictures, GREY)
    model = onnx.export(net, GREY, CLASSES)
    quantised = int8.quantise(model, pictures.batch(28, slice(0, 64)), scheme)
    reference = logits(net, pictures, GREY).argmax(1).numpy()
    exported = answers(engine.load(quantised.SerializeToString(), 1), pictures, GREY).argmax(1)
    assert len(set(reference)) == 3
    assert (reference == exported).mean() > 0.9
    assert {entry.key for entry in quantised.metadata_props} == {"classes", "preprocess"}
    assert max(len(node.output[0]) for node in quantised.graph.node) <= len("probabilities")


@pytest.mark.parametrize("layer", [nn.Conv2d(1, 16, 3, 2, 1), SameConv2d(1, 16, 3, 2), nn.Conv2d(1, 16, 5)])
def test_the_mean_of_pixels_moves_into_the_first_biases(layer: nn.Module, pictures: Dataset) -> None:
    torch.manual_seed(0)
    net = balanced(nn.Sequential(layer, nn.ReLU(), GlobalAvgPool(), nn.Linear(16, 3)).eval(), pictures, GREY)
    images = pictures.batch(28, range(64))
    model = int8.quantise(onnx.export(net, GREY, CLASSES), images, int8.schemes()[0])
    moved = without_zero_point(model)
    onnx_format.checker.check_model(moved)
    constants = {each.name: numpy_helper.to_array(each) for each in moved.graph.initializer}
    zeros = [constants[node.input[2]] for node in moved.graph.node if node.op_type == "DequantizeLinear"]
    assert not any((zero == 72).all() for zero in zeros)
    before, after = (engine.load(each.SerializeToString(), 1)(images) for each in (model, moved))
    np.testing.assert_array_equal(after, before)
    assert before.std(axis=0).min() > 0.01


def test_pixels_stay_as_they_are_where_their_mean_cannot_be_moved() -> None:
    colour = Preprocess((28, 28), 3, (1.5, 2.0, 3.0), (50.0, 60.0, 70.0))
    pooled = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(1, 16, 3), nn.ReLU(), GlobalAvgPool(), nn.Linear(16, 3)).eval()
    for net, preprocess in ((probe(3), colour), (pooled, GREY)):
        images = np.random.default_rng(0).integers(0, 256, (4, 28, 28, preprocess.channels), dtype=np.uint8)
        model = onnx.export(net, preprocess, CLASSES)
        for each in (model, int8.quantise(model, images, int8.schemes()[0])):
            assert without_zero_point(each) is each
    plain = onnx.export(probe(1), GREY, CLASSES)
    assert without_zero_point(plain) is plain


def test_overflow_is_noticed_and_weights_of_seven_bits_avoid_it() -> None:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if platform.machine() == "x86_64" else ""
    if "flags" not in flags:
        pytest.skip("only x86 has processors of both kinds, and Linux says which")
    assert int8.overflows() == ("vnni" not in flags)
    assert {scheme.weight_bits for scheme in int8.schemes()} == {7 if int8.overflows() else 8}
    net = nn.Sequential(nn.Conv2d(1, 1, 28), nn.Flatten(), nn.Linear(1, 2)).eval()
    for value in net.parameters():
        nn.init.constant_(value, 0.001)
    white = np.full((2, 28, 28, 1), 255, np.uint8)
    model = onnx.export(net, Preprocess((28, 28), 1, (0.0,), (255.0,)), ("a", "b"))
    seven = int8.quantise(model, white, replace(int8.SCHEMES[0], weight_bits=7))
    weights = [numpy_helper.to_array(each) for each in seven.graph.initializer if each.data_type == TensorProto.INT8]
    assert max(np.abs(each).max() for each in weights) == 64


@pytest.mark.parametrize("name", ["shufflenet_v1_g3_cifar", "mobilenet_v1_cifar", "se_resnet20_cifar", "resnet8_cifar"])
def test_int8_is_smaller_for_every_family(name: str) -> None:
    net = create_model(name, num_classes=3, in_chans=1, width=0.5, size=28).eval()
    model = onnx.export(net, GREY, CLASSES)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 28, 28, 1), dtype=np.uint8)
    quantised = int8.quantise(model, pixels, int8.schemes()[0]).SerializeToString()
    assert len(quantised) < 0.5 * len(model.SerializeToString())
    answered = engine.load(quantised, 1)(pixels)
    np.testing.assert_allclose(answered.sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("fault", ["none", "another mean", "mirrored", "swapped answers"])
def test_the_gate_lets_the_truth_pass_and_stops_planted_faults(fault: str, pictures: Dataset) -> None:
    net = balanced(probe(1), pictures, GREY)
    reference = logits(net, pictures, GREY).argmax(1).numpy()
    preprocess = Preprocess((28, 28), 1, (0.0,), (90.0,)) if fault == "another mean" else GREY
    run = engine.load(onnx.export(net, preprocess, CLASSES).SerializeToString(), 1)
    feed = {"mirrored": lambda x: run(x[:, :, ::-1].copy()), "swapped answers": lambda x: run(x)[:, [1, 0, 2]]}.get(
        fault, run
    )
    exported = answers(feed, pictures, GREY).argmax(1)
    parity = compare(reference, exported, reference, exact=True)
    assert parity.passed == (fault == "none")


def test_int8_may_lose_a_point_but_not_more() -> None:
    truth = np.zeros(10_000, int)
    lossy = truth.copy()
    lossy[:90] = 1
    assert compare(truth, lossy, truth, exact=False).passed
    lossy[:150] = 1
    assert not compare(truth, lossy, truth, exact=False).passed
    # Of ten pictures, one wrong is no more than chance: the paired interval decides.
    assert compare(truth[:10], np.eye(1, 10, dtype=int)[0], truth[:10], exact=False).passed


def test_the_temperature_is_found() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=(20_000, 4)) * 2
    labels = np.array([rng.choice(4, p=p) for p in np.exp(true) / np.exp(true).sum(1, keepdims=True)])
    assert temperature(true * 3, labels) == pytest.approx(3, rel=0.05)


def test_wilson_interval() -> None:
    low, high = wilson(8, 10)  # Wilson (1927); the textbook's value
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    assert wilson(10, 10)[1] == 1
    assert wilson(0, 10)[0] == pytest.approx(0)


def test_latency_is_measured_on_every_model() -> None:
    models = [onnx.export(probe(1), GREY, CLASSES).SerializeToString()] * 2
    found = latencies(models, np.zeros((1, 28, 28, 1), np.uint8), threads=1, seconds=0.02)
    assert len(found) == 2
    for each in found:
        assert 0 < each.p50 <= each.p95 <= each.p99
        assert each.n >= 15
