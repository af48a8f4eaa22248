"""Which channels of a network stay or go together: labels pushed through the traced graph.

Convolutions and linear layers mint labels, one for each channel; depthwise convolutions, norms, activations and pools
pass them on; sums and gates tie them; concatenations, parts, shuffles and flattening simply run on them.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flyweight import ops
from flyweight.errors import UsageError
from flyweight.graph import INPUT, GraphError, Node, Shape, trace

OUTPUT = "output"


@dataclass(frozen=True)
class Slice:
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
    where they are: "weight:axis:group" of the kernels that compute (axis 0) or read (axis 1) them, the parts and the
    padding that they are in, INPUT and OUTPUT. Groups of one place, in narrower networks of the same form too, can
    stand for each other.
    """

    place: frozenset[str]
    slices: tuple[Slice, ...]
    filters: tuple[Slice, ...]


def groups(net: nn.Module, input_shape: Shape) -> list[Group]:
    """The groups of a network's channels, in the order in which they are computed; those of the input come first.

    If a group's filters, biases and norms are zero, and it has neither INPUT nor OUTPUT in its place, the network
    answers the same without its slices. Raises GraphError for an unknown leaf, UsageError for one that mixes channels.
    """
    graph = trace(net, input_shape)
    known = _Labels()
    found = {INPUT: known.mint(input_shape[0], INPUT)}
    for node in graph.nodes:
        rule = RULES.get(type(node.leaf))
        if rule is None:
            name = type(node.leaf).__name__
            raise GraphError(f"{node.path} is a {name}, whose channels are not known; add its rule to channels.RULES")
        found[node.name] = rule(known, node, *[found[name] for name in node.inputs])
    for name in graph.outputs:
        known.mark(OUTPUT, found[name])
    return known.groups()


class _Labels:
    """Labels are numbers from 0 on, of a tensor as [1, C, 1, 1]; `parent` leads to the one that stands for all tied."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.marks: list[tuple[str, Tensor]] = []
        self.axes: dict[tuple[str, int], tuple[Tensor, int]] = {}  # tensor and axis → their labels, in so many groups
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

    def tie(self, one: Tensor, other: Tensor) -> None:
        for a, b in zip(one.flatten().tolist(), other.flatten().tolist(), strict=True):
            first, second = sorted((self.root(a), self.root(b)))
            self.parent[second] = first

    def attach(self, tensor: str, axis: int, labels: Tensor, parts: int = 1) -> None:
        """Notes whose channels an axis has; those of a leaf that is called again are the same."""
        if (tensor, axis) in self.axes:
            self.tie(self.axes[tensor, axis][0], labels)
        else:
            self.axes[tensor, axis] = (labels, parts)

    def rows(self, node: Node, labels: Tensor, parts: int = 1) -> Tensor:
        for name, tensor in node.leaf.state_dict().items():
            if tensor.dim():  # a norm's counter has no channels
                self.attach(f"{node.path}.{name}", 0, labels, parts)
        return labels

    def groups(self) -> list[Group]:
        places: defaultdict[int, set[str]] = defaultdict(set)
        slices: defaultdict[int, dict[tuple[str, int], list[int]]] = defaultdict(dict)
        for (tensor, axis), (labels, parts) in self.axes.items():
            size = labels.numel() // parts
            for position, label in enumerate(labels.flatten().tolist()):
                root = self.root(label)
                slices[root].setdefault((tensor, axis), []).append(position)
                if tensor in self.made:
                    places[root].add(f"{tensor}:{axis}:{position // size}")
        for place, labels in self.marks:
            for label in labels.flatten().tolist():
                places[self.root(label)].add(place)
        return [self._group(places[root], slices[root]) for root in sorted(places)]

    def _group(self, place: set[str], found: dict[tuple[str, int], list[int]]) -> Group:
        slices = tuple(Slice(tensor, axis, tuple(positions)) for (tensor, axis), positions in found.items())
        filters = tuple(each for each in slices if each.axis == 0 and each.tensor in self.made)
        return Group(frozenset(place), slices, filters)


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
        return known.axes[weight, 0][0]
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
    part = node.leaf(x)
    known.mark(node.path, part)
    return part


def _padded(known: _Labels, node: Node, x: Tensor) -> Tensor:
    leaf = node.leaf
    assert isinstance(leaf, ops.PadChannels)
    before, after = known.mint(leaf.before, f"{node.path}:before"), known.mint(leaf.after, f"{node.path}:after")
    return torch.cat([before, x, after], dim=1)


def _flattened(known: _Labels, node: Node, x: Tensor) -> Tensor:
    return x.repeat_interleave(node.shape[0] // x.numel(), dim=1)  # a channel's positions follow each other


def _mixed(known: _Labels, node: Node, x: Tensor) -> Tensor:
    raise UsageError(f"{node.path} is a {type(node.leaf).__name__}, which mixes channels: none can be taken away")


# Leaf class → the labels of its output.
RULES: dict[type[nn.Module], Callable[..., Any]] = {
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
    ops.ChannelShuffle: _run,
    ops.GlobalAvgPool: _passed,
    ops.GlobalMaxPool: _passed,
}
