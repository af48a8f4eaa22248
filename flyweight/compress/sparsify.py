"""Unstructured pruning: the smallest weights become zero and stay it, in each layer as many as its answers bear."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from flyweight.compress.precision import calibration_sample
from flyweight.compress.step import Context
from flyweight.errors import FlyweightError, UsageError
from flyweight.net import Net
from flyweight.train.inputs import normalise
from flyweight.train.losses import distance
from flyweight.units import percent

# Each layer is tried with these shares of the weights that it has left.
SHARES = (1.0, 0.75, 0.55, 0.4, 0.3, 0.2, 0.12, 0.06)
BATCH = 64
Layers = Mapping[str, nn.Parameter]


def kernels(net: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of convolutions and linear layers, by the layers' paths."""
    found = net.named_modules()
    return {path: leaf.get_parameter("weight") for path, leaf in found if isinstance(leaf, nn.Conv2d | nn.Linear)}


def calibration(context: Context, pictures: int, batch: int = BATCH) -> Iterator[Tensor]:
    """Up to so many training pictures as they are, ready for the network, in batches."""
    chosen = calibration_sample(len(context.train), context.seed, pictures)
    for start in range(0, len(chosen), batch):
        pixels = context.train.batch(context.preprocess.size[0], chosen[start : start + batch])
        yield normalise(torch.from_numpy(pixels), context.preprocess)


@contextmanager
def after_each_step(act: Callable[[], None]) -> Iterator[None]:
    """Within it `act` is called whenever an optimiser has changed the weights."""
    handle = register_optimizer_step_post_hook(lambda *_: act())
    try:
        yield
    finally:
        handle.remove()


def smallest(weight: Tensor, keep: int) -> Tensor:
    """bool, of the weight's shape: True at the `keep` largest that are not zero."""
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[weight.detach().abs().flatten().topk(keep).indices] = True
    return mask.view_as(weight) & (weight != 0)


@torch.no_grad()
def apply(layers: Layers, masks: Mapping[str, Tensor]) -> None:
    """Sets what the masks leave out to zero."""
    for path, mask in masks.items():
        layers[path].mul_(mask)


@contextmanager
def held(net: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, whatever is trained, weights that the masks leave out are zero, and so are their averages."""
    layers = kernels(net)
    apply(layers, masks)
    with after_each_step(lambda: apply(layers, masks)):
        yield


@torch.no_grad()
def sensitivity(net: nn.Module, batches: Sequence[Tensor], shares: Sequence[float]) -> dict[str, list[float]]:
    """What each layer, pruned alone to a share of its weights, does to the answers: KL(before ‖ after) in nats.

    The mean over the pictures in `batches`; zero for a layer that takes no part.
    """
    net.eval()
    answers = [net(x).float() for x in batches]
    pictures = sum(map(len, batches))

    def damage(weight: nn.Parameter, share: float) -> float:
        whole = weight.detach().clone()
        weight.mul_(smallest(weight, round(share * int(weight.count_nonzero()))))
        lost = [float(distance(net(x).float(), y, 1.0)) * len(x) for x, y in zip(batches, answers, strict=True)]
        weight.copy_(whole)
        return sum(lost) / pictures

    return {path: [damage(weight, share) for share in shares] for path, weight in kernels(net).items()}


def allot(
    damages: Mapping[str, Sequence[float]], sizes: Mapping[str, int], shares: Sequence[float], keep: int
) -> dict[str, int]:
    """How many weights each layer keeps, of `sizes`, so that `keep` are left: those go first that cost least each.

    `damages` are the layers' at each of the falling `shares`, of which the first is all. Raises FlyweightError where
    the last leaves more.
    """
    rising = {path: np.maximum.accumulate(own) for path, own in damages.items()}
    at = dict.fromkeys(sizes, 0)
    counts = {path: [round(share * size) for share in shares] for path, size in sizes.items()}
    kept = {path: own[0] for path, own in counts.items()}
    while (excess := sum(kept.values()) - keep) > 0:
        prices = {
            path: (rising[path][i + 1] - rising[path][i]) / max(1, counts[path][i] - counts[path][i + 1])
            for path, i in at.items()
            if i + 1 < len(shares) and counts[path][i + 1] < kept[path]
        }
        if not prices:
            least = sum(kept.values())
            raise FlyweightError(f"so few weights cannot be left: {least:,} are at the least, not {keep:,}")
        path = min(prices, key=lambda each: prices[each])
        at[path] += 1
        kept[path] = max(counts[path][at[path]], kept[path] - excess)
    return kept


@dataclass(frozen=True)
class Sparsify:
    """Leaves the share `density` of the weights of convolutions and linear layers, those largest in size.

    In each of `rounds` the layers are pruned one by one, on so many `pictures`, to see what that does to the answers;
    the weights that go are those of the layers that bear it best, and the network is trained without them.
    """

    density: float
    rounds: int = 3
    pictures: int = 128

    name: ClassVar[str] = "sparsify"

    def __post_init__(self) -> None:
        if not 0 < self.density < 1:
            raise UsageError(f"sparsifying leaves a share of the weights between 0 and 1, not {self.density:g}")
        if self.rounds < 1 or self.pictures < 1:
            raise UsageError("sparsifying needs a round and a picture at least")

    def __call__(self, net: Net, context: Context) -> Net:
        """Raises FlyweightError where the density is out of reach."""
        net = copy.deepcopy(net)
        layers = kernels(net)
        whole = sum(weight.numel() for weight in layers.values())
        batches = list(calibration(context, self.pictures))
        for turn in range(1, self.rounds + 1):
            sizes = {path: int(weight.count_nonzero()) for path, weight in layers.items()}
            wanted = sum(sizes.values()) / whole
            wanted *= (self.density / wanted) ** (1 / (self.rounds + 1 - turn))
            damages = sensitivity(net, batches, SHARES)
            kept = allot(damages, sizes, SHARES, round(wanted * whole))
            masks = {path: smallest(weight, kept[path]) for path, weight in layers.items()}
            with held(net, masks):
                trained = context.fine_tune(net, 1 / self.rounds)
            densities = {path: round(kept[path] / weight.numel(), 4) for path, weight in layers.items()}
            context.write("sparsified", density=wanted, layers=densities, val_top1=trained.accuracy)
            context.say(f"{percent(wanted)} of the weights are left, at an accuracy of {percent(trained.accuracy)}")
        return net
