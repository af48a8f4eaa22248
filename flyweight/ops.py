"""Parameter-free leaf modules. Every operation is a leaf, so cost, export and pruning are tables over classes."""

import torch
from torch import Tensor, nn


class Add(nn.Module):
    """Sum of tensors of one shape."""

    def forward(self, *xs: Tensor) -> Tensor:
        total = xs[0]
        for x in xs[1:]:
            total = total + x
        return total


class Cat(nn.Module):
    """Concatenation along the channels."""

    def forward(self, *xs: Tensor) -> Tensor:
        return torch.cat(xs, dim=1)


class ChannelShuffle(nn.Module):
    """[N, g·C, H, W]: the channels as a g × C table, transposed (ShuffleNet, arXiv:1707.01083, section 3.1)."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class GlobalAvgPool(nn.Module):
    """[N, C, H, W] → [N, C]: the mean over all positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


class GlobalMaxPool(nn.Module):
    """[N, C, H, W] → [N, C]: the largest value over all positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax(dim=(2, 3))


def round_channels(channels: float, divisor: int = 8) -> int:
    """The multiple of `divisor` nearest to `channels`, at least 90 % of it and at least `divisor` (MobileNetV2)."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded
