"""Several processes that train one network: each takes its share of every batch, and all make the same step.

The gradients of all processes are added up in one all-reduce after the backward pass. Each process weighs its share by
its part of the batch, so the sum is the gradient of the whole batch, however uneven the shares are.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import MethodType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from flyweight.errors import FlyweightError

T = TypeVar("T")
# A process that says nothing for so long is taken for lost; decoding pictures for the first time may take minutes.
PATIENCE = timedelta(minutes=30)


class Lost(FlyweightError):
    """Another process of the training has ended or cannot be reached."""


@contextmanager
def _told() -> Iterator[None]:
    """Turns what the backends raise when a process is gone into one sentence."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # ValueError: a store that has been closed
        raise Lost("another process of this training has ended or cannot be reached, so this one ends too") from error


@dataclass(frozen=True)
class Group:
    """The processes of one training: this one is `rank` of `size`, and of `local` on this machine."""

    rank: int = 0
    size: int = 1
    local: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def share(self, indices: np.ndarray) -> np.ndarray:
        """This process's part of a batch, in the batch's order."""
        return np.array_split(indices, self.size)[self.rank]

    def agree(self, *values: float) -> list[float]:
        """The largest of each value over all processes."""
        if self.size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64)
        with _told():
            dist.all_reduce(shared, dist.ReduceOp.MAX)
        return shared.tolist()

    @torch.no_grad()
    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors by their sums over all processes, in one message for each type."""
        if self.size == 1:
            return
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            alike = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in alike])
            with _told():
                dist.all_reduce(flat)
            for target, part in zip(alike, flat.split([t.numel() for t in alike]), strict=True):
                target.copy_(part.view(target.shape))

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _told():
            dist.all_gather_object(found, value)
        return found

    def from_first(self, value: T) -> T:
        """The value of the process that writes."""
        if self.size == 1:
            return value
        found: list[Any] = [value if self.first else None]
        with _told():
            dist.broadcast_object_list(found)
        return found[0]


def current() -> Group:
    """The group that this process has joined, or a group of its own."""
    if not (dist.is_available() and dist.is_initialized()):
        return Group()
    return Group(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def local_rank() -> int:
    """This process's number among those on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def joined() -> Iterator[Group]:
    """Within it this process belongs to the group that torchrun started, if it did.

    Small objects and processors speak over gloo, graphics cards over nccl.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield current()
        return
    with _told():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield current()
    finally:
        dist.destroy_process_group()


def align(group: Group, net: nn.Module) -> None:
    """Gives all processes the first one's network."""
    for tensor in net.state_dict().values() if group.size > 1 else ():
        with _told():
            dist.broadcast(tensor, 0)


def combine(group: Group, net: nn.Module, loss: Tensor) -> None:
    """Adds up gradients and loss over all processes, and averages the batch statistics: all are then in one state."""
    if group.size == 1:
        return
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    statistics = [b for b in net.buffers() if b.dtype.is_floating_point]
    for each in statistics:
        each.div_(group.size)
    group.add([*gradients, *statistics, loss])


class _GlobalNorm(torch.autograd.Function):
    """Batch normalisation with the statistics of all processes' pictures: (x − mean) / √(variance + ε)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, scale: Tensor, total: float, group: Group) -> Tensor:
        normalised = (x - mean) * scale
        ctx.save_for_backward(normalised, scale)
        ctx.total, ctx.group = total, group
        return normalised

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """As for one process, with the two sums over positions taken over all processes."""
        normalised, scale = ctx.saved_tensors
        g = gradients[0]
        sums = torch.stack([g.sum((0, 2, 3)), (g * normalised).sum((0, 2, 3))])
        ctx.group.add([sums])
        plain, along = (sums / ctx.total)[:, None, :, None, None]
        return (g - plain - normalised * along) * scale, None, None, None, None


def _statistics(x: Tensor, group: Group) -> tuple[Tensor, Tensor, float]:
    """Mean and summed squared deviation [C] over all processes, and the number of positions they are taken over.

    Each process's own are combined as by Chan, Golub & LeVeque (1979), without the cancellation of E[x²] − E[x]².
    """
    own = torch.zeros(group.size, 2 * x.shape[1] + 1, dtype=x.dtype, device=x.device)
    mean = x.mean((0, 2, 3))
    squares = ((x - mean[None, :, None, None]) ** 2).sum((0, 2, 3))
    count = x.new_tensor([x.numel() / x.shape[1]])
    own[group.rank] = torch.cat([mean, squares, count])
    group.add([own])
    means, squared, counts = own[:, : x.shape[1]], own[:, x.shape[1] : -1], own[:, -1:]
    mean = (means * counts).sum(0) / counts.sum()
    return mean, (squared + counts * (means - mean) ** 2).sum(0), float(counts.sum())


def _global_batch_norm(norm: nn.BatchNorm2d, x: Tensor, group: Group) -> Tensor:
    """What the layer computes where the batch is all processes' pictures."""
    if not norm.training:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    with torch.no_grad():
        mean, squares, total = _statistics(x.detach(), group)
        if norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None:
            norm.num_batches_tracked += 1
            momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            norm.running_mean.lerp_(mean, momentum)
            norm.running_var.lerp_(squares / (total - 1), momentum)
        scale = torch.rsqrt(squares / total + norm.eps)
    shape = (1, -1, 1, 1)
    y = _GlobalNorm.apply(x, mean.view(shape), scale.view(shape), total, group)
    assert isinstance(y, Tensor)
    return y if norm.weight is None else y * norm.weight.view(shape) + norm.bias.view(shape)


@contextmanager
def synchronised(net: nn.Module, group: Group) -> Iterator[None]:
    """Within it the network's batch normalisation takes its statistics from the pictures of all processes.

    The layers themselves stay what they are; torch's own SyncBatchNorm refuses processors.
    """
    norms = [leaf for leaf in net.modules() if isinstance(leaf, nn.BatchNorm2d)]
    for norm in norms:
        norm.forward = MethodType(lambda self, x: _global_batch_norm(self, x, group), norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward
