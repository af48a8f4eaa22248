"""ncnn on the CPU, in float32 or int8 as the file has it. It has no batches: pictures are answered one by one."""

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flyweight.errors import FlyweightError
from flyweight.exported import Exported

NAME = "ncnn"
TARGET = "ncnn"
OPENS = {".param": (".bin",)}
NEEDS = ("ncnn",)
EXTRA = "ncnn"
HALVES = ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_packed", "use_bf16_storage")


def start(exported: Exported, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """See `engines`. Raises FlyweightError for files that ncnn does not take."""
    ncnn: Any = importlib.import_module("ncnn")  # a compiled module that does not tell its types
    net = ncnn.Net()
    net.opt.num_threads = threads
    for name in HALVES:
        setattr(net.opt, name, False)
    # The binding's loader from memory keeps pointers into a copy that it frees, so weights come from a file.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "model.bin"
        path.write_bytes(b"".join([*exported.files.values()][1:]))
        if net.load_param_mem(exported.data.decode()) or net.load_model(str(path)):
            raise FlyweightError(f"ncnn cannot load {exported.name}: export it again")
    height, width = exported.preprocess.size
    order = ncnn.Mat.PixelType.PIXEL_RGB if exported.preprocess.channels == 3 else ncnn.Mat.PixelType.PIXEL_GRAY

    def answer(image: np.ndarray) -> np.ndarray:
        extractor = net.create_extractor()
        extractor.input("image", ncnn.Mat.from_pixels(np.ascontiguousarray(image), order, width, height))
        failed, output = extractor.extract("probabilities")
        if failed:
            raise FlyweightError(f"ncnn cannot run {exported.name}: it ends with code {failed}")
        return np.array(output)

    return lambda images: np.stack([answer(image) for image in images])
