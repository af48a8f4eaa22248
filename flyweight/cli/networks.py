"""The verbs about networks: what there are, what they cost, what they make of pictures before any training."""

import json
from pathlib import Path
from typing import Annotated

import typer

from flyweight.cli.options import Json, read_settings
from flyweight.errors import FlyweightError, UsageError


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
