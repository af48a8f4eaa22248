"""The command line: thin verbs over the library. Nothing heavy is imported before a verb needs it."""

import json
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from flyweight import __version__, cli_runtimes
from flyweight.errors import BudgetNotMet, FlyweightError, Interrupted, UsageError

if TYPE_CHECKING:
    from flyweight.net import Net

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="From labelled pictures and a budget to the smallest, fastest image classifier that meets it.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
IMAGENET_MEAN, IMAGENET_STD = "0.485,0.456,0.406", "0.229,0.224,0.225"  # what most published weights were trained with


def main() -> None:
    """Runs the command line; a failure is one sentence and its exit code, never a traceback."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(standalone_mode=False)  # the option parser turns an exit, and Ctrl-C, into a code of its own
    except (KeyboardInterrupt, typer.Abort):
        code = Interrupted.exit_code
    except FlyweightError as error:
        _fail(str(error), error.exit_code)
    except MemoryError:
        _fail("there is not enough memory: close other programs or use fewer or smaller pictures", 1)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone, which is not worth a word
        sys.exit(1)
    except Exception as error:
        message = getattr(error, "format_message", None)  # a usage error of the option parser's
        if message is None:
            raise
        if not message():
            sys.exit(UsageError.exit_code)  # the help has been printed
        _fail(message(), UsageError.exit_code)
    if code == Interrupted.exit_code:
        _fail("interrupted", code)
    sys.exit(code)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> NoReturn:
    print(f"flyweight: {message}", file=sys.stderr)
    sys.exit(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"flyweight {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command()
def fit(
    data: Annotated[
        str | None, typer.Argument(help="A folder of class folders, cifar10:PATH, idx:PATH, or demo.")
    ] = None,
    budget: Annotated[
        list[str] | None, typer.Option(help='Limits such as "latency<=2ms, size<=500KB"; may be repeated.')
    ] = None,
    time: Annotated[str, typer.Option(help="How long the whole job may take: 90s, 10m, 1.5h.")] = "10m",
    out: Annotated[Path | None, typer.Option(help="The run's folder; by default runs/<data>-<time>.")] = None,
    threads: Annotated[int, typer.Option(help="Cores that the latency is measured on.")] = 1,
    seed: Annotated[int, typer.Option(help="Of all random choices.")] = 0,
    pretrained: Annotated[
        str | None,
        typer.Option(
            metavar="auto|none|FILE",
            help="Also start from weights: of a model.safetensors; auto: cached ones, else downloads at most 60 MB. "
            "By default cached ones, without the network.",
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="The runtime to ship for, such as openvino; auto: the fastest of those installed.")
    ] = "onnxruntime",
    device: Annotated[
        Path | None,
        typer.Option(help="Budget for another machine: the latency table that flyweight profile made there."),
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the interrupted run in this folder.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show candidates and plan; train nothing.")] = False,
    skip_corrupt: Annotated[
        bool, typer.Option("--skip-corrupt", help="Leave out pictures that cannot be read.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Find, train, compress, verify and measure the best classifier within a budget.

    Exit codes: 0 budget met, 1 failure, 2 usage, 3 budget not met, 4 data refused, 5 export differs, 130 interrupted.
    """
    from flyweight import fitting
    from flyweight.search.budget import GRAMMAR
    from flyweight.terminal import Progress, show_outlook, show_result

    if resume is not None and (data is not None or budget or pretrained is not None):
        raise UsageError("--resume takes neither data nor a budget nor weights: the run knows them")
    if resume is None and data is None:
        raise UsageError("which pictures? flyweight fit DATA --budget BUDGET (or --resume DIR)")
    if resume is None and not budget:
        raise UsageError(f'what may it cost? --budget "latency<=2ms, size<=500KB"; {GRAMMAR}')
    if dry_run and data is not None:
        show_outlook(fitting.outlook(data, budget or (), time, threads, pretrained), as_json)
        return
    with Progress(quiet=as_json) as progress:
        try:
            if resume is not None:
                run = fitting.resume(resume, progress.listen)
            else:
                assert data is not None
                told = progress.listen
                run = fitting.fit(
                    data, budget or (), time, out, threads, seed, skip_corrupt, told, pretrained, engine, device
                )
        except Interrupted as stop:
            _fail(str(stop), stop.exit_code)
    show_result(run, as_json)
    if not run.met:
        raise BudgetNotMet(_missed(run.result["budget"], run.folder))


def _missed(budget: Iterable[dict[str, Any]], folder: Path) -> str:
    from flyweight.units import budget_value

    missed = [
        f"{line['name']} is {budget_value(line['name'], line['measured'])} "
        f"instead of {budget_value(line['name'], line['limit'])} "
        f"({100 * abs(line['measured'] / line['limit'] - 1):.0f} % short)"
        for line in budget
        if not line["met"]
    ]
    return f"the budget is not met: {'; '.join(missed)}. The nearest classifier is in {folder}"


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="A run's folder, a model.onnx or a packed .fly.")],
    images: Annotated[list[Path], typer.Argument(help="Pictures.")],
    top: Annotated[int, typer.Option(help="How many classes to show.")] = 5,
    as_json: Json = False,
) -> None:
    """Classify pictures."""
    from flyweight.run import classifier

    known = classifier(model)
    if top < 1:
        raise UsageError(f"--top must be at least 1, not {top}")
    rows = []
    for image, row in zip(images, known.predict_proba(list(images)), strict=True):
        best = row.argsort()[::-1][:top]
        rows.append(
            {"image": str(image), "top": [{"class": known.classes[i], "probability": float(row[i])} for i in best]}
        )
    if as_json:
        print(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    for row in rows:
        print(
            f"{row['image']}: " + ", ".join(f"{each['class']} {100 * each['probability']:.1f} %" for each in row["top"])
        )


@app.command()
def train(
    data: Annotated[
        str | None, typer.Argument(help="A folder of class folders, cifar10:PATH, idx:PATH, or demo.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The network; flyweight models lists them.")] = None,
    width: Annotated[float | None, typer.Option(help="Width multiplier; by default the name's own.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Side of the input in pixels.")] = None,
    arg: Annotated[
        list[str] | None, typer.Option(help="An argument of the network, such as se=0.25; may be repeated.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="How often to see the pictures; by default 10 times.")] = None,
    time: Annotated[str | None, typer.Option(help="How long to train instead: 90s, 10m, 1.5h.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="default, baseline, or fine-tuning (the usual with --pretrained).")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field of the recipe, such as learning_rate=0.1; may be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all random choices.")] = 0,
    threads: Annotated[int | None, typer.Option(help="Cores to train on; by default all.")] = None,
    pretrained: Annotated[
        str | None,
        typer.Option(help="Start from weights: auto (the best published), a run's folder, a file, or a network."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    sync_batchnorm: Annotated[
        bool, typer.Option("--sync-batchnorm", help="Under torchrun: batch statistics over all processes.")
    ] = False,
    checkpoint_every: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 15.0,
    out: Annotated[Path | None, typer.Option(help="The folder; by default runs/train-<model>-<time>.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the interrupted training in this folder.")] = None,
    skip_corrupt: Annotated[
        bool, typer.Option("--skip-corrupt", help="Leave out pictures that cannot be read.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train one network. Under torchrun, several processes share each batch."""
    import os

    from flyweight import training
    from flyweight.terminal import Progress, show_training

    if resume is not None and (data is not None or model is not None):
        raise UsageError("--resume takes neither data nor a model: the run knows them")
    if resume is None and (data is None or model is None):
        raise UsageError("which network on which pictures? flyweight train DATA --model NAME (or --resume DIR)")
    first = os.environ.get("RANK", "0") == "0"
    with Progress(quiet=as_json or not first) as progress:
        try:
            if resume is not None:
                result = training.resume(resume, progress.listen)
            else:
                assert data is not None
                assert model is not None
                span = training.duration(epochs, time)
                request = training.Request(
                    source=data,
                    model=model,
                    args=read_settings(arg or ()) | ({} if width is None else {"width": width}),
                    resolution=resolution,
                    epochs=span[0],
                    seconds=span[1],
                    recipe=recipe,
                    changes=read_settings(changes or ()),
                    seed=seed,
                    threads=threads,
                    pretrained=pretrained,
                    device=device,
                    sync_batchnorm=sync_batchnorm,
                    skip_corrupt=skip_corrupt,
                    checkpoint_seconds=checkpoint_every,
                )
                result = training.train_network(request, out, progress.listen)
        except Interrupted as stop:
            _fail(str(stop), stop.exit_code)
    if first:
        show_training(result, as_json)


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="A run's folder, a model.onnx, a packed .fly or a model.safetensors.")],
    data: Annotated[str, typer.Argument(help="Pictures of the classes that the model knows, as for fit.")],
    split: Annotated[str, typer.Option(help="test, validation or train.")] = "test",
    threads: Annotated[int, typer.Option(help="Cores to work on.")] = 1,
    skip_corrupt: Annotated[
        bool, typer.Option("--skip-corrupt", help="Leave out pictures that cannot be read.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Score a classifier on pictures: top-1 and top-5, by class, confusion, calibration error, images a second."""
    from flyweight import evaluation
    from flyweight.terminal import show_evaluation

    if threads < 1:
        raise UsageError(f"--threads must be at least 1, not {threads}")
    show_evaluation(evaluation.evaluate(model, data, split, threads, skip_corrupt), as_json)


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="A shell-style pattern such as 'squeeze*'.")] = "*",
    as_json: Json = False,
) -> None:
    """List the networks, with parameters and multiply-accumulates at their usual input."""
    from flyweight.costs import cost
    from flyweight.terminal import print_table
    from flyweight.zoo import list_models, usual_spec

    names = list_models(pattern)
    if not names:
        raise UsageError(f"no model matches {pattern!r}; flyweight models lists all")
    rows = []
    for name in names:
        spec = usual_spec(name)
        counted = cost(spec)
        row = {"name": name, "family": spec.family, "size": spec.input[1], "classes": spec.args["num_classes"]}
        rows.append(row | {"params": counted.params, "macs": counted.macs})
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        print_table(rows)


@app.command()
def cost(
    name: Annotated[str, typer.Argument(help="A network's name; flyweight models lists them.")],
    width: Annotated[float | None, typer.Option(help="Width multiplier; by default the name's own.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Side of the input in pixels.")] = None,
    classes: Annotated[int, typer.Option(help="Number of classes.")] = 1000,
    arg: Annotated[
        list[str] | None,
        typer.Option(help="An argument of the network, such as se=0.25 or bypass=simple; may be repeated."),
    ] = None,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="One line for each layer.")] = False,
    as_json: Json = False,
) -> None:
    """Count a network exactly: parameters, multiply-accumulates, bytes, memory, receptive field."""
    from flyweight.costs import cost as count
    from flyweight.terminal import show_cost
    from flyweight.zoo import spec_of

    args = read_settings(arg or ())
    if width is not None:
        args["width"] = width
    spec = spec_of(name, size=resolution, num_classes=classes, **args)
    show_cost(name, spec, count(spec), per_layer, as_json)


def read_settings(texts: Iterable[str]) -> dict[str, Any]:
    """The settings in texts of the form name=value."""
    return {name: read_value(text) for name, text in map(_name_and_text, texts)}


def _name_and_text(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise UsageError(f"give name=value, not {text!r}")
    return name, value


def read_value(text: str) -> Any:
    """JSON where the text is some (0.25, true, [1, 2]), else the word that it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_values(text: str) -> list[Any]:
    """The values between commas."""
    return [read_value(each) for each in text.split(",")]


@app.command()
def tables(
    check: Annotated[bool, typer.Option("--check", help="Fail if a figure differs without a reason.")] = False,
    as_json: Json = False,
) -> None:
    """Compare the papers' published tables with our own counts, and say why where they differ."""
    from flyweight.tables import rows
    from flyweight.terminal import show_tables

    found = rows()
    show_tables(found, as_json)
    wrong = [row for row in found if not row.holds]
    if check and wrong:
        first = wrong[0]
        raise FlyweightError(
            f"{len(wrong)} of {len(found)} figures differ without a reason; the first: {first.source}, {first.what}, "
            f"{first.figure} published, {first.ours:.7g} counted"
        )


@app.command()
def embed(
    model: Annotated[
        str,
        typer.Argument(help="A run's folder, a model.safetensors, or the name of a network with published weights."),
    ],
    data: Annotated[str, typer.Argument(help="Pictures, as for fit.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("features"),
    form: Annotated[
        str,
        typer.Option(
            "--format", metavar="npy|parquet", help="npy: features.npy and features.csv; or one Parquet file."
        ),
    ] = "npy",
    skip_corrupt: Annotated[
        bool, typer.Option("--skip-corrupt", help="Leave out pictures that cannot be read.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a network's frozen features of pictures, and what a linear probe and the nearest neighbour make of them."""
    import numpy as np

    from flyweight import features
    from flyweight.data import open_source, prepare
    from flyweight.search.donor import find_donor
    from flyweight.terminal import show_features

    if form not in features.FORMS:
        raise UsageError(f"--format is {' or '.join(features.FORMS)}, not {form!r}")
    if form == "parquet":
        features.arrow_modules()  # what is missing is told before anything is done
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not an empty folder: choose another --out")
    source = open_source(data)
    donor = find_donor(model)
    preprocess = donor.preprocess()
    if source.channels != preprocess.channels:
        raise UsageError(f"{data} has {source.channels} channels and {model} takes {preprocess.channels}")
    splits = prepare(source, [preprocess.size[0]], skip_corrupt=skip_corrupt)
    train, validation, test = features.embed(donor.net(), splits, preprocess)
    files = features.write(out, [train, validation, test], source.classes, form)
    clean = test.chosen(np.flatnonzero(~splits.leaked))
    judged = features.judge(train, validation, clean)
    show_features(files, donor.told(), train.values.shape[1], judged, as_json)


@app.command()
def sweep(
    model: Annotated[str | None, typer.Argument(help="A network's name; flyweight models lists them.")] = None,
    data: Annotated[str | None, typer.Argument(help="Pictures, as for fit.")] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            help="name=value,value,…: an argument of the network, a field of the recipe, or resolution. "
            "May be repeated: every combination is trained."
        ),
    ] = None,
    arg: Annotated[list[str] | None, typer.Option(help="name=value that all trainings share; may be repeated.")] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of each combination.")] = 3,
    time: Annotated[str | None, typer.Option(help="How long the whole sweep may take; by default 20m.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Of each training, however long all take.")] = None,
    out: Annotated[Path | None, typer.Option(help="The sweep's folder; by default runs/sweep-<model>-<time>.")] = None,
    threads: Annotated[int, typer.Option(help="Cores that the latency is measured on.")] = 1,
    resume: Annotated[Path | None, typer.Option(help="Go on with the interrupted sweep in this folder.")] = None,
    skip_corrupt: Annotated[
        bool, typer.Option("--skip-corrupt", help="Leave out pictures that cannot be read.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a network along a few axes under equal conditions: accuracy with its spread, cost, latency, figures."""
    from flyweight import sweep as study
    from flyweight.terminal import Progress, show_sweep

    if resume is not None and (model is not None or vary or arg):
        raise UsageError("--resume takes neither a model nor what to vary: the sweep knows them")
    if epochs is not None and time is not None:
        raise UsageError("--epochs and --time exclude each other")
    if resume is None and (model is None or data is None):
        raise UsageError("which network, which pictures? flyweight sweep NAME DATA --vary width=0.25,0.5,1.0")
    with Progress(quiet=as_json) as progress:
        try:
            if resume is not None:
                result = study.resume(resume, time, progress.listen)
            else:
                assert model is not None
                assert data is not None
                varied = {name: read_values(text) for name, text in map(_name_and_text, vary or ())}
                fixed = read_settings(arg or ())
                result = study.sweep(
                    model,
                    data,
                    varied,
                    time or "20m",
                    seeds,
                    fixed,
                    epochs,
                    out,
                    threads,
                    skip_corrupt,
                    progress.listen,
                )
        except Interrupted as stop:
            _fail(str(stop), stop.exit_code)
    show_sweep(result, as_json)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A finished run's folder.")]) -> None:
    """Write a run's report.html again from its records."""
    from flyweight.report import write_report

    print(write_report(run))


@app.command()
def compress(
    run: Annotated[Path, typer.Argument(help="The folder of a finished flyweight fit or flyweight train.")],
    to_size: Annotated[
        str | None, typer.Option(help="What the packed file may have, such as 450KB; by default as little as it can.")
    ] = None,
    max_drop: Annotated[float, typer.Option(help="Points of validation accuracy that may be lost.")] = 0.5,
    macs: Annotated[
        float | None, typer.Option(help="First prune channels to this share of the multiply-accumulates.")
    ] = None,
    density: Annotated[float | None, typer.Option(help="First prune weights to this share.")] = None,
    time: Annotated[str, typer.Option(help="How long each step may train to make good what it lost.")] = "60s",
    threads: Annotated[int, typer.Option(help="Cores that latency is measured on.")] = 1,
    out: Annotated[Path | None, typer.Option(help="The folder; by default runs/compress-<run>-<time>.")] = None,
    as_json: Json = False,
) -> None:
    """Make a trained network smaller: prune, cluster, repair, pack; each step measured.

    Exit codes as for fit; 3 where the size or the drop is not kept.
    """
    from flyweight.compressing import Request, compress_run
    from flyweight.search.budget import Budget, parse_time
    from flyweight.terminal import Progress, show_compression

    size = Budget.parse(f"size<={to_size}").limits[0].value if to_size else None
    seconds = parse_time(time)
    request = Request(str(run), None if size is None else int(size), max_drop / 100, macs, density, seconds, threads)
    with Progress(quiet=as_json) as progress:
        try:
            result = compress_run(request, out, progress.listen)
        except Interrupted as stop:
            _fail(str(stop), stop.exit_code)
    show_compression(result, as_json)
    if result["status"] != "met":
        lost = 100 * (result["validation"]["before"] - result["validation"]["top1"])
        raise BudgetNotMet(
            f"{lost:.2f} points are lost instead of at most {max_drop:g}: allow more bytes or more --time"
        )


@app.command()
def pack(
    model: Annotated[Path, typer.Argument(help="A run's folder, a model.safetensors or a model.onnx.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; by default <model>.fly, here.")] = None,
    classes: Annotated[
        Path | None, typer.Option(help="Names of the classes, one a line, for a model.safetensors without.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a classifier, bit for bit, into one small file that runs without torch."""
    from flyweight.compress.pack import contents_at, pack
    from flyweight.packed import SUFFIX
    from flyweight.units import human_bytes

    contents = contents_at(model, _lines(classes) if classes else ())
    path = out or Path((model.resolve().name if model.is_dir() else model.stem) + SUFFIX)
    data = pack(contents).data
    _write_new(path, data)
    whole = sum(each.nbytes for each in contents.tensors.values())
    if as_json:
        print(json.dumps({"file": str(path), "bytes": len(data), "tensor_bytes": whole}))
    else:
        print(f"{path}: {human_bytes(len(data))} ({len(data):,} bytes), of {human_bytes(whole)} in tensors")


@app.command()
def unpack(
    file: Annotated[Path, typer.Argument(help="A packed file.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
) -> None:
    """Write what a packed file holds, bit for bit: model.onnx, and of a network its tensors."""
    from flyweight.compress.pack import unpack
    from flyweight.packed import open_packed

    print(f"{out}: {', '.join(unpack(open_packed(file), out))}")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as text: {error}") from error


for verb in (cli_runtimes.export, cli_runtimes.bench, cli_runtimes.profile):
    app.command()(verb)

weights = typer.Typer(no_args_is_help=True, help="Take weights from other libraries, and give them back.")
app.add_typer(weights, name="weights")


@weights.command("import")
def import_weights(
    file: Annotated[Path, typer.Argument(help="Another library's weights: .safetensors, or .pth of tensors alone.")],
    name: Annotated[str, typer.Option("--as", help="Our network; flyweight models lists them.")],
    arg: Annotated[
        list[str] | None,
        typer.Option(help="An argument of the network, such as padding=same or num_classes=10; may be repeated."),
    ] = None,
    resolution: Annotated[int | None, typer.Option(help="Side of the input in pixels; by default the usual.")] = None,
    mean: Annotated[str, typer.Option(help="Of each channel, or one for all, of values from 0 to 1.")] = IMAGENET_MEAN,
    std: Annotated[str, typer.Option(help="The deviation, likewise.")] = IMAGENET_STD,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("model.safetensors"),
) -> None:
    """Read another library's weights by name, strictly, and write them with all that rebuilds the network."""
    from flyweight import foreign
    from flyweight.preprocess import Preprocess
    from flyweight.weights import net_bytes
    from flyweight.zoo import build, spec_of

    spec = spec_of(name, size=resolution, **read_settings(arg or ()))
    channels, height, width = spec.input
    preprocess = Preprocess((height, width), channels, _levels(mean, channels), _levels(std, channels))
    net = build(spec)
    library = foreign.take(net, foreign.read_weights(file))
    _write_new(out, net_bytes(net, preprocess))
    print(f"{out}: {name} with the weights of {file}, by {library}'s names; mean {mean}, deviation {std}")


@weights.command("export")
def export_weights(
    file: Annotated[Path, typer.Argument(help="A model.safetensors.")],
    to: Annotated[str, typer.Option(help="The library: torchvision, timm, cadene or pytorchcv.")],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
) -> None:
    """Write a network's weights under another library's names, for its own networks to load."""
    from safetensors.torch import save

    from flyweight import foreign
    from flyweight.weights import load_net

    net = load_net(file)
    tensors = foreign.give(net, to)
    _write_new(out, save(tensors, {"format": "pt"}))
    print(f"{out}: {len(tensors)} tensors under {to}'s names")
    if to == "timm":
        print(_describe_to_timm(net, file, out))


def _describe_to_timm(net: "Net", file: Path, out: Path) -> str:
    """Writes the config.json by which timm alone loads the folder, where it can; says what was done."""
    from flyweight.ship import write_json
    from flyweight.timm_models import native_config
    from flyweight.weights import load_preprocess, read_tensors

    path = out.parent / "config.json"
    config = native_config(net, load_preprocess(file) if "preprocess" in read_tensors(file)[1] else None)
    if config is None:
        return f"no config.json: timm has no {net.spec.family} that computes the same"
    if out.name != "model.safetensors":
        return "no config.json: timm loads a folder by its model.safetensors, so name --out FOLDER/model.safetensors"
    if path.exists():
        return f"{path} was there already and stays as it is"
    write_json(path, config)
    return f"{path}: timm.create_model('local-dir:{out.parent}', pretrained=True) loads it"


def _levels(text: str, channels: int) -> tuple[float, ...]:
    """Numbers with commas between them, for values from 0 to 1, in units of 0 … 255; one stands for all channels."""
    try:
        values = [round(255 * float(each), 6) for each in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, channels):
        raise UsageError(f"--mean and --std take one number, or {channels} with commas between them, not {text!r}")
    return tuple(values * channels)[:channels]


def _write_new(path: Path, data: bytes) -> None:
    from flyweight.train.checkpoint import write_atomically

    if path.exists():
        raise UsageError(f"{path} exists already: choose another --out")
    try:
        write_atomically(path, data)
    except OSError as error:
        raise FlyweightError(f"{path} cannot be written: {error.strerror}") from error
