"""PyTorch, compiled by torch.compile."""

from functools import partial

from flyweight.bench.engines import pytorch

NAME = "pytorch-compiled"
TARGET = "pytorch"
OPENS, NEEDS, EXTRA = pytorch.OPENS, pytorch.NEEDS, pytorch.EXTRA
start = partial(pytorch.start, compiled=True)
