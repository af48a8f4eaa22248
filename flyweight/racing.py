"""Which engine ships: the winner in every form and runtime, proven, then measured in turns."""

from dataclasses import replace

from flyweight.bench.measure import Latency
from flyweight.bench.race import Entry, Timing, race
from flyweight.benching import PYTORCH, as_it_is
from flyweight.compress.precision import Variant, measures
from flyweight.compress.repair import Repaired
from flyweight.costs import NetCost
from flyweight.errors import ParityError
from flyweight.exported import FLOAT, Exported
from flyweight.exporting import Outcome, Subject, outcomes
from flyweight.search.meter import DEFAULT
from flyweight.stages import Work

SECONDS, ROUNDS = 1.0, 5
PICTURES = 16  # that a race may take its batches from
# Of the ONNX files, how many compete with other engines' in each precision: those that were the fastest.
OF_ONNX = 2


def raced(work: Work, subject: Subject, repaired: Repaired, variants: list[Variant], counted: NetCost) -> list[Variant]:
    """The variants for all engines of the job, `variants` being those for ONNX Runtime, with latencies that compare.

    Raises ParityError where no engine answers as the network does.
    """
    own = _fastest(variants) if DEFAULT in work.engines else []
    others = [_as_variant(work, each, repaired.chosen.model) for each in _proven(work, subject, repaired)]
    found = [*own, *others]
    if not found:
        told = ", ".join(work.engines)
        raise ParityError(
            f"no file for {told} answers as the trained network does; nothing was shipped, see {work.folder}"
        )
    timings = _foretold(work, subject, found) if work.device else _timed(work, subject, found)
    return [_with_latency(work, *pair, counted) for pair in zip(found, timings, strict=True) if not pair[1].failed]


def _fastest(variants: list[Variant]) -> list[Variant]:
    """Of the ONNX files that answer as the network does, the fastest in each precision."""
    agreeing = sorted((each for each in variants if each.agrees), key=lambda each: each.latency.p50)
    full = [each for each in agreeing if each.format == FLOAT]
    return [*full[:1], *[each for each in agreeing if each.format != FLOAT][:OF_ONNX]]


def _proven(work: Work, subject: Subject, repaired: Repaired) -> list[Outcome]:
    """The network for every other engine, in both precisions, where its answers hold."""
    others, found = [each for each in work.engines if each != DEFAULT], []
    say = lambda said: work.records.progress(said, 0.0)  # noqa: E731
    for outcome in outcomes(subject, others, subject.forms(repaired), say=say):
        work.records.say(f"{'' if outcome.proven else 'left out: '}{outcome.told}")
        found += [outcome] if outcome.proven else []
    return found


def _as_variant(work: Work, outcome: Outcome, model: bytes) -> Variant:
    """A proven file, its latency not yet known; `model` is what stands beside it for ONNX Runtime."""
    assert outcome.exported is not None
    assert outcome.parity is not None
    unknown = Latency(float("inf"), float("inf"), float("inf"), outcome.engine, work.job.threads, 0)
    top1 = outcome.parity.exported_top1
    return Variant(outcome.format, model, unknown, top1, {}, 0.0, exported=outcome.exported)


def _entry(work: Work, subject: Subject, variant: Variant) -> Entry:
    exported = variant.exported
    if exported is None:
        task = subject.task
        exported = Exported("onnx", variant.format, {"model.onnx": variant.model}, task.preprocess, task.classes)
    return Entry(variant.latency.engine, exported, work.job.threads)


def _timed(work: Work, subject: Subject, found: list[Variant]) -> list[Timing]:
    """All in turns, beside PyTorch, which does not compete; each leaves a record."""
    entries = [_entry(work, subject, each) for each in found]
    beside = Entry(PYTORCH, as_it_is(subject), work.job.threads)
    pixels = subject.validation.batch(subject.task.preprocess.size[0], range(min(PICTURES, len(subject.validation))))
    timings = race([*entries, beside], pixels, SECONDS, ROUNDS, say=lambda text: work.records.progress(text, 0.0))
    scores = [*(each.val_top1 for each in found), None]
    for timing, score in zip(timings, scores, strict=True):
        work.records.write("engine", **timing.to_json(), val_top1=score)
    return timings[:-1]


def _foretold(work: Work, subject: Subject, found: list[Variant]) -> list[Timing]:
    """What the other machine's table says of each; not measured, so of no runs."""
    assert work.device is not None
    timings = []
    for each in found:
        entry = _entry(work, subject, each)
        ms = work.device.foretold(subject.task.graph, each.format, each.latency.engine)
        about = (entry.engine, entry.exported.target, each.format, entry.threads, each.size)
        timings.append(Timing(*about, p50=ms, p95=ms, p99=ms))
    return timings


def _with_latency(work: Work, variant: Variant, timing: Timing, counted: NetCost) -> Variant:
    measured = measures(counted, variant.format, variant.size, timing.p50, variant.val_top1)
    return replace(variant, latency=timing.latency(), measured=measured, excess=work.budget.excess(measured))
