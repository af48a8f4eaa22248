"""The last stages of the main job: what ships is compressed, verified, measured and written."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flyweight import __version__
from flyweight.bench.card import FILE as CARD
from flyweight.bench.card import card
from flyweight.bench.engines import Run
from flyweight.bench.engines import onnxruntime as engine
from flyweight.bench.measure import Latency, latency
from flyweight.bench.peak import peaks
from flyweight.bench.race import Entry, Runner, Timing, race
from flyweight.compress.cluster import Cluster
from flyweight.compress.estimate import SPARE
from flyweight.compress.pack import contents_of, contents_of_onnx, pack
from flyweight.compress.precision import CLOSE, PACKED, Variant, best, choose, measures, value_bytes
from flyweight.compress.repair import Attempt, Repair, Repaired, repair
from flyweight.compress.step import Context, repair_recipe
from flyweight.compress.step import compress as compressed
from flyweight.costs import NetCost, cost
from flyweight.errors import FlyweightError
from flyweight.export import onnx
from flyweight.export.task import Task
from flyweight.export.verify import Parity, answers, compare, gate, prepared_answers, temperature, wilson
from flyweight.exported import FLOAT
from flyweight.exporting import Subject
from flyweight.mistakes import worst_mistakes
from flyweight.net import Net
from flyweight.packed.container import read
from flyweight.preprocess import Preprocess
from flyweight.racing import raced
from flyweight.records import Records
from flyweight.report import write_report
from flyweight.search.meter import DEFAULT
from flyweight.search.space import Candidate
from flyweight.ship import write_card, write_export, write_json, write_model, write_network
from flyweight.stages import Work, data_summary, needed, rungs
from flyweight.train.loop import logits
from flyweight.train.platform import cores

MISTAKES = 24
# Seconds a precision is measured for when they compete, and the shipped file in the end.
RACE_SECONDS, FINAL_SECONDS = 0.6, 2.0
# Of the seconds that are left, the share that int8 may be repaired for, a half of it in fine-tuning; and then, where a
# network must be made small, the share that it is trained for.
INT8_SHARE, REPAIR_SHARE = 0.3, 0.6


def compress(work: Work, net: Net, preprocess: Preprocess) -> tuple[Net, Variant, NetCost]:
    """The network, what ships of it, its cost: in the best precision, for the fastest of the engines.

    Packed, and clustered, where it must be small.
    """
    counted = cost(net)
    subject, repaired = _repaired(work, net, preprocess)
    variants = [_variant(work, each, subject, counted) for each in repaired.attempts]
    small: Net | None = None
    if work.engines != (DEFAULT,) or work.device:
        variants = raced(work, subject, repaired, variants, counted)
    if DEFAULT in work.engines and _too_large(work, variants):
        int8 = best([each for each in variants if each.exported is None and each.format != FLOAT and each.agrees])
        variants += [] if int8 is None else [_packed(work, int8)]
    if DEFAULT in work.engines and _too_large(work, variants):
        try:
            small = _clustered(work, net, preprocess)
            variants.append(_packed_network(work, small, preprocess, counted))
        except FlyweightError as error:
            work.records.say(f"the network is not clustered: {error}")
    shipped = choose(variants)
    for variant in variants:
        work.records.write("variant", **variant.to_json(variant is shipped))
    work.watch.ends("compress")
    return small if small is not None and shipped is variants[-1] else net, shipped, counted


def _repaired(work: Work, net: Net, preprocess: Preprocess) -> tuple[Subject, Repaired]:
    """The network in float32 and by each int8 scheme, repaired where the fastest of them loses too much."""
    outputs = logits(net, work.splits.validation, preprocess).numpy()
    labels, context = work.splits.validation.labels, _context(work, net, preprocess)
    seconds = INT8_SHARE * max(0.0, work.left - needed(work, 0.0))
    settings = Repair(
        limit=max(CLOSE, 1 / len(labels)),  # of few pictures one wrong is no loss to speak of
        seconds=seconds / 2,
        fine_tune=seconds / 2,
        race=RACE_SECONDS,
        temperature=temperature(outputs, labels),
    )
    work.records.progress("quantising", 0.0)
    task = Task(net, preprocess, work.splits.train.classes, settings.temperature)
    subject = Subject(task, work.splits.train, work.splits.validation, work.job.seed)
    return subject, repair(net, context, settings)


def _variant(work: Work, attempt: Attempt, subject: Subject, counted: NetCost) -> Variant:
    """A file, against what the network answers on the validation pictures."""
    answered, labels = subject.reference.argmax(axis=1), work.splits.validation.labels
    parity = compare(answered, attempt.answered, labels, attempt.name == FLOAT)
    measured = measures(counted, attempt.name, len(attempt.model), attempt.latency.p50, attempt.val_top1)
    excess = work.budget.excess(measured)
    return Variant(attempt.name, attempt.model, attempt.latency, attempt.val_top1, measured, excess, parity.passed)


def _float_variant(work: Work, data: bytes, answered: np.ndarray, preprocess: Preprocess, counted: NetCost) -> Variant:
    """A float32 file that is no attempt of a repair, measured in the same way."""
    validation, size = work.splits.validation, preprocess.size[0]
    found = prepared_answers(engine.load(data, cores()), validation, size).argmax(axis=1)
    parity = compare(answered, found, validation.labels, exact=True)
    speed = latency(data, validation.batch(size, [0]), work.job.threads, RACE_SECONDS)
    measured = measures(counted, FLOAT, len(data), speed.p50, parity.exported_top1)
    return Variant(FLOAT, data, speed, parity.exported_top1, measured, work.budget.excess(measured), parity.passed)


def _context(work: Work, net: Net, preprocess: Preprocess) -> Context:
    """What compression steps of this job share; the network is what they are to answer as."""
    return Context(
        work.splits.train,
        work.splits.validation,
        preprocess,
        repair_recipe(preprocess.size[0]),
        records=work.records,
        seed=work.job.seed,
        threads=work.job.threads,
        teacher=net,
    )


def _too_large(work: Work, variants: list[Variant]) -> bool:
    """Whether the budget limits the size, and nothing that may ship keeps to it."""
    limit = work.budget.limit("size")
    return limit is not None and not any(limit.met(each.size) for each in variants if each.agrees)


def _packed(work: Work, variant: Variant) -> Variant:
    """The same file packed, bit for bit."""
    data = pack(contents_of_onnx(variant.model, variant.format)).data
    return _as_packed(work, variant, data, f"{variant.format}, {PACKED}")


def _as_packed(work: Work, variant: Variant, data: bytes, name: str) -> Variant:
    measured = variant.measured | {"size": len(data)}
    return replace(variant, format=name, packed=data, measured=measured, excess=work.budget.excess(measured))


def _clustered(work: Work, net: Net, preprocess: Preprocess) -> Net:
    """The network in so few values that its packed file keeps to the size. Raises FlyweightError where it cannot."""
    limit = work.budget.limit("size")
    assert limit is not None
    seconds = REPAIR_SHARE * max(0.0, work.left - needed(work, 0.0))
    work.records.progress("clustering", 0.0)
    context = replace(_context(work, net, preprocess), seconds=seconds)
    return compressed(net, [Cluster(size=int(limit.value) - SPARE)], context)


def _packed_network(work: Work, net: Net, preprocess: Preprocess, counted: NetCost) -> Variant:
    """A clustered network, exported and packed."""
    outputs, validation = logits(net, work.splits.validation, preprocess).numpy(), work.splits.validation
    degree = temperature(outputs, validation.labels)
    data = onnx.export(net, preprocess, work.splits.train.classes, degree).SerializeToString()
    variant = _float_variant(work, data, outputs.argmax(axis=1), preprocess, counted)
    packed = pack(contents_of(net, preprocess, work.splits.train.classes, net.spec.family, data)).data
    return _as_packed(work, variant, packed, f"{FLOAT}, clustered, {PACKED}")


def verify(work: Work, net: Net, preprocess: Preprocess, shipped: Variant) -> Parity:
    """The parity gate over all validation pictures, read anew from their sources."""
    validation = work.splits.validation
    outputs = logits(net, validation, preprocess)
    degree = temperature(outputs.numpy(), validation.labels)  # as it was exported with
    reference = (outputs / degree).softmax(1).numpy()
    with _running(shipped) as run:
        exported = answers(run, validation, preprocess)
    parity = gate(reference, exported, validation, shipped.precision.startswith(FLOAT))
    work.records.write("parity", **parity.to_json())
    work.watch.ends("verify")
    return parity


@contextmanager
def _running(shipped: Variant) -> Iterator[Run]:
    """What ships, as it will be opened, answering pictures."""
    if shipped.exported is None:
        yield engine.load(read(shipped.packed).onnx() if shipped.packed else shipped.model, cores())
        return
    entry = Entry(shipped.latency.engine, shipped.exported, cores())
    with tempfile.TemporaryDirectory() as folder, Runner(entry, Path(folder)) as run:
        yield run


def finish(
    work: Work,
    pool: list[Candidate],
    winner: Candidate,
    net: Net,
    preprocess: Preprocess,
    shipped: Variant,
    counted: NetCost,
) -> None:
    """Scores the test pictures once, with the shipped file alone; writes what the run leaves."""
    entry = write_model(work.folder, shipped.model, shipped.format, shipped.packed)
    if shipped.exported is not None:
        entry = write_export(work.folder, shipped.exported)
    entry["engine"] = shipped.latency.engine
    write_network(work.folder, net, winner.name, preprocess, work.splits.train.classes)
    tested = _test(work, preprocess, shipped)
    work.watch.ends("verify")
    _record_layers(work, counted, shipped.format)
    speed = _final_latency(work, shipped, preprocess)
    measured = measures(counted, shipped.format, shipped.size, speed.p50, shipped.val_top1)
    verdict = work.budget.check(measured)
    work.watch.ends("compress")
    result: dict[str, Any] = {
        "version": __version__,
        "status": "met" if all(line["met"] for line in verdict) else "not met",
        "data": data_summary(work.job.source, work.source, work.splits),
        "winner": {
            "name": winner.name,
            "spec": winner.spec.to_json(),
            "params": counted.params,
            "macs": counted.macs,
            "weights": winner.weights.to_json() if winner.weights else None,
            "teacher": _teacher(work.records),
        },
        "budget": verdict,
        **tested,
        "validation": {"top1": shipped.val_top1, "n": len(work.splits.validation)},
        "latency_ms": speed.to_json(),
        "shipped": entry,
        "weights": {"asked": work.job.pretrained, "found": list(work.job.weights), "notes": list(work.job.notes)},
        "candidates": [candidate.to_json() for candidate in pool],
        "seconds": {
            name: round(seconds, 2) for name, seconds in ({"total": work.watch.elapsed} | work.watch.stages).items()
        },
        "time_limit": work.job.seconds,
        "with_more_time": with_more_time(work, pool, winner),
        "seed": work.job.seed,
        "threads": work.job.threads,
    }
    _write_cost_card(work, counted, shipped, speed)
    write_card(work.folder, result)
    write_json(work.folder / "result.json", result)
    write_report(work.folder)


def _final_latency(work: Work, shipped: Variant, preprocess: Preprocess) -> Latency:
    """Of what ships, measured alone and for longer; for another machine what its table says."""
    pixels = work.splits.validation.batch(preprocess.size[0], [0])
    if work.device is not None:
        return shipped.latency
    if shipped.exported is None:
        return latency(shipped.model, pixels, work.job.threads, FINAL_SECONDS)
    alone = Entry(shipped.latency.engine, shipped.exported, work.job.threads)
    return race([alone], pixels, FINAL_SECONDS)[0].latency()


def _write_cost_card(work: Work, counted: NetCost, shipped: Variant, speed: Latency) -> None:
    """card.json: of everything that was raced, or of what ships alone."""
    timings = [Timing.from_json(record) for record in work.records.all("engine")]
    if not timings:
        about = (speed.engine, "onnx", shipped.format, speed.threads, shipped.size)
        timings = [Timing(*about, speed.p50, speed.p95, speed.p99, speed.n)]
    write_json(work.folder / CARD, card(counted, timings, {work.job.threads: peaks(work.job.threads)}))


def _teacher(records: Records) -> dict[str, Any] | None:
    record = records.find("teacher")
    if record is None or record["val_top1"] is None:
        return None
    return {key: record[key] for key in ("name", "epochs", "val_top1", "seconds")}


def _test(work: Work, preprocess: Preprocess, shipped: Variant) -> dict[str, Any]:
    """`test` and, where test pictures repeat training pictures, `test_clean`, as in result.json."""
    test, leaked = work.splits.test, work.splits.leaked
    with _running(shipped) as run:
        probabilities = answers(run, test, preprocess)
    predicted = probabilities.argmax(axis=1)
    right = predicted == test.labels
    confusion = np.zeros((len(test.classes), len(test.classes)), int)
    np.add.at(confusion, (test.labels, predicted), 1)
    work.records.write(
        "test", classes=list(test.classes), confusion=confusion.tolist(), top1=float(right.mean()), n=len(test)
    )
    for mistake in worst_mistakes(test, probabilities, MISTAKES):
        work.records.write("mistake", **mistake)
    found: dict[str, Any] = {"test": top1(right)}
    if leaked.any() and not leaked.all():
        found["test_clean"] = top1(right[~leaked]) | {"duplicates": int(leaked.sum())}
    return found


def top1(right: np.ndarray) -> dict[str, Any]:
    """The share of pictures that were named rightly, as in result.json."""
    return {"top1": float(right.mean()), "n": len(right), "ci95": list(wilson(int(right.sum()), len(right)))}


def _record_layers(work: Work, counted: NetCost, precision: str) -> None:
    for layer in counted.layers:
        work.records.write(
            "layer",
            path=layer.path,
            leaf=layer.leaf,
            shape=list(layer.shape),
            params=layer.params,
            macs=layer.macs,
            activation_bytes=layer.values * value_bytes(precision),
        )


def with_more_time(work: Work, pool: list[Candidate], winner: Candidate) -> str:
    """One sentence on what twice the time would have bought."""
    entrants = [candidate for candidate in pool if candidate.status != "dropped"]
    tried = sum(candidate.status in ("tried", "winner") for candidate in entrants)
    twice = rungs(len(entrants), 2 * work.job.seconds)
    could = twice[0].candidates if twice else tried
    trials = f"tried {could} candidates instead of {tried}" if could > tried else "tried the same candidates for longer"
    seen = winner.epochs or 0.0
    now, then = (f"{epochs:.2g}" if epochs < 10 else f"{epochs:.0f}" for epochs in (seen, 2 * seen))
    return (
        f"In {2 * work.job.seconds:g} s it would have {trials}, and trained the winner for about {then} epochs "
        f"instead of {now}."
    )
