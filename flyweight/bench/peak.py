"""What this machine can do at most: multiply-accumulates a second of a large matrix product, float32 and int8."""

import statistics
import time

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from flyweight.bench.engines.onnxruntime import session
from flyweight.exported import FLOAT

SIDE, RUNS = 512, 15
INT8 = "int8"


def peaks(threads: int) -> dict[str, float]:
    """Multiply-accumulates a second on `threads` cores, by precision, of SIDE × SIDE matrices in ONNX Runtime.

    The median of some runs: a network cannot be expected to be faster, and how near it comes says what is left to gain.
    """
    return {FLOAT: _rate(_product(np.float32, "MatMul"), np.float32, threads), INT8: _rate(
        _product(np.int8, "MatMulInteger"), np.uint8, threads
    )}  # fmt: skip


def _product(dtype: type, op: str) -> bytes:
    """x · w for a constant w."""
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT) if dtype == np.float32 else (TensorProto.UINT8, TensorProto.INT32)
    x, y = (helper.make_tensor_value_info(name, kind, [SIDE, SIDE]) for name, kind in zip("xy", kinds, strict=True))
    weights = numpy_helper.from_array(np.ones((SIDE, SIDE), dtype), "w")
    graph = helper.make_graph([helper.make_node(op, ["x", "w"], ["y"])], "product", [x], [y], [weights])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def _rate(model: bytes, dtype: type, threads: int) -> float:
    run, x = session(model, threads).run, np.ones((SIDE, SIDE), dtype)
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        run(None, {"x": x})
        times.append(time.perf_counter() - start)
    return SIDE**3 / statistics.median(times[1:])
