"""ExecuTorch's `.pte`, its layers given to XNNPACK; int8 by its own quantiser, which looks at the pictures itself."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from flyweight.export.task import Task
from flyweight.exported import Exported
from flyweight.fold import fold_batchnorm
from flyweight.preprocess import Preprocess

NAME = "executorch"
ENGINE = "executorch"
INT8 = True
QUICK = False
NEEDS = ("executorch", "torchao")
EXTRA = "executorch"
OBSERVED = 64  # pictures: its observers take a third of a second for each


class Whole(nn.Module):
    """uint8 [1, H, W, C] → normalisation → the network → softmax(logits / temperature) [1, classes]."""

    def __init__(self, net: nn.Module, preprocess: Preprocess, temperature: float) -> None:
        super().__init__()
        self.net, self.temperature = net, temperature
        self.register_buffer("mean", torch.tensor(preprocess.mean).reshape(1, -1, 1, 1))
        self.register_buffer("scale", 1 / torch.tensor(preprocess.std).reshape(1, -1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        assert isinstance(self.mean, Tensor)
        assert isinstance(self.scale, Tensor)
        x = (image.permute(0, 3, 1, 2).float() - self.mean) * self.scale
        return torch.softmax(self.net(x) / self.temperature, dim=1)


def export(task: Task) -> Exported:
    """See `targets`."""
    with _silence():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

    # Training leaves weights in another order of memory, which the converter cannot take.
    net = fold_batchnorm(copy.deepcopy(task.net), task.shape).to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    whole = Whole(net, task.preprocess, task.temperature).eval()
    height, width = task.preprocess.size
    image = torch.zeros(1, height, width, task.preprocess.channels, dtype=torch.uint8)
    with _silence(), torch.no_grad():
        program = torch.export.export(whole, (image,))
        if task.int8 is not None:
            captured = program.module()
            assert isinstance(captured, GraphModule)
            graph = _quantised(captured, task.int8.pictures, task.int8.scheme.per_channel)
            program = torch.export.export(graph, (image,))
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        data = bytes(lowered.to_executorch().buffer)
    return task.exported(NAME, {".pte": data})


@contextmanager
def _silence() -> Iterator[None]:
    """Within it no warnings: the converter's parts give them to each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def _quantised(graph: GraphModule, pictures: np.ndarray, per_channel: bool) -> nn.Module:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=per_channel))
    observed = prepare_pt2e(graph, quantizer)
    for picture in torch.from_numpy(pictures[:OBSERVED]).split(1):
        observed(picture)
    return convert_pt2e(observed)
