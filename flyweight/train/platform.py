"""What the machine at hand needs to train fast: memory that is kept, and bfloat16 where it pays."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# glibc's mallopt parameters (malloc.h).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


@cache
def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory: else large activations cost a page fault per 4 KB, most of a step's time."""
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library, with an allocator of its own
    mallopt(M_MMAP_THRESHOLD, 1 << 30)
    mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    mallopt(M_TOP_PAD, 64 << 20)


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _dense(conv: nn.Conv2d, x: Tensor) -> Tensor:
    bias = None if conv.bias is None else conv.bias.bfloat16()
    return conv._conv_forward(x.bfloat16(), conv.weight.bfloat16(), bias)  # which knows its padding


def _float_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return conv._conv_forward(x.float(), conv.weight, conv.bias)


def _float_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x.float(), linear.weight, linear.bias)


@contextmanager
def precision(net: nn.Module, name: str) -> Iterator[None]:
    """Within it the network computes in `name`: "float32", or "bfloat16" in its ungrouped convolutions.

    Grouped convolutions, whose bfloat16 kernels on CPUs are many times slower, and the last layer stay in float32.
    """
    changed: list[nn.Module] = []
    if name == "bfloat16":
        for leaf in net.modules():
            if isinstance(leaf, nn.Conv2d):
                leaf.forward = MethodType(_dense if leaf.groups == 1 else _float_conv, leaf)
            elif isinstance(leaf, nn.Linear):
                leaf.forward = MethodType(_float_linear, leaf)
            else:
                continue
            changed.append(leaf)
    try:
        yield
    finally:
        for leaf in changed:
            del leaf.forward


@contextmanager
def interrupts_between_steps() -> Iterator[Callable[[], None]]:
    """Within it Ctrl-C and SIGTERM wait for the function it gives to be called, which then raises KeyboardInterrupt.

    So a checkpoint is never written from the middle of a step. A second Ctrl-C does not wait. Only the main thread
    receives signals; elsewhere nothing changes.
    """
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def faster_precision(net: nn.Module, step: Callable[[], None]) -> str:
    """The precision in which `step` (a training step of `net`) runs faster here, by a few interleaved runs of each."""
    seconds = dict.fromkeys(("float32", "bfloat16"), float("inf"))
    for _ in range(2):
        for name in seconds:
            with precision(net, name):
                start = time.perf_counter()
                step()
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return min(seconds, key=lambda name: seconds[name])


def set_threads() -> None:
    """All cores for one operation, none for running operations side by side."""
    torch.set_num_threads(cores())
