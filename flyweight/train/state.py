"""Everything that a training knows between two steps, which is what a checkpoint holds."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from flyweight.errors import FlyweightError
from flyweight.train.checkpoint import load_latest, restore, save_checkpoint
from flyweight.train.device import device_of
from flyweight.train.distributed import Group
from flyweight.train.ema import Ema
from flyweight.train.inputs import epoch_order
from flyweight.train.optimisers import make
from flyweight.train.task import Training

LEAST_AT_ONCE = 2  # pictures: batch normalisation needs two


@dataclass
class Counters:
    """The numbers of a training; each stands in its checkpoints."""

    step: int = 0
    seen: int = 0
    """Pictures."""
    position: int = 0
    """Batches of this epoch that are done."""
    epoch: int = 0
    """Whole epochs when last scored."""
    reported: float = 0.0
    """Share of the training when last scored."""
    unreported: int = 0
    """Steps since."""
    accuracy: float | None = None
    loss: float = 0.0
    best: float | None = None
    best_loss: float = 0.0
    stale: int = 0
    """Scorings since the best."""
    micro: int = 0
    """Pictures that go through the network at once; 0: all of a batch."""
    side: int = 0
    """Of the pictures seen last, in pixels."""


class State:
    """Weights, averages, optimiser, generators, the order of the pictures, counters and the best weights so far."""

    def __init__(self, job: Training, group: Group | None = None) -> None:
        self.job = job
        self.group = group or Group()
        self.optimiser = make(job.net, job.recipe)
        self.ema = Ema(job.net, job.recipe.ema)
        self.rng = torch.Generator().manual_seed(job.seed + self.group.rank)
        self.order = np.random.default_rng(job.seed)
        self.epoch_order = self.order.bit_generator.state  # as it was before this epoch's order was drawn
        self.at = Counters(micro=job.micro or 0)
        self.losses = torch.zeros((), device=device_of(job.net))  # summed since last scored
        self.best: dict[str, Tensor] = {}
        self.whole = True  # not in the middle of a step
        self.saved = time.perf_counter()

    @property
    def epochs(self) -> float:
        """How often the data was seen."""
        return self.at.seen / len(self.job.data)

    @property
    def stopped(self) -> bool:
        """Whether the recipe's patience is at an end."""
        return 0 < self.job.recipe.patience <= self.at.stale

    def batches(self) -> Iterator[np.ndarray]:
        """Random batches without end, of all processes together; an epoch's incomplete last batch is dropped."""
        n, size = len(self.job.data), min(self.job.recipe.batch_size, len(self.job.data))
        while True:
            self.epoch_order = self.order.bit_generator.state
            order = epoch_order(self.job.data.labels, self.job.recipe.balanced, self.order)
            while self.at.position < n // size:
                yield order[self.at.position * size : (self.at.position + 1) * size]
            self.at.position = 0

    def halve(self, pictures: int) -> None:
        """Lets half as many pictures as before through the network at once. Raises FlyweightError at the least."""
        before = min(self.at.micro or pictures, pictures)
        if before <= LEAST_AT_ONCE or self.job.sync_batchnorm:
            at_once = "so many" if self.job.sync_batchnorm else "even two"
            raise FlyweightError(
                f"there is not enough memory to train on {at_once} pictures at once: choose a smaller batch, network "
                "or resolution, or close other programs"
            )
        self.at.micro = -(-before // 2)
        self.job.note(
            f"there is not enough memory for {before} pictures at once: from step {self.at.step} on they go through "
            f"the network {self.at.micro} at a time, and each step still has the gradient of its whole batch"
        )

    def scored(self, accuracy: float, loss: float, progress: float) -> None:
        """Notes what a scoring found; where the recipe has patience, keeps the averages if they are the best so far."""
        at = self.at
        at.accuracy, at.loss, at.epoch, at.reported = accuracy, loss, int(self.epochs), progress
        at.unreported = 0
        self.losses.zero_()
        if not self.job.recipe.patience:
            return
        at.stale += 1
        if at.best is None or accuracy > at.best:
            at.best, at.best_loss, at.stale = accuracy, loss, 0
            with self.ema.applied():
                self.best = {name: t.detach().clone() for name, t in self._net().items()}

    def settle(self) -> tuple[float, float]:
        """Leaves the weights that are kept in the network; their accuracy and loss."""
        self.ema.settle()
        at = self.at
        if at.best is None:
            assert at.accuracy is not None
            return at.accuracy, at.loss
        restore(self._net(), self.best)
        return at.best, at.best_loss

    def save(self) -> None:
        """Writes the checkpoint, by the one process that does; all take part."""
        generators = self.group.gather(self._generators())
        if self.job.checkpoint is None or not self.group.first:
            return
        tensors = {f"rng.{rank}.{name}": t for rank, own in enumerate(generators) for name, t in own.items()}
        tensors |= {"losses": self.losses} | self._weights()
        tensors |= {f"best.{name}": t for name, t in self.best.items()}
        scalars = {}
        for name, value in self._optimiser().items():
            (tensors if isinstance(value, Tensor) else scalars)[name] = value
        values = {
            "counters": asdict(self.at),
            "spent": self.job.clock.spent,
            "mode": self.job.mode,
            "order": self.epoch_order,
            "optimiser": scalars,
            "records": self.job.records.position() if self.job.records else None,
        }
        save_checkpoint(self.job.checkpoint, tensors, values)
        self.saved = time.perf_counter()

    def resume(self) -> bool:
        """Takes up the last whole checkpoint, and cuts the records back to it; whether there was one."""
        job, found = self.job, None
        words: list[str] = []  # said when the records have been cut back
        if self.group.first and job.checkpoint is not None:
            found = load_latest(job.checkpoint, words.append)
        found = self.group.from_first(found)
        if found is None:
            return False
        stored, values = found
        try:
            self._restore(stored, values)
        except (KeyError, TypeError) as error:
            raise FlyweightError(
                f"{job.checkpoint} is of another version of flyweight ({error}); delete it to start this training again"
            ) from error
        if job.records is not None and values["records"] is not None:
            job.records.cut(values["records"])
        for each in [*words, f"the training goes on from step {self.at.step}"]:
            job.note(each)
        return True

    def _restore(self, stored: dict[str, Tensor], values: Mapping[str, Any]) -> None:
        best = _below("best.", stored)
        live = self._weights()
        restore(live, {name: t for name, t in stored.items() if name.startswith(("net.", "ema."))})
        self.best = {name: t.to(live[f"net.{name}"].device) for name, t in best.items()}
        _restore_optimiser(self.optimiser, _below("optimiser.", {**stored, **values["optimiser"]}))
        self.losses.copy_(stored["losses"])
        self.at = Counters(**values["counters"])
        self.job.mode, self.job.clock.spent = values["mode"], values["spent"]
        self.order.bit_generator.state = values["order"]
        own = _below(f"rng.{self.group.rank}.", stored)
        if own:  # else a process that was not there before begins with a generator of its own
            self._set_generators(own)

    def _net(self) -> dict[str, Tensor]:
        return self.job.net.state_dict(keep_vars=True)

    def _weights(self) -> dict[str, Tensor]:
        averages = {f"ema.{name}": t for name, t in self.ema.average.items()}
        return {f"net.{name}": t for name, t in self._net().items()} | averages

    def _optimiser(self) -> dict[str, Any]:
        """What the optimiser keeps for each parameter, tensors and numbers, by `optimiser.<parameter>.<name>`."""
        kept = self.optimiser.state_dict()["state"]
        return {f"optimiser.{i}.{name}": value for i, own in kept.items() for name, value in own.items()}

    def _generators(self) -> dict[str, Tensor]:
        found = {"pictures": self.rng.get_state(), "torch": torch.get_rng_state()}
        if self.losses.is_cuda:
            found["cuda"] = torch.cuda.get_rng_state(self.losses.device)
        return found

    def _set_generators(self, stored: Mapping[str, Tensor]) -> None:
        self.rng.set_state(stored["pictures"])
        torch.set_rng_state(stored["torch"])
        if self.losses.is_cuda and "cuda" in stored:
            torch.cuda.set_rng_state(stored["cuda"], self.losses.device)


def _below(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _restore_optimiser(optimiser: Optimizer, stored: Mapping[str, Any]) -> None:
    """Gives an optimiser of any kind what it kept; what a step sets anew, such as learning rates, is left alone."""
    state: dict[int, dict[str, Any]] = {}
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    for name, value in stored.items():
        index, _, key = name.partition(".")
        if isinstance(value, Tensor) and value.shape == parameters[int(index)].shape:
            # In the memory layout of its parameter: fused optimisers walk both side by side.
            value = torch.empty_like(parameters[int(index)]).copy_(value)
        state.setdefault(int(index), {})[key] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
