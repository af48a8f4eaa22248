"""The frame of compression: steps from network to network, each measured before and after, each leaving a record.

A step is a frozen dataclass of settings in a file of its own here; a chain of them is a list.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Protocol

from torch import nn

from flyweight.bench.measure import Latency, latencies
from flyweight.compress.pack import contents_of, packed_bytes
from flyweight.costs import cost
from flyweight.data import Dataset
from flyweight.errors import FlyweightError
from flyweight.export import onnx
from flyweight.net import Net
from flyweight.preprocess import Preprocess
from flyweight.records import Records
from flyweight.train.loop import Clock, Diverged, Trained, Training, logits, score, train
from flyweight.train.recipe import SMALL, Recipe, recipe_for
from flyweight.units import percent

MOST_RESTARTS = 3
# What is left of the time before it counts as shorter: less lies within what two measurements of one file differ by.
SHORTER = 0.95


def repair_recipe(size: int) -> Recipe:
    """How a compressed network is trained at `size` pixels: at a low rate, towards its teacher where there is one."""
    small = size <= SMALL
    return replace(recipe_for(size), learning_rate=0.05 if small else 0.02, warm_up=0.1, resize=(), distil=0.5)


@dataclass
class Context:
    """What the steps of a chain share.

    `seconds` or `epochs` are what one step may train for (clustering's search counts too); `latency` asks for
    measurements on `threads` cores; `teacher` is what the recipe distils from.
    """

    train: Dataset
    validation: Dataset
    preprocess: Preprocess
    recipe: Recipe
    seconds: float | None = None
    epochs: float | None = None
    records: Records | None = None
    seed: int = 0
    threads: int = 1
    latency: bool = False
    teacher: nn.Module | None = None
    mode: str | None = None

    def fine_tune(self, net: Net, share: float = 1.0) -> Trained:
        """Trains a network in place for a share of a step's time; a diverging loss starts again at half the rate.

        Raises FlyweightError where it diverges at every rate tried.
        """
        before, recipe = copy.deepcopy(net.state_dict()), self.recipe
        for _ in range(MOST_RESTARTS + 1):
            job = self._training(net, recipe, share)
            try:
                trained = train(job)
            except Diverged as error:
                self.say(f"fine-tuning starts again at half the learning rate: {error}")
                net.load_state_dict(before)
                recipe = replace(recipe, learning_rate=recipe.learning_rate / 2)
                continue
            self.mode = job.mode
            return trained
        raise FlyweightError("fine-tuning diverges at every learning rate tried: is the network trained?")

    def _training(self, net: Net, recipe: Recipe, share: float) -> Training:
        seconds, epochs = (None if given is None else share * given for given in (self.seconds, self.epochs))
        return Training(
            net=net,
            data=self.train,
            validation=self.validation,
            preprocess=self.preprocess,
            recipe=recipe,
            clock=Clock(seconds, epochs),
            seed=self.seed,
            mode=self.mode,
            emit=lambda values: self.write("epoch", stage="compress", name=net.spec.family, **values),
            note=self.say,
            teacher=self.teacher,
        )

    def exported(self, net: Net) -> bytes:
        """The network as a float32 ONNX file."""
        return onnx.export(net, self.preprocess, self.train.classes).SerializeToString()

    def packed_bytes(self, net: Net) -> int:
        """The bytes of the network's packed file."""
        return packed_bytes(contents_of(net, self.preprocess, self.train.classes, net.spec.family))

    def accuracy(self, net: Net) -> float:
        """Top-1 on the validation pictures."""
        return score(logits(net, self.validation, self.preprocess), self.validation.labels)[0]

    def speeds(self, models: Sequence[bytes], seconds: float = 0.5) -> list[Latency]:
        """The latency of ONNX files on a real picture, `seconds` each, in interleaved rounds."""
        picture = self.validation.batch(self.preprocess.size[0], [0])
        return latencies(models, picture, self.threads, seconds)

    def write(self, kind: str, **values: Any) -> None:
        """Leaves a record, where records are kept."""
        if self.records is not None:
            self.records.write(kind, **values)

    def say(self, message: str) -> None:
        """Leaves a sentence."""
        self.write("log", message=message)


class Step(Protocol):
    """Called with a network, which it leaves as it is, a step gives the one that comes of it."""

    name: ClassVar[str]

    def __call__(self, net: Net, context: Context, /) -> Net: ...


@dataclass(frozen=True)
class Figures:
    """What a network costs and answers: bytes of its float32 ONNX file and of its packed file, validation top-1."""

    params: int
    macs: int
    size_bytes: int
    packed_bytes: int
    val_top1: float
    latency_ms: float | None = None


def compress(net: Net, steps: Sequence[Step], context: Context) -> Net:
    """The network that comes of the steps, one after the other; each leaves a `compression` record.

    The given network stays as it is. With a latency asked for, both files are measured in turn, before and after.
    """
    before, file = _figures(net, context)
    for step in steps:
        start = time.perf_counter()
        net = step(net, context)
        seconds = time.perf_counter() - start
        after, smaller = _figures(net, context)
        if context.latency:
            old, new = context.speeds([file, smaller])
            before, after = replace(before, latency_ms=old.p50), replace(after, latency_ms=new.p50)
        context.write(
            "compression",
            step=step.name,
            settings=asdict(step),  # type: ignore[call-overload]
            before=asdict(before),
            after=asdict(after),
            seconds=round(seconds, 2),
            note=told(before, after),
        )
        before, file = after, smaller
    return net


def _figures(net: Net, context: Context) -> tuple[Figures, bytes]:
    """A network's figures, but for its latency, and its file."""
    counted, file = cost(net), context.exported(net)
    return Figures(counted.params, counted.macs, len(file), context.packed_bytes(net), context.accuracy(net)), file


def told(before: Figures, after: Figures) -> str:
    """What a step bought and cost, in a sentence; that fewer MACs bought no time is said as such."""
    points = 100 * (after.val_top1 - before.val_top1)
    macs, packed = after.macs / before.macs, after.packed_bytes / before.packed_bytes
    left = f"{percent(macs)} of the MACs and {percent(packed)} of the packed bytes are left"
    sentence = f"{left}, at {points:+.2f} points"
    if before.latency_ms is None or after.latency_ms is None:
        return sentence
    time_left = after.latency_ms / before.latency_ms
    sentence += f" and {percent(time_left)} of the time ({before.latency_ms:.3g} to {after.latency_ms:.3g} ms)"
    if macs < SHORTER <= time_left:
        sentence += ": the MACs that are gone bought no time"
    return sentence
