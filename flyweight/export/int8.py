"""Static int8: a float ONNX model with quantise–dequantise pairs, placed by ONNX Runtime (arXiv:1712.05877).

The ranges that it covers come from `calibration`, or from whoever has better ones.
"""

import itertools
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from onnxruntime.quantization import QDQQuantizer, QuantType
from onnxruntime.quantization.calibrate import TensorData

from flyweight.errors import UsageError
from flyweight.export.calibration import Range, limits

QUANTISE, DEQUANTISE = "QuantizeLinear", "DequantizeLinear"
LAYERS = ("Conv", "Gemm")
# What is computed in int8, or passes its scale on.
QUANTISED = [*LAYERS, "Add", "Concat", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "Reshape"]
QUANTISED += ["Transpose", "Flatten"]


@dataclass(frozen=True)
class Scheme:
    """How numbers become 8 bits: one weight scale per output channel or per tensor, activations unsigned or signed.

    Weights are symmetric about zero; activations have a zero point of their own, unless they are `symmetric` as well.
    Weights of 7 bits leave 16-bit sums of two products without overflow, which x86 processors without VNNI need.
    """

    per_channel: bool
    signed: bool
    symmetric: bool = False
    weight_bits: int = 8

    @property
    def name(self) -> str:
        """For records and reports, such as "int8 per-channel u8"."""
        activations = ("s8" if self.signed else "u8") + " symmetric" * self.symmetric
        weights = "" if self.weight_bits == 8 else f" w{self.weight_bits}"
        return f"int8 per-{'channel' if self.per_channel else 'tensor'} {activations}{weights}"

    @property
    def weight_levels(self) -> int:
        """How many values a weight can have on each side of zero, as ONNX Runtime's quantiser counts them."""
        return 127 if self.weight_bits == 8 else 64


# The same network runs several times faster or slower by this choice alone, depending on the processor, so all are
# measured; `schemes` are those of the processor at hand.
SCHEMES = tuple(Scheme(per_channel, signed) for per_channel in (True, False) for signed in (False, True))
# Symmetric activations give away half of their levels behind a ReLU, and are no faster here: some accelerators ask.
NAMED = {scheme.name: scheme for scheme in itertools.starmap(Scheme, itertools.product(*[(True, False)] * 3, (8, 7)))}


def schemes() -> tuple[Scheme, ...]:
    """SCHEMES, with weights of 7 bits where this processor's products of 8 bits overflow."""
    return tuple(replace(scheme, weight_bits=7) for scheme in SCHEMES) if overflows() else SCHEMES


@cache
def overflows() -> bool:
    """Whether ONNX Runtime, on this processor, adds the products of large 8-bit values wrongly.

    x86 without VNNI adds pairs of products in 16 bits, of which the largest is 2 · 255 · 127 > 2¹⁵.
    """
    taps = 8
    types = numpy_helper.from_array(np.full((1, taps), 127, np.int8).T, "w"), np.uint8(0), np.int8(0)
    ones = [numpy_helper.from_array(np.array(value), name) for value, name in zip(types[1:], "zt", strict=True)]
    product = onnx.helper.make_node("MatMulInteger", ["x", "w", "z", "t"], ["y"])
    ends = [
        onnx.helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, [1, taps]),
        onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT32, [1, 1]),
    ]
    graph = onnx.helper.make_graph([product], "sum", ends[:1], ends[1:], [types[0], *ones])
    opset = [onnx.helper.make_opsetid("", 17)]
    file = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    largest = np.full((1, taps), 255, np.uint8)
    return int(np.asarray(session.run(None, {"x": largest})[0]).item()) != taps * 255 * 127


def scheme_named(name: str) -> Scheme:
    """The scheme of a name. Raises UsageError."""
    if name not in NAMED:
        raise UsageError(f"there is no scheme {name!r}; there are {', '.join(NAMED)}")
    return NAMED[name]


def quantise(model: onnx.ModelProto, images: np.ndarray, scheme: Scheme) -> onnx.ModelProto:
    """The model in int8 (QDQ form), its ranges taken from `images`, uint8 [N, H, W, C], as they pass through it.

    The input stays uint8 and the output float32; names and metadata are kept.
    """
    return shortened(placed(model, limits(model, images), scheme))


def placed(
    model: onnx.ModelProto, ranges: Mapping[str, Range], scheme: Scheme, kept: Collection[str] = ()
) -> onnx.ModelProto:
    """The model in int8, with these ranges of its inner values; layers that compute a value in `kept` stay float32.

    Values have the names of the float model, what the quantiser adds has long ones: `shortened` is for shipping.
    """
    source = onnx.ModelProto()
    source.CopyFrom(model)
    for node in source.graph.node:
        node.name = node.output[0]
    ends = {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()}
    with _without_advice():
        quantiser = QDQQuantizer(
            source,
            scheme.per_channel,
            scheme.weight_bits < 8,  # which the quantiser calls a reduced range
            QuantType.QInt8,
            QuantType.QInt8 if scheme.signed else QuantType.QUInt8,
            ends,
            [],
            list(kept),
            QUANTISED,
            {"ActivationSymmetric": scheme.symmetric, "WeightSymmetric": True},
        )
        quantised: onnx.ModelProto = quantiser.quantize_model()
        quantiser.model.topological_sort()  # what was added stands at the end
    if not scheme.signed:
        _take_pixels_as_they_are(quantised)
    del quantised.metadata_props[:]
    quantised.metadata_props.extend(model.metadata_props)  # without the notes of the quantiser
    return quantised


@contextmanager
def _without_advice() -> Iterator[None]:
    """Within it warnings are silent: the quantiser advises a preprocessing that these graphs do not need."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger().setLevel(level)


def _take_pixels_as_they_are(model: onnx.ModelProto) -> None:
    """Drops the requantisation of pixels that a DequantizeLinear has already placed on a uint8 scale."""
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    first = users[users["image"][0].output[0]][0]  # what reads the transposed pixels
    if first.op_type != DEQUANTISE:
        return
    for quantise_again in [node for node in users[first.output[0]] if node.op_type == QUANTISE]:
        for back in users[quantise_again.output[0]]:
            for user in users[back.output[0]]:
                user.input[:] = [first.output[0] if name == back.output[0] else name for name in user.input]
            model.graph.node.remove(back)
        model.graph.node.remove(quantise_again)
    used = {name for node in model.graph.node for name in node.input}
    kept = [constant for constant in model.graph.initializer if constant.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def shortened(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, every inner value of it renamed to a short name: the quantiser's long ones cost tens of kilobytes."""
    keep = {value.name for value in (*model.graph.input, *model.graph.output)}
    names: dict[str, str] = {}

    def short(name: str) -> str:
        return name if not name or name in keep else names.setdefault(name, f"t{len(names)}")

    for constant in model.graph.initializer:
        constant.name = short(constant.name)
    for node in model.graph.node:
        node.name = ""
        node.input[:] = [short(name) for name in node.input]
        node.output[:] = [short(name) for name in node.output]
    del model.graph.value_info[:]
    return model


@dataclass(frozen=True)
class Grid:
    """The values that an 8-bit tensor can hold: scale · (q − zero_point) for whole q from `low` to `high`."""

    scale: float
    zero_point: int
    low: int
    high: int


def grids(model: onnx.ModelProto) -> dict[str, Grid]:
    """The grids of a `placed` model's activations, by the names of the float model's values."""
    constants = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    found: dict[str, Grid] = {}
    for node in model.graph.node:
        if node.op_type == QUANTISE:
            scale, zero_point = constants[node.input[1]], constants[node.input[2]]
            span = np.iinfo(zero_point.dtype)
            found[node.input[0]] = Grid(float(scale), int(zero_point), span.min, span.max)
    return found


def quantised_weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """What the weights of a `placed` model's layers are in int8, dequantised, by the names of the float model's."""
    constants = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    pairs = {node.output[0]: node for node in model.graph.node if node.op_type == DEQUANTISE}
    found: dict[str, np.ndarray] = {}
    for layer in model.graph.node:
        if layer.op_type in LAYERS and layer.input[1] in pairs:
            values, scale, _ = (constants[name] for name in pairs[layer.input[1]].input)
            whole = scale.reshape(-1, *[1] * (values.ndim - 1)) if scale.ndim else scale
            found[layer.input[1].removesuffix("_DequantizeLinear_Output")] = values.astype(np.float32) * whole
    return found
