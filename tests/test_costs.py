"""Liveness, deployed weights, and errors of the counter."""

import pytest
import torch
from torch import nn

from flyweight import ops
from flyweight.costs import MACS, cost
from flyweight.export.onnx import RULES
from flyweight.graph import SHAPES, GraphError, trace
from flyweight.ops import Add, ChannelShuffle, round_channels


def test_every_counted_leaf_can_be_exported() -> None:
    assert set(MACS) == set(RULES) == set(SHAPES)


def test_liveness_counts_what_a_shortcut_keeps() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.back, self.add = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 2, 1), Add()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.add(x, self.back(self.wide(x)))

    # While `back` runs, x (2), wide's output (8) and its own (2) are alive, on 4 × 4 positions.
    assert cost(Skip(), (2, 4, 4)).peak_values == (2 + 8 + 2) * 16
    # Without the shortcut, x is gone by then.
    assert cost(nn.Sequential(nn.Conv2d(2, 8, 1), nn.Conv2d(8, 2, 1)), (2, 4, 4)).peak_values == (8 + 2) * 16


def test_deployed_weights_leave_out_the_norm() -> None:
    block = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    counted = cost(block, (3, 8, 8))
    assert counted.params == 3 * 4 * 9 + 8
    assert counted.weight_values == 3 * 4 * 9 + 4
    assert counted.memory_bytes(4) == 4 * (counted.weight_values + counted.peak_values)


def test_an_unknown_leaf_is_an_error_by_name() -> None:
    with pytest.raises(GraphError, match="0 is a Tanh"):
        cost(nn.Sequential(nn.Tanh()), (3, 8, 8))


def test_computing_outside_a_leaf_is_an_error() -> None:
    with pytest.raises(GraphError, match="outside a leaf"):
        trace(Wrapped(), (3, 8, 8))


class Wrapped(nn.Module):
    """Has a child, so it is walked, and adds outside of any leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x) + 1


def test_an_input_that_does_not_fit_is_an_error_by_layer() -> None:
    with pytest.raises(GraphError, match=r"0 \(Conv2d\) cannot take an input of \(4, 8, 8\)"):
        trace(nn.Sequential(nn.Conv2d(3, 2, 3)), (4, 8, 8))


WINDOWS = [
    (kernel, stride, padding, dilation)
    for kernel in (1, 2, 3, 5)
    for stride in (1, 2, 3)
    for padding in range(kernel // 2 + 1)
    for dilation in (1, 2)
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("size", [(5, 8), (9, 6), (12, 13)], ids=str)
def test_shapes_are_torchs(size: tuple[int, int]) -> None:
    """Every kind of window, rounded down and up, on sizes that fit and that leave a rest."""
    x = torch.zeros(1, 4, *size)
    for kernel, stride, padding, dilation in WINDOWS:
        leaves: list[nn.Module] = [
            nn.Conv2d(4, 6, kernel, stride, padding, dilation),
            nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=True),
            nn.MaxPool2d(kernel, stride, padding, dilation),
            nn.AvgPool2d(kernel, stride, padding, ceil_mode=True),
            nn.AvgPool2d(kernel, stride, padding),
            nn.Conv2d(4, 6, kernel, 1, "same", dilation),
            nn.Conv2d(4, 6, kernel, stride, "valid", dilation),
            ops.SameConv2d(4, 6, kernel, stride, dilation=dilation),
            ops.SameMaxPool2d(kernel, stride, dilation=dilation),
            ops.SameAvgPool2d(kernel, stride),
        ]
        for leaf in leaves:
            try:
                real = tuple(leaf(x).shape[1:])
            except RuntimeError:
                with pytest.raises(GraphError, match="the window of"):
                    trace(nn.Sequential(leaf), (4, *size))
            else:
                assert trace(nn.Sequential(leaf), (4, *size)).nodes[0].shape == real, (leaf, size)


@pytest.mark.parametrize(
    ("leaf", "shapes", "told"),
    [
        (nn.Conv2d(3, 4, 1), [(4, 8, 8)], "made for 3 channels"),
        (nn.BatchNorm2d(3), [(4, 8, 8)], "made for 3 channels"),
        (nn.Linear(3, 4), [(4,)], "made for 3 values"),
        (Add(), [(4, 8, 8), (4, 4, 4)], "they differ"),
        (ops.Cat(), [(4, 8, 8), (4, 4, 4)], "their sizes differ"),
        (ChannelShuffle(3), [(4, 8, 8)], "3 groups do not divide"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_errors(leaf: nn.Module, shapes: list[tuple[int, ...]], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SHAPES[type(leaf)](leaf, *shapes)


class Twice(nn.Module):
    """Calls one leaf twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.add = nn.Conv2d(2, 2, 3, padding=1), Add()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return self.add(x, self.conv(x))


def test_a_leaf_called_twice_works_twice_and_weighs_once() -> None:
    counted = cost(Twice(), (2, 4, 4))
    assert counted.macs == 2 * 9 * 4 * 16
    assert counted.params == counted.weight_values == 9 * 4 + 2


def test_tracing_leaves_the_network_as_it_was() -> None:
    net, x = Twice(), torch.randn(1, 2, 4, 4)
    before = net(x)
    trace(net, (2, 4, 4))
    with pytest.raises(GraphError):
        trace(net, (3, 4, 4))
    assert torch.equal(net(x), before)


def test_channel_shuffle_transposes_the_groups() -> None:
    x = torch.arange(6.0).view(1, 6, 1, 1)
    assert ChannelShuffle(3)(x).flatten().tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize(
    ("channels", "rounded"), [(32.0, 32), (24.0, 24), (12.0, 16), (3.0, 8), (19.0, 24), (17.0, 16)]
)
def test_round_channels_keeps_nine_tenths(channels: float, rounded: int) -> None:
    assert round_channels(channels) == rounded
    assert rounded % 8 == 0
    assert rounded >= 0.9 * channels
