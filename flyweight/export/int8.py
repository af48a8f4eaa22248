"""Static int8: a float ONNX model with quantise–dequantise pairs, calibrated on training data (arXiv:1712.05877)."""

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnxruntime import quantization as ort
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType

BATCH = 32
DEQUANTIZE = "DequantizeLinear"


@dataclass(frozen=True)
class Scheme:
    """How numbers become 8 bits: one weight scale per output channel or per tensor, activations unsigned or signed."""

    per_channel: bool
    signed: bool

    @property
    def name(self) -> str:
        """For records and reports, such as "int8 per-channel u8"."""
        return f"int8 per-{'channel' if self.per_channel else 'tensor'} {'s8' if self.signed else 'u8'}"


# The same network runs several times faster or slower by this choice alone, depending on the CPU: all are measured.
SCHEMES = tuple(Scheme(per_channel, signed) for per_channel in (True, False) for signed in (False, True))


class _Pictures(CalibrationDataReader):
    def __init__(self, images: np.ndarray) -> None:
        batches = (images[i : i + BATCH] for i in range(0, len(images), BATCH))
        self.feeds: Iterator[dict[str, np.ndarray]] = ({"image": batch} for batch in batches)

    def get_next(self) -> dict[str, np.ndarray]:
        return next(self.feeds, {})


def quantise(model: onnx.ModelProto, images: np.ndarray, scheme: Scheme) -> onnx.ModelProto:
    """The model in int8 (QDQ form), its ranges taken from `images`, uint8 [N, H, W, C], as they pass through it.

    The input stays uint8 and the output float32; names and metadata are kept.
    """
    activation = QuantType.QInt8 if scheme.signed else QuantType.QUInt8
    with tempfile.TemporaryDirectory() as folder:
        source, path = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(model.SerializeToString())
        level = logging.getLogger().level
        logging.getLogger().setLevel(
            logging.ERROR
        )  # the quantiser advises a preprocessing that this graph does not need
        try:
            ort.quantize_static(
                source,
                path,
                _Pictures(images),
                quant_format=QuantFormat.QDQ,
                per_channel=scheme.per_channel,
                activation_type=activation,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                op_types_to_quantize=[
                    "Conv",
                    "Gemm",
                    "Add",
                    "Concat",
                    "Relu",
                    "Clip",
                    "MaxPool",
                    "AveragePool",
                    "GlobalAveragePool",
                    "Reshape",
                    "Transpose",
                    "Flatten",
                ],
                extra_options={"ActivationSymmetric": False, "WeightSymmetric": True},
            )
        finally:
            logging.getLogger().setLevel(level)
        quantised = onnx.load_model_from_string(path.read_bytes())
    if not scheme.signed:
        _take_pixels_as_they_are(quantised)
    _shorten(quantised)
    del quantised.metadata_props[:]
    quantised.metadata_props.extend(model.metadata_props)  # without the notes of the quantiser
    return quantised


def _take_pixels_as_they_are(model: onnx.ModelProto) -> None:
    """Drops the requantisation of pixels that the first DequantizeLinear has already placed on a uint8 scale."""
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    first = next((node for node in model.graph.node if node.op_type == DEQUANTIZE), None)
    if first is None or users["image"][0].output[0] != first.input[0]:
        return
    for quantise_again in [node for node in users[first.output[0]] if node.op_type == "QuantizeLinear"]:
        for back in users[quantise_again.output[0]]:
            for user in users[back.output[0]]:
                user.input[:] = [first.output[0] if name == back.output[0] else name for name in user.input]
            model.graph.node.remove(back)
        model.graph.node.remove(quantise_again)
    used = {name for node in model.graph.node for name in node.input}
    kept = [constant for constant in model.graph.initializer if constant.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _shorten(model: onnx.ModelProto) -> None:
    """Renames every inner value to a short name: the quantiser's long ones cost tens of kilobytes."""
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
