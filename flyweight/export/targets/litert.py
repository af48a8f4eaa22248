"""LiteRT's (TensorFlow Lite's) `.tflite`, [N, H, W, C] throughout, written straight from the traced graph."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from flyweight import ops
from flyweight.export import tflite_int8
from flyweight.export.calibration import Range
from flyweight.export.task import Task
from flyweight.export.tflite import SAME, VALID, Grid, Op, Value, constant, fused, packed, whole
from flyweight.exported import Exported
from flyweight.graph import INPUT, Graph, GraphError, Node, Shape
from flyweight.preprocess import Preprocess

NAME = "litert"
ENGINE = "litert"
INT8 = True
QUICK = True
NEEDS = ("ai_edge_litert",)
EXTRA = "litert"

LOWEST = float(np.finfo(np.float32).min)


class Writer:
    """The operations of a network under construction."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.ops: list[Op] = []
        self.node = INPUT

    def add(self, code: str, *inputs: Value, shape: Shape | None = None, **options: Any) -> Value:
        """Appends an operation; its result, which has the first input's shape unless another is told."""
        output = Value(inputs[0].shape if shape is None else shape)
        self.ops.append(Op(code, [*inputs], output, options, self.node))
        return output

    def reshape(self, x: Value, *shape: int) -> Value:
        """`x` in another shape, whose first number grows with the batch."""
        return self.add("RESHAPE", x, whole(-1, *shape[1:]), shape=shape)

    def maker(self, value: Value) -> str:
        """The operation that computes a value."""
        return next((op.code for op in self.ops if op.output is value), "")


Rule = Callable[[Writer, Any, Node, list[Value]], Value]


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy().astype(np.float32)


def _out(node: Node) -> Shape:
    """Of the node's value: [1, H, W, C] or [1, C]."""
    return (1, *node.shape[1:], node.shape[0])


def _edges(leaf: ops.Window, node: Node, size: Shape) -> list[tuple[int, int]]:
    """(before, after) for height and width: the padding that windows meet, whatever rounding adds or leaves unread."""
    top, _, left, _ = ops.edges(leaf, *size)
    found: list[tuple[int, int]] = []
    for before, side, out, span, s in zip((top, left), size, node.shape[1:], *_spans(leaf), strict=True):
        found.append((before, max(0, (out - 1) * s + span - side - before)))
    return found


def _spans(leaf: ops.Window) -> tuple[list[int], tuple[int, int]]:
    """(height, width) of a window with its gaps, and of its steps."""
    kernel, gap = ops.pair(leaf.kernel_size), ops.dilation(leaf)
    return [(k - 1) * d + 1 for k, d in zip(kernel, gap, strict=True)], ops.pair(leaf.stride)


def _padding(leaf: ops.Window, node: Node, size: Shape) -> int | None:
    """SAME or VALID where one of them is the window's padding."""
    edges = _edges(leaf, node, size)
    if not any(map(any, edges)):
        return VALID
    top, _, left, _ = ops.same_padding(leaf, *size)
    whole_sides = tuple(-(-side // s) for side, s in zip(size, ops.pair(leaf.stride), strict=True))
    return SAME if ((top, left), whole_sides) == ((edges[0][0], edges[1][0]), node.shape[1:]) else None


def _pad(w: Writer, x: Value, edges: list[tuple[int, int]], value: float = 0.0) -> Value:
    """`x` with rows and columns around it."""
    table = constant(np.array([(0, 0), *edges, (0, 0)], np.int32))
    (top, bottom), (left, right) = edges
    shape = (1, x.shape[1] + top + bottom, x.shape[2] + left + right, x.shape[3])
    if value:
        return w.add("PADV2", x, table, constant(np.array(value, np.float32)), shape=shape)
    return w.add("PAD", x, table, shape=shape)


def _placed(w: Writer, leaf: ops.Window, node: Node, x: Value, value: float = 0.0) -> tuple[Value, dict[str, Any]]:
    """What a window slides over, padded with `value` where neither SAME nor VALID would do, and how it slides."""
    size = x.shape[1:3]
    padding = _padding(leaf, node, size)
    if padding is None:
        x, padding = _pad(w, x, _edges(leaf, node, size), value), VALID
    height, width = ops.pair(leaf.stride)
    return x, {"padding": padding, "strideH": height, "strideW": width}


def _conv(w: Writer, leaf: nn.Conv2d, node: Node, inputs: list[Value]) -> Value:
    x, options = _placed(w, leaf, node, inputs[0])
    height, width = ops.dilation(leaf)
    options |= {"dilationHFactor": height, "dilationWFactor": width, "shape": _out(node)}
    weight, bias = _array(leaf.weight), _bias(leaf)
    if leaf.groups == leaf.in_channels > 1:
        options["depthMultiplier"] = leaf.out_channels // leaf.groups
        kernel = constant(weight.transpose(1, 2, 3, 0))
        return w.add("DEPTHWISE_CONV_2D", x, kernel, bias, **options)
    return w.add("CONV_2D", x, constant(weight.transpose(0, 2, 3, 1)), bias, **options)


def _bias(leaf: nn.Conv2d | nn.Linear) -> Value:
    """Zeros where the leaf has none: some kernels insist."""
    return constant(np.zeros(len(leaf.weight), np.float32) if leaf.bias is None else _array(leaf.bias))


def _linear(w: Writer, leaf: nn.Linear, node: Node, inputs: list[Value]) -> Value:
    return w.add("FULLY_CONNECTED", *inputs, constant(_array(leaf.weight)), _bias(leaf), shape=_out(node))


def _norm(w: Writer, leaf: nn.BatchNorm2d, node: Node, inputs: list[Value]) -> Value:
    """A depthwise convolution by one weight for each channel."""
    assert leaf.running_mean is not None
    assert leaf.running_var is not None
    mean, variance = (_array(each).astype(np.float64) for each in (leaf.running_mean, leaf.running_var))
    scale = _array(leaf.weight) / np.sqrt(variance + leaf.eps)
    shift = _array(leaf.bias) - mean * scale
    tensors = (constant(each.astype(np.float32)) for each in (scale.reshape(1, 1, 1, -1), shift))
    return w.add("DEPTHWISE_CONV_2D", *inputs, *tensors, padding=VALID, strideH=1, strideW=1, depthMultiplier=1)


def _group_norm(w: Writer, leaf: nn.GroupNorm, node: Node, inputs: list[Value]) -> Value:
    """(x − μ) / √(σ² + ε) with the mean and variance of each group, then a weight and a bias for each channel."""
    _, height, width, c = _out(node)
    grouped = w.reshape(inputs[0], 1, height * width, leaf.num_groups, c // leaf.num_groups)
    flat, axes = (1, 1, leaf.num_groups, 1), whole(1, 3)
    centred = w.add("SUB", grouped, w.add("MEAN", grouped, axes, shape=flat, keepDims=True))
    variance = w.add("MEAN", w.add("MUL", centred, centred), axes, shape=flat, keepDims=True)
    scale = w.add("RSQRT", w.add("ADD", variance, constant(np.array(leaf.eps, np.float32))))
    normal = w.reshape(w.add("MUL", centred, scale), *_out(node))
    return w.add("ADD", w.add("MUL", normal, constant(_array(leaf.weight))), constant(_array(leaf.bias)))


def _silu(w: Writer, leaf: nn.Module, node: Node, inputs: list[Value]) -> Value:
    return w.add("MUL", inputs[0], w.add("LOGISTIC", inputs[0]))


def _hard_sigmoid(w: Writer, leaf: nn.Module, node: Node, inputs: list[Value]) -> Value:
    """min(max(x + 3, 0), 6) / 6."""
    shifted = w.add("ADD", inputs[0], constant(np.array(3, np.float32)))
    return w.add("MUL", w.add("RELU6", shifted), constant(np.array(1 / 6, np.float32)))


def _max_pool(w: Writer, leaf: nn.MaxPool2d, node: Node, inputs: list[Value]) -> Value:
    """Behind a ReLU nothing is below zero, so that padding with zeros, which is the faster, is as good."""
    if ops.dilation(leaf) != (1, 1):
        raise GraphError(f"{node.path} is a MaxPool2d with gaps (dilation), which TensorFlow Lite does not have")
    positive = w.maker(inputs[0]) in ("RELU", "RELU6")
    x, options = _placed(w, leaf, node, inputs[0], 0.0 if positive else LOWEST)
    height, width = ops.pair(leaf.kernel_size)
    return w.add("MAX_POOL_2D", x, shape=_out(node), filterHeight=height, filterWidth=width, **options)


def _avg_pool(w: Writer, leaf: nn.AvgPool2d, node: Node, inputs: list[Value]) -> Value:
    """TensorFlow Lite divides by the pixels that a window meets; where another number is due, the result is scaled."""
    size, (height, width), (rows, columns) = inputs[0].shape[1:3], ops.pair(leaf.kernel_size), ops.pair(leaf.stride)
    due = _counts(leaf, node, size, leaf.count_include_pad and not isinstance(leaf, ops.SameAvgPool2d))
    padding = _padding(leaf, node, size)
    options = {"filterHeight": height, "filterWidth": width, "strideH": rows, "strideW": columns}
    if padding is not None and (due == _counts(leaf, node, size, counted=False)).all():
        return w.add("AVERAGE_POOL_2D", *inputs, shape=_out(node), padding=padding, **options)
    x = _pad(w, inputs[0], _edges(leaf, node, size))
    pooled = w.add("AVERAGE_POOL_2D", x, shape=_out(node), padding=VALID, **options)
    scale = height * width / due
    return pooled if (scale == 1).all() else w.add("MUL", pooled, constant(scale.astype(np.float32)[None, :, :, None]))


def _counts(leaf: nn.AvgPool2d, node: Node, size: Shape, counted: bool) -> np.ndarray:
    """[height, width]: the pixels that each window meets, padding included where it is `counted`."""
    top, bottom, left, right = ops.edges(leaf, *size)
    sides: list[np.ndarray] = []
    windows = zip((top, left), (bottom, right), size, node.shape[1:], *_spans(leaf), strict=True)
    for before, after, side, out, span, s in windows:
        start = np.arange(out) * s - before
        first, last = (-before, side + after) if counted else (0, side)
        sides.append(np.minimum(start + span, last) - np.maximum(start, first))
    return np.outer(*sides)


def _averages(inputs: int, outputs: int) -> np.ndarray:
    """[1, outputs, inputs]: row i averages the inputs ⌊i · n / m⌋ … ⌈(i + 1) · n / m⌉, as adaptive pooling does."""
    table = np.zeros((1, outputs, inputs), np.float32)
    for i in range(outputs):
        start, end = i * inputs // outputs, -(-(i + 1) * inputs // outputs)
        table[0, i, start:end] = 1 / (end - start)
    return table


def _adaptive_pool(w: Writer, leaf: nn.AdaptiveAvgPool2d, node: Node, inputs: list[Value]) -> Value:
    """One pool where all windows are of one size, else two matrix products."""
    (_, height, width, c), (_, rows, columns, _) = inputs[0].shape, _out(node)
    if (height, width) == (rows, columns):
        return inputs[0]
    if height % rows == 0 == width % columns:
        sides = {"filterHeight": height // rows, "filterWidth": width // columns}
        steps = {"strideH": height // rows, "strideW": width // columns}
        return w.add("AVERAGE_POOL_2D", inputs[0], shape=_out(node), padding=VALID, **sides, **steps)
    flat = w.reshape(inputs[0], 1, height, width * c)
    down = w.add("BATCH_MATMUL", constant(_averages(height, rows)), flat, shape=(1, rows, width * c))
    flat = w.reshape(down, rows, width, c)
    across = w.add("BATCH_MATMUL", constant(_averages(width, columns)), flat, shape=(rows, columns, c))
    return w.reshape(across, *_out(node))


def _global_avg_pool(w: Writer, leaf: ops.GlobalAvgPool, node: Node, inputs: list[Value]) -> Value:
    return w.add("MEAN", *inputs, whole(1, 2), shape=_out(node), keepDims=leaf.keep)


def _global_max_pool(w: Writer, leaf: ops.GlobalMaxPool, node: Node, inputs: list[Value]) -> Value:
    return w.add("REDUCE_MAX", *inputs, whole(1, 2), shape=_out(node), keepDims=False)


def _flatten(w: Writer, leaf: nn.Flatten, node: Node, inputs: list[Value]) -> Value:
    """In torch's order: channels first."""
    x = inputs[0]
    if math.prod(x.shape[1:3]) > 1:
        _, height, width, c = x.shape
        x = w.add("TRANSPOSE", x, whole(0, 3, 1, 2), shape=(1, c, height, width))
    return w.reshape(x, *_out(node))


def _add(w: Writer, leaf: nn.Module, node: Node, inputs: list[Value]) -> Value:
    total = inputs[0]
    for value in inputs[1:]:
        total = w.add("ADD", total, value)
    return total


def _cat(w: Writer, leaf: nn.Module, node: Node, inputs: list[Value]) -> Value:
    return w.add("CONCATENATION", *inputs, shape=_out(node), axis=3)


def _part(w: Writer, leaf: ops.Part, node: Node, inputs: list[Value]) -> Value:
    """SLICE would do, but refuses to change its batch."""
    start = leaf.index * -(-inputs[0].shape[3] // leaf.parts)
    ends = whole(0, 0, 0, start), whole(0, 0, 0, start + node.shape[0]), whole(1, 1, 1, 1)
    others = 0b0111  # which axes are taken whole
    return w.add("STRIDED_SLICE", *inputs, *ends, shape=_out(node), beginMask=others, endMask=others)


def _pad_channels(w: Writer, leaf: ops.PadChannels, node: Node, inputs: list[Value]) -> Value:
    table = constant(np.array([(0, 0), (0, 0), (0, 0), (leaf.before, leaf.after)], np.int32))
    return w.add("PAD", *inputs, table, shape=_out(node))


def _shuffle(w: Writer, leaf: ops.ChannelShuffle, node: Node, inputs: list[Value]) -> Value:
    _, height, width, c = _out(node)
    table = w.reshape(inputs[0], height * width, leaf.groups, c // leaf.groups)
    swapped = w.add("TRANSPOSE", table, whole(0, 2, 1), shape=(height * width, c // leaf.groups, leaf.groups))
    return w.reshape(swapped, *_out(node))


def _resize(w: Writer, leaf: ops.Resize, node: Node, inputs: list[Value]) -> Value:
    return w.add("RESIZE_BILINEAR", inputs[0], whole(*node.shape[1:]), shape=_out(node), halfPixelCenters=True)


def _scale(w: Writer, leaf: ops.Scale, node: Node, inputs: list[Value]) -> Value:
    return w.add("MUL", *inputs, constant(np.array(leaf.factor, np.float32)))


def _same(w: Writer, leaf: nn.Module, node: Node, inputs: list[Value]) -> Value:
    return inputs[0]


def _op(code: str) -> Rule:
    """A leaf that is one operation, its result of the first input's shape."""
    return lambda w, leaf, node, inputs: w.add(code, *inputs)


RULES: dict[type[nn.Module], Rule] = {
    nn.Conv2d: _conv,
    ops.SameConv2d: _conv,
    nn.Linear: _linear,
    nn.BatchNorm2d: _norm,
    nn.GroupNorm: _group_norm,
    nn.ReLU: _op("RELU"),
    nn.ReLU6: _op("RELU6"),
    nn.Hardswish: _op("HARD_SWISH"),
    nn.SiLU: _silu,
    nn.Sigmoid: _op("LOGISTIC"),
    nn.Hardsigmoid: _hard_sigmoid,
    nn.Identity: _same,
    nn.Dropout: _same,
    nn.Flatten: _flatten,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.AdaptiveAvgPool2d: _adaptive_pool,
    ops.SameMaxPool2d: _max_pool,
    ops.SameAvgPool2d: _avg_pool,
    ops.Add: _add,
    ops.Mul: _op("MUL"),
    ops.Scale: _scale,
    ops.Cat: _cat,
    ops.Resize: _resize,
    ops.Part: _part,
    ops.PadChannels: _pad_channels,
    ops.ChannelShuffle: _shuffle,
    ops.GlobalAvgPool: _global_avg_pool,
    ops.GlobalMaxPool: _global_max_pool,
}


def _write_leaf(w: Writer, node: Node, inputs: list[Value]) -> Value:
    rule = RULES.get(type(node.leaf))
    if rule is None:
        kind = type(node.leaf).__name__
        raise GraphError(f"{node.path} is a {kind}, which has no LiteRT rule; add one to export.targets.litert.RULES")
    w.node = node.name
    return rule(w, node.leaf, node, inputs)


def _shared(preprocess: Preprocess) -> bool:
    """Whether one whole-numbered mean and one deviation hold for all channels."""
    return len(set(preprocess.mean)) == len(set(preprocess.std)) == 1 and preprocess.mean[0].is_integer()


def _image(preprocess: Preprocess) -> Value:
    """The pixels, uint8 [N, H, W, C]; one whole-numbered mean and one deviation for all channels are their grid."""
    mean, std = preprocess.mean[0], preprocess.std[0]
    grid = Grid(np.array(1 / std), int(mean)) if _shared(preprocess) else Grid(np.array(1.0))
    return Value((1, *preprocess.size, preprocess.channels), np.dtype(np.uint8), grid=grid)


def _normalise(w: Writer, image: Value, preprocess: Preprocess) -> Value:
    """uint8 [N, H, W, C] → (pixel − mean) / std; by whole rows, since to repeat three numbers over and over is slow."""
    x = w.add("DEQUANTIZE", image)
    if _shared(preprocess):
        return x
    _, height, width, c = image.shape
    mean, scale = (np.tile(each, width).astype(np.float32) for each in (preprocess.mean, 1 / np.array(preprocess.std)))
    rows = w.add("SUB", w.reshape(x, height, width * c), constant(mean))
    return w.reshape(w.add("MUL", rows, constant(scale)), *image.shape)


def _ranges(task: Task, values: Mapping[str, Value]) -> dict[Value, Range]:
    """What the values of all nodes are expected to lie in; the picture's follows from the normalisation."""
    mean, std = np.array(task.preprocess.mean), np.array(task.preprocess.std)
    picture = float((-mean / std).min()), float(((255 - mean) / std).max())
    return {value: picture if name == INPUT else task.range(name) for name, value in values.items()}


def export(task: Task) -> Exported:
    """See `targets`."""
    w, image = Writer(task.graph), _image(task.preprocess)
    values = {INPUT: _normalise(w, image, task.preprocess)}
    for node in task.graph.nodes:
        values[node.name] = _write_leaf(w, node, [values[name] for name in node.inputs])
    logits = values[task.graph.outputs[0]]
    w.node = "probabilities"
    answer = w.add("SOFTMAX", logits, beta=1 / task.temperature)
    if len(logits.shape) == 4:
        _, height, width, c = logits.shape
        answer = w.add("TRANSPOSE", answer, whole(0, 3, 1, 2), shape=(1, c, height, width))
    done = fused(w.ops)
    if task.int8 is not None:
        names, how = task.onnx[1], task.int8
        kept = {node for node, name in names.items() if name in how.kept}
        done = tflite_int8.quantised(done, _ranges(task, values), how.scheme, kept)
    return task.exported(NAME, {".tflite": packed(done, {"image": image}, {"probabilities": answer})})
