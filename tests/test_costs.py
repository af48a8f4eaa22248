"""The field's closed forms, liveness, and errors of the counter."""

import pytest
import torch
from torch import nn

from flyweight.blocks import DepthwiseSeparable, Fire
from flyweight.costs import MACS, cost
from flyweight.export.onnx import RULES
from flyweight.graph import SAME_SHAPE, GraphError, trace
from flyweight.ops import Add, ChannelShuffle, round_channels
from flyweight.zoo.squeezenet import conv_act


def weights(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters() if p.ndim > 1)


def test_every_counted_leaf_can_be_exported() -> None:
    assert set(MACS) == set(RULES)


@pytest.mark.parametrize(
    ("side", "kernel", "padding", "stride", "out"), [(6, 3, 0, 1, 4), (224, 7, 3, 2, 112), (32, 3, 1, 1, 32)]
)
def test_output_size(side: int, kernel: int, padding: int, stride: int, out: int) -> None:
    assert (side - kernel + 2 * padding) // stride + 1 == out
    assert trace(nn.Sequential(nn.Conv2d(3, 2, kernel, stride, padding)), (3, side, side)).nodes[0].shape == (
        2,
        out,
        out,
    )


def test_fire_is_small() -> None:
    assert weights(Fire(96, 6, 5, 4, conv_act)) == 96 * 6 + 6 * 5 + 9 * 6 * 4 == 822


@pytest.mark.parametrize(("inputs", "outputs"), [(192, 256), (16, 32)])
def test_depthwise_separable_against_plain(inputs: int, outputs: int) -> None:
    separable = cost(nn.Sequential(DepthwiseSeparable(inputs, outputs)), (inputs, 28, 28)).macs
    plain = cost(nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1)), (inputs, 28, 28)).macs
    assert separable == (9 * inputs + inputs * outputs) * 28 * 28
    assert separable / plain == pytest.approx(1 / outputs + 1 / 9)


def test_groups_divide_the_work() -> None:
    grouped = cost(nn.Sequential(nn.Conv2d(12, 24, 3, padding=1, groups=3, bias=False)), (12, 8, 8))
    assert grouped.params == 9 * 12 * 24 // 3
    assert grouped.macs == grouped.params * 64
    assert grouped.flops == 2 * grouped.macs


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


@pytest.mark.parametrize("leaf", [nn.BatchNorm2d(6), nn.ReLU(), nn.ReLU6(), nn.Identity(), nn.Dropout()])
def test_same_shape_leaves_keep_the_shape(leaf: nn.Module) -> None:
    assert isinstance(leaf, SAME_SHAPE)
    assert leaf(torch.zeros(2, 6, 3, 3)).shape == (2, 6, 3, 3)


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
