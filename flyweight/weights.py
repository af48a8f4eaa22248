"""A network as a file: `model.safetensors`, with the Spec that rebuilds it in the metadata."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flyweight.errors import FlyweightError, UsageError
from flyweight.net import Net, Spec
from flyweight.preprocess import Preprocess
from flyweight.zoo import build


def net_bytes(net: Net, preprocess: Preprocess | None = None, classes: Sequence[str] = ()) -> bytes:
    """The network's tensors, its Spec, how its pictures are made ready, and its classes, as a safetensors file."""
    tensors = {name: t.detach().contiguous() for name, t in net.state_dict().items()}
    metadata = {"format": "pt", "spec": json.dumps(net.spec.to_json())}
    if preprocess is not None:
        metadata["preprocess"] = json.dumps(preprocess.to_json())
    if classes:
        metadata["classes"] = json.dumps(list(classes))
    return save(tensors, metadata)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. Raises UsageError where there is none."""
    if not path.exists():
        raise UsageError(f"{path} does not exist: check the path")
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise FlyweightError(f"{path} is no safetensors file or is damaged: {error}") from error


def load_net(path: Path) -> Net:
    """The network of a `model.safetensors`, in evaluation mode. Raises UsageError where there is none."""
    tensors, metadata = read_tensors(path)
    net = build(_spec(metadata, path))
    _fill(net, tensors, path)
    return net.eval()


def _told(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else " x ".join(map(str, tensor.shape)) or "a number"


def load_preprocess(path: Path) -> Preprocess:
    """How pictures are made ready for the network in a file. Raises UsageError where it does not say."""
    _, metadata = read_tensors(path)
    if "preprocess" not in metadata:
        raise UsageError(f"{path} does not say how pictures are made ready for it: flyweight weights import does")
    return Preprocess.from_json(json.loads(metadata["preprocess"]))


def load_into(net: Net, path: Path) -> None:
    """Fills a network with the tensors of a file. Raises UsageError, naming a tensor, where they do not fit exactly."""
    _fill(net, read_tensors(path)[0], path)


def _fill(net: Net, tensors: Mapping[str, Tensor], path: Path) -> None:
    own = net.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        ours, theirs = own.get(name), tensors.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            here, there = _told(ours), _told(theirs)
            raise UsageError(f"{path} does not fit this network: {name} is {there} there and {here} here")
    net.load_state_dict(tensors, strict=True)


def stored_spec(path: Path) -> Spec | None:
    """The Spec of the network in a file, or None where it states none. Raises UsageError where there is no file."""
    metadata = read_tensors(path)[1]
    return _spec(metadata, path) if "spec" in metadata else None


def load_spec(path: Path) -> Spec:
    """The Spec of the network in a file. Raises UsageError where there is none."""
    return _spec(read_tensors(path)[1], path)


def _spec(metadata: Mapping[str, str], path: Path) -> Spec:
    if "spec" not in metadata:
        raise UsageError(f"{path} has no Spec in its metadata, so it was not written by flyweight")
    return Spec.from_json(json.loads(metadata["spec"]))
