"""Exact cost from one walk of the graph. One multiply-accumulate is 1 MAC; FLOPs = 2 × MACs. All are Python ints."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from flyweight import ops
from flyweight.create import spec_of, structure
from flyweight.graph import INPUT, Graph, GraphError, Node, Shape, trace
from flyweight.net import Net, Spec

MacRule = Callable[[Any, Shape, Shape], int]


def _none(leaf: nn.Module, inputs: Shape, output: Shape) -> int:
    return 0


def _conv(leaf: nn.Conv2d, inputs: Shape, output: Shape) -> int:
    """k_h · k_w · C_in / g multiplications for each output value."""
    kh, kw = leaf.kernel_size
    return kh * kw * leaf.in_channels // leaf.groups * output[0] * output[1] * output[2]


def _linear(leaf: nn.Linear, inputs: Shape, output: Shape) -> int:
    return leaf.in_features * leaf.out_features


# Only convolutions and linear layers multiply and accumulate. A class not listed here is an error, never a silent zero.
MACS: dict[type[nn.Module], MacRule] = {
    nn.Conv2d: _conv,
    nn.Linear: _linear,
    nn.BatchNorm2d: _none,
    nn.ReLU: _none,
    nn.ReLU6: _none,
    nn.Identity: _none,
    nn.Dropout: _none,
    nn.MaxPool2d: _none,
    nn.AvgPool2d: _none,
    ops.Add: _none,
    ops.Cat: _none,
    ops.ChannelShuffle: _none,
    ops.GlobalAvgPool: _none,
    ops.GlobalMaxPool: _none,
}
# These write over their input, or vanish when the network is deployed: no memory of their own.
IN_PLACE = (nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.Identity, nn.Dropout)


@dataclass(frozen=True)
class LayerCost:
    """One leaf: what it holds, multiplies and writes (`values` are numbers, not bytes)."""

    path: str
    leaf: str
    shape: Shape
    params: int
    macs: int
    values: int


@dataclass(frozen=True)
class NetCost:
    """A network's cost for one picture. `peak_values`: the most activation values alive at once, by liveness."""

    layers: tuple[LayerCost, ...]
    weight_values: int
    peak_values: int

    @cached_property
    def params(self) -> int:
        """Trainable parameters, batch normalisation included, as papers and zoos count them."""
        return sum(layer.params for layer in self.layers)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return sum(layer.macs for layer in self.layers)

    @property
    def flops(self) -> int:
        """Floating-point operations: 2 × MACs."""
        return 2 * self.macs

    def memory_bytes(self, value_bytes: int) -> int:
        """Peak activations plus deployed weights (norms folded), at `value_bytes` a number (float32: 4, int8: 1)."""
        return value_bytes * (self.weight_values + self.peak_values)


def _size(shape: Shape) -> int:
    return torch.Size(shape).numel()


def _layer(graph: Graph, node: Node) -> LayerCost:
    rule = MACS.get(type(node.leaf))
    if rule is None:
        raise GraphError(
            f"{node.path} is a {type(node.leaf).__name__}, whose cost is not known; add its rule to cost.MACS"
        )
    params = sum(p.numel() for p in node.leaf.parameters())
    macs = rule(node.leaf, graph.shapes[node.inputs[0]], node.shape)
    return LayerCost(node.path, type(node.leaf).__name__, node.shape, params, macs, _size(node.shape))


def _deployed_values(leaf: nn.Module) -> int:
    """Weights and one bias per output channel: what is left of a convolution and its folded batch normalisation."""
    if isinstance(leaf, nn.Conv2d):
        return leaf.weight.numel() + leaf.out_channels
    return sum(p.numel() for p in leaf.parameters()) if not isinstance(leaf, nn.BatchNorm2d) else 0


def peak_values(graph: Graph) -> int:
    """The largest sum of activations alive while a leaf runs: its inputs, its output and what later leaves need."""
    buffer = {INPUT: INPUT}
    for node in graph.nodes:
        buffer[node.name] = buffer[node.inputs[0]] if isinstance(node.leaf, IN_PLACE) else node.name
    last = {buffer[graph.output]: len(graph.nodes)}
    for i, node in enumerate(graph.nodes):
        for name in node.inputs:
            last[buffer[name]] = max(i, last.get(buffer[name], i))
    alive, peak = {INPUT}, _size(graph.input_shape)
    for i, node in enumerate(graph.nodes):
        alive.add(buffer[node.name])
        peak = max(peak, sum(_size(graph.shapes[name]) for name in alive))
        alive = {name for name in alive if last.get(name, i) > i}
    return peak


def graph_cost(graph: Graph) -> NetCost:
    """The cost of a traced network. Raises GraphError for a leaf class without a rule."""
    weights = {id(node.leaf): _deployed_values(node.leaf) for node in graph.nodes}
    return NetCost(tuple(_layer(graph, node) for node in graph.nodes), sum(weights.values()), peak_values(graph))


def cost(net: nn.Module | Spec | str, input_shape: Shape | None = None, **args: Any) -> NetCost:
    """The cost of a network, a Spec or a named model (with its arguments) for one picture of `input_shape` (C, H, W).

    Named models and Specs are built on the meta device: nothing is allocated. Raises GraphError for unknown operations.
    """
    if isinstance(net, str):
        net = spec_of(net, **args)
    if isinstance(net, Spec):
        with torch.device("meta"):
            built = structure(net)
        return graph_cost(trace(built, input_shape or net.input))
    if input_shape is None:
        if not isinstance(net, Net) or net.spec is None:
            raise ValueError("cost(net) needs the input shape (C, H, W) of a network that flyweight did not build")
        input_shape = net.spec.input
    return graph_cost(trace(net, input_shape))
