"""OpenVINO on the CPU, in float32 or int8 as the file has it."""

from collections.abc import Callable

import numpy as np

from flyweight.exported import Exported

NAME = "openvino"
TARGET = "openvino"
OPENS = {".onnx": (), ".xml": (".bin",)}
NEEDS = ("openvino",)
EXTRA = "openvino"


def start(exported: Exported, threads: int, precision: str = "f32") -> Callable[[np.ndarray], np.ndarray]:
    """See `engines`. `precision` is what float layers may be computed in."""
    return opened(exported.data, b"".join([*exported.files.values()][1:]), threads, precision)


def opened(model: bytes, weights: bytes, threads: int, precision: str) -> Callable[[np.ndarray], np.ndarray]:
    """A function of a model's only input, in IR (with its weights) or ONNX."""
    import openvino

    core = openvino.Core()
    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    request = core.compile_model(core.read_model(model, weights), "CPU", hints).create_infer_request()
    return lambda images: np.array(request.infer({0: images}, share_inputs=True, share_outputs=True)[0])
