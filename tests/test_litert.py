"""The .tflite file answers as the network does: every leaf, every family, any number of pictures, and in int8."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_export import GREY, balanced, probe
from test_models import small
from torch import nn

from flyweight import ops
from flyweight.bench.engines import litert as engine
from flyweight.data import open_source, prepare
from flyweight.data.dataset import Dataset
from flyweight.export import int8, onnx
from flyweight.export.targets import litert
from flyweight.export.task import Task
from flyweight.export.verify import answers
from flyweight.graph import GraphError
from flyweight.preprocess import Preprocess
from flyweight.train.loop import logits

pytest.importorskip("ai_edge_litert", reason="needs flyweight[litert]")

CLASSES = ("a", "b", "c")
SHARED = ((120.0,) * 3, (60.0,) * 3)  # by the input's own grid
OWN = ((123.7, 116.3, 103.5), (58.4, 57.1, 57.4))
# One form for each kind of block and each option that brings its own leaves.
NETS = [
    ("airbench94", {}), ("alexnet", {}), ("aligned_xception_41", {}), ("googlenet", {}), ("inception_resnet_v1", {}),
    ("inception_v2", {}), ("inception_v3", {}), ("mobilenet_v1", {"padding": "same"}),
    ("mobilenet_v2", {"act": "silu"}), ("mobilenet_v3_small", {}), ("nin", {}), ("resnet8_cifar", {"norm": "group"}),
    ("resnet18", {}), ("resnet20_cifar", {}), ("resnext50_32x4d", {}), ("se_resnet20_cifar", {}),
    ("shufflenet_v1_g3", {}), ("shufflenet_v2", {}), ("squeezenet1_0", {"bypass": "complex"}), ("xception", {}),
]  # fmt: skip


class Around(nn.Module):
    """A convolution, the leaf in question, a classifier of so many channels; with `gate` the leaf has two inputs."""

    def __init__(self, leaf: nn.Module, channels: int, gate: bool) -> None:
        super().__init__()
        self.first, self.leaf = nn.Conv2d(3, 8, 3, padding=1), leaf
        self.gate = ops.GlobalAvgPool(keep=True) if gate else None
        self.end = nn.Sequential(ops.GlobalAvgPool(), nn.Linear(channels, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.end(self.leaf(x) if self.gate is None else self.leaf(x, self.gate(x)))


class Resized(nn.Module):
    """Two maps of different sizes, the smaller one resized."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.resize = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, stride=2), ops.Resize()
        self.cat, self.end = ops.Cat(), nn.Sequential(ops.GlobalAvgPool(), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return self.end(self.cat(x, self.resize(self.b(x), x)))


class Sum(nn.Module):
    """Three maps, added."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.add = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), ops.Add()
        self.end = nn.Sequential(nn.ReLU(), ops.GlobalAvgPool(), nn.Linear(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return self.end(self.add(x, self.b(x), self.c(x)))


def around(leaf: nn.Module, channels: int = 8, gate: bool = False) -> nn.Module:
    net = Around(leaf, channels, gate)
    for each in net.modules():
        if isinstance(each, nn.GroupNorm | nn.BatchNorm2d):
            nn.init.uniform_(each.weight, 0.5, 1.5)
            nn.init.normal_(each.bias)
    return net


def silent() -> nn.Module:
    """A convolution with a channel that is its bias alone, and one that is hardly anything."""
    conv = nn.Conv2d(8, 8, 1)
    with torch.no_grad():
        conv.weight[0], conv.weight[1], conv.bias[0] = 0, 1e-12, 0.7
    return conv


# Nets around single leaves, on pictures of 15 × 18: odd, even, and not square.
LEAVES = {
    "strided": lambda: around(nn.Conv2d(8, 8, 3, 2, 1)),
    "torch's same": lambda: around(nn.Conv2d(8, 8, (1, 5), padding="same", bias=False)),
    "SAME": lambda: around(ops.SameConv2d(8, 8, 4, 3)),
    "grouped, with gaps": lambda: around(nn.Conv2d(8, 12, 3, 1, 2, 2, groups=4), 12),
    "depthwise, doubled": lambda: around(nn.Conv2d(8, 16, 3, 2, 1, groups=8), 16),
    "batch norm": lambda: around(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8))),
    "group norm": lambda: around(nn.GroupNorm(2, 8)),
    "max pool": lambda: around(nn.MaxPool2d(3, 2, 1)),
    "max pool behind ReLU": lambda: around(nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1))),
    "max pool, rounded up": lambda: around(nn.MaxPool2d(3, 2, ceil_mode=True)),
    "SAME max pool": lambda: around(ops.SameMaxPool2d(3, 2)),
    "average": lambda: around(nn.AvgPool2d(3, 2, 1)),
    "average, rounded up": lambda: around(nn.AvgPool2d(3, 2, 1, ceil_mode=True)),
    "average of pixels only": lambda: around(nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
    "strided average of pixels only": lambda: around(nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
    "SAME average": lambda: around(ops.SameAvgPool2d(3, 2)),
    "adaptive": lambda: around(nn.Sequential(nn.AdaptiveAvgPool2d((5, 6)), nn.Conv2d(8, 8, 3))),
    "adaptive, uneven": lambda: around(nn.Sequential(nn.AdaptiveAvgPool2d((4, 5)), nn.Conv2d(8, 8, 3))),
    "flat": lambda: nn.Sequential(nn.Conv2d(3, 2, 5, 4), nn.Dropout(), nn.Flatten(), nn.Linear(24, 3)),
    "shuffle": lambda: around(nn.Sequential(ops.ChannelShuffle(2), nn.Conv2d(8, 8, 1, groups=2))),
    "part": lambda: around(ops.Part(1), 4),
    "more channels": lambda: around(ops.PadChannels(2, 3), 13),
    "scale": lambda: around(ops.Scale(-0.3)),
    "largest": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), ops.GlobalMaxPool(), nn.Linear(8, 3)),
    "gate": lambda: around(ops.Mul(), gate=True),
    "resize": Resized,
    "sum": Sum,
    "silent channels": lambda: around(silent()),
    "an answer for each position": lambda: nn.Conv2d(3, 3, 3),
    "nothing": lambda: around(nn.Identity()),
} | {
    each.__name__: lambda each=each: around(each())
    for each in (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.Sigmoid, nn.Hardsigmoid)
}


def noise(preprocess: Preprocess) -> np.ndarray:
    """Three pictures: dark, dim and bright."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, *preprocess.size, preprocess.channels))
    return (pixels * np.array([0.2, 0.6, 1.0]).reshape(3, 1, 1, 1)).astype(np.uint8)


def expected(net: nn.Module, pixels: np.ndarray, preprocess: Preprocess) -> tuple[np.ndarray, float]:
    """softmax(logits / t) in float64, and t: the deviation of the logits, so that no answer is certain."""
    mean, std = (torch.tensor(each, dtype=torch.float64) for each in (preprocess.mean, preprocess.std))
    with torch.no_grad():
        x = ((torch.from_numpy(pixels) - mean) / std).permute(0, 3, 1, 2)
        logits = copy.deepcopy(net).double()(x)
    return torch.softmax(logits / logits.std(), dim=1).numpy(), logits.std().item()


def made(name: str) -> nn.Module:
    torch.manual_seed(2)
    return LEAVES[name]().eval()


def checked(net: nn.Module, preprocess: Preprocess) -> None:
    """One picture, three, and one again answer as in float64."""
    pixels = noise(preprocess)
    truth, temperature = expected(net, pixels, preprocess)
    assert np.abs(truth - truth.mean(axis=0)).max() > 1e-3, "answers must depend on the picture"
    run = engine.start(litert.export(Task(net, preprocess, CLASSES, temperature)), 1)
    for some in (slice(0, 1), slice(0, 3), slice(1, 2)):
        np.testing.assert_allclose(run(pixels[some]), truth[some], atol=1e-5)


def checked_int8(net: nn.Module, preprocess: Preprocess, error: float) -> None:
    """So do they in int8, nearly."""
    pixels = noise(preprocess)
    truth, temperature = expected(net, pixels, preprocess)
    task = Task(net, preprocess, CLASSES, temperature).quantised(int8.SCHEMES[0], pixels)
    run = engine.start(litert.export(task), 1)
    for some in (slice(0, 1), slice(0, 3), slice(1, 2)):
        np.testing.assert_allclose(run(pixels[some]), truth[some], atol=error)


def operations(task: Task) -> list[str]:
    """What the file computes, in order."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(model_content=litert.export(task).data, experimental_op_resolver_type=plain)
    return [each["op_name"] for each in interpreter._get_ops_details()]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small networks are slower on two."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


@pytest.mark.parametrize(("name", "args"), NETS, ids=[name for name, _ in NETS])
def test_every_family_answers_as_computed(name: str, args: dict) -> None:
    net = small(name, **args)
    checked(net, Preprocess(net.spec.input[1:], 3, *OWN))


@pytest.mark.parametrize("name", LEAVES)
def test_every_leaf_answers_as_computed(name: str) -> None:
    checked(made(name), Preprocess((15, 18), 3, *SHARED))


@pytest.mark.parametrize("name", LEAVES)
def test_every_leaf_answers_in_int8(name: str) -> None:
    checked_int8(made(name), Preprocess((15, 18), 3, *SHARED), 0.015)


@pytest.mark.parametrize("name", sorted(LEAVES.keys() - {"group norm", "adaptive, uneven"}))
def test_leaves_stay_in_int8(name: str) -> None:
    """Only the picture and the logits are dequantised."""
    preprocess = Preprocess((15, 18), 3, *SHARED)
    task = Task(made(name), preprocess, CLASSES).quantised(int8.SCHEMES[0], noise(preprocess))
    assert operations(task).count("DEQUANTIZE") == 2


@pytest.mark.parametrize("name", ["squeezenet1_0", "resnet18", "inception_resnet_v1", "se_resnet20_cifar", "nin"])
def test_a_whole_network_answers_in_int8(name: str) -> None:
    net = small(name)
    checked_int8(net, Preprocess(net.spec.input[1:], 3, *OWN), 0.03)


def test_every_leaf_of_onnx_has_a_rule() -> None:
    assert set(litert.RULES) == set(onnx.RULES)


def test_a_leaf_without_a_rule_fails_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(litert.RULES, nn.ReLU)
    with pytest.raises(GraphError, match="leaf is a ReLU, which has no LiteRT rule"):
        litert.export(Task(made("ReLU"), Preprocess((15, 18), 3, *SHARED), CLASSES))


def test_a_max_pool_with_gaps_fails_by_name() -> None:
    with pytest.raises(GraphError, match="leaf is a MaxPool2d with gaps"):
        litert.export(Task(around(nn.MaxPool2d(3, dilation=2)), Preprocess((15, 18), 3, *SHARED), CLASSES))


@pytest.mark.parametrize("normalisation", [SHARED, OWN])
def test_every_level_of_a_pixel_is_taken_exactly(normalisation: tuple) -> None:
    preprocess = Preprocess((1, 1), 3, *normalisation)
    levels = np.arange(256, dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(3, axis=3)
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten())
    truth, temperature = expected(net, levels, preprocess)
    run = engine.start(litert.export(Task(net, preprocess, CLASSES, temperature)), 1)
    np.testing.assert_allclose(run(levels), truth, atol=1e-6)


def test_the_interface_is_as_documented() -> None:
    from ai_edge_litert.interpreter import Interpreter

    exported = litert.export(Task(made("ReLU"), Preprocess((15, 18), 3, *SHARED), CLASSES))
    assert list(exported.files) == ["model.tflite"]
    interpreter = Interpreter(model_content=exported.data)
    assert interpreter.get_signature_list() == {"serving_default": {"inputs": ["image"], "outputs": ["probabilities"]}}
    image, answer = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    assert (image["name"], image["dtype"], list(image["shape_signature"])) == ("image", np.uint8, [-1, 15, 18, 3])
    assert image["quantization"] == (pytest.approx(1 / 60), 120)
    assert (answer["name"], answer["dtype"], list(answer["shape"])) == ("probabilities", np.float32, [1, 3])


@pytest.fixture(scope="module")
def pictures() -> Dataset:
    """Real pictures: the validation split of the data that comes along."""
    return prepare(open_source("demo"), [28]).validation


@pytest.mark.parametrize("scheme", int8.SCHEMES[::2], ids=lambda scheme: scheme.name)
def test_int8_keeps_most_answers_and_shrinks(scheme: int8.Scheme, pictures: Dataset) -> None:
    net = balanced(probe(1), pictures, GREY)
    task = Task(net, GREY, CLASSES)
    smaller = litert.export(task.quantised(scheme, pictures.batch(28, slice(0, 64))))
    reference = logits(net, pictures, GREY).argmax(1).numpy()
    assert (answers(engine.start(smaller, 1), pictures, GREY).argmax(1) == reference).mean() > 0.9
    assert smaller.files.keys() == {"model_int8.tflite"}
    assert smaller.size < litert.export(task).size


def test_int8_is_int8_from_the_picture_to_the_logits_but_for_what_is_kept() -> None:
    task = Task(probe(1), GREY, CLASSES).quantised(int8.SCHEMES[0], noise(GREY))
    conv, end = ["PAD", "CONV_2D"], ["PAD", "CONV_2D", "MEAN", "FULLY_CONNECTED", "DEQUANTIZE", "SOFTMAX"]
    assert operations(task) == ["DEQUANTIZE", "QUANTIZE", *conv, *end]
    assert task.int8 is not None
    kept = replace(task, int8=replace(task.int8, kept=(task.onnx[1]["0"],)))
    assert operations(kept) == ["DEQUANTIZE", *conv, "QUANTIZE", *end]
