"""PyTorch as it is, eager and in its default layout: the network itself. What every other runtime is compared with."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flyweight.exported import Exported

NAME = "pytorch"
TARGET = "pytorch"
OPENS = {".safetensors": ()}
NEEDS = ("torch",)
EXTRA = ""


def start(exported: Exported, threads: int, compiled: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    """See `engines`. `compiled`: by torch.compile, which wants a C++ compiler and takes its time."""
    import torch

    from flyweight.train.inputs import normalise
    from flyweight.weights import load_net

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        net = load_net(exported.written(Path(folder)))
    forward = torch.compile(net) if compiled else net

    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        return forward(normalise(torch.from_numpy(images), exported.preprocess).contiguous()).softmax(1).numpy()

    return run
