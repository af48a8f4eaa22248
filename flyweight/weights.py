"""A network as a file: `model.safetensors`, with the Spec that rebuilds it in the metadata."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from flyweight.create import build
from flyweight.errors import FlyweightError, UsageError
from flyweight.net import Net, Spec


def net_bytes(net: Net) -> bytes:
    """The network's tensors and Spec as the bytes of a safetensors file."""
    if net.spec is None:
        raise ValueError("only a network built from a Spec can be saved")
    tensors = {name: t.detach().contiguous() for name, t in net.state_dict().items()}
    return save(tensors, {"format": "pt", "spec": json.dumps(net.spec.to_json())})


def load_net(path: Path) -> Net:
    """The network of a `model.safetensors`, in evaluation mode. Raises UsageError where there is none."""
    if not path.exists():
        raise UsageError(f"{path} does not exist: check the path")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise FlyweightError(f"{path} is no safetensors file or is damaged: {error}") from error
    if "spec" not in metadata:
        raise UsageError(f"{path} has no Spec in its metadata, so it was not written by flyweight")
    net = build(Spec.from_json(json.loads(metadata["spec"])))
    net.load_state_dict(tensors, strict=True)
    return net.eval()
