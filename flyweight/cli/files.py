"""The verbs about files of weights: packed ones, and those of other libraries."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flyweight.cli.options import Json, read_settings
from flyweight.errors import FlyweightError, UsageError

if TYPE_CHECKING:
    from flyweight.net import Net

IMAGENET_MEAN, IMAGENET_STD = "0.485,0.456,0.406", "0.229,0.224,0.225"  # what most published weights were trained with


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
    write_new(path, data)
    whole = sum(each.nbytes for each in contents.tensors.values())
    if as_json:
        print(json.dumps({"file": str(path), "bytes": len(data), "tensor_bytes": whole}))
    else:
        print(f"{path}: {human_bytes(len(data))} ({len(data):,} bytes), of {human_bytes(whole)} in tensors")


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
    write_new(out, net_bytes(net, preprocess))
    print(f"{out}: {name} with the weights of {file}, by {library}'s names; mean {mean}, deviation {std}")


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
    write_new(out, save(tensors, {"format": "pt"}))
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


def write_new(path: Path, data: bytes) -> None:
    from flyweight.train.checkpoint import write_atomically

    if path.exists():
        raise UsageError(f"{path} exists already: choose another --out")
    try:
        write_atomically(path, data)
    except OSError as error:
        raise FlyweightError(f"{path} cannot be written: {error.strerror}") from error
