"""Which channels of a network stay or go together: labels pushed through the traced graph.

Convolutions and linear layers mint labels, one for each channel; depthwise convolutions, norms, activations and pools
pass them on; sums and gates tie them; concatenations, parts, shuffles and flattening simply run on them.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flyweight import ops
from flyweight.errors import UsageError
from flyweight.graph import INPUT, SHAPES, GraphError, Node, Shape, trace

OUTPUT = "output"
PADDING = ("before", "after")  # the channels that ops.PadChannels adds, by attribute
Rules = Mapping[type[nn.Module], Callable[..., Any]]


class Slice(NamedTuple):
    """Positions along one axis of a tensor of the state dict.

    Along axis 1 of a grouped kernel they count through all groups: with C columns in each, p is column p mod C of the
    rows of group p div C.
    """

    tensor: str
    axis: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Channels that stay or go together, as each other's sum, gate, norm or depthwise filter.

    `slices` are all that the network holds of them, `filters` those of the slices that compute them. `place` tells
    where they are: "weight:axis:group" of the kernels that compute (axis 0) or read (axis 1) them, "path:rows:row" of
    shuffles, "input:parts:part", the padding that they are in, INPUT and OUTPUT. Groups of one place, in narrower
    networks of the same form too, can stand for each other. Where places differ in the last number alone, each of them
    has its share of one layer's channels, which must stay equal.
    """

    place: frozenset[str]
    slices: tuple[Slice, ...]
    filters: tuple[Slice, ...]


def groups(net: nn.Module, input_shape: Shape, rules: Rules | None = None) -> list[Group]:
    """The groups of a network's channels, in the order in which they are computed; those of the input come first.

    If a group's filters, biases and norms are zero, and it has neither INPUT nor OUTPUT in its place, the network
    answers the same without its slices. `rules` stand in for RULES. Raises GraphError for an unknown leaf, UsageError
    for one that mixes channels.
    """
    return _pushed(net, input_shape, rules or RULES).groups()


def places(net: nn.Module, input_shape: Shape) -> list[frozenset[str]]:
    """The place of each group, in the order of `groups` and sooner."""
    return list(_pushed(net, input_shape, RULES).places().values())


def _pushed(net: nn.Module, input_shape: Shape, rules: Rules) -> "_Labels":
    graph = trace(net, input_shape)
    known = _Labels()
    found = {INPUT: known.mint(input_shape[0], INPUT)}
    for node in graph.nodes:
        rule = rules.get(type(node.leaf))
        if rule is None:
            name = type(node.leaf).__name__
            raise GraphError(f"{node.path} is a {name}, whose channels are not known; add its rule to channels.RULES")
        found[node.name] = rule(known, node, *[found[name] for name in node.inputs])
    for name in graph.outputs:
        known.mark(OUTPUT, found[name])
    return known


class _Labels:
    """Labels are numbers from 0 on, of a tensor as [1, C, 1, 1]; `parent` leads to the one that stands for all tied."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.marks: list[tuple[str, Tensor]] = []
        self.axes: dict[tuple[str, int], Tensor] = {}  # tensor and axis → their labels
        self.made: set[str] = set()  # tensors whose rows compute channels

    def mint(self, count: int, place: str = "") -> Tensor:
        new = torch.arange(len(self.parent), len(self.parent) + count, device="cpu").view(1, -1, 1, 1)
        self.parent += new.flatten().tolist()
        if place:
            self.mark(place, new)
        return new

    def mark(self, place: str, labels: Tensor) -> None:
        self.marks.append((place, labels))

    def root(self, label: int) -> int:
        while self.parent[label] != label:
            self.parent[label] = label = self.parent[self.parent[label]]
        return label

    def roots(self) -> list[int]:
        return [self.root(label) for label in range(len(self.parent))]

    def tie(self, one: Tensor, other: Tensor) -> None:
        for a, b in zip(one.flatten().tolist(), other.flatten().tolist(), strict=True):
            first, second = sorted((self.root(a), self.root(b)))
            self.parent[second] = first

    def attach(self, tensor: str, axis: int, labels: Tensor, parts: int = 1) -> None:
        """Notes whose channels an axis has; those of a leaf that is called again are the same."""
        if (tensor, axis) in self.axes:
            self.tie(self.axes[tensor, axis], labels)
            return
        self.axes[tensor, axis] = labels
        if tensor in self.made:
            for part, own in enumerate(labels.chunk(parts, dim=1)):
                self.mark(f"{tensor}:{axis}:{part}", own)

    def rows(self, node: Node, labels: Tensor, parts: int = 1) -> Tensor:
        for name, tensor in node.leaf.state_dict().items():
            if tensor.dim():  # a norm's counter has no channels
                self.attach(f"{node.path}.{name}", 0, labels, parts)
        return labels

    def places(self) -> dict[int, frozenset[str]]:
        """Root → the marks of all that are tied to it."""
        roots, found = self.roots(), defaultdict[int, set[str]](set)
        for place, labels in self.marks:
            for label in labels.flatten().tolist():
                found[roots[label]].add(place)
        return {root: frozenset(found[root]) for root in sorted(found)}

    def groups(self) -> list[Group]:
        roots = self.roots()
        slices: defaultdict[int, defaultdict[tuple[str, int], list[int]]] = defaultdict(lambda: defaultdict(list))
        for axis, labels in self.axes.items():
            for position, label in enumerate(labels.flatten().tolist()):
                slices[roots[label]][axis].append(position)
        return [self._group(place, slices[root]) for root, place in self.places().items()]

    def _group(self, place: frozenset[str], found: Mapping[tuple[str, int], list[int]]) -> Group:
        slices = tuple(Slice(tensor, axis, tuple(positions)) for (tensor, axis), positions in found.items())
        filters = tuple(each for each in slices if each.axis == 0 and each.tensor in self.made)
        return Group(place, slices, filters)


def _convolved(known: _Labels, node: Node, x: Tensor) -> Tensor:
    leaf = node.leaf
    assert isinstance(leaf, nn.Conv2d)
    if leaf.groups == leaf.in_channels > 1:  # depthwise
        return known.rows(node, x.repeat_interleave(leaf.out_channels // leaf.in_channels, dim=1))
    return _made(known, node, x, leaf.groups)


def _made(known: _Labels, node: Node, x: Tensor, parts: int = 1) -> Tensor:
    weight = f"{node.path}.weight"
    known.made.add(weight)
    known.attach(weight, 1, x, parts)
    if (weight, 0) in known.axes:  # called again
        return known.axes[weight, 0]
    return known.rows(node, known.mint(node.shape[0]), parts)


def _passed(known: _Labels, node: Node, x: Tensor) -> Tensor:
    return known.rows(node, x)


def _tied(known: _Labels, node: Node, x: Tensor, *others: Tensor) -> Tensor:
    for other in others:
        known.tie(x, other)
    return x


def _run(known: _Labels, node: Node, *xs: Tensor) -> Tensor:
    return node.leaf(*xs)


def _resized(known: _Labels, node: Node, x: Tensor, like: Tensor) -> Tensor:
    return x


def _part(known: _Labels, node: Node, x: Tensor) -> Tensor:
    leaf = node.leaf
    assert isinstance(leaf, ops.Part)
    part = leaf(x)
    known.mark(f"{node.inputs[0]}:parts:{leaf.index}", part)
    return part


def _shuffled(known: _Labels, node: Node, x: Tensor) -> Tensor:
    leaf = node.leaf
    assert isinstance(leaf, ops.ChannelShuffle)
    for row, labels in enumerate(x.chunk(leaf.groups, dim=1)):
        known.mark(f"{node.path}:rows:{row}", labels)
    return leaf(x)


def _padded(known: _Labels, node: Node, x: Tensor) -> Tensor:
    leaf = node.leaf
    assert isinstance(leaf, ops.PadChannels)
    before, after = (known.mint(getattr(leaf, side), f"{node.path}.{side}") for side in PADDING)
    return torch.cat([before, x, after], dim=1)


def _flattened(known: _Labels, node: Node, x: Tensor) -> Tensor:
    return x.repeat_interleave(node.shape[0] // x.numel(), dim=1)  # a channel's positions follow each other


def _mixed(known: _Labels, node: Node, x: Tensor) -> Tensor:
    raise UsageError(f"{node.path} is a {type(node.leaf).__name__}, which mixes channels: none can be taken away")


# Leaf class → the labels of its output.
RULES: Rules = {
    nn.Conv2d: _convolved,
    ops.SameConv2d: _convolved,
    nn.Linear: _made,
    nn.BatchNorm2d: _passed,
    nn.GroupNorm: _mixed,
    nn.ReLU: _passed,
    nn.ReLU6: _passed,
    nn.Hardswish: _passed,
    nn.SiLU: _passed,
    nn.Sigmoid: _passed,
    nn.Hardsigmoid: _passed,
    nn.Identity: _passed,
    nn.Dropout: _passed,
    nn.Flatten: _flattened,
    nn.MaxPool2d: _passed,
    nn.AvgPool2d: _passed,
    nn.AdaptiveAvgPool2d: _passed,
    ops.SameMaxPool2d: _passed,
    ops.SameAvgPool2d: _passed,
    ops.Add: _tied,
    ops.Mul: _tied,
    ops.Scale: _passed,
    ops.Cat: _run,
    ops.Resize: _resized,
    ops.Part: _part,
    ops.PadChannels: _padded,
    ops.ChannelShuffle: _shuffled,
    ops.GlobalAvgPool: _passed,
    ops.GlobalMaxPool: _passed,
}


def narrow(net: nn.Module, input_shape: Shape, widths: Mapping[str, int]) -> None:
    """Leaves so many channels: `widths` by the path of the leaf that computes them (of padding, "….before", "….after").

    What reads them follows; the tensors keep their first values, to be drawn or loaded. Raises UsageError for a path
    that computes no channels, and where the widths do not fit together.
    """
    if not isinstance(widths, Mapping):
        raise UsageError(f"the widths do not fit this network: {widths!r} does not tell them by the path of a leaf")
    unknown, shapes = dict(widths), {INPUT: input_shape}
    for node in trace(net, input_shape).nodes:
        inputs = [shapes[name] for name in node.inputs]
        try:
            _fit(node, inputs[0][0], unknown)
            shapes[node.name] = SHAPES[type(node.leaf)](node.leaf, *inputs)
        except ValueError as error:
            raise UsageError(f"the widths do not fit this network: at {node.path}, {error}") from error
    if unknown:
        raise UsageError(f"the widths do not fit this network: it computes no channels at {min(unknown)}")


def _fit(node: Node, channels: int, widths: dict[str, int]) -> None:
    """Fits a leaf to the channels that it reads, and to its own width, which is taken out of `widths`."""
    leaf, path = node.leaf, node.path
    if isinstance(leaf, nn.BatchNorm2d):
        leaf.num_features = channels
        _keep(leaf, channels)
    elif isinstance(leaf, nn.Linear):
        leaf.in_features, leaf.out_features = channels, _width(widths, path, leaf.out_features)
        _keep(leaf, leaf.out_features, channels)
    elif isinstance(leaf, nn.Conv2d):
        if leaf.groups == leaf.in_channels > 1:
            leaf.out_channels, leaf.groups = leaf.out_channels // leaf.groups * channels, channels
        else:
            leaf.out_channels = _width(widths, path, leaf.out_channels)
        leaf.in_channels = channels
        if channels % leaf.groups or leaf.out_channels % leaf.groups:
            raise ValueError(f"{leaf.groups} groups do not divide {channels} and {leaf.out_channels} channels")
        _keep(leaf, leaf.out_channels, channels // leaf.groups)
    elif isinstance(leaf, ops.PadChannels):
        leaf.before, leaf.after = (_width(widths, f"{path}.{side}", getattr(leaf, side), 0) for side in PADDING)


def _width(widths: dict[str, int], path: str, own: int, least: int = 1) -> int:
    width = widths.pop(path, own)
    if type(width) is not int or not least <= width <= own:
        raise ValueError(f"{width!r} is not a whole number from {least} to the family's {own}")
    return width


def _keep(leaf: nn.Module, rows: int, columns: int | None = None) -> None:
    """The first rows, and of each the first columns, of all tensors of a leaf."""
    for name, tensor in leaf.state_dict(keep_vars=True).items():
        kept = tensor.detach()[(slice(rows), slice(columns))[: tensor.dim()]]
        if kept.shape != tensor.shape:
            kept = kept.clone(memory_format=torch.contiguous_format)
            setattr(leaf, name, nn.Parameter(kept) if isinstance(tensor, nn.Parameter) else kept)
