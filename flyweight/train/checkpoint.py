"""The state of a training as one safetensors file, replaced in one step so that a crash leaves the old one whole."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flyweight.errors import FlyweightError


def write_atomically(path: Path, data: bytes) -> None:
    """Writes beside `path`, to the disk itself, then renames: readers see the old file or the new one, never a part."""
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def save_checkpoint(path: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Stores tensors and JSON values; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = save({name: t.detach().contiguous() for name, t in tensors.items()}, {"state": json.dumps(values)})
    write_atomically(path, data)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of `save_checkpoint`. Raises FlyweightError for a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return tensors, json.loads((file.metadata() or {})["state"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise FlyweightError(f"{path} is damaged ({error}); delete it to start this training again") from error


def restore(targets: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    """Copies stored tensors into live ones, name by name, strictly both ways."""
    if targets.keys() != stored.keys():
        odd = sorted(targets.keys() ^ stored.keys())
        raise FlyweightError(f"the checkpoint is of another network: {', '.join(odd[:3])} do not match")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(stored[name])
