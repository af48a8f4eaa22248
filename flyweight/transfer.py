"""From one network's weights to another of the same kind, for other classes or other channels."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from flyweight import zoo
from flyweight.blocks import Options
from flyweight.errors import UsageError
from flyweight.net import Net, Spec

LAST = re.compile(r"(head|aux\.\w+)\.fc\.\w+")  # the layers that make the logits, of the head and of auxiliary ones
SHAPES_AGREE = ("act", "eps", "padding")  # options that change what a network answers but not its tensors


def compare(net: Net, donor: Net) -> dict[str, str]:
    """Tensor → what becomes of it, for all of both networks that cannot simply be copied.

    "classifier", "input" (the first convolution), "aux", or "misfit".
    """
    own, given = net.state_dict(), donor.state_dict()
    first = _first_convolution(net)
    found: dict[str, str] = {}
    for name in own.keys() | given.keys():
        ours, theirs = own.get(name), given.get(name)
        if LAST.fullmatch(name) and net.num_classes != donor.num_classes:
            found[name] = "classifier"
        elif ours is None or theirs is None:
            found[name] = "aux" if name.startswith("aux.") else "misfit"
        elif ours.shape != theirs.shape:
            found[name] = "input" if name == first and ours[:, 0].shape == theirs[:, 0].shape else "misfit"
    return found


def _first_convolution(net: Net) -> str:
    return next(f"{name}.weight" for name, leaf in net.named_modules() if isinstance(leaf, nn.Conv2d))


def adopt(net: Net, donor: Net) -> list[str]:
    """Copies the tensors of a donor for other classes or channels; says what was dropped, changed or stays untrained.

    Raises UsageError, naming a tensor, where anything else differs.
    """
    own, given, special = net.state_dict(), donor.state_dict(), compare(net, donor)
    if "misfit" in special.values():
        name = min(name for name, what in special.items() if what == "misfit")
        raise UsageError(f"the weights do not fit this {net.spec.family}: {name} has another shape there or is missing")
    kept = {name: tensor for name, tensor in given.items() if name not in special}
    kept |= {name: adapt_input(given[name], net.in_chans) for name, what in special.items() if what == "input"}
    kept |= {name: tensor for name, tensor in own.items() if special.get(name) in ("classifier", "aux")}
    net.load_state_dict(kept, strict=True)
    changes: list[str] = []
    if "classifier" in special.values():
        new = f"that for {net.num_classes} is untrained" if net.num_classes else "the network has none"
        changes.append(f"the classifier for {donor.num_classes} classes was dropped, {new}")
    if "input" in special.values():
        how = "summed for grey" if net.in_chans == 1 else f"taken in turn, and scaled, for {net.in_chans} channels"
        changes.append(f"the first convolution's kernels were {how}")
    if "aux" in special.values():
        changes.append("the auxiliary heads are untrained" if len(net.aux) else "the auxiliary heads were dropped")
    for key in SHAPES_AGREE:
        here, there = _option(net.spec, key), _option(donor.spec, key)
        if here != there:
            changes.append(f"{key} is {here!r}, the weights were trained with {there!r}")
    return changes


def _option(spec: Spec, key: str) -> Any:
    defaults = getattr(zoo.families()[spec.family], "DEFAULTS", {})
    return spec.args.get(key, defaults.get(key, getattr(Options, key)))


def adapt_input(weight: Tensor, channels: int) -> Tensor:
    """The first convolution's kernels [O, 3, k, k] for another number of channels, as timm adapts them.

    One: their sum. Others: the three in turn, scaled by 3 / channels so that the answers keep their size.
    """
    if channels == 1:
        return weight.sum(1, keepdim=True)
    turns = torch.arange(channels) % weight.shape[1]
    return weight[:, turns] * (weight.shape[1] / channels)
