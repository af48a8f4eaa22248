"""The verbs that train, and those about what was trained."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from flyweight.cli.options import Json, fail, name_and_text, read_settings, read_values
from flyweight.errors import BudgetNotMet, Interrupted, UsageError


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
            fail(str(stop), stop.exit_code)
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
            fail(str(stop), stop.exit_code)
    if first:
        show_training(result, as_json)


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
                varied = {name: read_values(text) for name, text in map(name_and_text, vary or ())}
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
            fail(str(stop), stop.exit_code)
    show_sweep(result, as_json)


def report(run: Annotated[Path, typer.Argument(help="A finished run's folder.")]) -> None:
    """Write a run's report.html again from its records."""
    from flyweight.report import write_report

    print(write_report(run))


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
            fail(str(stop), stop.exit_code)
    show_compression(result, as_json)
    if result["status"] != "met":
        lost = 100 * (result["validation"]["before"] - result["validation"]["top1"])
        raise BudgetNotMet(
            f"{lost:.2f} points are lost instead of at most {max_drop:g}: allow more bytes or more --time"
        )
