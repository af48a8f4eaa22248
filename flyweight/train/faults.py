"""What goes wrong around a training: signals, too little memory, a machine that is busy with something else."""

import ctypes
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from flyweight.train.platform import M_MMAP_THRESHOLD, M_TOP_PAD

# A second signal within so many seconds is the same wish again: Ctrl-C reaches torchrun's workers from the terminal and
# from torchrun itself.
SAME_WISH = 3.0
# torch's own allocators; and oneDNN, which says no more than that where it finds no memory for itself.
NO_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "annot allocate memory",
    "out of memory",
    "could not create a primitive",
)
WATCHED_SECONDS = 2.0
# Cores' worth of other processes' work that disturbs a training which uses all cores.
DISTURBING = 0.3


class Signals:
    """Whether Ctrl-C or SIGTERM has come."""

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.since: float | None = None

    @property
    def came(self) -> bool:
        return self.since is not None

    def note(self, number: int, frame: object) -> None:
        """The handler: the first signal waits for the step's end, a second one does not."""
        now = time.monotonic()
        if self.since is not None and now - self.since >= self.patience:
            raise KeyboardInterrupt
        self.since = self.since or now


@contextmanager
def signals_between_steps(several: bool = False) -> Iterator[Signals]:
    """Within it Ctrl-C and SIGTERM are only noted, so that no checkpoint is written from the middle of a step.

    A second one does not wait: where there are `several` processes, only after SAME_WISH seconds. Only the main thread
    receives signals; elsewhere nothing changes.
    """
    signals = Signals(SAME_WISH if several else 0.0)
    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {number: signal.signal(number, signals.note) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be had: torch says so in exceptions of its own."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def give_back_memory() -> None:
    """Returns to the system what glibc keeps of freed memory, now and from now on: not every part of torch can use it.

    The opposite of `platform.keep_freed_memory`.
    """
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            glibc = ctypes.CDLL("libc.so.6")
            glibc.mallopt(M_MMAP_THRESHOLD, 128 << 10)
            glibc.mallopt(M_TOP_PAD, 128 << 10)
            glibc.malloc_trim(0)


class Watch:
    """Notices, once, that other processes keep the cores busy that a training uses."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.told = False
        self.since = self._now()

    def disturbance(self) -> str | None:
        """A sentence, the first time that others have been busy for WATCHED_SECONDS; needs Linux's /proc/stat."""
        if self.told or self.since is None or time.perf_counter() - self.since[0] < WATCHED_SECONDS:
            return None
        before, self.since = self.since, self._now()
        if self.since is None:
            return None
        seconds, own, all_busy = (now - then for now, then in zip(self.since, before, strict=True))
        others = max(0.0, (all_busy - own) / seconds)
        if others < DISTURBING or others + self.threads < len(self.cores) + DISTURBING:
            return None
        self.told = True
        return (
            f"the machine is busy with something else: other processes take {others:.1f} of the {len(self.cores)} "
            f"core(s) that this training has {self.threads} thread(s) on; threads that share a core wait for each "
            "other, so it may be several times slower"
        )

    def _now(self) -> tuple[float, float, float] | None:
        """The time, this process's seconds of work, and those of all processes on its cores."""
        try:
            text = Path("/proc/stat").read_text(encoding="ascii")
        except OSError:
            return None
        return time.perf_counter(), time.process_time(), busy_seconds(text, self.cores)


def busy_seconds(stat: str, cores: list[int]) -> float:
    """Seconds in which some cores were not idle, by the text of /proc/stat (proc_stat(5)); stolen ones count."""
    wanted = {f"cpu{core}" for core in cores}
    ticks = 0
    for line in stat.splitlines():
        name, *fields = line.split()
        if name in wanted:
            user, nice, system, _idle, _waiting, irq, softirq, *steal = (int(field) for field in fields[:8])
            ticks += user + nice + system + irq + softirq + sum(steal)
    return ticks / os.sysconf("SC_CLK_TCK")
