"""What an error in a layer's weights does to a network's answers, to second order.

The Fisher information of a layer is taken as a product of two factors: second moments of what its weights read, and the
mean square of its output's gradient (K-FAC, arXiv:1503.05671; convolutions: arXiv:1602.01407, section 3). Across the
positions of a map gradients are alike rather than independent, before a global average even equal. What a window reads
is therefore taken apart, its mean over the map weighing as the square of the gradients' sum, and what is left as the
sum of their squares.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flyweight import ops

POSITIONS = 400  # of a map, drawn at random, are enough for the moments of what a window reads


@dataclass
class Curvature:
    """Of one layer, a mean over the pictures.

    `inputs` [groups, n, n]: moments of the n values that an output's weights are multiplied with at a position, the
    last of them the bias's 1 where there is one. `outputs` [O]: the gradient's square, summed over the positions. An
    error d [O, n] of the weights moves the answers by Σ_o outputs_o · d_oᵀ inputs d_o / 2 nats.
    """

    inputs: Tensor
    outputs: Tensor


class _Moments(NamedTuple):
    """Of one layer, as sums over the pictures so far.

    Moments [groups, n, n] of what a window reads, its mean over the map and what is left; the sum of the gradient's
    squares over the map and the square of its sum, [O].
    """

    around: Tensor
    mean: Tensor
    squares: Tensor
    sums: Tensor

    def plus(self, other: "_Moments | None") -> "_Moments":
        return self if other is None else _Moments(*map(torch.add, self, other))

    def over(self, pictures: int) -> Curvature:
        alike = self.sums.mean() / self.squares.mean().clamp(min=torch.finfo(torch.float64).tiny)
        return Curvature((self.around + alike * self.mean) / pictures, self.squares / pictures)


def curvatures(net: nn.Module, batches: Iterable[Tensor], seed: int = 0) -> dict[str, Curvature]:
    """Of each convolution and linear layer that takes part in the answers, by its path.

    The gradients are of classes drawn by the network's own answers, so no labels are needed.
    """
    rng = torch.Generator().manual_seed(seed)
    found: dict[str, _Moments] = {}
    pictures = 0
    net.eval()
    for x in batches:
        calls = _Calls(net)
        outputs = calls.run(x)
        drawn = torch.multinomial(outputs.detach().softmax(1), 1, generator=rng)[:, 0]
        gradients = torch.autograd.grad(F.cross_entropy(outputs, drawn, reduction="sum"), [y for _, _, y in calls.made])
        for (path, read, _), gradient in zip(calls.made, gradients, strict=True):
            found[path] = _of_call(net.get_submodule(path), read, gradient, rng).plus(found.get(path))
        pictures += len(x)
    return {path: moments.over(pictures) for path, moments in found.items()}


class _Calls:
    """What the convolutions and linear layers read and gave while a network ran."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.made: list[tuple[str, Tensor, Tensor]] = []

    def run(self, x: Tensor) -> Tensor:
        hooks = [
            leaf.register_forward_hook(partial(self._called, path))
            for path, leaf in self.net.named_modules()
            if isinstance(leaf, nn.Conv2d | nn.Linear)
        ]
        try:
            return self.net(x).float()
        finally:
            for hook in hooks:
                hook.remove()

    def _called(self, path: str, leaf: nn.Module, read: tuple[Tensor, ...], y: Tensor) -> None:
        self.made.append((path, read[0].detach(), y))


def _of_call(leaf: nn.Module, read: Tensor, gradient: Tensor, rng: torch.Generator) -> _Moments:
    assert isinstance(leaf, nn.Conv2d | nn.Linear)
    rows = _windows(leaf, read, rng) if isinstance(leaf, nn.Conv2d) else read.reshape(len(read), -1, 1, read.shape[-1])
    if leaf.bias is not None:
        rows = F.pad(rows, (0, 1), value=1.0)
    mean = rows.mean(1, keepdim=True)
    if isinstance(leaf, nn.Linear):
        gradient = gradient.reshape(len(gradient), -1, gradient.shape[-1]).transpose(1, 2)
    slopes = gradient.flatten(2)
    squares, sums = slopes.square().sum(2), slopes.sum(2).square()
    found = _Moments(_moments(rows - mean), _moments(mean), squares.sum(0), sums.sum(0))
    return _Moments(*(each.double() for each in found))


def _moments(rows: Tensor) -> Tensor:
    """[pictures, positions, groups, n] as moments [groups, n, n], means over the positions."""
    grouped = rows.flatten(0, 1).transpose(0, 1)
    return grouped.transpose(1, 2) @ grouped / rows.shape[1]


def _windows(leaf: nn.Conv2d, x: Tensor, rng: torch.Generator) -> Tensor:
    """What the kernels of a convolution read, at some of the positions: [pictures, positions, groups, n]."""
    top, bottom, left, right = ops.edges(leaf, x.shape[2], x.shape[3])
    x = F.pad(x, (left, right, top, bottom))
    read = F.unfold(x, ops.pair(leaf.kernel_size), ops.dilation(leaf), stride=ops.pair(leaf.stride))
    chosen = torch.randperm(read.shape[2], generator=rng)[:POSITIONS]
    return read[:, :, chosen].transpose(1, 2).reshape(len(x), -1, leaf.groups, read.shape[1] // leaf.groups)
