"""ONNX Runtime on the CPU."""

import json
from collections.abc import Callable

import numpy as np
import onnxruntime

from flyweight.errors import UsageError
from flyweight.exported import Exported, Stated
from flyweight.preprocess import Preprocess

NAME = "onnxruntime"
TARGET = "onnx"
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


def stated(model: bytes) -> Stated:
    """How pictures are made ready for a model, and its classes, by its metadata. Raises UsageError without any."""
    return stated_by(session(model, 1))


def stated_by(opened: onnxruntime.InferenceSession) -> Stated:
    """The same of an open one."""
    metadata = opened.get_modelmeta().custom_metadata_map
    if "classes" not in metadata or "preprocess" not in metadata:
        raise UsageError("it lacks the metadata 'classes' and 'preprocess', so it was not written by flyweight")
    return Preprocess.from_json(json.loads(metadata["preprocess"])), tuple(json.loads(metadata["classes"]))


def load(model: bytes, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function from uint8 [N, H, W, C] to probabilities [N, classes]."""
    run = session(model, threads).run
    return lambda images: np.asarray(run(None, {"image": images})[0])


def start(exported: Exported, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """See `engines`."""
    return load(exported.data, threads)
