"""Ranges made alike before quantisation, of kernels or of activations, and shifted means put right after it.

Nagel et al., arXiv:1906.04721, for one scale per kernel; Xiao et al., arXiv:2211.10438, for one per output channel.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flyweight import ops
from flyweight.channels import OUTPUT, RULES, Group, Rules, Slice, groups
from flyweight.compress.qat import FakeQuantised
from flyweight.graph import INPUT, Graph, Node, Shape, trace

OBSERVED_AT_ONCE = 32  # pictures
ROUNDS, SETTLED = 20, 1e-2  # at most so many; they end when no scale differs from 1 by more
LEAST_RANGE = 1e-12  # of a kernel: below it lies a channel that is not there
# Marks of channels: any scale would change what the network computes; or one that the clip of a ReLU6 does not meet.
FIXED, CLIPPED = "fixed", "clipped:"
CLIP = 6.0
LEAST_SHARE = 1 / 64  # of the largest activation: one that was smaller on a few pictures counts as this


@dataclass(frozen=True)
class Edge:
    """Channels between the layers that compute them and those that read them, each of which may be scaled.

    `rows` and `columns` give, for kernels and biases by name, the number of the channel in each row or column (as
    `channels.Slice` counts them), `count` where it is none of these. `clipped` are the kernels whose outputs a ReLU6
    clips.
    """

    count: int
    rows: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    clipped: tuple[str, ...]


@torch.no_grad()
def equalise(net: nn.Module, input_shape: Shape) -> nn.Module:
    """A copy of a network with folded norms that computes the same, the ranges of its kernels made alike by channel.

    Section 4.1: where relu(s · x) = s · relu(x) lies between two layers, a channel's row in the first is divided, and
    its column in the second multiplied, by s = √(r₁ / r₂), r being their largest absolute weights; edge by edge until
    nothing changes. Channels that several layers compute or read have one scale. Through ReLU6 a channel is scaled only
    where no input can drive it to the clip, before or after (`_least_scales`), so answers stay equal there as well.
    """
    equal = copy.deepcopy(net).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    graph = trace(equal, input_shape)
    found, bounded = edges(equal, graph), _bounded(graph)
    leaves = dict(equal.named_modules())
    for _ in range(ROUNDS):
        changes = [_equalise_edge(leaves, edge, bounded) for edge in found]
        if not any(changes):
            break
    return equal


@torch.no_grad()
def smooth(net: nn.Module, pictures: Tensor) -> nn.Module:
    """A copy of a network with folded norms that computes the same, its activations' ranges made alike by channel.

    Where rows of kernels have scales of their own, rows may be scaled at no loss, and what remains to be made alike is
    activations (one scale per tensor) and the columns that read them. A channel is divided by s ∝ √(a / c) (section 4,
    α = ½): a is its largest activation on the normalised `pictures` [N, C, H, W]; c the largest share of a row's range
    that its column has. A depthwise kernel has no row but its column: there s ∝ a. ReLU6 as in `equalise`.
    """
    even = copy.deepcopy(net).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    graph = trace(even, tuple(pictures.shape[1:]))
    reach, bounded = _reach(even, pictures), _bounded(graph)
    leaves = dict(even.named_modules())
    for edge in edges(even, graph):
        _scale(leaves, edge, _smoothing(leaves, edge, reach), _least_scales(leaves, edge, bounded))
    return even


def _reach(net: nn.Module, pictures: Tensor) -> dict[str, Tensor]:
    """The largest value in each channel that a layer reads, by the name of its kernel."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(leaf: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            most = inputs[0].abs().transpose(0, 1).flatten(1).amax(1)
            found[name] = most.maximum(found.get(name, most))

        return look

    layers = {name: leaf for name, leaf in net.named_modules() if isinstance(leaf, nn.Conv2d | nn.Linear)}
    hooks = [leaf.register_forward_pre_hook(watch(f"{name}.weight")) for name, leaf in layers.items()]
    for batch in pictures.split(OBSERVED_AT_ONCE):
        net(batch)
    for hook in hooks:
        hook.remove()
    return found


def _smoothing(leaves: Mapping[str, nn.Module], edge: Edge, reach: Mapping[str, Tensor]) -> Tensor:
    """The scale of each channel of an edge that its activations ask for, 0 where there is nothing to scale."""
    largest, share = torch.zeros(edge.count + 1), torch.zeros(edge.count + 1)
    for tensor, numbers in edge.columns.items():
        largest.scatter_reduce_(0, numbers, reach[tensor].float(), "amax")
        kernel = _parts(leaves, tensor).abs().amax(3).float()
        if kernel.shape[2] > 1:
            kernel = kernel / kernel.amax(2, keepdim=True).clamp(min=LEAST_RANGE)
            share.scatter_reduce_(0, numbers, kernel.amax(1).flatten(), "amax")
    largest[-1] = 0.0
    floor = largest.clamp(min=LEAST_SHARE * float(largest.max()))
    scales = torch.where(share > 0, (floor / share.clamp(min=LEAST_RANGE)).sqrt(), floor).double()
    scales[largest == 0] = 0.0
    used = scales > 0
    return scales * (largest[used] / scales[used]).max() / largest.max() if used.any() else scales


def edges(net: nn.Module, graph: Graph) -> list[Edge]:
    """The edges of a network along which channels may be scaled, in the order of execution."""
    together: defaultdict[tuple[str, ...], list[Group]] = defaultdict(list)
    for group in groups(net, graph.input_shape, _rules(graph)):
        rows, columns = _kernels(group, 0), _kernels(group, 1)
        if rows and columns and not {INPUT, OUTPUT, FIXED} & group.place:
            together[(*rows, "", *columns)].append(group)
    return [_edge(net, members) for members in together.values()]


def _kernels(group: Group, axis: int) -> list[str]:
    return sorted({each.tensor for each in group.slices if each.axis == axis and each.tensor.endswith(".weight")})


def _edge(net: nn.Module, members: list[Group]) -> Edge:
    sizes: dict[tuple[str, int], int] = {}
    slices: defaultdict[tuple[str, int], list[tuple[int, Slice]]] = defaultdict(list)
    for number, group in enumerate(members):
        for each in group.slices:
            slices[each.tensor, each.axis].append((number, each))
    for tensor, axis in slices:
        path, _, _ = tensor.rpartition(".")
        leaf = net.get_submodule(path)
        size = net.get_parameter(tensor).shape[axis]
        sizes[tensor, axis] = size * (leaf.groups if axis and isinstance(leaf, nn.Conv2d) else 1)
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for (tensor, axis), own in slices.items():
        numbers = torch.full((sizes[tensor, axis],), len(members))
        for number, each in own:
            numbers[list(each.positions)] = number
        found[axis][tensor] = numbers
    places = frozenset().union(*(group.place for group in members))
    clipped = {place.removeprefix(CLIPPED) for place in places if place.startswith(CLIPPED)}
    return Edge(len(members), *found, tuple(sorted(f"{path}.weight" for path in clipped)))


def _rules(graph: Graph) -> Rules:
    """Labels as in `channels`, but that a layer's outputs are channels of its own even where it is depthwise."""
    made, by_name = RULES[nn.Linear], {node.name: node for node in graph.nodes}

    def convolved(known: Any, node: Node, x: Tensor) -> Tensor:
        leaf = node.leaf
        assert isinstance(leaf, nn.Conv2d)
        return made(known, node, x, leaf.groups)

    def fixed(known: Any, node: Node, x: Tensor) -> Tensor:
        known.mark(FIXED, x)
        return x

    def gated(known: Any, node: Node, x: Tensor, gate: Tensor) -> Tensor:
        known.mark(FIXED, gate)
        return x

    def clipped(known: Any, node: Node, x: Tensor) -> Tensor:
        before = by_name.get(node.inputs[0])
        while before is not None and isinstance(before.leaf, nn.Identity):
            before = by_name.get(before.inputs[0])
        alone = before is not None and isinstance(before.leaf, nn.Conv2d | nn.Linear)
        known.mark(f"{CLIPPED}{before.path}" if alone and before is not None else FIXED, x)
        return x

    curved = (nn.Hardswish, nn.SiLU, nn.Sigmoid, nn.Hardsigmoid, nn.BatchNorm2d, nn.GroupNorm)
    own: Rules = {nn.Conv2d: convolved, ops.SameConv2d: convolved, ops.Mul: gated, nn.ReLU6: clipped}
    return {**RULES, **own, **dict.fromkeys(curved, fixed)}


def _equalise_edge(leaves: Mapping[str, nn.Module], edge: Edge, bounded: set[str]) -> bool:
    """Scales the channels of an edge; whether any scale was notable."""
    first, second = torch.zeros(edge.count + 1), torch.zeros(edge.count + 1)
    for tensor, numbers in edge.rows.items():
        if tensor.endswith(".weight"):
            kernel = _parts(leaves, tensor)
            first.scatter_reduce_(0, numbers, kernel.abs().amax((2, 3)).flatten().float(), "amax")
    for tensor, numbers in edge.columns.items():
        kernel = _parts(leaves, tensor)
        second.scatter_reduce_(0, numbers, kernel.abs().amax((1, 3)).flatten().float(), "amax")
    scales = (first / second.clamp(min=LEAST_RANGE)).sqrt().double()
    scales[(first < LEAST_RANGE) | (second < LEAST_RANGE)] = 0.0
    return _scale(leaves, edge, scales, _least_scales(leaves, edge, bounded))


def _scale(leaves: Mapping[str, nn.Module], edge: Edge, wanted: Tensor, least: Tensor) -> bool:
    """Divides each channel by its scale, at least `least`, where one is wanted (else 0); whether any was notable."""
    scales = wanted.maximum(least)
    scales[(wanted == 0) | least.isinf()] = 1.0
    scales[-1] = 1.0
    for tensor, numbers in edge.rows.items():
        value = _tensor(leaves, tensor)
        value.div_(scales[numbers].to(value.dtype).view(-1, *[1] * (value.ndim - 1)))
    for tensor, numbers in edge.columns.items():
        kernel = _parts(leaves, tensor)
        kernel.mul_(scales[numbers].to(kernel.dtype).view(kernel.shape[0], 1, kernel.shape[2], 1))
    return bool(((scales - 1).abs() > SETTLED).any())


def _tensor(leaves: Mapping[str, nn.Module], name: str) -> Tensor:
    path, _, own = name.rpartition(".")
    return getattr(leaves[path], own)


def _parts(leaves: Mapping[str, nn.Module], name: str) -> Tensor:
    """A kernel as [groups, rows of each, columns, positions], the same memory."""
    kernel, leaf = _tensor(leaves, name), leaves[name.rpartition(".")[0]]
    parts = leaf.groups if isinstance(leaf, nn.Conv2d) else 1
    return kernel.view(parts, kernel.shape[0] // parts, kernel.shape[1], -1)


def _least_scales(leaves: Mapping[str, nn.Module], edge: Edge, bounded: set[str]) -> Tensor:
    """The least scale of each channel with which a ReLU6 still clips nothing; infinite where it may clip already.

    A layer that reads values from 0 to 6 computes at most b + 6 · Σ max(w, 0) in a channel. Up to 6 the clip is never
    met, and it is not met after the channel was divided by at least a sixth of that.
    """
    least = torch.zeros(edge.count + 1, dtype=torch.double)
    for tensor in edge.clipped:
        numbers, bias = edge.rows[tensor], edge.rows.get(tensor.replace(".weight", ".bias"))
        weight = _tensor(leaves, tensor).double()
        most = CLIP * weight.clamp(min=0).flatten(1).sum(1)
        if bias is not None:
            most = most + _tensor(leaves, tensor.replace(".weight", ".bias")).double()
        needed = (most / CLIP).clamp(min=0)
        needed[most > CLIP] = torch.inf
        if tensor not in bounded:
            needed = torch.full_like(needed, torch.inf)
        least.scatter_reduce_(0, numbers, needed, "amax")
    return least


def _bounded(graph: Graph) -> set[str]:
    """The kernels of the layers that read nothing but values from 0 to 6."""
    keeping = (nn.Identity, nn.Dropout, nn.Flatten, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, ops.Cat, ops.Part)
    keeping += (ops.ChannelShuffle, ops.GlobalAvgPool, ops.GlobalMaxPool)
    within: set[str] = set()
    for node in graph.nodes:
        if isinstance(node.leaf, nn.ReLU6) or (isinstance(node.leaf, keeping) and within.issuperset(node.inputs)):
            within.add(node.name)
    layers = [node for node in graph.nodes if isinstance(node.leaf, nn.Conv2d | nn.Linear)]
    outside = {node.path for node in layers if node.inputs[0] not in within}
    return {f"{node.path}.weight" for node in layers if node.path not in outside}


@torch.no_grad()
def correct_biases(fake: FakeQuantised, reference: nn.Module, pictures: Tensor) -> None:
    """Takes from each layer's bias what quantisation adds to its outputs on average, E[ỹ] − E[y] (section 4.2).

    Layer after layer, so that each sees the corrections before it; `reference` is the network as it was, `pictures` are
    normalised [N, C, H, W].
    """
    graph = trace(reference, tuple(pictures.shape[1:]))
    values, true = {INPUT: fake.rounded(INPUT, pictures)}, {INPUT: pictures}
    for node, original in zip(fake.graph.nodes, graph.nodes, strict=True):
        y = fake.computed(node, [values[name] for name in node.inputs])
        expected = original.leaf(*[true[name] for name in original.inputs])
        if isinstance(node.leaf, nn.Conv2d | nn.Linear):
            y = _corrected(node.leaf, y, expected)
        values[node.name], true[node.name] = fake.rounded(node.name, y), expected
        for name in fake.forgotten[node.name]:
            del values[name], true[name]


def _corrected(layer: nn.Conv2d | nn.Linear, y: Tensor, expected: Tensor) -> Tensor:
    shift = (y - expected).transpose(0, 1).flatten(1).mean(1)
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros_like(shift))
    layer.bias.sub_(shift)
    return y - shift.view(-1, *[1] * (y.ndim - 2))
