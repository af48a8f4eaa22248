"""Parameter-free leaf modules. Every operation is a leaf, so cost, export and pruning are tables over classes.

The three convolutions and pools with TensorFlow's SAME padding live here too: as leaves of their own classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Add(nn.Module):
    """Sum of tensors of one shape."""

    def forward(self, *xs: Tensor) -> Tensor:
        total = xs[0]
        for x in xs[1:]:
            total = total + x
        return total


class Mul(nn.Module):
    """[N, C, H, W] times a gate [N, C, 1, 1]."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return x * gate


class Scale(nn.Module):
    """x times a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Cat(nn.Module):
    """Concatenation along the channels."""

    def forward(self, *xs: Tensor) -> Tensor:
        return torch.cat(xs, dim=1)


class Resize(nn.Module):
    """[N, C, h, w] → [N, C, H, W], bilinear, to the height and width of `like`, whose values are not read.

    Pixels are areas: corners are not aligned. A map of one position is repeated.
    """

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


class Part(nn.Module):
    """The `index`-th of `parts` equal ranges of channels."""

    def __init__(self, index: int, parts: int = 2) -> None:
        super().__init__()
        self.index, self.parts = index, parts

    def forward(self, x: Tensor) -> Tensor:
        return x.chunk(self.parts, dim=1)[self.index]


class PadChannels(nn.Module):
    """Zero channels before and after (the parameter-free shortcut of ResNet, arXiv:1512.03385, section 3.3, A)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


class ChannelShuffle(nn.Module):
    """[N, g·C, H, W]: the channels as a g × C table, transposed (ShuffleNet, arXiv:1707.01083, section 3.1)."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class GlobalAvgPool(nn.Module):
    """[N, C, H, W] → [N, C], the mean over all positions; with `keep` [N, C, 1, 1]."""

    def __init__(self, keep: bool = False) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3), keepdim=self.keep)


class GlobalMaxPool(nn.Module):
    """[N, C, H, W] → [N, C]: the largest value over all positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax(dim=(2, 3))


def pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of a leaf's setting, which torch keeps as one number or two."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


Window = nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d


def dilation(leaf: Window) -> tuple[int, int]:
    """(height, width) between the positions that a window reads; average pools have no gaps."""
    return (1, 1) if isinstance(leaf, nn.AvgPool2d) else pair(leaf.dilation)


def same_padding(leaf: Window, height: int, width: int) -> tuple[int, int, int, int]:
    """TensorFlow's SAME: (top, bottom, left, right) such that ⌈size / stride⌉ positions remain, the odd one after."""
    sides: list[int] = []
    kernel, stride, gap = pair(leaf.kernel_size), pair(leaf.stride), dilation(leaf)
    for size, k, s, d in zip((height, width), kernel, stride, gap, strict=True):
        total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        sides += [total // 2, total - total // 2]
    return sides[0], sides[1], sides[2], sides[3]


def _pad_same(leaf: Window, x: Tensor, value: float) -> Tensor:
    top, bottom, left, right = same_padding(leaf, x.shape[2], x.shape[3])
    return F.pad(x, (left, right, top, bottom), value=value)


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = _pad_same(self, input, 0.0)
        return F.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)


class SameMaxPool2d(nn.MaxPool2d):
    """Max-pooling with TensorFlow's SAME padding, which never wins."""

    def forward(self, input: Tensor) -> Tensor:
        return F.max_pool2d(_pad_same(self, input, -torch.inf), self.kernel_size, self.stride, 0, self.dilation)


class SameAvgPool2d(nn.AvgPool2d):
    """Average pooling with TensorFlow's SAME padding, which does not count."""

    def forward(self, input: Tensor) -> Tensor:
        total = F.avg_pool2d(_pad_same(self, input, 0.0), self.kernel_size, self.stride)
        ones = torch.ones_like(input[:1, :1])
        return total / F.avg_pool2d(_pad_same(self, ones, 0.0), self.kernel_size, self.stride)


def edges(leaf: Window, height: int, width: int) -> tuple[int, int, int, int]:
    """The padding of any window on an input of this size: (top, bottom, left, right)."""
    if isinstance(leaf, SameConv2d | SameMaxPool2d | SameAvgPool2d):
        return same_padding(leaf, height, width)
    if isinstance(leaf.padding, str):  # torch's own words: "valid", or "same", which it takes for a stride of 1 only
        keeps = leaf.padding == "same"
        whole = [(k - 1) * d * keeps for k, d in zip(pair(leaf.kernel_size), dilation(leaf), strict=True)]
        return whole[0] // 2, whole[0] - whole[0] // 2, whole[1] // 2, whole[1] - whole[1] // 2
    vertical, horizontal = pair(leaf.padding)
    return vertical, vertical, horizontal, horizontal


def round_channels(channels: float, divisor: int = 8) -> int:
    """The multiple of `divisor` nearest to `channels`, at least 90 % of it and at least `divisor` (MobileNetV2)."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded
