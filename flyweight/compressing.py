"""A trained network made smaller: `flyweight compress`, which chains steps of compression and packs what they leave."""

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flyweight import __version__
from flyweight.bench.engines import onnxruntime as engine
from flyweight.bench.environment import environment
from flyweight.bench.measure import latency
from flyweight.compress.cluster import Cluster
from flyweight.compress.estimate import SPARE, clustered_bytes
from flyweight.compress.pack import contents_of, pack
from flyweight.compress.precision import PACKED
from flyweight.compress.prune import Prune
from flyweight.compress.sparsify import Sparsify
from flyweight.compress.step import Context, Step, compress, repair_recipe
from flyweight.costs import cost
from flyweight.data import Splits, open_source, prepare
from flyweight.errors import FlyweightError, ParityError, UsageError
from flyweight.export import onnx
from flyweight.export.verify import answers, compare, temperature
from flyweight.exported import FLOAT
from flyweight.job import FILE, Stopwatch, guarded, new_folder
from flyweight.net import Net
from flyweight.packed.container import read
from flyweight.records import Listener, Records, decoding
from flyweight.ship import write_json, write_model, write_network
from flyweight.shipping import top1
from flyweight.stages import data_summary
from flyweight.train.loop import logits
from flyweight.train.platform import check_threads, cores
from flyweight.units import human_bytes
from flyweight.weights import load_net, load_preprocess

# Shares of the kernels' float32 bytes that are tried one after the other where no size is asked for.
SHARES = (0.14, 0.1, 0.08, 0.06, 0.045, 0.035)
LATENCY_SECONDS = 2.0


@dataclass(frozen=True)
class Request:
    """What `flyweight compress` is asked to do with the network in a run's folder.

    `size` is what the packed file may have in bytes; without it, the smallest is sought that loses at most the share
    `drop` of the validation pictures. `macs` and `density` are the shares of multiply-accumulates and of weights that
    pruning leaves before. Each step may train for `seconds`.
    """

    run: str
    size: int | None = None
    drop: float = 0.005
    macs: float | None = None
    density: float | None = None
    seconds: float = 60.0
    threads: int = 1
    verb: str = "compress"
    version: str = __version__

    def steps(self) -> list[Step]:
        """Those before clustering."""
        prune = [] if self.macs is None else [Prune(macs=self.macs)]
        return [*prune, *([] if self.density is None else [Sparsify(self.density)])]


@dataclass
class _Work:
    """What the parts of one compression share; `before` is the run's network, `source` its pictures' name."""

    folder: Path
    request: Request
    name: str
    before: Net
    splits: Splits
    context: Context
    watch: Stopwatch
    data: dict[str, Any]


def compress_run(request: Request, out: Path | None = None, listener: Listener | None = None) -> dict[str, Any]:
    """Makes a run's network smaller and leaves it in a new folder; what stands in its result.json.

    The pictures and their split are the run's; the test pictures are scored once, at the end, by the file that ships.
    `status` is "met" where the size and the drop were kept. Raises UsageError where the folder is no run that can be
    compressed, FlyweightError where no size tried loses little enough.
    """
    _check(request)
    run = Path(request.run)
    job, net = _opened(run)
    preprocess, watch = load_preprocess(run / "model.safetensors"), Stopwatch()
    source, side = open_source(job["source"]), preprocess.size[0]
    told, skip = decoding(listener), job["skip_corrupt"]
    splits = prepare(source, [side], seed=job["seed"], skip_corrupt=skip, progress=told)
    if len(source.classes) != net.num_classes:
        raise UsageError(f"{job['source']} has changed since {run} was made: it has {len(source.classes)} classes now")
    folder = new_folder(out, f"compress-{run.resolve().name}")
    with guarded(folder, _command(request)):
        write_json(
            folder / FILE, asdict(request) | {"source": job["source"], "seed": job["seed"], "skip_corrupt": skip}
        )
        write_json(folder / "environment.json", environment(request.threads))
        context = Context(
            splits.train,
            splits.validation,
            preprocess,
            repair_recipe(side),
            seconds=request.seconds,
            records=Records(folder, lambda: watch.elapsed, listener),
            seed=job["seed"],
            threads=request.threads,
            latency=request.macs is not None,
            teacher=net,
        )
        data = data_summary(job["source"], source, splits)
        work = _Work(folder, request, f"{run.resolve().name}, compressed", net, splits, context, watch, data)
        small = compress(net, request.steps(), context)
        return _finish(work, _clustered(work, small))


def _check(request: Request) -> None:
    """What can be told before anything is opened."""
    check_threads(request.threads)
    request.steps()
    if request.size is not None and request.size <= 0:
        raise UsageError("--to-size must be more than nothing")
    if not 0 <= request.drop < 1:
        raise UsageError(f"--max-drop is in points from 0 to 100, not {100 * request.drop:g}")


def _opened(run: Path) -> tuple[dict[str, Any], Net]:
    """A run's job and its network."""
    weights, file = run / "model.safetensors", run / FILE
    if not weights.exists() or not file.exists():
        raise UsageError(f"{run} is no finished run: it lacks {weights.name} or {file.name}, which fit and train leave")
    try:
        job = {"skip_corrupt": False, **json.loads(file.read_text(encoding="utf-8"))}
        _ = job["source"], job["seed"]
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{file} is damaged ({error!r}): it must name the pictures and the seed") from error
    return job, load_net(weights)


def _command(request: Request) -> str:
    return shlex.join(["flyweight", "compress", request.run])


def _clustered(work: _Work, net: Net) -> Net:
    """The network in few values: of the size that is asked for, or the smallest that loses little enough."""
    request, context = work.request, work.context
    if request.size is not None:
        return compress(net, [Cluster(size=request.size - SPARE)], context)
    least = context.accuracy(work.before) - request.drop
    best: Net | None = None
    sizes = [clustered_bytes(net, context.preprocess, work.splits.train.classes, share) for share in SHARES]
    for size in sizes:
        try:
            small = compress(net, [Cluster(size=size)], context)
        except FlyweightError as error:  # then no smaller one is in reach
            context.say(str(error))
            break
        missing = least - context.accuracy(small)
        if missing > 0:
            context.say(f"{human_bytes(size)} are too few: {100 * (missing + request.drop):.2f} points are lost")
            break
        best = small
    if best is None:
        raise FlyweightError(
            f"already {human_bytes(sizes[0])} lose more than {100 * request.drop:g} points: allow a "
            "larger --max-drop, or more --time to make it good"
        )
    return best


def _finish(work: _Work, net: Net) -> dict[str, Any]:
    """Packs, verifies and scores what ships, on the test pictures this once, and writes the folder."""
    folder, context, request, splits = work.folder, work.context, work.request, work.splits
    preprocess, classes = context.preprocess, splits.train.classes
    outputs = logits(net, splits.validation, preprocess).numpy()
    model = onnx.export(net, preprocess, classes, temperature(outputs, splits.validation.labels)).SerializeToString()
    packed = pack(contents_of(net, preprocess, classes, net.spec.family, model)).data
    run = engine.load(read(packed).onnx(), cores())
    found = answers(run, splits.validation, preprocess).argmax(axis=1)
    parity = compare(outputs.argmax(axis=1), found, splits.validation.labels, True)
    context.write("parity", **parity.to_json())
    if not parity.passed:
        raise ParityError(f"the packed file answers otherwise than the network; nothing was shipped, see {folder}")
    counted, before = cost(net), context.accuracy(work.before)
    entry = write_model(folder, model, f"{FLOAT}, clustered, {PACKED}", packed)
    write_network(folder, net, work.name, preprocess, classes)
    right = answers(run, splits.test, preprocess).argmax(axis=1) == splits.test.labels
    dropped = before - parity.exported_top1
    picture = splits.validation.batch(preprocess.size[0], [0])
    result: dict[str, Any] = {
        "version": __version__,
        "verb": request.verb,
        "status": "met" if dropped <= request.drop and len(packed) <= (request.size or len(packed)) else "not met",
        "folder": str(folder),
        "run": request.run,
        "data": work.data,
        "winner": {"name": work.name, "spec": net.spec.to_json(), "params": counted.params, "macs": counted.macs},
        "float_bytes": 4 * sum(parameter.numel() for parameter in work.before.parameters()),
        "validation": {"top1": parity.exported_top1, "before": before, "n": len(splits.validation)},
        "test": top1(right),
        "latency_ms": latency(model, picture, request.threads, LATENCY_SECONDS).to_json(),
        "shipped": entry,
        "seconds": {"total": round(work.watch.elapsed, 2)},
        "threads": request.threads,
        "seed": context.seed,
    }
    if splits.leaked.any() and not splits.leaked.all():
        result["test_clean"] = top1(right[~splits.leaked]) | {"duplicates": int(splits.leaked.sum())}
    write_json(folder / "result.json", result)
    return result
