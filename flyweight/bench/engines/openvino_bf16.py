"""OpenVINO on the CPU, float layers in bfloat16 where the processor has it (elsewhere it is the same as float32)."""

from functools import partial

from flyweight.bench.engines import openvino

NAME = "openvino-bf16"
TARGET = "openvino"
OPENS = {".xml": (".bin",)}
NEEDS, EXTRA = openvino.NEEDS, openvino.EXTRA
start = partial(openvino.start, precision="bf16")
