"""Exact cost from one walk of the graph. One multiply-accumulate is 1 MAC; FLOPs = 2 × MACs. All are Python ints."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from flyweight import ops
from flyweight.graph import INPUT, Graph, GraphError, Node, Shape, trace
from flyweight.net import FeatureNet, Net, Spec
from flyweight.zoo import spec_of, structure

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
    ops.SameConv2d: _conv,
    nn.Linear: _linear,
    nn.BatchNorm2d: _none,
    nn.GroupNorm: _none,
    nn.ReLU: _none,
    nn.ReLU6: _none,
    nn.Hardswish: _none,
    nn.SiLU: _none,
    nn.Sigmoid: _none,
    nn.Hardsigmoid: _none,
    nn.Identity: _none,
    nn.Dropout: _none,
    nn.Flatten: _none,
    nn.MaxPool2d: _none,
    nn.AvgPool2d: _none,
    nn.AdaptiveAvgPool2d: _none,
    ops.SameMaxPool2d: _none,
    ops.SameAvgPool2d: _none,
    ops.Add: _none,
    ops.Mul: _none,
    ops.Scale: _none,
    ops.Cat: _none,
    ops.Resize: _none,
    ops.Part: _none,
    ops.PadChannels: _none,
    ops.ChannelShuffle: _none,
    ops.GlobalAvgPool: _none,
    ops.GlobalMaxPool: _none,
}
# These write over an input that nothing else reads, or vanish when the network is deployed: no memory of their own.
VANISHING = (nn.Identity, nn.Dropout)
IN_PLACE = (
    nn.BatchNorm2d,
    nn.ReLU,
    nn.ReLU6,
    nn.Hardswish,
    nn.SiLU,
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.Flatten,
)
# Bytes of a weight and of a bias by precision; int8 runtimes keep biases as int32.
PRECISIONS = {"float32": (4, 4), "float16": (2, 2), "int8": (1, 4)}


@dataclass(frozen=True)
class LayerCost:
    """One leaf: what it holds, multiplies, reads and writes (`values`, `read` are numbers, not bytes).

    `params` counts as papers do; `weights` and `biases` what is left when the norm is folded into the convolution.
    `field` is the receptive field (height, width) in pixels of its output.
    """

    path: str
    leaf: str
    shape: Shape
    params: int
    macs: int
    values: int
    read: int
    weights: int
    biases: int
    field: tuple[int, int]

    @property
    def intensity(self) -> float:
        """FLOPs for each byte that the layer reads and writes in float32, weights included."""
        moved = self.read + self.values + self.weights + self.biases
        return 2 * self.macs / (4 * moved) if moved else 0.0


@dataclass(frozen=True)
class NetCost:
    """A network's cost for one picture, of what is deployed: no auxiliary heads, norms folded into convolutions.

    `peak_values`: the most activation values alive at once, by liveness.
    """

    layers: tuple[LayerCost, ...]
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

    @cached_property
    def weight_values(self) -> int:
        """Deployed weights and biases: what is left when the norms are folded."""
        return sum(layer.weights + layer.biases for layer in self.layers)

    def weight_bytes(self, precision: str = "float32") -> int:
        """Bytes of the deployed weights and biases in a precision of PRECISIONS, without a file's own overhead."""
        of_weight, of_bias = PRECISIONS[precision]
        return sum(of_weight * layer.weights + of_bias * layer.biases for layer in self.layers)

    def activation_bytes(self, precision: str = "float32") -> int:
        """Bytes of all activations that are written for one picture, one after the other."""
        return PRECISIONS[precision][0] * sum(layer.values for layer in self.layers)

    def peak_bytes(self, precision: str = "float32") -> int:
        """Bytes of the activations that are alive at once, at most."""
        return PRECISIONS[precision][0] * self.peak_values

    def memory_bytes(self, value_bytes: int) -> int:
        """Peak activations plus deployed weights (norms folded), at `value_bytes` a number (float32: 4, int8: 1)."""
        return value_bytes * (self.weight_values + self.peak_values)

    @property
    def intensity(self) -> float:
        """Arithmetic intensity in float32: FLOPs for each byte of weights and activations moved once a layer.

        Low ones wait for memory, high ones for arithmetic (the roofline, Williams et al., CACM 52 (4), 2009).
        """
        moved = sum(layer.read + layer.values + layer.weights + layer.biases for layer in self.layers)
        return self.flops / (4 * moved)

    @property
    def receptive_field(self) -> tuple[int, int]:
        """Height and width in pixels of what one position of the last feature map sees."""
        return max((layer.field for layer in self.layers), default=(1, 1))


def _size(shape: Shape) -> int:
    return torch.Size(shape).numel()


def _layer(graph: Graph, node: Node) -> LayerCost:
    leaf = node.leaf
    rule = MACS.get(type(leaf))
    if rule is None:
        raise GraphError(f"{node.path} is a {type(leaf).__name__}, whose cost is not known; add its rule to costs.MACS")
    params = sum(p.numel() for p in leaf.parameters())
    macs = rule(leaf, graph.shapes[node.inputs[0]], node.shape)
    weights, biases = _deployed(leaf)
    # What works in place, or vanishes, is done while the layer before it writes: nothing moves again.
    moves = not _in_place(graph, node)
    read = sum(_size(graph.shapes[name]) for name in node.read) if moves else 0
    values = _size(node.shape) if moves else 0
    field = graph.fields[node.name].size
    return LayerCost(node.path, type(leaf).__name__, node.shape, params, macs, values, read, weights, biases, field)


def _in_place(graph: Graph, node: Node) -> bool:
    if isinstance(node.leaf, VANISHING):
        return True
    return isinstance(node.leaf, IN_PLACE) and len(graph.users[node.inputs[0]]) == 1


def _deployed(leaf: nn.Module) -> tuple[int, int]:
    """Weights and biases when deployed: a convolution has a bias, its own or its folded norm's; that norm nothing."""
    if isinstance(leaf, nn.Conv2d):
        return leaf.weight.numel(), leaf.out_channels
    if isinstance(leaf, nn.Linear):
        return leaf.weight.numel(), sum(p.numel() for p in leaf.parameters()) - leaf.weight.numel()
    return 0, 0 if isinstance(leaf, nn.BatchNorm2d) else sum(p.numel() for p in leaf.parameters())


def peak_values(graph: Graph) -> int:
    """The largest sum of activations alive while a leaf runs: its inputs, its output and what later leaves need."""
    buffer = {INPUT: INPUT}
    for node in graph.nodes:
        buffer[node.name] = buffer[node.inputs[0]] if _in_place(graph, node) else node.name
    last = {buffer[name]: len(graph.nodes) for name in graph.outputs}
    for i, node in enumerate(graph.nodes):
        for name in node.read:
            last[buffer[name]] = max(i, last.get(buffer[name], i))
    alive, peak = {INPUT}, _size(graph.input_shape)
    for i, node in enumerate(graph.nodes):
        alive.add(buffer[node.name])
        peak = max(peak, sum(_size(graph.shapes[name]) for name in alive))
        alive = {name for name in alive if last.get(name, i) > i}
    return peak


def graph_cost(graph: Graph) -> NetCost:
    """The cost of a traced network. Raises GraphError for a leaf class without a rule."""
    layers = [_layer(graph, node) for node in graph.nodes]
    seen: set[str] = set()
    for i, layer in enumerate(layers):
        if layer.path in seen:  # a leaf that is called again holds nothing more
            layers[i] = replace(layer, params=0, weights=0, biases=0)
        seen.add(layer.path)
    return NetCost(tuple(layers), peak_values(graph))


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
        if not isinstance(net, Net | FeatureNet):
            raise ValueError("cost(net) needs the input shape (C, H, W) of a network that flyweight did not build")
        input_shape = net.spec.input
    return graph_cost(trace(net, input_shape))
