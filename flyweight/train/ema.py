"""An exponential moving average of a network's weights and batch statistics."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Ema:
    """Averaged copies of all floating-point tensors; the average forgets over a `share` of the steps so far.

    With a share of 0 there is no average: the network's own weights stand for it.
    """

    def __init__(self, net: nn.Module, share: float) -> None:
        self.share = share
        tensors = net.state_dict(keep_vars=True) if share else {}
        self.live = {name: t for name, t in tensors.items() if t.dtype.is_floating_point}
        self.average = {name: t.detach().clone() for name, t in self.live.items()}

    @torch.no_grad()
    def update(self, step: int, every: int) -> None:
        """Moves the average towards the weights after `step` steps, of which it sees each `every`-th."""
        if self.live:
            weight = min(1.0, every / max(1.0, self.share * step))
            torch._foreach_lerp_(list(self.average.values()), list(self.live.values()), weight)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the network holds the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def settle(self) -> None:
        """Leaves the averages in the network."""
        for name, live in self.live.items():
            live.copy_(self.average[name])

    @torch.no_grad()
    def _swap(self) -> None:
        for name, live in self.live.items():
            kept = live.detach().clone()
            live.copy_(self.average[name])
            self.average[name].copy_(kept)
