"""The training loop: one readable function over data, a recipe and a clock."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flyweight.data import Dataset, augment
from flyweight.errors import FlyweightError
from flyweight.net import Net
from flyweight.preprocess import Preprocess
from flyweight.train.checkpoint import load_checkpoint, restore, save_checkpoint
from flyweight.train.ema import Ema
from flyweight.train.platform import (
    faster_precision,
    interrupts_between_steps,
    keep_freed_memory,
    precision,
    set_threads,
)
from flyweight.train.recipe import SMALL, Recipe, rate

EMA_EVERY = 4
CHECK_EVERY = 20
SCORED_AT_ONCE = 250
REPORT_EVERY = 0.04  # of the training: scoring after each of many short epochs would cost more than it tells
CHECKPOINT_SECONDS = 15.0


class Diverged(FlyweightError):
    """The loss is no longer a number."""


@dataclass
class Clock:
    """How much of the training is done: by time (`seconds`) or, exactly repeatable, by `epochs`."""

    seconds: float | None = None
    epochs: float | None = None
    spent: float = 0.0
    _since: float = field(default=0.0, repr=False)

    def start(self) -> None:
        """Time runs from here; what was spent before counts."""
        self._since = time.perf_counter() - self.spent

    def progress(self, epochs: float) -> float:
        """In [0, 1] and beyond, after `epochs` of the data."""
        self.spent = time.perf_counter() - self._since
        if self.epochs is not None:
            return epochs / self.epochs
        assert self.seconds is not None
        return self.spent / self.seconds


@dataclass(frozen=True)
class Trained:
    """What came of a training: `accuracy` of the averaged weights on the validation pictures."""

    epochs: float
    steps: int
    seconds: float
    accuracy: float
    loss: float


@dataclass
class Training:
    """One training: network, data, recipe, clock. `emit` takes the figures of an epoch, `progress` the share done;
    `checkpoint` is where to keep state."""

    net: nn.Module
    data: Dataset
    validation: Dataset
    preprocess: Preprocess
    recipe: Recipe
    clock: Clock
    seed: int = 0
    emit: Callable[[dict[str, Any]], None] = lambda record: None
    progress: Callable[[float], None] = lambda share: None
    checkpoint: Path | None = None
    mode: str | None = None

    def pixels(self, indices: np.ndarray) -> Tensor:
        """Training pictures, uint8 [n, H, W, C]."""
        return torch.from_numpy(self.data.batch(self.preprocess.size[0], indices))


def normalise(images: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 [N, H, W, C] → float32 [N, C, H, W] in channels-last memory, (pixel − mean) / std."""
    mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
    return ((images.float() - mean) / std).permute(0, 3, 1, 2)


def augmented(images: Tensor, preprocess: Preprocess, recipe: Recipe, rng: torch.Generator) -> Tensor:
    """A training batch: uint8 [N, H, W, C] varied by the recipe, → float32 [N, C, H, W] in channels-last memory."""
    if max(preprocess.size) <= SMALL:
        x = normalise(augment.shift_and_flip(images, recipe.shift, recipe.flip, rng), preprocess)
    else:
        x = augment.zoom_and_turn(normalise(images, preprocess), recipe.zoom, recipe.flip, rng)
        x = augment.tone(x, recipe.tone, rng)
    if recipe.cutout:
        x = augment.cutout(x, recipe.cutout, rng)
    return x.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def logits(net: nn.Module, data: Dataset, preprocess: Preprocess, mirror: bool = False) -> Tensor:
    """float32 [N, classes] for all pictures (or their mirror images), in evaluation mode, without augmentation."""
    training = net.training
    net.eval()
    out = []
    for start in range(0, len(data), SCORED_AT_ONCE):
        indices = np.arange(start, min(start + SCORED_AT_ONCE, len(data)))
        x = normalise(torch.from_numpy(data.batch(preprocess.size[0], indices)), preprocess)
        out.append(net(x.flip(3) if mirror else x).float())
    net.train(training)
    return torch.cat(out)


def score(outputs: Tensor, labels: np.ndarray) -> tuple[float, float]:
    """(top-1 accuracy, mean cross-entropy) of logits [N, classes]."""
    truth = torch.from_numpy(labels)
    accuracy = (outputs.argmax(1) == truth).float().mean().item()
    return accuracy, F.cross_entropy(outputs, truth).item()


def _by_depth(net: nn.Module, recipe: Recipe) -> list[tuple[float, list[nn.Parameter]]]:
    """Parameters with the share of the learning rate that they get: all alike, or less the farther from the answer."""
    if not isinstance(net, Net) or recipe.features == recipe.depth == 1:
        return [(1.0, list(net.parameters()))]
    stages = list(net.features.children())
    shares = [recipe.features * recipe.depth ** (len(stages) - 1 - i) for i in range(len(stages))]
    heads = [*net.head.parameters(), *net.aux.parameters()]
    return [(1.0, heads), *((share, list(each.parameters())) for share, each in zip(shares, stages, strict=True))]


def _optimiser(net: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    groups: list[dict[str, Any]] = []
    for share, parameters in _by_depth(net, recipe):
        decayed, free = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
        groups.append({"params": decayed, "weight_decay": recipe.weight_decay, "share": share})
        groups.append({"params": free, "weight_decay": 0.0, "share": share})
    groups = [group for group in groups if group["params"]]
    return torch.optim.SGD(groups, lr=0.0, momentum=recipe.momentum, nesterov=True, fused=True)


class _State:
    """Everything that a checkpoint holds."""

    def __init__(self, job: Training) -> None:
        self.job = job
        self.optimiser = _optimiser(job.net, job.recipe)
        self.ema = Ema(job.net, job.recipe.ema)
        self.rng = torch.Generator().manual_seed(job.seed)
        self.order = np.random.default_rng(job.seed)
        self.epoch_order = self.order.bit_generator.state  # as it was before this epoch's permutation was drawn
        self.position = 0  # batches of this epoch that are done
        self.figures: tuple[float, float] | None = None  # accuracy and loss when last reported
        self.whole = True  # not in the middle of a step
        self.step = 0
        self.seen = 0
        self.saved = time.perf_counter()

    @property
    def epochs(self) -> float:
        return self.seen / len(self.job.data)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"net.{name}": t for name, t in self.job.net.state_dict(keep_vars=True).items()}
        tensors |= {f"ema.{name}": t for name, t in self.ema.average.items()}
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        for i, p in enumerate(parameters):
            momentum = self.optimiser.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            tensors[f"momentum.{i}"] = momentum
        return tensors

    def save(self) -> None:
        if self.job.checkpoint is None:
            return
        values = {
            "step": self.step,
            "seen": self.seen,
            "spent": self.job.clock.spent,
            "mode": self.job.mode,
            "order": self.epoch_order,
            "position": self.position,
        }
        save_checkpoint(self.job.checkpoint, {**self._tensors(), "rng": self.rng.get_state()}, values)
        self.saved = time.perf_counter()

    def resume(self) -> None:
        """Takes up the checkpoint where there is one."""
        if self.job.checkpoint is None or not self.job.checkpoint.exists():
            return
        stored, values = load_checkpoint(self.job.checkpoint)
        self.rng.set_state(stored.pop("rng"))
        restore(self._tensors(), stored)
        self.step, self.seen, self.job.mode = values["step"], values["seen"], values["mode"]
        self.job.clock.spent = values["spent"]
        self.order.bit_generator.state, self.position = values["order"], values["position"]

    def batches(self) -> Iterator[np.ndarray]:
        """Random batches without end; each epoch is a fresh permutation, its incomplete last batch dropped."""
        n, size = len(self.job.data), min(self.job.recipe.batch_size, len(self.job.data))
        while True:
            self.epoch_order = self.order.bit_generator.state
            order = self.order.permutation(n)
            while self.position < n // size:
                yield order[self.position * size : (self.position + 1) * size]
            self.position = 0


def train(job: Training) -> Trained:
    """Trains until the clock has run out and leaves the averaged weights in the network, in evaluation mode.

    Takes up `job.checkpoint` where it exists; writes it again every few seconds and when interrupted. Raises Diverged
    when the loss is not finite.
    """
    keep_freed_memory()
    set_threads()
    net = job.net.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    state = _State(job)
    state.resume()
    job.mode = job.mode or _fastest_mode(job)
    job.clock.start()
    losses: list[Tensor] = []
    epoch, reported = int(state.epochs), 0.0
    try:
        with precision(net, job.mode), interrupts_between_steps() as check:
            for indices in state.batches():
                progress = job.clock.progress(state.epochs)
                if progress >= 1:
                    break
                job.progress(progress)
                losses.append(_step(job, state, indices, progress))
                check()
                if state.step % CHECK_EVERY == 0 and not torch.isfinite(losses[-1]):
                    raise Diverged(
                        f"the loss became {losses[-1].item()} after {state.step} steps; lower the learning rate"
                    )
                if state.epochs >= epoch + 1 and progress >= reported + REPORT_EVERY:
                    epoch, reported = int(state.epochs), progress
                    state.figures = _report(job, state, progress, losses)
                    losses = []
                if time.perf_counter() - state.saved > CHECKPOINT_SECONDS:
                    state.save()
    except KeyboardInterrupt:
        if state.whole:
            state.save()
        raise
    return _finish(job, state, losses)


def _step(job: Training, state: _State, indices: np.ndarray, progress: float) -> Tensor:
    """One step of gradient descent; returns the loss."""
    state.whole = False
    for group in state.optimiser.param_groups:
        waits = group["share"] < 1 and progress < job.recipe.head_first
        group["lr"] = 0.0 if waits else rate(job.recipe, progress) * group["share"]
    x = augmented(job.pixels(indices), job.preprocess, job.recipe, state.rng)
    loss = _loss(job, x, torch.from_numpy(job.data.labels[indices]))
    loss.backward()
    state.optimiser.step()
    state.optimiser.zero_grad()
    state.step += 1
    state.seen += len(indices)
    if state.step % EMA_EVERY == 0:
        state.ema.update(state.step, EMA_EVERY)
    state.position += 1
    state.whole = True
    return loss.detach()


def _loss(job: Training, x: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy of the answers, plus that of auxiliary heads where the network has them, at their weight."""
    smoothing = job.recipe.label_smoothing
    if not isinstance(job.net, Net) or not job.net.aux:
        return F.cross_entropy(job.net(x).float(), truth, label_smoothing=smoothing)
    outputs, others = job.net.forward_aux(x)
    aux = torch.stack([F.cross_entropy(other.float(), truth, label_smoothing=smoothing) for other in others])
    return F.cross_entropy(outputs.float(), truth, label_smoothing=smoothing) + job.net.aux_weight * aux.sum()


def _fastest_mode(job: Training) -> str:
    """The faster precision for this network, by a few training steps whose effects are undone."""
    indices = np.arange(min(job.recipe.batch_size, len(job.data)))
    x = augmented(job.pixels(indices), job.preprocess, job.recipe, torch.Generator().manual_seed(0))
    kept = {name: buffer.clone() for name, buffer in job.net.named_buffers()}

    def step() -> None:
        _loss(job, x, torch.from_numpy(job.data.labels[indices])).backward()

    mode = faster_precision(job.net, step)
    job.net.zero_grad()
    for name, buffer in job.net.named_buffers():
        buffer.copy_(kept[name])
    return mode


def _report(job: Training, state: _State, progress: float, losses: Sequence[Tensor]) -> tuple[float, float]:
    """Scores the averaged weights on the validation pictures and emits the epoch's record."""
    with state.ema.applied():
        accuracy, loss = score(logits(job.net, job.validation, job.preprocess), job.validation.labels)
    if not math.isfinite(loss):
        raise Diverged(f"the validation loss became {loss} after {state.step} steps; lower the learning rate")
    train_loss = torch.stack(list(losses)).mean().item() if losses else None
    job.emit(
        {
            "epoch": round(state.epochs, 3),
            "seconds": round(job.clock.spent, 2),
            "lr": rate(job.recipe, progress),
            "train_loss": train_loss,
            "val_loss": loss,
            "val_top1": accuracy,
        }
    )
    return accuracy, loss


def _finish(job: Training, state: _State, losses: Sequence[Tensor]) -> Trained:
    """Leaves the averages in the network and scores them."""
    if state.figures is None or losses:  # else the last step was reported already
        state.figures = _report(job, state, 1.0, losses)
    accuracy, loss = state.figures
    with torch.no_grad():
        for name, live in state.ema.live.items():
            live.copy_(state.ema.average[name])
    job.net.eval()
    return Trained(state.epochs, state.step, job.clock.spent, accuracy, loss)
