"""int8 pixels without a zero point, for runtimes that compute a convolution of them in float32 otherwise.

A convolution of (pixel − mean) is that of the pixels, less the mean times the sum of each filter, if what stands around
the picture is the mean as well: Σ w · (p − m) = Σ w · p − m · Σ w, exact in whole numbers.
"""

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

DEQUANTISE = "DequantizeLinear"


def without_zero_point(model: onnx.ModelProto) -> onnx.ModelProto:
    """An int8 model by `export.int8`, the mean of its pixels moved into the first layer's biases.

    They are dequantised before they are transposed, too. The same model where its pixels have no whole-numbered mean,
    or something else than int8 convolutions reads them.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = _Graph(made)
    (transpose,) = graph.reading("image")
    (pixels, *others) = graph.reading(transpose.output[0])
    layers = graph.reading(pixels.output[0])
    if others or pixels.op_type != DEQUANTISE or not all(_takes(graph, layer) for layer in layers):
        return model
    mean = graph.value(pixels.input[2]).reshape(())
    for number, layer in enumerate(layers):
        _move_mean(graph, layer, int(mean))
        _feed(graph, layer, pixels.input[1], mean, f"pixels{number}")
    for node in (transpose, pixels):
        graph.body.node.remove(node)
    return made


class _Graph:
    """A model's nodes and constants."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.body = model.graph
        self.constants = {each.name: each for each in self.body.initializer}
        self.makers = {node.output[0]: node for node in self.body.node}

    def reading(self, name: str) -> list[onnx.NodeProto]:
        return [node for node in self.body.node if name in node.input]

    def value(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self.constants[name])

    def stored(self, name: str) -> str:
        """The constant behind a value that may be dequantised."""
        return name if name in self.constants else self.makers[name].input[0]

    def replace(self, name: str, value: np.ndarray) -> None:
        self.constants[name].CopyFrom(numpy_helper.from_array(value, name))

    def constant(self, name: str, value: np.ndarray) -> str:
        self.body.initializer.append(numpy_helper.from_array(value, name))
        return name


def _takes(graph: _Graph, layer: onnx.NodeProto) -> bool:
    """Whether it is an int8 convolution with biases, of all channels at once."""
    if layer.op_type != "Conv" or len(layer.input) < 3 or _attribute(layer, "group", 1) != 1:
        return False
    return [graph.value(graph.stored(name)).dtype for name in layer.input[1:]] == [np.int8, np.int32]


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)


def _move_mean(graph: _Graph, layer: onnx.NodeProto, mean: int) -> None:
    """Biases count in units of what a pixel's level times a weight's is worth."""
    weights, biases = (graph.stored(name) for name in layer.input[1:])
    values = graph.value(biases)
    sums = graph.value(weights).reshape(len(values), -1).sum(1, dtype=np.int32)
    graph.replace(biases, values - np.int32(mean) * sums)


def _feed(graph: _Graph, layer: onnx.NodeProto, scale: str, mean: np.ndarray, name: str) -> None:
    """Gives a layer the pixels, with as much of the mean around them as it would have put zeros."""
    nodes, source = [], "image"
    top, left, bottom, right = _attribute(layer, "pads", (0, 0, 0, 0))
    if top or left or bottom or right:
        around = graph.constant(f"{name}_around", np.array([0, top, left, 0, 0, bottom, right, 0], np.int64))
        level = graph.constant(f"{name}_mean", mean)
        source = f"{name}_padded"
        nodes.append(helper.make_node("Pad", ["image", around, level], [source]))
        next(each for each in layer.attribute if each.name == "pads").ints[:] = [0, 0, 0, 0]
    zero = graph.constant(f"{name}_zero", np.zeros_like(mean))
    nodes.append(helper.make_node(DEQUANTISE, [source, scale, zero], [f"{name}_float"]))
    nodes.append(helper.make_node("Transpose", [f"{name}_float"], [name], perm=[0, 3, 1, 2]))
    layer.input[0] = name
    at = list(graph.body.node).index(layer)
    for node in reversed(nodes):
        graph.body.node.insert(at, node)
