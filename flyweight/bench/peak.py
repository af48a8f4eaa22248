"""What this machine can do at most: multiply-accumulates a second of a large matrix product, by precision."""

import statistics
import time
from itertools import pairwise

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from flyweight.bench.engines import Run, installed, openvino, openvino_bf16
from flyweight.bench.engines.onnxruntime import session
from flyweight.exported import FLOAT

SIDE, CHAINED, RUNS = 512, 8, 15
INT8, BFLOAT16 = "int8", openvino_bf16.PRECISION


def peaks(threads: int) -> dict[str, float]:
    """Multiply-accumulates a second on `threads` cores, by precision, of SIDE × SIDE matrices.

    Float32 and int8 in ONNX Runtime, and bfloat16 in OpenVINO where both are here. The median of some runs: a network
    cannot be expected to be faster, and how near it comes says what is left to gain.
    """
    chain, whole = _chain(), _whole()
    found = {
        FLOAT: CHAINED * _rate(_in_onnxruntime(chain, threads), np.float32),
        INT8: _rate(_in_onnxruntime(whole, threads), np.uint8),
    }
    if openvino_bf16.NAME in installed():
        found[BFLOAT16] = CHAINED * _rate(openvino.opened(chain, b"", threads, "bf16"), np.float32)
    return found


def _in_onnxruntime(model: bytes, threads: int) -> Run:
    own = session(model, threads)
    return lambda x: np.asarray(own.run(None, {"x": x})[0])


def _chain() -> bytes:
    """x · w · w … for a constant w: bfloat16 is converted at both ends, which one product alone would not outweigh."""
    names = ["x", *(f"y{i}" for i in range(1, CHAINED)), "y"]
    nodes = [helper.make_node("MatMul", [one, "w"], [next_one]) for one, next_one in pairwise(names)]
    return _model(nodes, TensorProto.FLOAT, TensorProto.FLOAT, np.float32)


def _whole() -> bytes:
    return _model([helper.make_node("MatMulInteger", ["x", "w"], ["y"])], TensorProto.UINT8, TensorProto.INT32, np.int8)


def _model(nodes: list[NodeProto], taken: int, given: int, dtype: type) -> bytes:
    x, y = (helper.make_tensor_value_info(name, kind, [SIDE, SIDE]) for name, kind in (("x", taken), ("y", given)))
    graph = helper.make_graph(nodes, "product", [x], [y], [numpy_helper.from_array(np.ones((SIDE, SIDE), dtype), "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def _rate(run: Run, dtype: type) -> float:
    x, times = np.ones((SIDE, SIDE), dtype), []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        run(x)
        times.append(time.perf_counter() - start)
    return SIDE**3 / statistics.median(times[1:])
