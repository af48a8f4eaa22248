"""The state of a training as a safetensors file that a crash leaves whole, and whose damage is noticed."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flyweight.errors import FlyweightError

Stored = tuple[dict[str, Tensor], dict[str, Any]]


def write_atomically(path: Path, data: bytes) -> None:
    """Writes beside `path`, to the disk itself, then renames: readers see the old file or the new one, never a part."""
    temporary = _write_beside(path, data)
    temporary.replace(path)
    _settle(path.parent)


def _write_beside(path: Path, data: bytes) -> Path:
    """Writes `path`.part, to the disk itself; leaves nothing of it where that fails."""
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _settle(folder: Path) -> None:
    """Brings a folder's renames to the disk itself, where the system has a way to."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def earlier(path: Path) -> Path:
    """Where the checkpoint before the one at `path` is kept."""
    return path.with_name(f"{path.stem}.earlier{path.suffix}")


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Stores tensors and JSON values with their checksum; creates the folder. What was there stays as `earlier`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    state = json.dumps(values)
    temporary = _write_beside(path, save(kept, {"state": state, "sha256": _checksum(kept, state)}))
    if path.exists():
        path.replace(earlier(path))
    temporary.replace(path)
    _settle(path.parent)


def load_checkpoint(path: Path) -> Stored:
    """The inverse of `save_checkpoint`. Raises FlyweightError for a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            metadata = file.metadata() or {}
        if _checksum(tensors, metadata["state"]) != metadata["sha256"]:
            raise ValueError("its checksum is another")
        return tensors, json.loads(metadata["state"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise FlyweightError(f"{path} is damaged ({error}); delete it to start this training again") from error


def load_latest(path: Path, note: Callable[[str], None]) -> Stored | None:
    """The checkpoint at `path`, else the one before it; None where there is neither.

    A damaged one is passed over with a `note`, and removed so that it never takes the place of the whole one. Raises
    FlyweightError where no whole one is left.
    """
    there = [each for each in (path, earlier(path)) if each.exists()]
    damage: list[FlyweightError] = []
    for each in there:
        try:
            found = load_checkpoint(each)
        except FlyweightError as error:
            damage.append(error)
            continue
        if damage:
            path.unlink()
            note(f"{path.name} was damaged: the training goes on from the checkpoint before it")
        return found
    if len(damage) == 2:
        raise FlyweightError(
            f"{path} and {earlier(path).name} are both damaged; delete them to start this training again"
        ) from damage[0]
    if damage:
        raise damage[0]
    return None


def _checksum(tensors: Mapping[str, Tensor], state: str) -> str:
    """SHA-256 of the values and of all tensors by name, shape and bytes."""
    digest = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def restore(targets: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Copies stored tensors into live ones, name by name, strictly both ways."""
    odd = sorted(targets.keys() ^ stored.keys())
    odd += [name for name in targets.keys() & stored.keys() if targets[name].shape != stored[name].shape]
    if odd:
        raise FlyweightError(f"the checkpoint is of another network: {', '.join(odd[:3])} do not match")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(stored[name])
