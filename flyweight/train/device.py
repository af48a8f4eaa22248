"""Where a training runs: on the processor, or on a graphics card with mixed precision."""

from contextlib import AbstractContextManager, nullcontext
from itertools import chain

import torch
from torch import nn

from flyweight.errors import UsageError
from flyweight.train.distributed import local_rank


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" takes a graphics card where there is one. Raises UsageError where there is none."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(each for each, found in there.items() if found)
    if not there.get(name):
        known = ", ".join(each for each, found in there.items() if found)
        raise UsageError(f"there is no device {name!r} here: choose auto or {known}")
    if name == "cuda":  # each process of a machine its own card
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return torch.device(name)


def device_of(net: nn.Module) -> torch.device:
    """Where a network's tensors are."""
    first = next(chain(net.parameters(), net.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def mixed_precision(device: torch.device, plain: bool) -> AbstractContextManager[object]:
    """bfloat16 where a graphics card computes in it (float16 would need its losses scaled); else nothing changes."""
    if plain or device.type != "cuda" or not torch.cuda.is_bf16_supported():
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
