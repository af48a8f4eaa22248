"""Int8 that holds: a network quantised, from the cheapest attempt on, until a file answers as well as the float one."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
import onnx as onnx_format
import torch
from torch import Tensor, nn

from flyweight.bench.engines import onnxruntime as engine
from flyweight.bench.measure import Latency
from flyweight.compress.equalise import correct_biases, edges, equalise, smooth
from flyweight.compress.precision import NOTABLY, calibration_sample
from flyweight.compress.qat import FakeQuantised, fake_quantised, fine_tune
from flyweight.compress.step import Context
from flyweight.export import int8, onnx
from flyweight.export.calibration import CALIBRATORS, Histogram, Range, limits, observe, ranges
from flyweight.export.verify import prepared_answers
from flyweight.exported import FLOAT
from flyweight.fold import fold_batchnorm
from flyweight.graph import trace
from flyweight.train.inputs import normalise
from flyweight.train.loop import Clock, Diverged
from flyweight.train.platform import cores

# Training pictures that place the ranges; and of them those that give largest activations, mean errors and those of
# single layers.
CALIBRATED, LOOKED_INTO = 256, 64
MOST_FLOAT = 1 / 3  # of the layers
RATES = (0.005, 0.0005)  # of learning, in the fine-tuning
LEAST = 1e-9  # a probability's
MIN_MAX = "min-max"


class Row(Protocol):
    """What competes to ship: a file, its latency and its accuracy."""

    model: bytes
    latency: Latency
    val_top1: float


R = TypeVar("R", bound=Row)


def frontier(rows: Sequence[R]) -> list[R]:
    """The rows that no other equals or beats in size, latency and accuracy at once."""
    return [row for row in rows if not any(_beats(other, row) for other in rows)]


def _beats(one: Row, other: Row) -> bool:
    better = (len(other.model) - len(one.model), other.latency.p50 - one.latency.p50, one.val_top1 - other.val_top1)
    return min(better) >= 0 and max(better) > 0


def fastest(rows: Sequence[R], least: float) -> R:
    """What ships of the rows: the fastest with an accuracy of at least `least`, else the most accurate.

    Of several about as fast it is the most accurate; it is never one that another beats.
    """
    best = frontier(rows)
    holding = [row for row in best if row.val_top1 >= least]
    bar = min((row.latency.p50 for row in holding), default=float("inf"))
    near = [row for row in holding if NOTABLY * row.latency.p50 <= bar]
    return max(near or best, key=lambda row: row.val_top1)


@dataclass(frozen=True)
class Form:
    """A network with folded norms on its way to int8: exported; its ranges are those on `pictures`, uint8 [N, H, W, C].

    `source` is the form whose mean errors were taken from the biases of this one: they depend on what is rounded.
    """

    net: nn.Module
    model: onnx_format.ModelProto
    names: Mapping[str, str]
    pictures: np.ndarray = field(repr=False)
    done: tuple[str, ...] = ()
    source: "Form | None" = None

    @cached_property
    def values(self) -> dict[str, Histogram]:
        """What its inner values are on the pictures."""
        return observe(self.model, self.pictures)

    def ranges(self, calibrator: str) -> dict[str, Range]:
        """Of its inner values."""
        return limits(self.model, self.pictures) if calibrator == MIN_MAX else ranges(self.values, calibrator)


@dataclass(frozen=True)
class Way:
    """How a form becomes a file: `kept` are the values whose layers stay float32."""

    form: Form
    scheme: int8.Scheme
    calibrator: str
    ranges: Mapping[str, Range]
    kept: tuple[str, ...] = ()

    @classmethod
    def of(cls, form: Form, scheme: int8.Scheme, calibrator: str) -> "Way":
        """A form by a scheme, its ranges by a calibrator."""
        return cls(form, scheme, calibrator, form.ranges(calibrator))

    @property
    def name(self) -> str:
        """Such as "int8 per-tensor u8, mse, equalised, 2 layers float32"."""
        count = len(self.kept)
        float_layers = f"{count} layer{'s' * (count > 1)} {FLOAT}" if count else ""
        calibrator = "" if self.calibrator == MIN_MAX else self.calibrator
        return ", ".join(part for part in (self.scheme.name, calibrator, *self.form.done, float_layers) if part)

    def placed(self) -> onnx_format.ModelProto:
        """The model in int8, with the float model's names."""
        return int8.placed(self.form.model, self.ranges, self.scheme, self.kept)


@dataclass(eq=False)
class Attempt:
    """One file: accuracy on the validation pictures; `agreement`, the share of the float file's answers that it gives;
    `divergence`, the mean Kullback-Leibler divergence of its probabilities from the float file's.

    `answered` [N] are its classes of those pictures; `way` is None for the float file itself; `kept` are the paths of
    the layers that stayed float32.
    """

    name: str
    model: bytes
    val_top1: float
    agreement: float
    divergence: float
    latency: Latency
    answered: np.ndarray = field(repr=False)
    way: Way | None = field(default=None, repr=False)
    kept: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A row of the table of attempts."""
        return {
            "name": self.name,
            "val_top1": self.val_top1,
            "agreement": self.agreement,
            "divergence": self.divergence,
            "size_bytes": len(self.model),
            "latency_ms": self.latency.p50,
            "engine": self.latency.engine,
            "float_layers": list(self.kept),
        }


@dataclass(frozen=True)
class Repair:
    """How far to go: until a file loses at most `limit` of accuracy, or `seconds` have passed.

    The fine-tuning, the last resort, has `fine_tune` seconds more, shared by RATES; 0: there is none. `race` is
    what each file is measured for.
    """

    limit: float = 0.003
    seconds: float = float("inf")
    fine_tune: float = 0.0
    race: float = 0.5
    schemes: tuple[int8.Scheme, ...] = field(default_factory=int8.schemes)
    temperature: float = 1.0


@dataclass(frozen=True)
class Repaired:
    """Every attempt, the float file first; `chosen` is what ships by `fastest`."""

    attempts: list[Attempt]
    chosen: Attempt


def repair(net: nn.Module, context: Context, settings: Repair) -> Repaired:
    """Quantises a trained network by every scheme, plain and equalised; where that loses too much, goes on.

    REPAIRS are tried in their order, then fine-tuning, until a file holds for which no scheme among the others is
    notably faster. Accuracy is that on the validation pictures of the context, ranges and corrections come from its
    training pictures.
    """
    search = _Search(net, context, settings)
    for way in _plain(search):
        search.attempt(way)
    search.follow(_equalised)
    search.measure()
    for stage in REPAIRS:
        if search.late or not search.open():
            break
        search.follow(stage)
    for way in _fine_tuned(search):  # which has time of its own
        search.attempt(way)
    search.measure()
    least = search.attempts[0].val_top1 - settings.limit
    return Repaired(search.attempts, fastest(search.attempts, least))


class _Search:
    """The attempts so far, and what the stages share."""

    def __init__(self, net: nn.Module, context: Context, settings: Repair) -> None:
        self.context, self.settings = context, settings
        self.start = time.perf_counter()
        size, train = context.preprocess.size, context.train
        self.pictures = train.batch(size[0], calibration_sample(len(train), context.seed, CALIBRATED))
        self.shape = (context.preprocess.channels, *size)
        self.plain = self.form(fold_batchnorm(net, self.shape), ())
        file = self.plain.model.SerializeToString()
        self.true = prepared_answers(engine.load(file, cores()), context.validation, size[0])
        self.true_here = engine.load(file, cores())(self.pictures)
        self.attempts: list[Attempt] = []
        self._add(FLOAT, file, self.true)

    @property
    def late(self) -> bool:
        """Whether the time is over."""
        return time.perf_counter() - self.start > self.settings.seconds

    def form(self, net: nn.Module, done: tuple[str, ...]) -> Form:
        """A network with folded norms, exported."""
        return Form(net, *self._exported(net), self.pictures, done)

    def adjusted(self, way: Way, net: nn.Module, done: str, source: Form | None = None) -> Way:
        """A way whose network has other parameters now, for the ranges that it has."""
        model, names = self._exported(net)
        form = replace(way.form, net=net, model=model, names=names, done=(*way.form.done, done), source=source)
        return replace(way, form=form)

    def _exported(self, net: nn.Module) -> tuple[onnx_format.ModelProto, dict[str, str]]:
        classes, temperature = self.context.train.classes, self.settings.temperature
        return onnx.export_named(net, self.context.preprocess, classes, temperature)

    def corrected(self, way: Way) -> Way:
        """A way with biases that lack the mean error of what it rounds."""
        fake = _fake(way)
        correct_biases(fake, way.form.net, self.looked_into())
        return self.adjusted(way, fake.net, "biases corrected", way.form)

    def attempt(self, way: Way) -> None:
        """Makes and scores a file."""
        file = int8.shortened(way.placed()).SerializeToString()
        run, context = engine.load(file, cores()), self.context
        self._add(way.name, file, prepared_answers(run, context.validation, context.preprocess.size[0]), way)

    def follow(self, stage: "Stage") -> None:
        """Attempts what a stage yields, while there is time."""
        for way in stage(self):
            if self.late:
                break
            self.attempt(way)

    def looked_into(self) -> Tensor:
        """Some of the calibration pictures, normalised [N, C, H, W]."""
        return normalise(torch.from_numpy(self.pictures[:LOOKED_INTO]), self.context.preprocess)

    def _add(self, name: str, file: bytes, found: np.ndarray, way: Way | None = None) -> None:
        labels = self.context.validation.labels
        answer, true = found.argmax(1), self.true.argmax(1)
        paths = {value: node for node, value in reversed([*self.plain.names.items()])}
        self.attempts.append(
            Attempt(
                name=name,
                model=file,
                val_top1=float((answer == labels).mean()),
                agreement=float((answer == true).mean()),
                divergence=divergence(self.true, found),
                latency=Latency(float("inf"), float("inf"), float("inf"), engine.NAME, self.context.threads, 0),
                answered=answer,
                way=way,
                kept=tuple(paths[value] for value in way.kept) if way else (),
            )
        )
        self.context.say(f"{name}: {100 * self.attempts[-1].val_top1:.2f} %")

    def measure(self) -> None:
        """The latency of every file so far, all in turn."""
        found = self.context.speeds([each.model for each in self.attempts], self.settings.race)
        for each, latency in zip(self.attempts, found, strict=True):
            each.latency = latency

    def of(self, scheme: int8.Scheme) -> list[Attempt]:
        """The attempts by a scheme."""
        return [each for each in self.attempts if each.way is not None and each.way.scheme == scheme]

    def nearest(self, scheme: int8.Scheme) -> Way:
        """The attempt by a scheme, with all layers in int8, whose answers are nearest to the float file's."""
        whole = [each for each in self.of(scheme) if not each.kept]
        way = min(whole, key=lambda each: each.divergence).way
        assert way is not None
        return way

    def holds(self, scheme: int8.Scheme) -> bool:
        """Whether an attempt by a scheme is within the limit."""
        least = self.attempts[0].val_top1 - self.settings.limit
        return any(each.val_top1 >= least for each in self.of(scheme))

    def open(self) -> list[int8.Scheme]:
        """The schemes worth repairing: notably faster than any that holds; the fastest first."""
        speed = {scheme: self.of(scheme)[0].latency.p50 for scheme in self.settings.schemes}
        bar = min((speed[scheme] for scheme in speed if self.holds(scheme)), default=float("inf"))
        return sorted((scheme for scheme in speed if speed[scheme] < NOTABLY * bar), key=lambda each: speed[each])


def divergence(true: np.ndarray, found: np.ndarray) -> float:
    """The mean over N of KL(true ‖ found), of probabilities [N, classes]."""
    ratio = np.log(np.maximum(true, LEAST)) - np.log(np.maximum(found, LEAST))
    return float((true * ratio).sum(1).mean())


def _plain(search: _Search) -> Iterator[Way]:
    """Every scheme, with the ranges that hold all values."""
    for scheme in search.settings.schemes:
        yield Way.of(search.plain, scheme, MIN_MAX)


def _equalised(search: _Search) -> Iterator[Way]:
    """Ranges made alike: of the kernels where each has one scale, of the activations where its channels have their own.

    Tried wherever it changes anything: it costs no time and no bytes in the file.
    """
    net = search.plain.net
    if not edges(net, trace(net, search.shape)):
        return
    forms: dict[bool, Form] = {}
    for scheme in search.settings.schemes:
        if scheme.per_channel not in forms:
            even = smooth(net, search.looked_into()) if scheme.per_channel else equalise(net, search.shape)
            forms[scheme.per_channel] = search.form(even, ("smoothed" if scheme.per_channel else "equalised",))
        yield Way.of(forms[scheme.per_channel], scheme, MIN_MAX)


def _calibrated(search: _Search) -> Iterator[Way]:
    """Other calibrators, of the scheme's nearest form."""

    def ways(scheme: int8.Scheme) -> Iterator[Way]:
        form = search.nearest(scheme).form
        for each in CALIBRATORS:
            yield Way.of(form, scheme, each)

    yield from _until_held(search, ways)


def _corrected(search: _Search) -> Iterator[Way]:
    """Biases without the mean error, of the scheme's nearest attempt."""

    yield from _until_held(search, lambda scheme: iter([search.corrected(search.nearest(scheme))]))


def _with_float_layers(search: _Search) -> Iterator[Way]:
    """The layers that hurt most in float32, one more each time."""

    def ways(scheme: int8.Scheme) -> Iterator[Way]:
        nearest = search.nearest(scheme)
        way = replace(nearest, form=nearest.form.source or nearest.form)
        worst = list(errors(way, search.pictures[:LOOKED_INTO], search.true_here[:LOOKED_INTO]))
        for count in range(1, int(MOST_FLOAT * len(worst)) + 1):
            mixed = replace(way, kept=tuple(worst[:count]))
            yield mixed if nearest.form.source is None else search.corrected(mixed)

    yield from _until_held(search, ways)


def _fine_tuned(search: _Search) -> Iterator[Way]:
    """A short training of the weights that rounds as the file does, of the scheme nearest to holding.

    Where it does harm, it begins again at the next rate.
    """
    seconds, open_schemes = search.settings.fine_tune, search.open()
    if not seconds or not open_schemes:
        return
    scheme = min(open_schemes, key=lambda scheme: min(each.divergence for each in search.of(scheme)))
    way, before = search.nearest(scheme), min(each.divergence for each in search.of(scheme))
    for rate in RATES:
        fake = _fake(way)
        try:
            fine_tune(fake, search.plain.net, search.context, Clock(seconds=seconds / len(RATES)), rate)
        except Diverged as error:
            search.context.say(f"quantisation-aware fine-tuning at {rate:g} fails: {error}")
            continue
        yield search.adjusted(way, fake.net, f"fine-tuned at {rate:g}")
        if search.attempts[-1].divergence < before:
            return


def _fake(way: Way) -> FakeQuantised:
    return fake_quantised(way.form.net, way.form.model, way.placed(), way.form.names, way.scheme)


def _until_held(search: _Search, ways: Callable[[int8.Scheme], Iterator[Way]]) -> Iterator[Way]:
    """The ways of each scheme worth repairing that have not been tried, until one of them holds."""
    tried = {each.name for each in search.attempts}
    for scheme in search.open():
        for way in ways(scheme):
            if way.name not in tried:
                yield way
            if search.holds(scheme):
                return  # the schemes that follow are slower


Stage = Callable[[_Search], Iterator[Way]]
# From the cheapest on.
REPAIRS: tuple[Stage, ...] = (_calibrated, _corrected, _with_float_layers)


def errors(way: Way, pictures: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """The `divergence` of a file with one layer alone in int8, by the value that the layer computes; worst first."""
    nodes = way.form.model.graph.node
    others = [node.output[0] for node in nodes if node.op_type not in ("Relu", "Clip")]  # which belong to the layer
    found: dict[str, float] = {}
    for own in (node.output[0] for node in nodes if node.op_type in int8.LAYERS):
        alone = replace(way, kept=tuple(name for name in others if name != own))
        found[own] = divergence(true, engine.load(alone.placed().SerializeToString(), cores())(pictures))
    return dict(sorted(found.items(), key=lambda item: -item[1]))
