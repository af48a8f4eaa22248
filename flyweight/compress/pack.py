"""From a network, or an ONNX file of ours, to a packed file, and back; FORMAT.md describes the file.

Every tensor is written in each form that could suit it, and the shortest is kept.
"""

import copy
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from flyweight.errors import FlyweightError, UsageError
from flyweight.export.onnx import export
from flyweight.exported import FLOAT
from flyweight.graph import Shape, trace
from flyweight.net import Net, Spec
from flyweight.packed import SUFFIX, Packed, open_packed
from flyweight.packed.coder import BITS, LANES, ONE, Histogram, Ints
from flyweight.packed.container import Contents, Piece, folded, read, write
from flyweight.packed.damage import DamagedError
from flyweight.packed.models import MOST
from flyweight.packed.tensors import DTYPES, PARTS, Form, Numbers, keys, step_of, tensor, values_of
from flyweight.preprocess import Preprocess
from flyweight.run import load
from flyweight.ship import write_model, write_network
from flyweight.weights import load_net, load_preprocess, read_tensors
from flyweight.zoo import structure

SMALLEST = 64  # bytes of an ONNX tensor below which it stays in the skeleton
REMADE = 4  # how often a parameter may be made anew while a network is put together
STORED = "onnx:"  # begins the names of tensors that the ONNX file has and the network has not


class Encoder:
    """Writes what `packed.coder.Decoder` reads, the entropy coder's part backwards once all is known (`close`)."""

    def __init__(self) -> None:
        self.steps: list[tuple[Ints, Ints]] = []
        self.raw = bytearray()
        self.bits_of: defaultdict[str, float] = defaultdict(float)

    def code(self, histogram: Histogram, contexts: Ints, symbols: Ints | None) -> Ints:
        assert symbols is not None
        histogram.refresh()
        places = contexts * histogram.symbols + symbols
        widths = histogram.widths[places]
        self.steps.append((widths, histogram.starts[places] - (contexts << BITS)))
        self.bits_of[histogram.name] += float((BITS - np.log2(widths)).sum())
        return symbols

    def bits(self, widths: Ints, values: Ints | None) -> Ints:
        assert values is not None
        places = np.repeat(np.cumsum(widths), widths) - np.arange(int(widths.sum())) - 1  # from the first digit on
        self.plain(0, np.packbits(np.repeat(values, widths) >> places & 1).tobytes())
        return values

    def plain(self, length: int, given: bytes | None) -> bytes:
        assert given is not None
        self.raw += given
        return given

    @property
    def cost(self) -> float:
        """Bytes, as far as they are known before the end."""
        return len(self.raw) + sum(self.bits_of.values()) / 8

    def extend(self, other: "Encoder") -> None:
        """Appends what another has been given."""
        self.steps += other.steps
        self.raw += other.raw
        for name, bits in other.bits_of.items():
            self.bits_of[name] += bits

    def close(self) -> bytes:
        """The words of the entropy coder."""
        states = np.full(LANES, ONE, np.int64)
        words: list[Ints] = []
        for widths, starts in reversed(self.steps):
            for begin in reversed(range(0, len(widths), LANES)):
                width, start = widths[begin : begin + LANES], starts[begin : begin + LANES]
                state = states[: len(width)]
                high = (state >= width << BITS).nonzero()[0]
                words.append(state[high] & (ONE - 1))
                state[high] >>= BITS
                states[: len(width)] = (state // width << BITS) + state % width + start
        return np.concatenate([states >> BITS, states & (ONE - 1), *reversed(words)]).astype("<u2").tobytes()


@dataclass
class Packing:
    """A packed file, and where its bytes went: each tensor's form and its bytes by what they say."""

    data: bytes
    forms: dict[str, Form] = field(default_factory=dict)
    costs: dict[str, dict[str, float]] = field(default_factory=dict)


def pack(contents: Contents) -> Packing:
    """Contents as a packed file, read back and compared. Raises FlyweightError where they cannot be packed."""
    packing = _written(contents)
    try:
        back = read(packing.data)
    except DamagedError as error:  # it may be so small for what it holds that no reader would take it
        raise FlyweightError(f"{contents.name} cannot be packed: the file {error}") from error
    for name, values in contents.tensors.items():
        if back.tensors[name].tobytes() != values.tobytes() or back.tensors[name].dtype != values.dtype:
            raise FlyweightError(f"{contents.name} cannot be packed: {name} does not come back as it was")
    return packing


def packed_bytes(contents: Contents) -> int:
    """How many bytes `pack` would write, in less time: nothing is read back. Raises FlyweightError as `pack` does."""
    return len(_written(contents).data)


def _written(contents: Contents) -> Packing:
    encoder, numbers = Encoder(), Numbers()
    packing = Packing(b"")
    for name, values in contents.tensors.items():
        if values.dtype.name not in DTYPES:
            raise FlyweightError(f"{contents.name} cannot be packed: {name} is {values.dtype.name}")
        form, trial, numbers = _shortest(values, numbers)
        encoder.extend(trial)
        packing.forms[name] = form
        packing.costs[name] = {"raw": len(trial.raw)} | {key: bits / 8 for key, bits in trial.bits_of.items()}
    packing.data = write(contents, packing.forms.values(), encoder.close(), bytes(encoder.raw))
    return packing


def _shortest(values: NDArray, numbers: Numbers) -> tuple[Form, Encoder, Numbers]:
    """The form that writes a tensor in the fewest bytes, the tensor so written, and what is known of numbers then."""
    best: tuple[Form, Encoder, Numbers] | None = None
    for form in _forms(values, numbers):
        trial, known = Encoder(), copy.deepcopy(numbers)
        tensor(trial, known, form, values.dtype, values.shape, values)
        if best is None or trial.cost < best[1].cost:
            best = form, trial, known
    assert best is not None
    return best


def _forms(values: NDArray, numbers: Numbers) -> Iterator[Form]:
    """The forms that can hold a tensor and may suit it."""
    yield ["bytes"]
    if values.dtype == np.float32:
        yield ["floats", _significant(values)]
    if values.dtype == np.int32:
        yield ["ints"]
    if values.dtype.itemsize > 4 or values.size < SMALLEST:
        return
    found = np.unique(keys(values))
    zero = keys(np.zeros(1, values.dtype))[0]
    inner = len(found) - int(zero in found)
    on_grid = values.dtype == np.float32 and len(found) <= MOST and step_of(values_of(found, values.dtype)) is not None
    if len(found) <= min(MOST, values.size // 2):
        yield ["grid" if on_grid else "codes", len(found)]
    if inner < len(found):
        if values.dtype == np.float32:
            yield ["sparse", "floats", _significant(values)]
        if 1 <= inner <= min(MOST, values.size // 2):
            yield ["sparse", "grid" if on_grid else "codes", inner]
    if values.ndim > 1 and 2 <= values.shape[1] <= PARTS and values.shape[1] < values[0].size:
        parts = [np.ascontiguousarray(values[:, i : i + 1]) for i in range(values.shape[1])]
        yield ["parts", *(_shortest(part, numbers)[0] for part in parts)]


def _significant(values: NDArray) -> int:
    """How many bytes of sign and fraction, from the first on, say all of float32 values."""
    bits = np.bitwise_or.reduce(np.ascontiguousarray(values).view("<u4").ravel())
    return 3 if bits & 0xFF else 2 if bits & 0xFFFF else 1


def contents_of(
    net: Net, preprocess: Preprocess, classes: Sequence[str], name: str, model: bytes | None = None
) -> Contents:
    """What a packed file holds of a network: its tensors, and `model`, by default its float ONNX file.

    Of the ONNX file, tensors that are the network's, or the network's with batch normalisation folded, take no room.
    """
    if model is None:
        model = export(net, preprocess, classes).SerializeToString()
    tensors = {key: value.detach().cpu().contiguous().numpy() for key, value in net.state_dict().items()}
    contents = Contents(name, net.spec.to_json(), preprocess, tuple(classes), tensors)
    known: dict[bytes, Piece] = {value.tobytes(): ["tensor", key] for key, value in tensors.items()}
    for conv, norm, epsilon in _folds(net, net.spec.input):
        for part in ("kernel", "bias"):
            known.setdefault(folded(tensors, part, conv, norm, epsilon), [part, conv, norm, epsilon])
    return _with_model(contents, model, known, STORED)


def contents_of_onnx(model: bytes, name: str) -> Contents:
    """What a packed file holds of an ONNX file of ours, in whatever precision: its own tensors."""
    return _with_model(Contents(name, None, *_metadata(model, name), {}), model, {}, "")


def _metadata(model: bytes, name: str) -> tuple[Preprocess, tuple[str, ...]]:
    """Preprocessing and classes that an ONNX file of ours names."""
    try:
        metadata = {each.key: each.value for each in onnx.load_model_from_string(model).metadata_props}
        return Preprocess.from_json(json.loads(metadata["preprocess"])), tuple(json.loads(metadata["classes"]))
    except Exception as error:  # protobuf's own class, or whatever the metadata lacks
        raise UsageError(f"{name} is no ONNX file that flyweight wrote, so it cannot be packed") from error


def _with_model(contents: Contents, model: bytes, known: dict[bytes, Piece], prefix: str) -> Contents:
    """Adds an ONNX file, cut at its tensors, its classes and its preprocessing; unknown tensors are added as well."""
    holes: list[tuple[bytes, Piece]] = []
    for constant in onnx.load_model_from_string(model).graph.initializer:
        if len(constant.raw_data) < SMALLEST or constant.data_type == onnx.TensorProto.INT64:
            continue  # the latter are shapes and places, no weights
        if constant.raw_data not in known:
            contents.tensors[prefix + constant.name] = numpy_helper.to_array(constant)
            known[constant.raw_data] = ["tensor", prefix + constant.name]
        holes.append((constant.raw_data, known[constant.raw_data]))
    at, kept = 0, bytearray()
    for data, piece in [*holes, *((contents.piece([key]), [key]) for key in ("classes", "preprocess"))]:
        start = model.find(data, at)
        if start < 0:  # in another order or written otherwise: it stays where it is
            continue
        if start > at:
            contents.pieces.append(["skeleton", start - at])
            kept += model[at:start]
        contents.pieces.append(piece)
        at = start + len(data)
    if at < len(model):
        contents.pieces.append(["skeleton", len(model) - at])
    contents.skeleton = bytes(kept + model[at:])
    if contents.onnx() != model:
        raise FlyweightError(f"{contents.name} cannot be packed: its ONNX file does not come back as it was")
    return contents


def _folds(net: nn.Module, shape: Shape) -> Iterator[tuple[str, str, float]]:
    """Convolution, batch normalisation and epsilon wherever `fold_batchnorm` merges the two."""
    graph = trace(net, shape)
    by_name = {node.name: node for node in graph.nodes}
    for node in graph.nodes:
        before = by_name.get(node.inputs[0])
        if isinstance(node.leaf, nn.BatchNorm2d) and before is not None and isinstance(before.leaf, nn.Conv2d):
            yield before.path, node.path, node.leaf.eps


def contents_at(path: Path, classes: Sequence[str] = ()) -> Contents:
    """What `flyweight pack` packs of a run's folder, a model.safetensors or a model.onnx.

    A run that ships float32 is packed with its network, one that ships int8 as its ONNX file, one that ships a packed
    file as that. `classes` name those of a model.safetensors that does not. Raises UsageError.
    """
    if path.suffix == ".safetensors":
        metadata = read_tensors(path)[1]
        named = tuple(classes) or tuple(json.loads(metadata.get("classes", "[]")))
        net = load_net(path)
        if len(named) != net.num_classes:
            raise UsageError(
                f"{path} has {net.num_classes} classes and {len(named) or 'none'} of them named: --classes FILE with a "
                "name on each line"
            )
        return contents_of(net, load_preprocess(path), named, path.stem)
    if classes:
        raise UsageError(f"{path} names its classes itself: --classes is for a model.safetensors")
    if path.suffix == ".onnx":
        return replace(contents_of_onnx(_read(path), str(path)), name=path.stem)
    if path.suffix == SUFFIX:
        raise UsageError(f"{path} is packed already: flyweight unpack gives back what it holds")
    run = load(path)
    file, name = path / run.result["shipped"]["file"], run.result["winner"]["name"]
    if file.suffix == SUFFIX:
        return open_packed(file).contents
    model = _read(file)
    if run.result["shipped"]["format"] != FLOAT:
        return contents_of_onnx(model, name)
    return contents_of(load_net(path / "model.safetensors"), *_metadata(model, str(file)), name, model)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def unpack(packed: Packed, folder: Path) -> list[str]:
    """Writes what a packed file holds as a run leaves it: model.onnx and, of a network, model.safetensors; their names.

    Raises UsageError where the folder holds something already, FlyweightError where Spec and tensors do not fit.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not an empty folder: choose another --out")
    net = network_of(packed) if packed.spec is not None else None
    folder.mkdir(parents=True, exist_ok=True)
    if net is not None:
        write_network(folder, net, packed.name, packed.preprocess, packed.classes)
    write_model(folder, packed.onnx(), "", None)
    return sorted(each.name for each in folder.iterdir())


def network_of(packed: Packed) -> Net:
    """The network in a packed file, in evaluation mode. Raises FlyweightError where Spec and tensors do not fit."""
    tensors = {name: torch.tensor(each) for name, each in packed.tensors.items() if not name.startswith(STORED)}
    try:
        with torch.device("meta"), _at_most(REMADE * len(tensors)):  # no memory before the tensors are known to fit
            net = structure(Spec.from_json(packed.spec or {}))
        wanted = {name: (value.shape, value.dtype) for name, value in net.state_dict().items()}
        if wanted != {name: (value.shape, value.dtype) for name, value in tensors.items()}:
            raise ValueError("they differ in names, shapes or types")
        net.load_state_dict(tensors, assign=True)
    except (UsageError, RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise FlyweightError(f"{packed.path} holds other tensors than its Spec needs: {error}") from error
    return net.eval()


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Ends the construction of a network with more parameters than `count`: a Spec may ask for any number of layers."""
    made = 0

    def registered(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal made
        made += 1
        if made > count:
            raise ValueError("it has more layers")

    handle = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()
