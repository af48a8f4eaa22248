"""A network as one ONNX file: uint8 pictures in, calibrated probabilities out, normalisation inside.

Written straight from the traced graph, one rule per leaf class: the same walk that counts the cost, a few milliseconds
instead of the seconds of a general exporter (so latency can be measured before anything is trained), short names, and
an operation without a rule fails by name.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from flyweight import ops
from flyweight.fold import fold_batchnorm
from flyweight.graph import INPUT, Graph, GraphError, Node, Shape, trace
from flyweight.preprocess import Preprocess

SUFFIX = ".onnx"
OPSET = 17
IR_VERSION = 8
DEQUANTIZE = "DequantizeLinear"


class Writer:
    """Nodes and constants of a graph under construction; every value gets the shortest free name."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, op: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Appends an operation with one output and returns that output's name."""
        output = output or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def constant(self, value: np.ndarray | np.generic | torch.Tensor) -> str:
        """Stores a tensor in the file and returns its name."""
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name


Rule = Callable[[Writer, Any, Node, list[str]], str]


def _shape(w: Writer, node: Node) -> Shape:
    """Of the leaf's first input: (C, H, W)."""
    return w.graph.shapes[node.inputs[0]]


def _window(w: Writer, leaf: ops.Window, node: Node) -> dict[str, Any]:
    kernel, stride = ops.pair(leaf.kernel_size), ops.pair(leaf.stride)
    top, bottom, left, right = ops.edges(leaf, *_shape(w, node)[1:])
    return {"kernel_shape": kernel, "strides": stride, "pads": [top, left, bottom, right]}


def _conv(w: Writer, leaf: nn.Conv2d, node: Node, inputs: list[str]) -> str:
    tensors = [w.constant(t) for t in (leaf.weight, leaf.bias) if t is not None]
    window = _window(w, leaf, node)
    return w.add("Conv", *inputs, *tensors, group=leaf.groups, dilations=ops.dilation(leaf), **window)


def _max_pool(w: Writer, leaf: nn.MaxPool2d, node: Node, inputs: list[str]) -> str:
    window = _window(w, leaf, node)
    return w.add("MaxPool", *inputs, ceil_mode=int(leaf.ceil_mode), dilations=ops.dilation(leaf), **window)


def _linear(w: Writer, leaf: nn.Linear, node: Node, inputs: list[str]) -> str:
    tensors = [w.constant(t) for t in (leaf.weight, leaf.bias) if t is not None]
    return w.add("Gemm", *inputs, *tensors, transB=1)


def _norm(w: Writer, leaf: nn.BatchNorm2d, node: Node, inputs: list[str]) -> str:
    tensors = (leaf.weight, leaf.bias, leaf.running_mean, leaf.running_var)
    return w.add("BatchNormalization", *inputs, *(w.constant(t) for t in tensors if t is not None), epsilon=leaf.eps)


def _shuffle(w: Writer, leaf: ops.ChannelShuffle, node: Node, inputs: list[str]) -> str:
    c, h, width = node.shape
    table = w.constant(np.array([0, leaf.groups, c // leaf.groups, h, width], np.int64))
    swapped = w.add("Transpose", w.add("Reshape", *inputs, table), perm=[0, 2, 1, 3, 4])
    return w.add("Reshape", swapped, w.constant(np.array([0, c, h, width], np.int64)))


def _add(w: Writer, leaf: nn.Module, node: Node, inputs: list[str]) -> str:
    total = inputs[0]
    for name in inputs[1:]:
        total = w.add("Add", total, name)
    return total


def _relu6(w: Writer, leaf: nn.Module, node: Node, inputs: list[str]) -> str:
    return w.add("Clip", *inputs, w.constant(np.float32(0)), w.constant(np.float32(6)))


def _avg_pool(w: Writer, leaf: nn.AvgPool2d, node: Node, inputs: list[str]) -> str:
    counted = leaf.count_include_pad and not isinstance(leaf, ops.SameAvgPool2d)
    window = _window(w, leaf, node)
    return w.add("AveragePool", *inputs, count_include_pad=int(counted), ceil_mode=int(leaf.ceil_mode), **window)


def _averages(inputs: int, outputs: int) -> np.ndarray:
    """[outputs, inputs]: row i averages the inputs ⌊i · n / m⌋ … ⌈(i + 1) · n / m⌉, as adaptive pooling does."""
    table = np.zeros((outputs, inputs), np.float32)
    for i in range(outputs):
        start, end = i * inputs // outputs, -(-(i + 1) * inputs // outputs)
        table[i, start:end] = 1 / (end - start)
    return table


def _adaptive_pool(w: Writer, leaf: nn.AdaptiveAvgPool2d, node: Node, inputs: list[str]) -> str:
    """Two matrix products, since ONNX has no pool whose windows differ in size."""
    (_, height, width), (_, rows, columns) = _shape(w, node), node.shape
    if (height, width) == (rows, columns):
        return inputs[0]
    down = w.add("MatMul", w.constant(_averages(height, rows)), *inputs)
    return w.add("MatMul", down, w.constant(_averages(width, columns).T))


def _group_norm(w: Writer, leaf: nn.GroupNorm, node: Node, inputs: list[str]) -> str:
    """Each group as one instance, then a weight and a bias for each channel."""
    groups = leaf.num_groups
    table = w.add("Reshape", *inputs, w.constant(np.array([0, groups, -1], np.int64)))
    ones, zeros = w.constant(np.ones(groups, np.float32)), w.constant(np.zeros(groups, np.float32))
    normal = w.add("InstanceNormalization", table, ones, zeros, epsilon=leaf.eps)
    back = w.add("Reshape", normal, w.constant(np.array([0, *node.shape], np.int64)))
    weight, bias = (w.constant(t.reshape(-1, 1, 1)) for t in (leaf.weight, leaf.bias))
    return w.add("Add", w.add("Mul", back, weight), bias)


def _global_avg_pool(w: Writer, leaf: ops.GlobalAvgPool, node: Node, inputs: list[str]) -> str:
    pooled = w.add("GlobalAveragePool", *inputs)
    return pooled if leaf.keep else w.add("Flatten", pooled)


def _part(w: Writer, leaf: ops.Part, node: Node, inputs: list[str]) -> str:
    start = leaf.index * -(-_shape(w, node)[0] // leaf.parts)
    ends = (start, start + node.shape[0], 1)
    return w.add("Slice", *inputs, *(w.constant(np.array([value], np.int64)) for value in ends))


def _resize(w: Writer, leaf: ops.Resize, node: Node, inputs: list[str]) -> str:
    """Factors a hair above the ratios of the sizes, since ONNX rounds their products down."""
    ratios = [1, 1, *(new / old for new, old in zip(node.shape[1:], _shape(w, node)[1:], strict=True))]
    factors = np.nextafter(np.array(ratios, np.float32), np.array([1, 1, np.inf, np.inf], np.float32))
    return w.add(
        "Resize", inputs[0], "", w.constant(factors), mode="linear", coordinate_transformation_mode="half_pixel"
    )


def _pad_channels(w: Writer, leaf: ops.PadChannels, node: Node, inputs: list[str]) -> str:
    return w.add("Pad", *inputs, w.constant(np.array([0, leaf.before, 0, 0, 0, leaf.after, 0, 0], np.int64)))


def _same(w: Writer, leaf: nn.Module, node: Node, inputs: list[str]) -> str:
    return inputs[0]


def _op(name: str, **attributes: Any) -> Rule:
    """A leaf that is one operation of ONNX."""
    return lambda w, leaf, node, inputs: w.add(name, *inputs, **attributes)


RULES: dict[type[nn.Module], Rule] = {
    nn.Conv2d: _conv,
    ops.SameConv2d: _conv,
    nn.Linear: _linear,
    nn.BatchNorm2d: _norm,
    nn.GroupNorm: _group_norm,
    nn.ReLU: _op("Relu"),
    nn.ReLU6: _relu6,
    nn.Hardswish: _op("HardSwish"),
    nn.SiLU: lambda w, leaf, node, inputs: w.add("Mul", inputs[0], w.add("Sigmoid", inputs[0])),
    nn.Sigmoid: _op("Sigmoid"),
    nn.Hardsigmoid: _op("HardSigmoid", alpha=1 / 6, beta=0.5),
    nn.Identity: _same,
    nn.Dropout: _same,
    nn.Flatten: _op("Flatten"),
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.AdaptiveAvgPool2d: _adaptive_pool,
    ops.SameMaxPool2d: _max_pool,
    ops.SameAvgPool2d: _avg_pool,
    ops.Add: _add,
    ops.Mul: _op("Mul"),
    ops.Scale: lambda w, leaf, node, inputs: w.add("Mul", *inputs, w.constant(np.float32(leaf.factor))),
    ops.Cat: _op("Concat", axis=1),
    ops.Resize: _resize,
    ops.Part: _part,
    ops.PadChannels: _pad_channels,
    ops.ChannelShuffle: _shuffle,
    ops.GlobalAvgPool: _global_avg_pool,
    ops.GlobalMaxPool: lambda w, leaf, node, inputs: w.add("Flatten", w.add("GlobalMaxPool", *inputs)),
}


def _write_leaf(w: Writer, node: Node, inputs: list[str]) -> str:
    rule = RULES.get(type(node.leaf))
    if rule is None:
        raise GraphError(
            f"{node.path} is a {type(node.leaf).__name__}, which has no ONNX rule; add one to export.onnx.RULES"
        )
    return rule(w, node.leaf, node, inputs)


def _normalise(w: Writer, preprocess: Preprocess) -> str:
    """uint8 [N, H, W, C] → (pixel − mean) / std as [N, C, H, W].

    One whole-numbered mean and one deviation for all channels are just what DequantizeLinear computes: an int8 network
    then takes the pixels as they are, where a subtraction and a multiplication can cost more than the network itself.
    """
    x = w.add("Transpose", "image", perm=[0, 3, 1, 2])
    mean, std = preprocess.mean, preprocess.std
    if len(set(mean)) == len(set(std)) == 1 and mean[0].is_integer():
        return w.add(DEQUANTIZE, x, w.constant(np.float32(1 / std[0])), w.constant(np.uint8(mean[0])))
    x = w.add("Cast", x, to=TensorProto.FLOAT)
    shift, scale = (np.array(v, np.float32).reshape(1, -1, 1, 1) for v in (mean, [1 / s for s in std]))
    return w.add("Mul", w.add("Sub", x, w.constant(shift)), w.constant(scale))


def export(net: nn.Module, preprocess: Preprocess, classes: Sequence[str], temperature: float = 1.0) -> onnx.ModelProto:
    """The network (batch normalisation folded) as an ONNX model.

    Input `image` uint8 [N, H, W, C]; output `probabilities` float32 [N, classes] = softmax(logits / temperature),
    for a network that answers for each position [N, classes, H, W].
    Raises GraphError for a leaf class without a rule.
    """
    return export_named(net, preprocess, classes, temperature)[0]


def export_named(
    net: nn.Module, preprocess: Preprocess, classes: Sequence[str], temperature: float = 1.0
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """`export`, and what the value that each node of the traced network computes is called in the file."""
    height, width = preprocess.size
    shape = (preprocess.channels, height, width)
    graph = trace(fold_batchnorm(net, shape), shape)
    w = Writer(graph)
    names = {INPUT: _normalise(w, preprocess)}
    for node in graph.nodes:
        names[node.name] = _write_leaf(w, node, [names[name] for name in node.inputs])
    scaled = w.add("Mul", names[graph.outputs[0]], w.constant(np.float32(1 / temperature)))
    w.add("Softmax", scaled, output="probabilities", axis=1)
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", height, width, preprocess.channels])
    output = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", *graph.shapes[graph.outputs[0]]])
    body = helper.make_graph(w.nodes, "flyweight", [image], [output], w.constants)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    model.producer_name = "flyweight"
    metadata = {"classes": json.dumps(list(classes)), "preprocess": json.dumps(preprocess.to_json())}
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    return model, names
