"""The closed forms of the field, each against a network that is built and counted; the examples of docs/cost.md."""

import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import nn

from flyweight.blocks import DepthwiseSeparable, Fire, Options
from flyweight.costs import NetCost, cost
from flyweight.zoo.resnet import bottleneck

COST_PAGE = Path(__file__).parents[1] / "docs" / "cost.md"
BARE = Options(norm="none")


def counted(channels: int, side: int, *parts: nn.Module) -> NetCost:
    """The cost of the parts, one after the other, on a square input."""
    return cost(nn.Sequential(*parts), (channels, side, side))


def weights(count: NetCost) -> int:
    """Weights without biases, as the closed forms have them."""
    return sum(layer.weights for layer in count.layers)


def plain(inputs: int, outputs: int, kernel: int | tuple[int, int] = 3) -> nn.Conv2d:
    """A convolution that keeps the size."""
    return nn.Conv2d(inputs, outputs, kernel, padding="same", bias=False)


@pytest.mark.parametrize(
    ("side", "kernel", "padding", "stride"),
    [(6, 3, 0, 1), (224, 7, 3, 2), (227, 11, 0, 4), (32, 3, 1, 1), (112, 3, 1, 2), (55, 3, 0, 2), (7, 7, 0, 1)],
)
def test_output_size(side: int, kernel: int, padding: int, stride: int) -> None:
    out = (side - kernel + 2 * padding) // stride + 1
    conv, pool = nn.Conv2d(3, 2, kernel, stride, padding), nn.MaxPool2d(kernel, stride, min(padding, kernel // 2))
    assert counted(3, side, conv).layers[0].shape == (2, out, out)
    assert counted(3, side, pool).layers[0].shape == (3, out, out)


def test_height_and_width_count_apart() -> None:
    count = cost(nn.Sequential(nn.Conv2d(3, 8, (3, 5), (2, 1), bias=False)), (3, 21, 30))
    assert count.layers[0].shape == (8, (21 - 3) // 2 + 1, 30 - 5 + 1)
    assert count.macs == 3 * 5 * 3 * 8 * 10 * 26


def test_two_kernels_over_a_6_by_6_picture() -> None:
    count = counted(3, 6, nn.Conv2d(3, 2, 3, bias=False))
    assert count.layers[0].shape == (2, 4, 4)
    assert weights(count) == 2 * 3 * 3 * 3
    assert count.macs == 2 * 3 * 3 * 3 * 4 * 4


@pytest.mark.parametrize(
    ("inputs", "squeeze", "expand", "fire", "full"),
    [(96, 6, (5, 4), 822, 7776), (3, 3, (4, 4), 129, 216), (10, 3, (4, 4), 150, 720)],
)
def test_fire_against_a_plain_convolution(
    inputs: int, squeeze: int, expand: tuple[int, int], fire: int, full: int
) -> None:
    count = counted(inputs, 8, Fire(BARE, inputs, squeeze, expand))
    assert weights(count) == inputs * squeeze + squeeze * expand[0] + 9 * squeeze * expand[1] == fire
    assert weights(counted(inputs, 8, plain(inputs, sum(expand)))) == full
    assert count.layers[-1].shape[0] == sum(expand)


def test_depthwise_separable_is_an_eighth_of_the_work() -> None:
    separable = counted(192, 28, DepthwiseSeparable(Options(), 192, 256)).macs
    full = counted(192, 28, plain(192, 256)).macs
    assert Fraction(separable, full) == Fraction(1, 256) + Fraction(1, 9)
    assert round(separable / full, 3) == 0.115


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_depthwise_separable_by_kernel(kernel: int) -> None:
    separable = counted(16, 10, BARE.depthwise(16, kernel), BARE.conv(16, 32, 1))
    assert weights(separable) == 16 * kernel**2 + 16 * 32
    assert weights(counted(16, 10, plain(16, 32, kernel))) == 16 * 32 * kernel**2


@pytest.mark.parametrize(
    ("alpha", "side", "macs", "params"), [(1, 14, 52.3, 0.27), (0.75, 14, 29.6, 0.15), (0.75, 10, 15.1, 0.15)]
)
def test_width_and_resolution_multipliers(alpha: float, side: int, macs: float, params: float) -> None:
    """MobileNets, equation 7 and table 3: D_K = 3, M = N = 512, D_F = 14, ρ = 10 / 14."""
    o = Options(width=alpha)
    channels = o.channels(512)
    count = counted(channels, side, DepthwiseSeparable(o, channels, channels))
    assert count.macs == 3**2 * alpha * 512 * side**2 + alpha * 512 * alpha * 512 * side**2
    assert round(count.macs / 1e6, 1) == macs
    assert round(weights(count) / 1e6, 2) == params
    full = counted(512, 14, plain(512, 512))
    assert (round(full.macs / 1e6), round(weights(full) / 1e6, 2)) == (462, 2.36)


@pytest.mark.parametrize(("kernel", "groups"), [(1, 2), (1, 8), (3, 3), (3, 4), (5, 24)])
def test_groups_divide_the_work(kernel: int, groups: int) -> None:
    grouped = counted(24, 8, nn.Conv2d(24, 48, kernel, padding=kernel // 2, groups=groups, bias=False))
    assert grouped.params == kernel**2 * 24 * 48 // groups
    assert grouped.macs == grouped.params * 8 * 8
    assert grouped.flops == 2 * grouped.macs


def test_two_3x3_for_a_5x5() -> None:
    full, two = counted(64, 17, plain(64, 64, 5)), counted(64, 17, plain(64, 64), plain(64, 64))
    assert Fraction(full.macs, two.macs) == Fraction(weights(full), weights(two)) == Fraction(25, 18)
    assert full.receptive_field == two.receptive_field == (5, 5)


@pytest.mark.parametrize("n", [3, 5, 7])
def test_1xn_and_nx1_for_nxn(n: int) -> None:
    full, two = counted(64, 17, plain(64, 64, n)), counted(64, 17, plain(64, 64, (1, n)), plain(64, 64, (n, 1)))
    assert Fraction(full.macs, two.macs) == Fraction(n, 2)
    assert full.receptive_field == two.receptive_field == (n, n)


def test_bottleneck_against_a_plain_convolution() -> None:
    count = counted(256, 14, *bottleneck(Options(), 256, 256, 1, groups=1, base_width=64).values())
    assert [layer.shape[0] for layer in count.layers if layer.macs] == [64, 64, 256]
    full = counted(256, 14, plain(256, 256))
    assert round(weights(full) / weights(count), 2) == round(full.macs / count.macs, 2) == 8.47


def test_mobilenet_has_28_layers() -> None:
    kinds = [
        "fc" if "fc" in each.path else each.path.split(".")[-2] for each in cost("mobilenet_v1").layers if each.weights
    ]
    assert kinds == ["stem", *["depthwise", "pointwise"] * 13, "fc"]
    assert len(kinds) == 1 + 26 + 1 == 28


STACKS = {
    "3x3 thrice": [(3, 1), (3, 1), (3, 1)],
    "ResNet's stem": [(7, 2), (3, 2)],
    "VGG-16": [(3, 1), (3, 1), (2, 2)] * 2 + [(3, 1), (3, 1), (3, 1), (2, 2)] * 3,
    "strides between": [(5, 1), (3, 2), (1, 1), (5, 3), (3, 1)],
}


def receptive_field(windows: list[tuple[int, int]]) -> int:
    """The recurrence r ← r + (k − 1) · j, j ← j · s over kernels k and strides s, from r = j = 1."""
    r = j = 1
    for kernel, stride in windows:
        r, j = r + (kernel - 1) * j, j * stride
    return r


@pytest.mark.parametrize("windows", STACKS.values(), ids=STACKS)
def test_receptive_field_of_a_stack(windows: list[tuple[int, int]]) -> None:
    """By the recurrence, and as the pixels on which one position's value really depends."""
    net = nn.Sequential(*(nn.Conv2d(1, 1, kernel, stride, bias=False) for kernel, stride in windows)).double()
    for conv in net:
        nn.init.ones_(conv.weight)
    r = receptive_field(windows)
    picture = torch.zeros(1, 1, r + 40, r + 40, dtype=torch.float64, requires_grad=True)
    net(picture)[0, 0, 0, 0].backward()
    assert picture.grad is not None
    seen = picture.grad[0, 0].nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [r, r]
    assert cost(net, (1, r + 40, r + 40)).receptive_field == (r, r)


def test_known_receptive_fields() -> None:
    assert receptive_field(STACKS["ResNet's stem"]) == 11
    assert receptive_field(STACKS["VGG-16"]) == 212
    blocks = [(3, stride) for stride in (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)]
    assert cost("mobilenet_v1").receptive_field == (receptive_field([(3, 2), *blocks]),) * 2 == (315, 315)


def test_a_shortcut_has_the_field_of_its_longest_path() -> None:
    assert cost("resnet18").receptive_field == (435, 435)
    dilated = counted(1, 32, nn.Conv2d(1, 1, 3, dilation=4), nn.Conv2d(1, 1, (1, 3)))
    assert dilated.receptive_field == (9, 11)


def test_the_examples_of_the_page_on_cost_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", COST_PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert sum(block.count("assert ") for block in blocks) >= len(blocks) > 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(COST_PAGE), "exec"), names)
