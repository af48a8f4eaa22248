"""ncnn's `.param`, a line of text for each layer, and `.bin`, their weights: written straight from the traced graph.

Lines give parameters by the numbers of ncnn's operators.md. `image` takes planes of pixels from 0 to 255, as
ncnn::Mat::from_pixels gives them; `probabilities` are the answers. In int8, values are symmetric about zero as weights
are, whatever the scheme says of them: ncnn has nothing else.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from flyweight import ops
from flyweight.export.int8 import Scheme
from flyweight.export.task import Task
from flyweight.exported import Exported
from flyweight.graph import INPUT, GraphError, Node

NAME = "ncnn"
ENGINE = "ncnn"
INT8 = True
QUICK = True
NEEDS = ()
EXTRA = "ncnn"

MAGIC = 7767517
LEVELS = 127  # on each side of zero, of weights and of values
NOTHING = 1e-20  # where scales, or the product of two, would leave float32
FLOAT_TAG, INT8_TAG = 0, 0x000D4B38
INT8_TERM, ACTIVATION, ACTIVATION_VALUES = 8, 9, 10  # parameters of the layers with weights
IN_INT8, GIVES_INT8 = 2, 102  # what INT8_TERM can be, besides absent
WEIGHTED = ("Convolution", "ConvolutionDepthWise", "InnerProduct")
SIXTH = (1 / 6, 0.5)  # of hard sigmoid and hard swish: x / 6 + 1/2, cut at 0 and 1
# What a layer with weights computes on its way: kind of the layer → its number as such a part.
ACTIVATIONS = {"ReLU": 1, "Clip": 3, "HardSwish": 6}

Value = int | float | tuple[int, ...] | tuple[float, ...]
Params = dict[int, Value]


@dataclass(frozen=True)
class Layer:
    """A line of `.param` and its part of `.bin`; `scale` turns the input of a layer in int8 into whole numbers."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    params: Params = field(default_factory=dict)
    data: bytes = b""
    scale: float | None = None

    @property
    def name(self) -> str:
        """That of the first output."""
        return self.outputs[0]

    def line(self) -> str:
        """Kind, name, how many inputs and outputs, their names, number=value."""
        values = [_written(number, value) for number, value in self.params.items()]
        counts = (str(len(self.inputs)), str(len(self.outputs)))
        return " ".join([self.kind, self.name, *counts, *self.inputs, *self.outputs, *values])


def _written(number: int, value: Value) -> str:
    if isinstance(value, tuple):
        return f"{-23300 - number}={len(value)},{','.join(map(_number, value))}"
    return f"{number}={_number(value)}"


def _number(value: float) -> str:
    """Whole numbers without a point, others with nine digits: ncnn reads 15 characters."""
    return str(value) if isinstance(value, int) else f"{value:.8e}"


class Writer:
    """Layers under construction, every one named by its number."""

    def __init__(self, task: Task) -> None:
        self.task, self.graph = task, task.graph
        self.layers: list[Layer] = []

    def add(
        self, kind: str, inputs: Sequence[str], params: Params, data: bytes = b"", scale: float | None = None
    ) -> str:
        """Appends a layer with one output and returns that output's name."""
        name = f"v{len(self.layers)}"
        self.layers.append(Layer(kind, tuple(inputs), (name,), params, data, scale))
        return name

    def slices(self, x: str, count: int) -> tuple[str, ...]:
        """Appends a layer that cuts a value into equal ranges of channels and returns their names."""
        names = tuple(f"v{len(self.layers)}_{i}" for i in range(count))
        self.layers.append(Layer("Slice", (x,), names, {0: (-233,) * count, 1: 0}))  # -233: an equal share
        return names

    def weighted(self, kind: str, node: Node, x: str, params: Params, part: slice = slice(None)) -> str:
        """Appends a layer with a part of the outputs of the leaf's weight and bias; in int8 each output has a scale."""
        weight, bias = _array(node.leaf.weight), b""
        if node.leaf.bias is not None:
            bias = _array(node.leaf.bias)[part].tobytes()
        scheme = self.scheme(node)
        if scheme is None:
            return self.add(kind, [x], params, _tagged(weight[part]) + bias)
        largest = np.abs(weight).reshape(len(weight), -1).max(axis=1)
        scales = _scales(largest if scheme.per_channel else np.full_like(largest, largest.max()))
        whole = np.round(weight * scales.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.int8)
        scale = float(_scales(np.abs(self.task.range(node.inputs[0])).max()))
        data = _tagged(whole[part]) + bias + scales[part].tobytes() + _bytes(scale)
        return self.add(kind, [x], {**params, INT8_TERM: IN_INT8}, data, scale)

    def scheme(self, node: Node) -> Scheme | None:
        """How a layer becomes int8, or None where it stays float32.

        Depthwise convolutions stay: ncnn's in int8 scale by an estimated reciprocal, are no faster and save few bytes.
        """
        how, leaf = self.task.int8, node.leaf
        depthwise = isinstance(leaf, nn.Conv2d) and 1 < leaf.groups == leaf.in_channels
        return None if how is None or depthwise or self.task.onnx[1][node.name] in how.kept else how.scheme


def _array(tensor: torch.Tensor | nn.Module | None) -> np.ndarray:
    assert isinstance(tensor, torch.Tensor)
    return np.ascontiguousarray(tensor.detach().cpu().numpy(), np.float32)


def _bytes(*values: float) -> bytes:
    return np.array(values, np.float32).tobytes()


def _tagged(weight: np.ndarray) -> bytes:
    """Of a layer's main weight: what numbers they are, then these, filled up to whole words."""
    data = weight.tobytes()
    tag = INT8_TAG if weight.dtype == np.int8 else FLOAT_TAG
    return np.uint32(tag).tobytes() + data + bytes(-len(data) % 4)


def _scales(largest: np.ndarray) -> np.ndarray:
    """127 / largest, 1 where all is as good as zero."""
    return (LEVELS / np.where(largest > NOTHING, largest, LEVELS)).astype(np.float32)


Rule = Callable[[Writer, Any, Node, list[str]], str]


def _conv(w: Writer, leaf: nn.Conv2d, node: Node, inputs: list[str]) -> str:
    (kh, kw), (sh, sw), (dh, dw) = ops.pair(leaf.kernel_size), ops.pair(leaf.stride), ops.dilation(leaf)
    top, bottom, left, right = ops.edges(leaf, *_size(w, node))
    n, groups = leaf.out_channels, leaf.groups
    params: Params = {0: n, 1: kw, 2: dw, 3: sw, 4: left, 5: int(leaf.bias is not None), 6: leaf.weight.numel()}
    params |= {11: kh, 12: dh, 13: sh, 14: top, 15: right, 16: bottom}
    if groups == 1:
        return w.weighted("Convolution", node, inputs[0], params)
    if w.scheme(node) is None:
        return w.weighted("ConvolutionDepthWise", node, inputs[0], {**params, 7: groups})
    # Groups become convolutions of their own: with 8 channels each, ncnn's int8 gives wrong answers on x86.
    params |= {0: n // groups, 6: leaf.weight.numel() // groups}
    parts = [slice(i, i + n // groups) for i in range(0, n, n // groups)]
    cut = zip(w.slices(inputs[0], groups), parts, strict=True)
    return w.add("Concat", [w.weighted("Convolution", node, x, params, part) for x, part in cut], {0: 0})


def _size(w: Writer, node: Node) -> tuple[int, int]:
    """Height and width of the leaf's first input."""
    _, height, width = w.graph.shapes[node.inputs[0]]
    return height, width


def _linear(w: Writer, leaf: nn.Linear, node: Node, inputs: list[str]) -> str:
    params: Params = {0: leaf.out_features, 1: int(leaf.bias is not None), 2: leaf.weight.numel()}
    return w.weighted("InnerProduct", node, inputs[0], params)


def _norm(w: Writer, leaf: nn.BatchNorm2d, node: Node, inputs: list[str]) -> str:
    tensors = (leaf.weight, leaf.running_mean, leaf.running_var, leaf.bias)
    data = b"".join(_array(each).tobytes() for each in tensors)
    return w.add("BatchNorm", inputs, {0: leaf.num_features, 1: leaf.eps}, data)


def _group_norm(w: Writer, leaf: nn.GroupNorm, node: Node, inputs: list[str]) -> str:
    data = _array(leaf.weight).tobytes() + _array(leaf.bias).tobytes()
    return w.add("GroupNorm", inputs, {0: leaf.num_groups, 1: leaf.num_channels, 2: leaf.eps}, data)


def _pool(w: Writer, leaf: nn.MaxPool2d | nn.AvgPool2d, node: Node, inputs: list[str]) -> str:
    """Padding as the output's size asks, whichever way that was rounded; an average counts what is in the picture."""
    (kh, kw), (sh, sw) = ops.pair(leaf.kernel_size), ops.pair(leaf.stride)
    if ops.dilation(leaf) != (1, 1):
        raise GraphError(f"{node.path} is a {type(leaf).__name__} with dilation, which ncnn does not have")
    height, width = _size(w, node)
    top, bottom, left, right = ops.edges(leaf, height, width)
    average = isinstance(leaf, nn.AvgPool2d)
    if average and leaf.count_include_pad and not isinstance(leaf, ops.SameAvgPool2d):
        inputs = [w.add("Padding", inputs, {0: top, 1: bottom, 2: left, 3: right})]
        height, width = height + top + bottom, width + left + right
        top = left = 0
    bottom = max((node.shape[1] - 1) * sh + kh - height - top, 0)
    right = max((node.shape[2] - 1) * sw + kw - width - left, 0)
    pads = {3: left, 5: 1, 13: top, 14: right, 15: bottom}  # 5: only these
    return w.add("Pooling", inputs, {0: int(average), 1: kw, 2: sw, 11: kh, 12: sh, **pads})


def _adaptive_pool(w: Writer, leaf: nn.AdaptiveAvgPool2d, node: Node, inputs: list[str]) -> str:
    if node.shape == w.graph.shapes[node.inputs[0]]:
        return inputs[0]
    return w.add("Pooling", inputs, {0: 1, 7: 1, 8: node.shape[2], 18: node.shape[1]})


def _global_avg_pool(w: Writer, leaf: ops.GlobalAvgPool, node: Node, inputs: list[str]) -> str:
    pooled = w.add("Pooling", inputs, {0: 1, 4: 1})
    return w.add("Reshape", [pooled], {0: 1, 1: 1, 2: node.shape[0]}) if leaf.keep else pooled


def _add(w: Writer, leaf: nn.Module, node: Node, inputs: list[str]) -> str:
    total = inputs[0]
    for name in inputs[1:]:
        total = w.add("BinaryOp", [total, name], {0: 0})
    return total


def _part(w: Writer, leaf: ops.Part, node: Node, inputs: list[str]) -> str:
    start = leaf.index * -(-w.graph.shapes[node.inputs[0]][0] // leaf.parts)
    return w.add("Crop", inputs, {9: (start,), 10: (start + node.shape[0],), 11: (0,)})


def _resize(w: Writer, leaf: ops.Resize, node: Node, inputs: list[str]) -> str:
    """Bilinear, but a side of one position is repeated first: ncnn would read beside it."""
    sides, goal = _size(w, node), node.shape[1:]
    if 1 in sides:
        height, width = (new if old == 1 else old for old, new in zip(sides, goal, strict=True))
        inputs = [w.add("Interp", inputs, {0: 1, 3: height, 4: width})]
    return w.add("Interp", inputs, {0: 2, 3: goal[0], 4: goal[1]})


def _times(w: Writer, x: str, factor: float) -> str:
    return w.add("BinaryOp", [x], {0: 2, 1: 1, 2: float(factor)})


def _same(w: Writer, leaf: nn.Module, node: Node, inputs: list[str]) -> str:
    return inputs[0]


def _op(kind: str, *values: Value) -> Rule:
    """A leaf that is one layer of ncnn, of which the first parameters are given."""
    return lambda w, leaf, node, inputs: w.add(kind, inputs, dict(enumerate(values)))


RULES: dict[type[nn.Module], Rule] = {
    nn.Conv2d: _conv,
    ops.SameConv2d: _conv,
    nn.Linear: _linear,
    nn.BatchNorm2d: _norm,
    nn.GroupNorm: _group_norm,
    nn.ReLU: _op("ReLU"),
    nn.ReLU6: _op("Clip", 0.0, 6.0),
    nn.Hardswish: _op("HardSwish", *SIXTH),
    nn.SiLU: _op("Swish"),
    nn.Sigmoid: _op("Sigmoid"),
    nn.Hardsigmoid: _op("HardSigmoid", *SIXTH),
    nn.Identity: _same,
    nn.Dropout: _same,
    nn.Flatten: _op("Flatten"),
    nn.MaxPool2d: _pool,
    nn.AvgPool2d: _pool,
    nn.AdaptiveAvgPool2d: _adaptive_pool,
    ops.SameMaxPool2d: _pool,
    ops.SameAvgPool2d: _pool,
    ops.Add: _add,
    ops.Mul: _op("BinaryOp", 2),
    ops.Scale: lambda w, leaf, node, inputs: _times(w, inputs[0], leaf.factor),
    ops.Cat: _op("Concat", 0),
    ops.Resize: _resize,
    ops.Part: _part,
    ops.PadChannels: lambda w, leaf, node, inputs: w.add("Padding", inputs, {7: leaf.before, 8: leaf.after}),
    ops.ChannelShuffle: lambda w, leaf, node, inputs: w.add("ShuffleChannel", inputs, {0: leaf.groups}),
    ops.GlobalAvgPool: _global_avg_pool,
    ops.GlobalMaxPool: lambda w, leaf, node, inputs: w.add("Pooling", inputs, {0: 0, 4: 1}),
}


def export(task: Task) -> Exported:
    """See `targets`."""
    layers = _split(_in_int8_throughout(_fused(_layers(task))))
    blobs = sum(len(layer.outputs) for layer in layers)
    text = "\n".join([str(MAGIC), f"{len(layers)} {blobs}", *(layer.line() for layer in layers), ""])
    return task.exported(NAME, {".param": text.encode(), ".bin": b"".join(layer.data for layer in layers)})


def _layers(task: Task) -> list[Layer]:
    """A layer or a few for each leaf: (pixel − mean) / std before them, softmax(logits / temperature) behind."""
    w, preprocess = Writer(task), task.preprocess
    (height, width), mean, std = preprocess.size, np.array(preprocess.mean), np.array(preprocess.std)
    w.layers.append(Layer("Input", (), ("image",), {0: width, 1: height, 2: preprocess.channels}))
    shift = _bytes(*(1 / std), *(-mean / std))
    names = {INPUT: w.add("Scale", ["image"], {0: preprocess.channels, 1: 1}, shift)}
    for node in w.graph.nodes:
        rule = RULES.get(type(node.leaf))
        if rule is None:
            raise GraphError(
                f"{node.path} is a {type(node.leaf).__name__}, which has no ncnn rule; "
                "add one to export.targets.ncnn.RULES"
            )
        names[node.name] = rule(w, node.leaf, node, [names[name] for name in node.read])
    logits = _times(w, names[w.graph.outputs[0]], 1 / task.temperature)
    w.layers.append(Layer("Softmax", (logits,), ("probabilities",), {0: 0, 1: 1}))  # 1: axis 0 is that of channels
    return w.layers


def _readers(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Name of a value → the layers that read it, one that reads it twice as two."""
    found: dict[str, list[Layer]] = {name: [] for layer in layers for name in layer.outputs}
    for layer in layers:
        for name in layer.inputs:
            found[name].append(layer)
    return found


def _fused(layers: Sequence[Layer]) -> list[Layer]:
    """An activation that alone reads a layer with weights becomes part of it."""
    readers, found = _readers(layers), dict[str, Layer]()
    for layer in layers:
        before = found.get(layer.inputs[0]) if layer.kind in ACTIVATIONS else None
        if (
            before is None
            or before.kind not in WEIGHTED
            or ACTIVATION in before.params
            or len(readers[before.name]) > 1
        ):
            found[layer.name] = layer
            continue
        values = {ACTIVATION_VALUES: tuple(layer.params.values())} if layer.params else {}
        params = {**before.params, ACTIVATION: ACTIVATIONS[layer.kind], **values}
        del found[before.name]
        found[layer.name] = replace(before, outputs=layer.outputs, params=params)
    return list(found.values())


def _in_int8_throughout(layers: Sequence[Layer]) -> list[Layer]:
    """A convolution in int8 that only such convolutions read gives int8, on their scale, rather than float32."""
    readers, found = _readers(layers), list[Layer]()
    for layer in layers:
        scales = {each.scale if each.kind == "Convolution" else None for each in readers[layer.name]}
        scale = scales.pop() if len(scales) == 1 else None
        if layer.kind == "Convolution" and layer.scale is not None and scale is not None:
            layer = replace(layer, params={**layer.params, INT8_TERM: GIVES_INT8}, data=layer.data + _bytes(scale))
        found.append(layer)
    return found


def _split(layers: Sequence[Layer]) -> list[Layer]:
    """What is read more than once goes through a Split, since a value of ncnn has one reader."""
    count, taken = {name: len(each) for name, each in _readers(layers).items()}, Counter[str]()

    def own(name: str) -> str:
        taken[name] += 1
        return name if count[name] == 1 else f"{name}_{taken[name]}"

    found: list[Layer] = []
    for layer in layers:
        found.append(replace(layer, inputs=tuple(map(own, layer.inputs))))
        if count[layer.name] > 1:
            copies = tuple(f"{layer.name}_{i + 1}" for i in range(count[layer.name]))
            found.append(Layer("Split", layer.outputs, copies))
    return found
