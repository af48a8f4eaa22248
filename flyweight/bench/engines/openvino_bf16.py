"""OpenVINO on the CPU, float layers in bfloat16, on processors that have instructions for it."""

from functools import partial

from flyweight.bench.engines import openvino

NAME = "openvino-bf16"
TARGET = "openvino"
OPENS = {".xml": (".bin",)}
NEEDS, EXTRA = openvino.NEEDS, openvino.EXTRA
PRECISION = "bfloat16"
start = partial(openvino.start, precision="bf16")


def lack() -> str | None:
    """OpenVINO would compute in float32 without a word."""
    from openvino import Core

    capable = Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return None if "BF16" in capable else "this processor has no instructions for bfloat16"
