"""Networks by name: the one contract (timm's names) over every family of the zoo."""

from fnmatch import fnmatch
from typing import Any

from flyweight import zoo
from flyweight.errors import UsageError
from flyweight.net import Net, Spec, initialise


def list_models(pattern: str = "*") -> list[str]:
    """The names that `create_model` takes and the shell-style `pattern` matches, sorted."""
    return sorted(name for name in zoo.variants() if fnmatch(name, pattern))


def spec_of(name: str, size: int | tuple[int, int] | None = None, **args: Any) -> Spec:
    """The Spec of a named model with further arguments of its family.

    `size` is the input's height and width, by default 32 for the small-picture forms and 224 for the others. Raises
    UsageError for an unknown name or an impossible size.
    """
    variants = zoo.variants()
    if name not in variants:
        near = list_models(f"*{name}*") or list_models()
        raise UsageError(f"there is no model {name!r}; the nearest names: {', '.join(near[:12])}")
    family, own = variants[name]
    merged = {**own, **args}
    if size is None:
        size = 32 if merged.get("stem") == "cifar" else 224
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise UsageError(f"{name} cannot take pictures of {height} x {width} pixels")
    return Spec(family, merged, (int(merged.get("in_chans", 3)), height, width))


def build(spec: Spec) -> Net:
    """The network of a Spec, freshly initialised. Raises UsageError where the family refuses the arguments."""
    net = structure(spec)
    getattr(zoo.families()[spec.family], "initialise", initialise)(net)
    return net


def structure(spec: Spec) -> Net:
    """The network of a Spec, its weights not yet drawn: enough to count. Raises UsageError as `build` does."""
    family = zoo.families().get(spec.family)
    if family is None:
        raise UsageError(f"there is no family {spec.family!r}; there are {', '.join(zoo.families())}")
    try:
        net: Net = family.build(**spec.args)
    except (TypeError, KeyError, ValueError) as error:
        raise UsageError(f"{spec.family} cannot be built with {dict(spec.args)}: {error}") from error
    net.spec = spec
    return net


def create_model(name: str, num_classes: int = 1000, in_chans: int = 3, **args: Any) -> Net:
    """A named network with random weights: [N, in_chans, H, W] → logits [N, num_classes].

    `args` are `width`, `drop_rate`, `size` and whatever the family's builder takes.
    """
    return build(spec_of(name, num_classes=num_classes, in_chans=in_chans, **args))
