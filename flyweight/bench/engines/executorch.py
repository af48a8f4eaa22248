"""ExecuTorch with XNNPACK. Its number of threads belongs to the process: the last one that was asked for counts."""

from collections.abc import Callable

import numpy as np

from flyweight.exported import Exported

NAME = "executorch"
TARGET = "executorch"
OPENS = {".pte": ()}
NEEDS = ("executorch",)
EXTRA = "executorch"


def start(exported: Exported, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """See `engines`. The file takes one picture at a time."""
    import torch
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(threads)
    method = Runtime.get().load_program(exported.data).load_method("forward")
    assert method is not None

    def run(images: np.ndarray) -> np.ndarray:
        return np.concatenate([method.execute([torch.from_numpy(each[None])])[0].numpy() for each in images])

    return run
