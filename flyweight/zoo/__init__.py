"""The families, one file each, and the way from a name over its Spec to a network.

A file here with `build`, `VARIANTS`, `CANDIDATES`, `WIDTHS`, `REFERENCE` and `initialise` is in every list and test;
`DEFAULTS`, `SIZE` and `NAMES` (what other libraries call its modules) are as needed.
"""

import bisect
import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatch
from functools import cache
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from flyweight.adapt import dilate, pad_same
from flyweight.blocks import Options, SqueezeExcite
from flyweight.errors import UsageError
from flyweight.graph import GraphError, trace
from flyweight.net import Net, Spec

ENOUGH = 512  # pixels that every network can take
COMMON = tuple(field.name for field in dataclasses.fields(Options))


@cache
def families() -> dict[str, ModuleType]:
    """Family name → its module, discovered from this directory, sorted by name."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")
    return {name: import_module(f"{__name__}.{name}") for name in names}


@cache
def variants() -> dict[str, tuple[str, dict[str, Any]]]:
    """Model name → (family, the arguments that make it); raises when two families claim one name."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for family, module in families().items():
        for name, args in module.VARIANTS.items():
            if name in found:
                raise ValueError(f"the model name {name} is claimed by {found[name][0]} and by {family}")
            found[name] = (family, args)
    return found


def list_models(pattern: str = "*") -> list[str]:
    """The names that `create_model` takes and the shell-style `pattern` matches, sorted."""
    return sorted(name for name in variants() if fnmatch(name, pattern))


def spec_of(
    name: str, size: int | tuple[int, int] | None = None, widths: Mapping[str, int] | None = None, **args: Any
) -> Spec:
    """The Spec of a named model with further arguments: those of `Options`, which all take, and its family's own.

    `size` is the input's height and width, by default what the model was designed for: mostly 224, for the
    small-picture forms 32; `widths` are those of a pruned network. Raises UsageError for an unknown name or size.
    """
    if name not in variants():
        near = list_models(f"*{name}*") or get_close_matches(name, variants(), 8, 0.5) or list(families())
        raise UsageError(f"there is no model {name!r}; the nearest names: {', '.join(near[:12])}")
    family, own = variants()[name]
    merged = {**own, **args}
    native: int = merged.pop("size", getattr(families()[family], "SIZE", 224))
    if size is None:
        size = 32 if merged.get("stem") == "cifar" else native
    height, width = size if isinstance(size, tuple) else (size, size)
    if min(height, width) < 1:
        raise UsageError(f"{name} cannot take pictures of {height} x {width} pixels")
    return Spec(family, merged, (int(merged.get("in_chans", 3)), height, width), widths or {})


def usual_spec(name: str) -> Spec:
    """A model as its paper has it: 10 classes for the forms that take pictures of 32 pixels, 1000 for the others."""
    spec = spec_of(name, num_classes=1000)
    return spec if spec.input[1] > 32 else spec.with_args(num_classes=10)


def build(spec: Spec) -> Net:
    """The network of a Spec, freshly initialised. Raises UsageError where the family refuses the arguments."""
    net = structure(spec)
    families()[spec.family].initialise(net)
    return net


def structure(spec: Spec) -> Net:
    """The network of a Spec, its weights not yet drawn: enough to count. Raises UsageError as `build` does."""
    family = families().get(spec.family)
    if family is None:
        raise UsageError(f"there is no family {spec.family!r}; there are {', '.join(families())}")
    args = {**getattr(family, "DEFAULTS", {}), **spec.args}
    common = {name: args.pop(name) for name in COMMON if name in args}
    own = list(signature(family.build).parameters)[1:]
    unknown = [name for name in args if name not in own]
    if unknown:
        raise UsageError(
            f"{spec.family} takes no {unknown[0]!r}; its own arguments: {', '.join(own) or 'none'}; all networks take "
            f"{', '.join(COMMON)} and size"
        )
    try:
        options = Options(**common)
        net: Net = family.build(options, **args)
    except KeyError as error:
        raise UsageError(f"{spec.family} has no form {error} among its rows: {_told(spec)}") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"{spec.family} cannot be built: {error} ({_told(spec)})") from error
    net.spec = spec
    if options.se and not any(isinstance(block, SqueezeExcite) for block in net.modules()):
        raise UsageError(f"{spec.family} has no block that squeeze-and-excitation (se={options.se:g}) fits into")
    if options.padding == "same":
        pad_same(net)
    if options.output_stride is not None:
        dilate(net, options.output_stride)
    if spec.widths:
        net.narrow(spec.widths)
    return net


def _told(spec: Spec) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in spec.args.items()) or "no arguments"


def smallest_input(spec: Spec) -> int:
    """The least side of a square picture that the network can take, and that its strides leave a position of."""
    channels = spec.input[0]
    with torch.device("meta"):
        net = structure(replace(spec, input=(channels, ENOUGH, ENOUGH)))

    def fits(side: int) -> bool:
        try:
            trace(net, (channels, side, side))
        except GraphError:
            return False
        return True

    least = net.feature_info.reduction()[-1]
    if fits(least):  # as nearly always
        return least
    return least + bisect.bisect_left(range(least, ENOUGH), True, key=fits)
