"""The only walker: a network as a list of leaf modules with their inputs and shapes. Nothing is computed."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from torch import nn

from flyweight import ops
from flyweight.errors import FlyweightError

Shape = tuple[int, ...]
INPUT = "input"
WINDOWS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


@dataclass(frozen=True)
class Node:
    """One call of a leaf module: `shape` is its output's without the batch, `inputs` the names of nodes or "input"."""

    name: str
    path: str
    leaf: nn.Module
    inputs: tuple[str, ...]
    shape: Shape

    @property
    def read(self) -> tuple[str, ...]:
        """The inputs whose values are read: all but the one that gives a resized map its size."""
        return self.inputs[:1] if isinstance(self.leaf, ops.Resize) else self.inputs


@dataclass(frozen=True)
class Field:
    """`stride`: pixels from one position to the next; `size`: the receptive field's height and width in pixels."""

    stride: int
    size: tuple[int, int]

    def through(self, leaf: nn.Module, size: tuple[int, int]) -> "Field":
        """The field behind a leaf whose inputs see at most `size`: each window adds (k − 1) · dilation · stride."""
        if not isinstance(leaf, WINDOWS):
            return Field(self.stride, size)
        kernel, gap = ops.pair(leaf.kernel_size), ops.dilation(leaf)
        height, width = (size[axis] + (kernel[axis] - 1) * gap[axis] * self.stride for axis in (0, 1))
        return Field(self.stride * ops.pair(leaf.stride)[0], (height, width))


@dataclass(frozen=True)
class Graph:
    """The leaves of a network in the order of execution."""

    input_shape: Shape
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Node name → output shape, the input included."""
        return {INPUT: self.input_shape} | {node.name: node.shape for node in self.nodes}

    @cached_property
    def users(self) -> dict[str, list[Node]]:
        """Node name → the nodes that read its output."""
        found: dict[str, list[Node]] = {name: [] for name in self.shapes}
        for node in self.nodes:
            for name in node.read:
                found[name].append(node)
        return found

    @cached_property
    def fields(self) -> dict[str, "Field"]:
        """Node name → what a position of its output sees of the picture, by the longest path of windows.

        What a squeeze-and-excitation gate adds from the whole picture is left out.
        """
        found = {INPUT: Field(1, (1, 1))}
        for node in self.nodes:
            before = [found[name] for name in node.inputs]
            if isinstance(node.leaf, ops.Mul):
                before = before[:1]
            elif isinstance(node.leaf, ops.Resize):  # between two positions, on the grid of what it follows
                height, width = (side + before[0].stride for side in before[0].size)
                before = [Field(before[1].stride, (height, width))]
            sizes = [max(field.size[axis] for field in before) for axis in (0, 1)]
            found[node.name] = before[0].through(node.leaf, (sizes[0], sizes[1]))
        return found


class GraphError(FlyweightError):
    """The network does something outside a leaf module, so nothing exact can be said of it."""


@dataclass(frozen=True)
class _Symbol:
    """What flows through a network while it is traced: a node's name and shape, which only leaf modules understand."""

    name: str
    shape: Shape

    def __getattr__(self, attribute: str) -> Any:
        raise _outside(f"the tensor's {attribute}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _outside(f"torch's {func.__name__}")


def _outside(operation: str) -> GraphError:
    return GraphError(f"a forward uses {operation} outside a leaf module; put it into one in ops.py")


def _refuse(operation: str) -> Callable[..., Any]:
    def refused(*_: object) -> Any:
        raise _outside(operation)

    return refused


for _operation in ("add", "sub", "mul", "truediv", "matmul", "pow", "neg", "getitem"):
    setattr(_Symbol, f"__{_operation}__", _refuse(_operation))
    setattr(_Symbol, f"__r{_operation}__", _refuse(_operation))


def trace(net: nn.Module, input_shape: Shape) -> Graph:
    """The graph of `net` for one picture of `input_shape` (C, H, W): its forward runs once, on symbols for tensors.

    Raises GraphError where a forward computes outside a leaf module, a leaf's class has no rule in SHAPES, or the
    shapes do not fit together.
    """
    nodes: list[Node] = []
    calls: Counter[str] = Counter()

    def call(path: str, leaf: nn.Module, *inputs: _Symbol) -> _Symbol:
        shape = _output_shape(path, leaf, [each.shape for each in inputs])
        calls[path] += 1
        name = path if calls[path] == 1 else f"{path}:{calls[path]}"
        nodes.append(Node(name, path, leaf, tuple(each.name for each in inputs), shape))
        return _Symbol(name, shape)

    leaves = [(path, leaf) for path, leaf in net.named_modules() if next(leaf.children(), None) is None]
    for path, leaf in leaves:
        leaf.__dict__["forward"] = partial(call, path, leaf)
    try:
        results = net(_Symbol(INPUT, input_shape))
    finally:
        for _, leaf in leaves:
            del leaf.__dict__["forward"]
    outputs = results if isinstance(results, list | tuple) else [results]
    return Graph(input_shape, tuple(nodes), tuple(each.name for each in outputs))


def _output_shape(path: str, leaf: nn.Module, inputs: list[Shape]) -> Shape:
    rule = SHAPES.get(type(leaf))
    if rule is None:
        raise GraphError(f"{path} is a {type(leaf).__name__}, whose shape is not known; add its rule to graph.SHAPES")
    try:
        shape = rule(leaf, *inputs)
    except ValueError as error:
        shapes = ", ".join(str(shape) for shape in inputs)
        raise GraphError(f"{path} ({type(leaf).__name__}) cannot take an input of {shapes}: {error}") from error
    return shape


def _same(leaf: nn.Module, shape: Shape, *others: Shape) -> Shape:
    return shape


def _equal(leaf: nn.Module, shape: Shape, *others: Shape) -> Shape:
    if any(other != shape for other in others):
        raise ValueError("they differ")
    return shape


def _normed(leaf: nn.BatchNorm2d | nn.GroupNorm, shape: Shape) -> Shape:
    own = leaf.num_features if isinstance(leaf, nn.BatchNorm2d) else leaf.num_channels
    if shape[0] != own:
        raise ValueError(f"it is made for {own} channels")
    return shape


def _windows(leaf: ops.Window, shape: Shape) -> tuple[int, int]:
    """(W − K + 2P) / S + 1 for height and width, K the kernel with its gaps; rounded down, or up with `ceil_mode`."""
    kernel, stride, gap = ops.pair(leaf.kernel_size), ops.pair(leaf.stride), ops.dilation(leaf)
    top, bottom, left, right = ops.edges(leaf, shape[1], shape[2])
    up = not isinstance(leaf, nn.Conv2d) and leaf.ceil_mode
    sides: list[int] = []
    for size, k, s, d, (before, after) in zip(
        shape[1:], kernel, stride, gap, ((top, bottom), (left, right)), strict=True
    ):
        room = size + before + after - d * (k - 1) - 1
        side = (-(-room // s) if up else room // s) + 1
        # A window that rounding up adds must begin inside the picture or the padding before it.
        sides.append(side - 1 if up and (side - 1) * s >= size + before else side)
        if sides[-1] < 1:
            raise ValueError(f"the window of {d * (k - 1) + 1} is larger")
    return sides[0], sides[1]


def _convolved(leaf: nn.Conv2d, shape: Shape) -> Shape:
    if shape[0] != leaf.in_channels:
        raise ValueError(f"it is made for {leaf.in_channels} channels")
    return (leaf.out_channels, *_windows(leaf, shape))


def _pooled(leaf: nn.MaxPool2d | nn.AvgPool2d, shape: Shape) -> Shape:
    return (shape[0], *_windows(leaf, shape))


def _adapted(leaf: nn.AdaptiveAvgPool2d, shape: Shape) -> Shape:
    height, width = ops.pair(leaf.output_size)  # type: ignore[arg-type]
    return (shape[0], height, width)


def _linear(leaf: nn.Linear, shape: Shape) -> Shape:
    if shape[-1] != leaf.in_features:
        raise ValueError(f"it is made for {leaf.in_features} values")
    return (*shape[:-1], leaf.out_features)


def _concatenated(leaf: ops.Cat, *shapes: Shape) -> Shape:
    if len({shape[1:] for shape in shapes}) > 1:
        raise ValueError("their sizes differ")
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _resized(leaf: ops.Resize, shape: Shape, like: Shape) -> Shape:
    return (shape[0], *like[1:])


def _part(leaf: ops.Part, shape: Shape) -> Shape:
    size = -(-shape[0] // leaf.parts)
    return (min(size, shape[0] - leaf.index * size), *shape[1:])


def _padded(leaf: ops.PadChannels, shape: Shape) -> Shape:
    return (shape[0] + leaf.before + leaf.after, *shape[1:])


def _shuffled(leaf: ops.ChannelShuffle, shape: Shape) -> Shape:
    if shape[0] % leaf.groups:
        raise ValueError(f"{leaf.groups} groups do not divide its channels")
    return shape


# Leaf class → the shape of its output, without the batch.
SHAPES: dict[type[nn.Module], Callable[..., Shape]] = {
    nn.Conv2d: _convolved,
    ops.SameConv2d: _convolved,
    nn.Linear: _linear,
    nn.BatchNorm2d: _normed,
    nn.GroupNorm: _normed,
    nn.ReLU: _same,
    nn.ReLU6: _same,
    nn.Hardswish: _same,
    nn.SiLU: _same,
    nn.Sigmoid: _same,
    nn.Hardsigmoid: _same,
    nn.Identity: _same,
    nn.Dropout: _same,
    nn.Flatten: lambda leaf, shape: (math.prod(shape),),
    nn.MaxPool2d: _pooled,
    nn.AvgPool2d: _pooled,
    nn.AdaptiveAvgPool2d: _adapted,
    ops.SameMaxPool2d: _pooled,
    ops.SameAvgPool2d: _pooled,
    ops.Add: _equal,
    ops.Mul: _same,
    ops.Scale: _same,
    ops.Cat: _concatenated,
    ops.Resize: _resized,
    ops.Part: _part,
    ops.PadChannels: _padded,
    ops.ChannelShuffle: _shuffled,
    ops.GlobalAvgPool: lambda leaf, shape: (shape[0], 1, 1) if leaf.keep else (shape[0],),
    ops.GlobalMaxPool: lambda leaf, shape: (shape[0],),
}
