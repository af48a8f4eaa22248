"""ncnn's files answer as the network does, leaf by leaf and family by family; int8 as the same roundings in float64."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_models import small
from torch import Tensor, nn

from flyweight import ops, zoo
from flyweight.bench.engines import ncnn as engine
from flyweight.bench.engines import read_export
from flyweight.errors import FlyweightError
from flyweight.export import int8, onnx
from flyweight.export.targets import ncnn
from flyweight.export.task import Task
from flyweight.fold import fold_batchnorm
from flyweight.graph import GraphError
from flyweight.preprocess import Preprocess

pytest.importorskip("ncnn")

FAMILIES = [(module.CANDIDATES["small"][0], {}) for _, module in sorted(zoo.families().items())]
OPTIONS = [
    ("mobilenet_v1", {"padding": "same"}),
    ("inception_v3", {"padding": "same"}),
    ("googlenet", {}),
    ("mobilenet_v3_small", {"act": "silu"}),
    ("mobilenet_v2", {"norm": "group"}),
    ("shufflenet_v1_g3_cifar", {"in_chans": 1}),
    ("resnet20_cifar", {"se": 4}),
    ("resnext50_32x4d", {}),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


def pixels(task: Task, n: int = 3) -> np.ndarray:
    """Noise, from dark to bright."""
    height, width = task.preprocess.size
    noise = np.random.default_rng(0).integers(0, 256, (n, height, width, task.preprocess.channels))
    return (noise * np.linspace(0.2, 1, n).reshape(n, 1, 1, 1)).astype(np.uint8)


def logits(net: nn.Module, task: Task, images: np.ndarray) -> Tensor:
    """In float64, which torch's own float32 is up to 1e-4 away from."""
    mean, std = (torch.tensor(value, dtype=torch.float64) for value in (task.preprocess.mean, task.preprocess.std))
    x = ((torch.from_numpy(images).double() - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        return copy.deepcopy(net).double()(x)


def computed(net: nn.Module, task: Task, images: np.ndarray) -> np.ndarray:
    """Probabilities in float64."""
    return torch.softmax(logits(net, task, images) / task.temperature, dim=1).numpy()


def task_of(net: nn.Module, shape: tuple[int, int, int]) -> Task:
    """The network to be exported, at the temperature that gives its logits a deviation of 1."""
    channels, height, width = shape
    preprocess = Preprocess((height, width), channels, (123.7, 116.3, 103.5)[:channels], (58.4, 57.1, 57.4)[:channels])
    task = Task(net, preprocess, ())
    outputs = logits(net, task, pixels(task))
    return replace(task, classes=tuple(map(str, range(outputs.shape[1]))), temperature=outputs.std().item())


def answers(task: Task, images: np.ndarray) -> np.ndarray:
    return engine.start(ncnn.export(task), 1)(images)


@pytest.mark.parametrize(("name", "args"), FAMILIES + OPTIONS, ids=lambda value: str(value))
def test_every_family_answers_as_the_network_does(name: str, args: dict) -> None:
    net = small(name, **args)
    task = task_of(net, net.spec.input)
    images = pixels(task)
    expected = computed(net, task, images)
    assert np.ptp(expected, axis=0).max() > 1e-3, "answers must depend on the picture"
    np.testing.assert_allclose(answers(task, images), expected, atol=2e-5)


class Twice(nn.Module):
    """y = leaf(x, x), or with a map of another size."""

    def __init__(self, leaf: nn.Module, other: nn.Module | None = None) -> None:
        super().__init__()
        self.leaf, self.other = leaf, other or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.leaf(x, self.other(x))


class Thrice(nn.Module):
    """Two parts, swapped, behind the whole, times its own sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.cat, self.add = ops.Part(0), ops.Part(1), ops.Cat(), ops.Add()

    def forward(self, x: Tensor) -> Tensor:
        return self.cat(x, self.second(x), self.first(x), self.add(x, x, x))


def resized(side: int | tuple[int, int]) -> nn.Module:
    """A map of this size, brought back to the size that it came from."""

    class Resized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.resize = nn.AdaptiveAvgPool2d(side), ops.Resize()

        def forward(self, x: Tensor) -> Tensor:
            return self.resize(self.pool(x), x)

    return Resized()


def gate() -> nn.Module:
    return nn.Sequential(ops.GlobalAvgPool(keep=True), nn.Conv2d(8, 8, 1), nn.Hardsigmoid())


LEAVES: dict[str, Callable[[], nn.Module]] = {
    "asymmetric convolution": lambda: nn.Conv2d(8, 8, (3, 5), (2, 1), (0, 2), (1, 2)),
    "same convolution": lambda: ops.SameConv2d(8, 8, (4, 3), 2),
    "groups": lambda: nn.Conv2d(8, 12, 3, groups=4),
    "depthwise, multiplied": lambda: nn.Conv2d(8, 16, 3, 2, 1, groups=8, bias=False),
    "max pool": lambda: nn.MaxPool2d(3, 2, 1),
    "max pool, rounded up": lambda: nn.MaxPool2d((2, 3), 2, ceil_mode=True),
    "max pool, rounded up and padded": lambda: nn.MaxPool2d(2, 3, 1, ceil_mode=True),
    "same max pool": lambda: ops.SameMaxPool2d(3, 2),
    "average pool": lambda: nn.AvgPool2d(3, 2, 1),
    "average pool, rounded up": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "average pool, padding not counted": lambda: nn.AvgPool2d((3, 2), 2, 1, ceil_mode=True, count_include_pad=False),
    "same average pool": lambda: ops.SameAvgPool2d(3, 2),
    "adaptive pool": lambda: nn.AdaptiveAvgPool2d((4, 3)),
    "batch norm": lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8)),
    "group norm": lambda: nn.GroupNorm(2, 8),
    "relu": nn.ReLU,
    "relu6": lambda: nn.Sequential(ops.Scale(9.0), nn.ReLU6()),
    "hard swish": nn.Hardswish,
    "swish": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "gate": lambda: Twice(ops.Mul(), gate()),
    "read twice": lambda: Twice(ops.Add()),
    "parts": Thrice,
    "shuffle": lambda: ops.ChannelShuffle(4),
    "more channels": lambda: ops.PadChannels(3, 2),
    "resized": lambda: resized((4, 6)),
    "resized from one position": lambda: resized(1),
    "resized from one row": lambda: resized((1, 4)),
    "nothing": lambda: nn.Sequential(nn.Identity(), nn.Dropout(), nn.ReLU(), nn.ReLU()),
}
HEADS = {"positions": nn.Flatten, "mean": ops.GlobalAvgPool, "largest": ops.GlobalMaxPool}


def around(leaf: nn.Module, head: nn.Module, shape: tuple[int, int, int]) -> nn.Module:
    """Convolution → norm → the leaf → a head → four classes."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(shape[0], 8, 3, padding=1), nn.BatchNorm2d(8), leaf, head)
    for norm in (each for each in body.modules() if isinstance(each, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        norm.momentum = 1.0
    body.train()(torch.randn(8, *shape))
    return nn.Sequential(body, nn.Linear(body.eval()(torch.zeros(1, *shape)).shape[1], 4)).eval()


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_leaf_answers_as_torch_does(leaf: str) -> None:
    shape = (3, 9, 12)
    task = task_of(around(LEAVES[leaf](), nn.Flatten(), shape), shape)
    images = pixels(task)
    np.testing.assert_allclose(answers(task, images), computed(task.net, task, images), atol=2e-6)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_head_takes_grey_and_coloured_pictures(head: str, channels: int) -> None:
    shape = (channels, 8, 5)
    task = task_of(around(nn.ReLU(), HEADS[head](), shape), shape)
    images = pixels(task)
    np.testing.assert_allclose(answers(task, images), computed(task.net, task, images), atol=2e-6)


def test_all_leaves_that_onnx_has_have_a_rule() -> None:
    assert set(ncnn.RULES) == set(onnx.RULES)


def test_a_leaf_without_a_rule_fails_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ncnn.RULES, nn.SiLU)
    with pytest.raises(GraphError, match=r"0\.2 is a SiLU, which has no ncnn rule"):
        ncnn.export(task_of(around(nn.SiLU(), nn.Flatten(), (3, 8, 8)), (3, 8, 8)))


def test_a_pool_with_gaps_fails_by_name() -> None:
    with pytest.raises(GraphError, match=r"0\.2 is a MaxPool2d with dilation"):
        ncnn.export(task_of(around(nn.MaxPool2d(2, dilation=2), nn.Flatten(), (3, 8, 8)), (3, 8, 8)))


def test_one_picture_and_several_read_back_from_a_folder(tmp_path) -> None:
    task = task_of(around(nn.ReLU(), nn.Flatten(), (3, 8, 8)), (3, 8, 8))
    exported = ncnn.export(task)
    run, images = engine.start(read_export(exported.written(tmp_path)), 2), pixels(task)
    together = run(images)
    assert (together.shape, together.dtype) == ((3, 4), np.float32)
    for picture, answer in zip(images, together, strict=True):
        np.testing.assert_array_equal(run(picture[None])[0], answer)


def test_an_activation_that_alone_reads_a_layer_becomes_part_of_it() -> None:
    net = around(nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 1), Twice(ops.Add(), nn.ReLU())), nn.Flatten(), (3, 8, 8))
    lines = ncnn.export(task_of(net, (3, 8, 8))).data.decode().splitlines()
    assert [line.split()[0] for line in lines[2:]] == [
        "Input", "Scale", "Convolution", "Convolution", "Split", "ReLU", "BinaryOp", "Flatten", "InnerProduct",
        "BinaryOp", "Softmax",
    ]  # fmt: skip


@pytest.mark.parametrize("damaged", [".param", ".bin"])
def test_a_damaged_file_is_told(damaged: str) -> None:
    exported = ncnn.export(task_of(around(nn.ReLU(), nn.Flatten(), (3, 8, 8)), (3, 8, 8)))
    files = {name: data[:100] if name.endswith(damaged) else data for name, data in exported.files.items()}
    with pytest.raises(FlyweightError, match=r"ncnn cannot load model\.param"):
        engine.start(replace(exported, files=files), 1)


def rounded(x: Tensor, largest: Tensor | float) -> Tensor:
    """The nearest of 255 equal steps between −largest and largest."""
    step = largest / 127
    return (x / step).round().clamp(-127, 127) * step


def fake_quantised(task: Task) -> nn.Module:
    """The folded network in float64, the inputs and weights of its layers in int8 rounded to the values of int8."""
    assert task.int8 is not None
    net = fold_batchnorm(task.net, task.shape).double()
    for node in task.graph.nodes:
        leaf = net.get_submodule(node.path)
        depthwise = isinstance(leaf, nn.Conv2d) and leaf.groups == leaf.in_channels > 1
        if not isinstance(leaf, nn.Conv2d | nn.Linear) or depthwise or task.onnx[1][node.name] in task.int8.kept:
            continue
        largest = max(map(abs, task.range(node.inputs[0])))
        leaf.register_forward_pre_hook(lambda leaf, args, largest=largest: (rounded(args[0], largest),))
        rows = leaf.weight.data.flatten(1).abs()
        most = rows.amax(1) if task.int8.scheme.per_channel else rows.max()
        leaf.weight.data = rounded(leaf.weight.data, most.reshape(-1, *[1] * (leaf.weight.dim() - 1)))
    return net


@pytest.mark.parametrize("scheme", [int8.SCHEMES[0], int8.SCHEMES[-1]], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize(
    "name", ["squeezenet1_0", "mobilenet_v3_small", "shufflenet_v1", "resnet18", "airbench94", "alexnet"]
)
def test_int8_is_what_the_same_roundings_give(name: str, scheme: int8.Scheme) -> None:
    net = small(name)
    task = task_of(net, net.spec.input)
    images = pixels(task, 8)
    quantised = task.quantised(scheme, images)
    found, expected = answers(quantised, images), computed(fake_quantised(quantised), task, images)
    # Where float32 and float64 round to different steps, a picture's answers differ: the median picture has none.
    assert np.median(np.abs(found - expected).max(axis=1)) < 1e-6
    assert np.median(np.abs(found - computed(net, task, images)).max(axis=1)) > 1e-3


def test_layers_that_are_kept_stay_float() -> None:
    net = small("squeezenet1_0")
    task = task_of(net, net.spec.input)
    images = pixels(task, 4)
    quantised = task.quantised(int8.SCHEMES[0], images)
    assert quantised.int8 is not None
    convolutions = [node for node in task.graph.nodes if isinstance(node.leaf, nn.Conv2d)]
    kept = tuple(task.onnx[1][node.name] for node in convolutions)
    some, every = (replace(quantised, int8=replace(quantised.int8, kept=names)) for names in (kept[:9], kept))
    assert ncnn.export(every).data == ncnn.export(task).data
    assert ncnn.export(quantised).size < ncnn.export(some).size < ncnn.export(task).size
    expected = computed(fake_quantised(some), task, images)
    assert np.median(np.abs(answers(some, images) - expected).max(axis=1)) < 1e-6
