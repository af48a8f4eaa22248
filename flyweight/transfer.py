"""From one network's weights to another of the same kind: other classes, other pictures, fewer channels."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from flyweight import channels, zoo
from flyweight.blocks import Options
from flyweight.channels import OUTPUT, Group
from flyweight.errors import UsageError
from flyweight.graph import INPUT
from flyweight.net import Net, Spec

LAST = re.compile(r"(head|aux\.\w+)\.fc\.\w+")  # the layers that make the logits, of the head and of auxiliary ones
SHAPES_AGREE = ("act", "eps", "padding")  # options that change what a network answers but not its tensors


def compare(net: Net, donor: Net) -> dict[str, str]:
    """Tensor → what becomes of it, for all of both networks that cannot simply be copied.

    "classifier", "input" (the first convolution), "aux", or "misfit".
    """
    return _compare(net, donor.state_dict(), net.num_classes != donor.num_classes)


def _compare(net: Net, given: Mapping[str, Tensor], other_classes: bool) -> dict[str, str]:
    own = net.state_dict()
    first = _first_convolution(net)
    found: dict[str, str] = {}
    for name in own.keys() | given.keys():
        ours, theirs = own.get(name), given.get(name)
        if LAST.fullmatch(name) and other_classes:
            found[name] = "classifier"
        elif ours is None or theirs is None:
            found[name] = "aux" if name.startswith("aux.") else "misfit"
        elif ours.shape != theirs.shape:
            found[name] = "input" if name == first and ours[:, 0].shape == theirs[:, 0].shape else "misfit"
    return found


def _first_convolution(net: Net) -> str:
    return next(f"{name}.weight" for name, leaf in net.named_modules() if isinstance(leaf, nn.Conv2d))


def adopt(net: Net, donor: Net) -> list[str]:
    """Copies the tensors of a donor for other classes, other pictures or more channels; says what was dropped, changed
    or stays untrained.

    Of more channels the ones with the largest filters are kept (`Narrowing`); what is pruned in the donor goes in the
    network too. Raises UsageError, naming a tensor, where anything else differs.
    """
    changes = _prune_alike(net, donor)
    given, special = donor.state_dict(), compare(net, donor)
    if "misfit" in special.values():
        narrowing = Narrowing(net, donor)
        given = narrowing.tensors()
        changes.append(narrowing.told())
        special = _compare(net, given, net.num_classes != donor.num_classes)
    _copy(net, given, special)
    return changes + _told(net, donor, set(special.values()))


def _prune_alike(net: Net, donor: Net) -> list[str]:
    widths = donor.spec.widths
    if not widths or net.spec.widths:
        return []
    spec = replace(net.spec, widths=widths)
    with torch.device("meta"):
        zoo.structure(spec)  # which is refused before anything changes
    net.narrow(widths)
    net.spec = spec
    return [f"{len(widths)} layers have the fewer channels that pruning left in the weights"]


def _copy(net: Net, given: Mapping[str, Tensor], special: Mapping[str, str]) -> None:
    own = net.state_dict()
    kept = {name: tensor for name, tensor in given.items() if name not in special}
    kept |= {name: adapt_input(given[name], net.in_chans) for name, what in special.items() if what == "input"}
    kept |= {name: tensor for name, tensor in own.items() if special.get(name) in ("classifier", "aux")}
    net.load_state_dict(kept, strict=True)


def _told(net: Net, donor: Net, changed: set[str]) -> list[str]:
    changes: list[str] = []
    if "classifier" in changed:
        new = f"that for {net.num_classes} is untrained" if net.num_classes else "the network has none"
        changes.append(f"the classifier for {donor.num_classes} classes was dropped, {new}")
    if "input" in changed:
        how = "summed for grey" if net.in_chans == 1 else f"taken in turn, and scaled, for {net.in_chans} channels"
        changes.append(f"the first convolution's kernels were {how}")
    if "aux" in changed:
        changes.append("the auxiliary heads are untrained" if len(net.aux) else "the auxiliary heads were dropped")
    for key in SHAPES_AGREE:
        here, there = _option(net.spec, key), _option(donor.spec, key)
        if here != there:
            changes.append(f"{key} is {here!r}, the weights were trained with {there!r}")
    return changes


Weigh = Callable[[Group], float]


def filter_norms(net: Net, order: int = 1) -> Weigh:
    """What a group of channels weighs by its filters: the sum of their L1 or L2 norms (arXiv:1608.08710, section 3)."""
    norms = {name: t.flatten(1).norm(order, 1) for name, t in net.state_dict().items() if t.dim() > 1}
    return lambda group: sum(float(norms[each.tensor][list(each.positions)].sum()) for each in group.filters)


@dataclass(frozen=True)
class Narrowing:
    """Which channels of a wider donor of the same form a network keeps: at each place those that weigh the most.

    What a group of channels (`channels.Group`) weighs is by default the L1 norm of its filters; the order stays. Where
    the dropped channels are zero in the donor, its answers are the network's. Auxiliary heads are not kept. Raises
    UsageError, naming a tensor, where the donor is not wider or has another form.
    """

    net: Net
    donor: Net
    weigh: Weigh | None = None

    def __post_init__(self) -> None:
        own, given = self.net.state_dict(), self.donor.state_dict()
        misfits = sorted(name for name, what in compare(self.net, self.donor).items() if what == "misfit")
        for name in misfits:
            if name not in own or name not in given or own[name].shape[2:] != given[name].shape[2:]:
                raise self._misfit(name)
        for name in misfits:
            if any(ours > theirs for ours, theirs in zip(own[name].shape, given[name].shape, strict=True)):
                raise self._misfit(name, ": channels can be taken away, not added")

    def _misfit(self, name: str, why: str = "") -> UsageError:
        told = f"the weights do not fit this {self.net.spec.family}: {name} has another shape there or is missing"
        return UsageError(told + why)

    @cached_property
    def wide(self) -> dict[frozenset[str], list[Group]]:
        """The donor's groups of channels by place."""
        return places(self.donor)

    @cached_property
    def pairs(self) -> list[tuple[Group, Group]]:
        """Each group of the network's channels with the donor's group that it takes."""
        weigh = self.weigh or filter_norms(self.donor)
        found: list[tuple[Group, Group]] = []
        for place, ours in places(self.net).items():
            theirs = self.wide.get(place, [])
            if len(theirs) < len(ours):
                told = f"of its channels {len(theirs)} are read and added where {len(ours)} would be needed"
                raise UsageError(f"the weights cannot be narrowed to this {self.net.spec.family}: {min(place)}: {told}")
            best = sorted(range(len(theirs)), key=lambda i: -weigh(theirs[i]))[: len(ours)]
            found += zip(ours, (theirs[i] for i in sorted(best)), strict=True)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """The donor's tensors with the kept channels alone, but all of its input and its classes."""
        indices: defaultdict[str, dict[int, dict[int, int]]] = defaultdict(dict)  # tensor, axis, our position → theirs
        for ours, theirs in self.pairs:
            there = {(each.tensor, each.axis): each.positions for each in theirs.slices}
            for each in ours.slices:
                if positions := there.get((each.tensor, each.axis)):
                    index = indices[each.tensor].setdefault(each.axis, {})
                    index.update(zip(each.positions, positions, strict=True))
        own, found = self.net.state_dict(), dict[str, Tensor]()
        for name, tensor in self.donor.state_dict().items():
            if not name.startswith("aux."):
                rows, columns = (_ordered(indices[name].get(axis)) for axis in (0, 1))
                found[name] = _taken(tensor, rows, columns, own[name].shape[1] if columns else 0)
        return found

    def told(self) -> str:
        """What was kept, in words."""
        kept = sum(len(each.positions) for _, group in self.pairs for each in group.filters)
        total = sum(len(each.positions) for found in self.wide.values() for group in found for each in group.filters)
        here, there = _option(self.net.spec, "width"), _option(self.donor.spec, "width")
        form = "the narrower form" if here == there else f"width {here:g} instead of {there:g}"
        return f"{form} keeps {kept:,} of {total:,} channels, those with the largest filters (L1 norm)"


def fill(net: Net, donor: Net) -> list[str]:
    """Copies what a donor of another family has for a network, as the family's `DONORS` tell: a part, by declaration.

    Returns the leaves that hold tensors and got none, in the network's order: they stay as they were. Raises UsageError
    for a donor that the family does not know, and, naming a tensor, for one of another width.
    """
    known = getattr(zoo.families()[net.spec.family], "DONORS", {})
    if donor.spec.family not in known:
        told = ", ".join(known) or "none"
        raise UsageError(f"{net.spec.family} takes no tensors from {donor.spec.family}; it knows as donors: {told}")
    given, taken, unfilled = donor.state_dict(), dict[str, Tensor](), dict[str, None]()
    for name, tensor in net.state_dict().items():
        path, _, kind = name.rpartition(".")
        source = f"{known[donor.spec.family](net.spec.args, path)}.{kind}"
        if source not in given:
            unfilled[path] = None
        elif given[source].shape != tensor.shape:
            raise UsageError(
                f"{donor.spec.family}'s {source} does not fit {name}: both need one width and one in_chans"
            )
        else:
            taken[name] = given[source]
    if not taken:
        raise UsageError(f"this form of {net.spec.family} has nothing in common with {donor.spec.family}")
    net.load_state_dict(taken, strict=False)
    return list(unfilled)


def places(net: Net) -> dict[frozenset[str], list[Group]]:
    """A network's groups of channels by place, but for its input and its classes, which no width changes."""
    found: dict[frozenset[str], list[Group]] = {}
    for group in channels.groups(net, net.spec.input):
        if place := _inner(group.place):
            found.setdefault(place, []).append(group)
    return found


def numbers(net: Net) -> Counter[frozenset[str]]:
    """How many groups of channels a network has at each of its `places`."""
    return Counter(place for each in channels.places(net, net.spec.input) if (place := _inner(each)))


def _inner(place: frozenset[str]) -> frozenset[str]:
    """A place without what is said of the classes; empty for channels of the input."""
    return frozenset() if INPUT in place else frozenset(e for e in place if e != OUTPUT and not LAST.match(e))


def _ordered(index: dict[int, int] | None) -> list[int]:
    return [index[i] for i in range(len(index))] if index else []


def _taken(tensor: Tensor, rows: list[int], columns: list[int], width: int) -> Tensor:
    """Rows, and of each row columns, which count through all groups (`channels.Slice`); `width` is those in a group."""
    if rows:
        tensor = tensor[rows]
    if not columns:
        return tensor
    count = len(tensor)
    part = torch.arange(count) * (len(columns) // width) // count
    table = torch.tensor(columns).view(-1, width)[part] % tensor.shape[1]
    return tensor[torch.arange(count)[:, None], table]


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
