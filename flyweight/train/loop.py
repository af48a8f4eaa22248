"""The training loop: one readable function over data, a recipe and a clock."""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flyweight.data import Dataset
from flyweight.errors import UsageError
from flyweight.graph import GraphError, trace
from flyweight.preprocess import Preprocess
from flyweight.train.device import choose_device, device_of, mixed_precision
from flyweight.train.distributed import Group, align, combine, current, synchronised
from flyweight.train.faults import Signals, Watch, give_back_memory, is_out_of_memory, signals_between_steps
from flyweight.train.inputs import augmented, normalise, shrunk
from flyweight.train.losses import loss_of
from flyweight.train.platform import cores, faster_precision, keep_freed_memory, precision, set_threads
from flyweight.train.recipe import rate, side
from flyweight.train.state import State
from flyweight.train.statistics import reestimate
from flyweight.train.task import Clock, Diverged, Trained, Training

__all__ = ["Clock", "Diverged", "Trained", "Training", "logits", "normalise", "score", "train"]

EMA_EVERY = 4
CHECK_EVERY = 20
SCORED_AT_ONCE = 250
REPORT_EVERY = 0.04  # of the training: scoring after each of many short epochs would cost more than it tells


def train(job: Training) -> Trained:
    """Trains until the clock has run out and leaves the weights that are kept in the network, in evaluation mode.

    They are the averages, or where the recipe has patience the best of them. Takes up `job.checkpoint` where there is
    one; writes it at the start, every few seconds and when interrupted. Within `distributed.joined` each process takes
    its share of every batch. Raises Diverged when the loss is not finite.
    """
    group = current()
    with _place(job, group), _random_numbers(job.seed + group.rank):
        align(group, job.net)
        _leave_out_sizes(job)
        state = State(job, group)
        if not state.resume():
            job.mode = group.from_first(job.mode or _fastest_mode(job, state))
            torch.manual_seed(job.seed + group.rank)
            state.save()
        job.clock.start()
        with precision(job.net, job.mode or "float32"), _shared_statistics(job, group):
            _run(job, state)
            return _finish(job, state)


@contextmanager
def _place(job: Training, group: Group) -> Iterator[None]:
    """Within it the network is ready to train on the job's device; afterwards it is back on the processor."""
    if min(job.recipe.batch_size, len(job.data)) < group.size:
        raise UsageError(f"a batch of {job.recipe.batch_size} pictures cannot be shared by {group.size} processes")
    if not job.recipe.plain:
        keep_freed_memory()
    if job.threads is None and group.local == 1:
        set_threads()
    else:
        torch.set_num_threads(job.threads or max(1, cores() // group.local))
    layout = torch.contiguous_format if job.recipe.plain else torch.channels_last
    job.net.to(device=choose_device(job.device), memory_format=layout).train()  # type: ignore[call-overload]
    try:
        yield
    finally:
        job.net.to("cpu")


def _leave_out_sizes(job: Training) -> None:
    """Takes the stages of progressive resizing out of the recipe whose pictures are too small for the network."""
    kept = []
    for until, share in job.recipe.resize:
        shown = round(share * job.preprocess.size[0])
        try:
            trace(job.net, (job.preprocess.channels, shown, shown))
            kept.append((until, share))
        except GraphError:
            job.note(f"no pictures of {shown} pixels are shown on the way: the network takes none so small")
    job.recipe = replace(job.recipe, resize=tuple(kept))


@contextmanager
def _random_numbers(seed: int) -> Iterator[None]:
    """Within it torch draws by this seed, for dropout; the caller's generators stay as they are."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _shared_statistics(job: Training, group: Group) -> AbstractContextManager[None]:
    return synchronised(job.net, group) if job.sync_batchnorm and group.size > 1 else nullcontext()


def _run(job: Training, state: State) -> None:
    """Steps until the clock has run out, the recipe's patience is at an end, or a signal comes."""
    watch = Watch(torch.get_num_threads() * state.group.local)
    with signals_between_steps(several=state.group.size > 1) as signals:
        try:
            for indices in state.batches():
                progress = _agreed_progress(job, state, signals)
                if progress >= 1 or state.stopped:
                    return
                job.progress(progress)
                loss = _step(job, state, indices, progress)
                if state.at.step % CHECK_EVERY == 0:
                    _check(loss, state, "loss")
                    if sentence := watch.disturbance():
                        job.note(sentence)
                if state.epochs >= state.at.epoch + 1 and progress >= state.at.reported + REPORT_EVERY:
                    _report(job, state, progress)
        except KeyboardInterrupt:
            if state.whole and state.group.size == 1:
                state.save()
            raise


def _agreed_progress(job: Training, state: State, signals: Signals) -> float:
    """The share done, by the first process's clock. Saves when it is time to; raises KeyboardInterrupt after a signal
    to any process."""
    progress, due = job.clock.progress(state.epochs), time.perf_counter() - state.saved > job.checkpoint_seconds
    if not state.group.first:
        progress, due = -math.inf, False
    progress, stop, save = state.group.agree(progress, float(signals.came), float(due))
    if stop or save:
        state.save()
    if stop:
        raise KeyboardInterrupt
    return progress


def _step(job: Training, state: State, indices: np.ndarray, progress: float) -> Tensor:
    """One step of gradient descent on a batch of all processes; returns its loss."""
    state.whole = False
    for group in state.optimiser.param_groups:
        waits = group["share"] < 1 and progress < job.recipe.head_first
        group["lr"] = 0.0 if waits else rate(job.recipe, progress) * group["share"]
    mine = state.group.share(indices)
    x, targets = _batch(job, state, mine, progress)
    loss = _gradients(job, state, x, targets, len(mine) / len(indices))
    combine(state.group, job.net, loss)
    state.optimiser.step()
    state.optimiser.zero_grad()
    state.losses += loss
    at = state.at
    at.step += 1
    at.unreported += 1
    at.seen += len(indices)
    at.position += 1
    if at.step % EMA_EVERY == 0:
        state.ema.update(at.step, EMA_EVERY)
    state.whole = True
    return loss


def _batch(job: Training, state: State, indices: np.ndarray, progress: float) -> tuple[Tensor, Tensor]:
    """Pictures varied by the recipe, at the size of this stage, and their targets, ready for the network."""
    truth, classes = job.truth(indices), len(job.data.classes)
    x, targets = augmented(job.pixels(indices), truth, classes, job.preprocess, job.recipe, state.rng)
    state.at.side = side(job.recipe, progress, job.preprocess.size[0])
    return _ready(job.net, shrunk(x, state.at.side)), targets.to(device_of(job.net))


def _ready(net: nn.Module, x: Tensor) -> Tensor:
    """Pictures where the network is, in its number format."""
    first = next(net.parameters(), x)
    return x.to(first.device, first.dtype)


def _gradients(job: Training, state: State, x: Tensor, targets: Tensor, weight: float) -> Tensor:
    """Leaves the gradients of `weight` times the mean loss; returns that. Where memory does not suffice, in parts."""
    while True:
        try:
            return _accumulated(job, state, x, targets, weight)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        state.optimiser.zero_grad()  # here the failed pass's frames, and what they hold, are gone
        give_back_memory()
        state.halve(len(x))


def _accumulated(job: Training, state: State, x: Tensor, targets: Tensor, weight: float) -> Tensor:
    parts = -(-len(x) // (state.at.micro or len(x)))
    total = torch.zeros_like(state.losses)
    for pictures, truth in zip(x.tensor_split(parts), targets.tensor_split(parts), strict=True):
        with mixed_precision(x.device, job.recipe.plain):
            loss = loss_of(job.net, pictures, truth, job.recipe, job.teacher) * (weight * len(pictures) / len(x))
        loss.backward()
        total += loss.detach()
    return total


def _fastest_mode(job: Training, state: State) -> str:
    """The faster precision for this network, by a few training steps whose effects are undone."""
    if job.recipe.plain or job.sync_batchnorm or device_of(job.net).type != "cpu":
        return "float32"  # fused layers have batch statistics of their own
    indices = state.group.share(np.arange(min(job.recipe.batch_size, len(job.data))))
    kept = {name: buffer.clone() for name, buffer in job.net.named_buffers()}
    generator = state.rng.get_state()
    x, targets = _batch(job, state, indices, 1.0)
    state.rng.set_state(generator)

    def step() -> None:
        _gradients(job, state, x, targets, 1.0)

    mode = faster_precision(job.net, step)
    state.optimiser.zero_grad()
    for name, buffer in job.net.named_buffers():
        buffer.copy_(kept[name])
    return mode


def _check(loss: Tensor | float, state: State, name: str) -> None:
    value = float(loss)
    if not math.isfinite(value):
        raise Diverged(f"the {name} became {value} after {state.at.step} steps; lower the learning rate")


def _report(job: Training, state: State, progress: float) -> None:
    """Scores the averaged weights on the validation pictures and emits the epoch's record."""
    with state.ema.applied():
        accuracy, loss = _scored(job, state.group)
    _check(loss, state, "validation loss")
    train_loss = state.losses.item() / state.at.unreported if state.at.unreported else None
    state.scored(accuracy, loss, progress)
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


def _scored(job: Training, group: Group) -> tuple[float, float]:
    """Accuracy and loss on the validation pictures, of which each process takes its share."""
    mine = job.validation
    if group.size > 1:
        mine = mine.subset(group.share(np.arange(len(mine))))
    parts = group.gather(logits(job.net, mine, job.preprocess))
    return score(torch.cat(parts), job.validation.labels)


def _finish(job: Training, state: State) -> Trained:
    """Scores what has not been, and leaves the weights that are kept in the network."""
    if state.at.accuracy is None or state.at.unreported:  # else the last step was reported already
        _report(job, state, 1.0)
    accuracy, loss = state.settle()
    if job.recipe.reestimate:
        reestimate(job.net, _plain_batches(job, job.recipe.reestimate))
        accuracy, loss = _scored(job, state.group)
    job.net.eval()
    return Trained(state.epochs, state.at.step, job.clock.spent, accuracy, loss)


def _plain_batches(job: Training, count: int) -> Iterator[Tensor]:
    """Random training pictures as they are, in up to `count` whole batches."""
    size = min(job.recipe.batch_size, len(job.data))
    order = np.random.default_rng(job.seed).permutation(len(job.data))
    for start in range(0, min(count, len(order) // size) * size, size):
        yield _ready(job.net, normalise(job.pixels(order[start : start + size]), job.preprocess))


@torch.no_grad()
def logits(net: nn.Module, data: Dataset, preprocess: Preprocess, mirror: bool = False) -> Tensor:
    """float32 [N, classes] for all pictures (or their mirror images), in evaluation mode, without augmentation."""
    training = net.training
    net.eval()
    out = []
    for start in range(0, len(data), SCORED_AT_ONCE):
        indices = np.arange(start, min(start + SCORED_AT_ONCE, len(data)))
        x = _ready(net, normalise(torch.from_numpy(data.batch(preprocess.size[0], indices)), preprocess))
        out.append(net(x.flip(3) if mirror else x).float().cpu())
    net.train(training)
    return torch.cat(out)


def score(outputs: Tensor, labels: np.ndarray) -> tuple[float, float]:
    """(top-1 accuracy, mean cross-entropy) of logits [N, classes]."""
    truth = torch.from_numpy(labels)
    accuracy = (outputs.argmax(1) == truth).float().mean().item()
    return accuracy, F.cross_entropy(outputs, truth).item()
