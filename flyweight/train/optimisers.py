"""From a recipe to torch's optimisers. Each group of parameters carries `share`, of the schedule's learning rate."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer, RMSprop

from flyweight.net import Net
from flyweight.train.recipe import Recipe

Groups = list[dict[str, Any]]
PICTURE_CHANNELS = 3


def make(net: nn.Module, recipe: Recipe) -> Optimizer:
    """The recipe's optimiser over all parameters of a network; the training sets `lr` of each group before a step."""
    groups = _groups(net, recipe)
    kinds: dict[str, Callable[[Groups], Optimizer]] = {
        "sgd": lambda groups: SGD(groups, lr=0.0, momentum=recipe.momentum, nesterov=True),
        "adam": lambda groups: Adam(groups, lr=0.0),
        "adamw": lambda groups: AdamW(groups, lr=0.0),
        "rmsprop": lambda groups: RMSprop(groups, lr=0.0, alpha=0.9, eps=1.0, momentum=recipe.momentum),
        "muon": lambda groups: MuonWithSgd(groups, recipe),
    }
    return kinds[recipe.optimiser](groups)


def _groups(net: nn.Module, recipe: Recipe) -> Groups:
    groups: Groups = []
    for share, parameters in _by_depth(net, recipe):
        decayed, free = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
        groups.append({"params": decayed, "weight_decay": recipe.weight_decay, "share": share})
        groups.append({"params": free, "weight_decay": 0.0, "share": share})
    return [group for group in groups if group["params"]]


def _by_depth(net: nn.Module, recipe: Recipe) -> list[tuple[float, list[nn.Parameter]]]:
    """Parameters with the share of the learning rate that they get: all alike, or less the farther from the answer."""
    if not isinstance(net, Net) or recipe.features == recipe.depth == 1:
        return [(1.0, list(net.parameters()))]
    stages = list(net.features.children())
    shares = [recipe.features * recipe.depth ** (len(stages) - 1 - i) for i in range(len(stages))]
    heads = [*net.head.parameters(), *net.aux.parameters()]
    return [(1.0, heads), *((share, list(each.parameters())) for share, each in zip(shares, stages, strict=True))]


class MuonWithSgd(Optimizer):
    """torch's Muon on convolutions between features, each as a matrix [out, in · k · k], and SGD on all else.

    The matrices share their memory with the weights. Not made orthogonal are depthwise filters and those on the picture
    itself, whose few inputs are no features, and the classifier.
    """

    def __init__(self, groups: Groups, recipe: Recipe) -> None:
        self.views: list[tuple[nn.Parameter, nn.Parameter]] = []
        matrices, rest = [], []
        for group in groups:
            hidden = [p for p in group["params"] if _is_hidden(p)]
            others = [p for p in group["params"] if not _is_hidden(p)]
            views = [nn.Parameter(_matrix(p.detach())) for p in hidden]
            self.views += zip(hidden, views, strict=True)
            matrices.append(group | {"params": views})
            rest.append(group | {"params": others, "share": group["share"] * recipe.others})
        self.muon = Muon(_filled(matrices), lr=0.0, momentum=recipe.momentum)
        self.sgd = SGD(_filled(rest), lr=0.0, momentum=recipe.momentum, nesterov=True)
        super().__init__(self.muon.param_groups + self.sgd.param_groups, {})
        self._connect()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # after loading, groups and state are new objects
        self._connect()

    def _connect(self) -> None:
        """Groups and state of the two are those of the whole, so that a schedule and a checkpoint see one optimiser."""
        count = len(self.muon.param_groups)
        self.muon.param_groups, self.sgd.param_groups = self.param_groups[:count], self.param_groups[count:]
        self.muon.state = self.sgd.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of both."""
        for weight, view in self.views:
            view.grad = None if weight.grad is None else _matrix_like(weight, weight.grad)
        self.muon.step()
        self.sgd.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of the weights themselves, which are not in the groups."""
        super().zero_grad(set_to_none)
        for weight, view in self.views:
            weight.grad = view.grad = None


def _is_hidden(p: Tensor) -> bool:
    return p.ndim == 4 and p.shape[1] > PICTURE_CHANNELS


def _filled(groups: Iterable[dict[str, Any]]) -> Groups:
    return [group for group in groups if group["params"]]


def _matrix(weight: Tensor) -> Tensor:
    """[O, I, k, k] as [O, I · k · k] in the same memory, in whatever order of the inputs it lies there."""
    return (weight if weight.is_contiguous() else weight.permute(0, 2, 3, 1)).view(len(weight), -1)


def _matrix_like(weight: Tensor, grad: Tensor) -> Tensor:
    """A gradient as a matrix, in the order of its weight's."""
    return (grad if weight.is_contiguous() else grad.permute(0, 2, 3, 1)).reshape(len(grad), -1)
