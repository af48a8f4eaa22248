"""The verbs about runtimes: exports that are proven, what is measured."""

import json
from pathlib import Path
from typing import Annotated

import typer

from flyweight.cli.options import Json, numbers, words

DATA = "Pictures to judge by, as for fit; by default the run's own."


def export(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a model.safetensors with --data.")],
    to: Annotated[
        str,
        typer.Option(help="With commas: onnx, openvino, litert, ncnn, executorch, web; by default all that can be."),
    ] = "",
    formats: Annotated[str, typer.Option(help="With commas: float32, int8.")] = "float32,int8",
    out: Annotated[Path | None, typer.Option(help="The folder to write; by default the run's exports.")] = None,
    data: Annotated[str | None, typer.Option(help=DATA)] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Points of accuracy that int8 may lose; by default 1, or what chance explains.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Export a network for other runtimes; each file first answers the validation pictures, in its own runtime.

    Exit code 5 where one does not answer as the network does; such a file is not left.
    """
    from flyweight.exporting import export_run
    from flyweight.terminal import Progress, show_exports

    points = None if tolerance is None else tolerance / 100
    with Progress(quiet=as_json) as progress:
        summary = export_run(run, words(to), words(formats), out, data, points, progress.listen)
    show_exports(summary, as_json)


def bench(
    paths: Annotated[list[Path], typer.Argument(help="Runs' folders, a model.safetensors, exported files.")],
    engines: Annotated[str, typer.Option(help="With commas; by default all that are installed.")] = "",
    threads: Annotated[str, typer.Option(help="Numbers of cores, with commas.")] = "1",
    seconds: Annotated[float, typer.Option(help="How long each file is measured, in interleaved rounds.")] = 1.0,
    rounds: Annotated[int, typer.Option(help="How many rounds.")] = 5,
    batches: Annotated[str, typer.Option(help="Also pictures a second with so many at once: 1,8,32.")] = "",
    data: Annotated[str | None, typer.Option(help=DATA)] = None,
    as_json: Json = False,
) -> None:
    """Measure files in every runtime that is here: latency, its spread, throughput, cold start, memory, bytes."""
    from flyweight import benching
    from flyweight.terminal import Progress, show_bench

    request = benching.Request(
        words(engines), numbers(threads, "--threads"), seconds, rounds, numbers(batches, "--batches"), data
    )
    with Progress(quiet=as_json) as progress:
        cards = benching.bench(paths, request, progress.listen)
    if as_json:
        print(json.dumps(cards, indent=2))
        return
    for card in cards:
        show_bench(card)


def profile(
    engines: Annotated[str, typer.Option(help="With commas; by default the installed that export quickly.")] = "",
    threads: Annotated[str, typer.Option(help="Numbers of cores, with commas.")] = "1",
    formats: Annotated[str, typer.Option(help="With commas: float32, int8.")] = "float32,int8",
    time: Annotated[str, typer.Option(help="For each engine, format and number of threads.")] = "3m",
    out: Annotated[Path | None, typer.Option(help="By default profile-<machine>.json in the cache folder.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Measure 40 networks that it was made without.")] = False,
    as_json: Json = False,
) -> None:
    """Measure this machine's latency table, from which a network's latency is predicted here and elsewhere."""
    from flyweight.profiling import CHECK_NETS, default_path, profile_machine, read_request
    from flyweight.terminal import Progress, show_profile

    request = read_request(engines, formats, threads, time, CHECK_NETS if check else 0)
    with Progress(quiet=as_json) as progress:
        table, checked = profile_machine(request, progress.listen)
    path = out or default_path()
    table.write(path)
    show_profile(path, table, checked, as_json)
