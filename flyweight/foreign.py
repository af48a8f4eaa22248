"""Weights under the names that other libraries give them: into our networks and out again, by name, strictly both ways.

A family's `NAMES` says for each library what our modules are called there, as `Rules`, or as a function from the
family's arguments to them; its `SWAPPED`, which of our weights belongs there to a linear layer instead of a 1 × 1
convolution, or the other way round. The order of tensors never decides.
"""

import contextlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flyweight import zoo
from flyweight.errors import FlyweightError, UsageError
from flyweight.net import Net, Rules
from flyweight.weights import read_tensors

COUNTER = "num_batches_tracked"  # which older files lack, and nothing needs
WRAPPERS = ("state_dict", "model", "model_state_dict")  # keys under which training scripts keep the weights


def libraries(net: Net) -> list[str]:
    """The libraries that have a name for every tensor of this network."""
    found = []
    for library in _known(net):
        with contextlib.suppress(UsageError):
            names(net, library)
            found.append(library)
    return found


def names(net: Net, library: str) -> dict[str, str]:
    """Our name → theirs for every tensor of the network. Raises UsageError where the library has none."""
    known = _known(net)
    if library not in known:
        raise UsageError(f"{library}'s names for {net.spec.family} are not known; known: {', '.join(known) or 'none'}")
    rules = known[library]
    if not isinstance(rules, list):
        rules = rules(net.spec.args)
    found: dict[str, str] = {}
    for ours in net.state_dict():
        path, _, tensor = ours.rpartition(".")
        found[ours] = f"{_translate(path, rules, library)}.{tensor}"
    if len(set(found.values())) < len(found):
        raise ValueError(f"{library}'s names for {net.spec.family} give one name to two tensors")
    return found


def _known(net: Net) -> "Mapping[str, Rules | Callable[[Mapping[str, Any]], Rules]]":
    return getattr(zoo.families()[net.spec.family], "NAMES", {})


def _translate(path: str, rules: Rules, library: str) -> str:
    for pattern, theirs in rules:
        match = re.fullmatch(pattern, path)
        if match:
            return match.expand(theirs) if isinstance(theirs, str) else theirs(match)
    raise UsageError(f"{library} has no network of this form: it has no name for {path}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, or of a .pth through torch's weights-only loader, which runs no code of the file.

    Raises UsageError where there is none, FlyweightError where the file is damaged or holds more than tensors.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    if not path.exists():
        raise UsageError(f"{path} does not exist: check the path")
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises all kinds on a damaged or a hostile file
        remedy = "it is damaged, was not written by torch.save, or holds other things than tensors: use .safetensors"
        raise FlyweightError(f"{path} cannot be read as weights alone: {remedy}") from error
    for wrapper in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise FlyweightError(f"{path} holds something else than named tensors")
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}


def take(net: Net, tensors: Mapping[str, Tensor]) -> str:
    """Fills a network with tensors under another library's names, and returns that library.

    Raises UsageError, naming the tensors that are missing, left over or of another shape, where no library fits.
    """
    own = net.state_dict()
    misfits: dict[str, list[str]] = {}
    for library in libraries(net):
        known = names(net, library)
        misfits[library] = _misfit(own, known, tensors)
        if not misfits[library]:
            counters = {ours: own[ours] for ours in own if ours.endswith(COUNTER)}
            found = {
                ours: tensors[theirs].reshape(own[ours].shape) for ours, theirs in known.items() if theirs in tensors
            }
            net.load_state_dict(counters | found, strict=True)
            return library
    if not misfits:
        raise UsageError(f"no other library is known to have {net.spec.family} in this form")
    nearest = min(misfits, key=lambda library: len(misfits[library]))
    told = misfits[nearest]
    more = f", and {len(told) - 3} more" if len(told) > 3 else ""
    raise UsageError(f"the weights do not fit {net.spec.family} by {nearest}'s names: {'; '.join(told[:3])}{more}")


def give(net: Net, library: str) -> dict[str, Tensor]:
    """The network's tensors under another library's names. Raises UsageError where they are not known."""
    if net.spec.widths:
        raise UsageError(f"{library} has no {net.spec.family} of these widths: it has lost channels by pruning")
    swapped = getattr(zoo.families()[net.spec.family], "SWAPPED", {}).get(library)
    own, given = net.state_dict(), dict[str, Tensor]()
    for ours, theirs in names(net, library).items():
        tensor = own[ours].detach().clone()
        if ours == swapped:  # a 1 × 1 convolution becomes a linear layer, a linear layer a 1 × 1 convolution
            tensor = tensor.flatten(1) if tensor.dim() == 4 else tensor[:, :, None, None]
        given[theirs] = tensor
    return given


def _misfit(own: Mapping[str, Tensor], known: Mapping[str, str], tensors: Mapping[str, Tensor]) -> list[str]:
    """What keeps the tensors from fitting, one sentence a tensor."""
    wrong = []
    for ours, theirs in known.items():
        if theirs not in tensors:
            if not ours.endswith(COUNTER):
                wrong.append(f"{theirs} is missing")
        elif _core(tensors[theirs]) != _core(own[ours]):
            there, here = (" x ".join(map(str, t.shape)) for t in (tensors[theirs], own[ours]))
            wrong.append(f"{theirs} is {there} instead of {here}")
    left_over = sorted(tensors.keys() - set(known.values()))
    return wrong + [f"{name} has no place" for name in left_over if not name.endswith(COUNTER)]


def _core(tensor: Tensor) -> tuple[int, ...]:
    """The shape without the 1 × 1 of a convolution that elsewhere is a linear layer."""
    shape = tuple(tensor.shape)
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape
