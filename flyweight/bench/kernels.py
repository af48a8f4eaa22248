"""A network as kernels: what an engine runs as one, such as a convolution with the activation that alone reads it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from flyweight import ops
from flyweight.graph import INPUT, Graph, GraphError, Node, Shape

Pair = tuple[int, int]
PICTURE = "picture"  # what surrounds a network: the call of the engine, the pixels' normalisation, the softmax
MOVED = 30  # multiply-accumulates that take about as long as reading or writing a value
CONVOLUTIONS = ("convolution", "depthwise convolution", "grouped convolution")
WEIGHTED = (*CONVOLUTIONS, "linear")
FUSING = (*WEIGHTED, "add")


@dataclass(frozen=True)
class Kernel:
    """`inputs` and `output` are shapes without the batch; windows are (height, width); `activation` a class's name."""

    kind: str
    inputs: tuple[Shape, ...]
    output: Shape
    window: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    ceil_mode: bool = False
    activation: str = ""

    def to_json(self) -> dict[str, Any]:
        """As in the table's file."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Kernel":
        """The inverse of `to_json`. Raises ValueError for a kind that is not known."""
        if value["kind"] not in MAKE:
            raise ValueError(f"no kind {value['kind']!r}")
        pairs = {name: tuple(value[name]) for name in ("window", "stride", "padding", "dilation")}
        inputs = tuple(tuple(shape) for shape in value["inputs"])
        return cls(**{**value, **pairs, "inputs": inputs, "output": tuple(value["output"])})

    @property
    def weights(self) -> int:
        """How many it holds, without a bias."""
        if self.kind not in WEIGHTED:
            return 0
        return math.prod(self.window) * self.inputs[0][0] // self.groups * self.output[0]

    @property
    def macs(self) -> int:
        """Multiply-accumulates; where there are no weights, the values that its windows read."""
        if self.kind not in WEIGHTED:
            return math.prod(self.window) * math.prod(self.output)
        return self.weights * math.prod(self.output[1:])

    @property
    def effort(self) -> int:
        """What kernels of all kinds are compared by before any is measured, in multiply-accumulates, roughly."""
        return self.macs + MOVED * sum(math.prod(shape) for shape in (*self.inputs, self.output))


def kernels(graph: Graph) -> list[Kernel]:
    """What an engine runs for a traced network, in its order; norms that alone read a convolution count as folded.

    Raises GraphError for a leaf class without a rule.
    """
    made = {INPUT: Kernel(PICTURE, (graph.input_shape,), graph.input_shape)}  # by the node that begins the kernel
    begins = {INPUT: INPUT}  # by every node of the kernel
    for node in graph.nodes:
        before = begins[node.inputs[0]]
        joined = _joined(node, made[before], len(graph.users[node.inputs[0]]) == 1)
        begins[node.name] = node.name if joined is None else before
        made[begins[node.name]] = joined or _kernel(graph, node)
    return list(made.values())


def _joined(node: Node, before: Kernel, alone: bool) -> Kernel | None:
    """The kernel before a node, where that computes the node as well; else None."""
    if isinstance(node.leaf, FREE):
        return before
    if not alone or before.activation:
        return None
    if isinstance(node.leaf, nn.BatchNorm2d) and before.kind in CONVOLUTIONS:
        return before
    name = type(node.leaf).__name__
    return replace(before, activation=name) if name in ACTIVATIONS and before.kind in FUSING else None


def _kernel(graph: Graph, node: Node) -> Kernel:
    rule = RULES.get(type(node.leaf))
    if rule is None:
        name = type(node.leaf).__name__
        raise GraphError(f"{node.path} is a {name}, which is no kernel yet; add its rule to bench.kernels.RULES")
    inputs = tuple(graph.shapes[name] for name in node.inputs)
    return Kernel(inputs=inputs, output=node.shape, **rule(node.leaf, inputs[0]))


Rule = Callable[[Any, Shape], dict[str, Any]]


def _kind(kind: str, groups: str | None = None) -> Rule:
    """A leaf whose shapes tell all but the attribute that holds its number of groups."""
    return lambda leaf, shape: {"kind": kind, "groups": getattr(leaf, groups) if groups else 1}


def _window(leaf: ops.Window, shape: Shape) -> dict[str, Any]:
    top, bottom, left, right = ops.edges(leaf, *shape[1:])
    padding = (-(-(top + bottom) // 2), -(-(left + right) // 2))
    window, stride = ops.pair(leaf.kernel_size), ops.pair(leaf.stride)
    return {"window": window, "stride": stride, "padding": padding, "dilation": ops.dilation(leaf)}


def _pool(kind: str) -> Rule:
    return lambda leaf, shape: {"kind": kind, "ceil_mode": leaf.ceil_mode, **_window(leaf, shape)}


def _convolution(leaf: nn.Conv2d, shape: Shape) -> dict[str, Any]:
    kind = CONVOLUTIONS[0 if leaf.groups == 1 else 1 if leaf.groups == leaf.in_channels else 2]
    return {"kind": kind, "groups": leaf.groups, **_window(leaf, shape)}


def _activation(leaf: nn.Module, shape: Shape) -> dict[str, Any]:
    return {"kind": "activation", "activation": type(leaf).__name__}


FREE = (nn.Identity, nn.Dropout, nn.Flatten)
ACTIVATIONS: dict[str, type[nn.Module]] = {
    each.__name__: each for each in (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.Sigmoid, nn.Hardsigmoid)
}
# Leaf class → the fields of its kernel that its shapes do not tell.
RULES: dict[type[nn.Module], Rule] = {
    nn.Conv2d: _convolution,
    ops.SameConv2d: _convolution,
    nn.Linear: _kind("linear"),
    nn.BatchNorm2d: _kind("batch norm"),
    nn.GroupNorm: _kind("group norm", groups="num_groups"),
    nn.MaxPool2d: _pool("max pool"),
    ops.SameMaxPool2d: _pool("max pool"),
    nn.AvgPool2d: _pool("average pool"),
    ops.SameAvgPool2d: _pool("average pool"),
    nn.AdaptiveAvgPool2d: _kind("adaptive pool"),
    ops.GlobalAvgPool: _kind("global average"),
    ops.GlobalMaxPool: _kind("global maximum"),
    ops.Add: _kind("add"),
    ops.Mul: _kind("multiply"),
    ops.Scale: _kind("scale"),
    ops.Cat: _kind("concat"),
    ops.Resize: _kind("resize"),
    ops.Part: _kind("part", groups="parts"),
    ops.PadChannels: _kind("pad"),
    ops.ChannelShuffle: _kind("shuffle", groups="groups"),
} | dict.fromkeys(ACTIVATIONS.values(), _activation)


def _make_convolution(k: Kernel) -> nn.Module:
    return nn.Conv2d(k.inputs[0][0], k.output[0], k.window, k.stride, k.padding, k.dilation, k.groups)


# Kind → a module that does the same work.
MAKE: dict[str, Callable[[Kernel], nn.Module]] = {
    PICTURE: lambda k: nn.Identity(),
    "activation": lambda k: nn.Identity(),
    **dict.fromkeys(CONVOLUTIONS, _make_convolution),
    "linear": lambda k: nn.Linear(k.inputs[0][0], k.output[0]),
    "batch norm": lambda k: nn.BatchNorm2d(k.output[0]),
    "group norm": lambda k: nn.GroupNorm(k.groups, k.output[0]),
    "max pool": lambda k: nn.MaxPool2d(k.window, k.stride, k.padding, k.dilation, ceil_mode=k.ceil_mode),
    "average pool": lambda k: nn.AvgPool2d(k.window, k.stride, k.padding, k.ceil_mode),
    "adaptive pool": lambda k: nn.AdaptiveAvgPool2d(k.output[1:]),
    "global average": lambda k: ops.GlobalAvgPool(keep=len(k.output) == 3),
    "global maximum": lambda k: ops.GlobalMaxPool(),
    "add": lambda k: ops.Add(),
    "multiply": lambda k: ops.Mul(),
    "scale": lambda k: ops.Scale(0.5),
    "concat": lambda k: ops.Cat(),
    "resize": lambda k: ops.Resize(),
    "part": lambda k: ops.Part(0, k.groups),
    "pad": lambda k: ops.PadChannels(0, k.output[0] - k.inputs[0][0]),
    "shuffle": lambda k: ops.ChannelShuffle(k.groups),
}


class Probe(nn.Module):
    """A picture → what a kernel reads, by 1x1 convolutions → the kernel, if it is to be there → one position of each.

    The difference that a kernel makes is what it costs. Taking one position is nearly free and leaves an engine its own
    layout of memory, which a mean or a softmax over the whole map would not.
    """

    def __init__(self, kernel: Kernel, whole: bool) -> None:
        super().__init__()
        channels, *size = picture_shape(kernel)
        self.stems = nn.ModuleList(_stem(shape, (channels, *size), kernel.kind == PICTURE) for shape in kernel.inputs)
        self.body = MAKE[kernel.kind](kernel) if whole else None
        self.activation = ACTIVATIONS[kernel.activation]() if kernel.activation else nn.Identity()
        self.heads = nn.ModuleList(_head(shape) for shape in ([kernel.output] if whole else kernel.inputs))
        self.join = ops.Cat() if len(self.heads) > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        values = [stem(x) for stem in self.stems]
        if self.body is not None:
            values = [self.activation(self.body(*values))]
        return self.join(*(head(value) for head, value in zip(self.heads, values, strict=True)))


def picture_shape(kernel: Kernel) -> Shape:
    """Of the picture that a probe of the kernel takes: the largest of its inputs, in colour."""
    if kernel.kind == PICTURE:
        return kernel.output
    sides = [shape[1:] or (1, 1) for shape in kernel.inputs]
    return (3, max(height for height, _ in sides), max(width for _, width in sides))


def _stem(shape: Shape, picture: Shape, bare: bool) -> nn.Module:
    """From a picture to a value of this shape, which is not negative."""
    if bare:
        return nn.Identity()
    size = shape[1:] or (1, 1)
    smaller = nn.Identity() if size == picture[1:] else nn.AdaptiveAvgPool2d(size)
    flat = nn.Identity() if len(shape) == 3 else nn.Flatten()
    return nn.Sequential(smaller, nn.Conv2d(picture[0], shape[0], 1), nn.ReLU(), flat)


def _head(shape: Shape) -> nn.Module:
    if len(shape) == 1:
        return nn.Identity()
    one = nn.Identity() if shape[1:] == (1, 1) else nn.MaxPool2d(1, shape[1:])
    return nn.Sequential(one, nn.Flatten())
