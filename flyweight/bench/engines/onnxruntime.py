"""ONNX Runtime on the CPU."""

from collections.abc import Callable

import numpy as np
import onnxruntime

from flyweight.exported import Exported

NAME = "onnxruntime"
OPENS = {".onnx": ()}
NEEDS = ("onnxruntime",)
EXTRA = "onnx"


def session(model: bytes, threads: int) -> onnxruntime.InferenceSession:
    """A session on `threads` cores. The model comes as bytes: a file's external data could reach outside its folder."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def load(model: bytes, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function from uint8 [N, H, W, C] to probabilities [N, classes]."""
    run = session(model, threads).run
    return lambda images: np.asarray(run(None, {"image": images})[0])


def start(exported: Exported, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """See `engines`."""
    return load(exported.data, threads)
