"""The zoo inside timm: `register()` adds every network to timm's registry, under the prefix "fw_".

And the config.json by which timm rebuilds one of our networks, or its own that is the same.
"""

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import nn

from flyweight import foreign
from flyweight.blocks import Options
from flyweight.create import create_model
from flyweight.errors import UsageError
from flyweight.net import FeatureNet, Net, Spec
from flyweight.ops import SameAvgPool2d, SameConv2d, SameMaxPool2d
from flyweight.preprocess import Preprocess
from flyweight.zoo import families, list_models, spec_of, structure, variants

PREFIX = "fw_"
# Our network with arguments, and the name under which timm has the same function.
NATIVE: list[tuple[str, dict[str, Any], str]] = [
    *[("mobilenet_v1", {"width": width}, f"mobilenetv1_{round(100 * width)}") for width in (1, 1.25)],
    *[("mobilenet_v2", {"width": w}, f"mobilenetv2_{round(100 * w):03}") for w in (0.35, 0.5, 0.75, 1, 1.4)],
    *[(f"mobilenet_v3_{size}", {"eps": 1e-5}, f"mobilenetv3_{size}_100") for size in ("small", "large")],
    *[(f"mobilenet_v3_{size}", {"padding": "same"}, f"tf_mobilenetv3_{size}_100") for size in ("small", "large")],
    ("xception", {}, "legacy_xception"),
    *[(f"aligned_xception_{depth}", {}, f"xception{depth}") for depth in (41, 65, 71)],
    ("inception_v3", {"aux": False}, "inception_v3"),
    *[(name, {}, name) for name in ("inception_v4", "inception_resnet_v2")],
    *[(name, {}, name) for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")],
    *[(name, {}, name) for name in ("resnext50_32x4d", "resnext101_32x8d")],
    ("resnext101_32x8d", {"base_width": 4}, "resnext101_32x4d"),
    ("resnext101_32x8d", {"groups": 64, "base_width": 4}, "resnext101_64x4d"),
    *[(f"se_{name}", {}, f"se{name}") for name in ("resnet18", "resnet50", "resnext50_32x4d")],
]
# Arguments that timm gives its networks too, or that change no answer in evaluation.
FREE = ("num_classes", "in_chans", "drop_rate")
# Where timm looks for the settings of a network; its `list_models(module=…)` knows the last part of this name.
HOME = f"{__name__}.flyweight"


class ArgumentError(UsageError, TypeError):
    """What timm's networks raise for an argument that they do not take is a TypeError."""


def register() -> list[str]:
    """Adds the networks to timm's registry and returns their names there; a second call adds nothing.

    `timm.create_model("fw_mobilenet_v1", num_classes=10, in_chans=1, features_only=True)` works from then on. Auxiliary
    heads are off. Raises UsageError where timm is not installed.
    """
    try:
        models = import_module("timm.models")
    except ImportError as error:
        raise UsageError(f"timm cannot be imported ({error}): pip install timm") from error
    names = {PREFIX + name: name for name in list_models()}
    home = sys.modules.setdefault(HOME, ModuleType(HOME))
    inputs = {theirs: {"input_size": spec_of(ours).input} for theirs, ours in names.items()}
    home.__dict__["default_cfgs"] = models.generate_default_cfgs(inputs)
    for leaf in (SameConv2d, SameMaxPool2d, SameAvgPool2d):  # whose padding depends on the size that they are given
        models.register_notrace_module(leaf)
    for theirs, ours in names.items():
        if not models.is_model(theirs):
            models.register_model(_entrypoint(theirs, ours, models.build_model_with_cfg))
    return list(names)


def config(net: Net, preprocess: Preprocess | None = None) -> dict[str, Any]:
    """What config.json says of a network under our own names of tensors: timm rebuilds it once `register()` was called.

    The architecture is a variant of its family that its arguments make the same; for a network without one, which no
    name of the zoo and no command makes, it is the family's name, which timm does not know.
    """
    args = dict(net.spec.args)
    if len(net.aux):
        args["aux"] = True  # which inside timm is off by default
    known = [name for name, (family, own) in variants().items() if family == net.spec.family and _within(own, args)]
    name = max(
        known, key=lambda name: sum(args.get(key) == value for key, value in variants()[name][1].items()), default=""
    )
    described = net.pretrained_cfg
    cfg = {"first_conv": described["first_conv"], "classifier": described["classifier"]}
    args["size"] = list(net.spec.input[1:])
    if net.spec.widths:
        args["widths"] = dict(net.spec.widths)
    return {
        "architecture": PREFIX + name if name else net.spec.family,
        "model_args": args,
        "num_classes": net.num_classes,
        "pretrained_cfg": _input(net, preprocess) | cfg,
    }


def _within(own: Mapping[str, Any], args: Mapping[str, Any]) -> bool:
    """Whether the arguments state all that a variant would else add."""
    return own.keys() - {"size"} <= args.keys()


def native_name(spec: Spec) -> str | None:
    """Under which name timm itself has the function of a network, or None."""
    wanted = _function(spec)
    return next((theirs for ours, args, theirs in NATIVE if _function(spec_of(ours, **args)) == wanted), None)


def native_config(net: Net, preprocess: Preprocess | None = None) -> dict[str, Any] | None:
    """What config.json says of a network under timm's names of tensors, for timm alone; None where timm lacks it."""
    name = native_name(net.spec)
    if name is None:
        return None
    theirs, described = foreign.names(net, "timm"), net.pretrained_cfg
    weights = {key: f"{described[key]}.weight" for key in ("first_conv", "classifier")}
    cfg = {key: theirs[weight].removesuffix(".weight") for key, weight in weights.items() if weight in theirs}
    return {"architecture": name, "num_classes": net.num_classes, "pretrained_cfg": _input(net, preprocess) | cfg}


def _function(spec: Spec) -> dict[str, Any]:
    """All that decides what a network computes, but its weights."""
    family = families()[spec.family]
    own = list(inspect.signature(family.build).parameters.values())[1:]
    args = {field.name: field.default for field in dataclasses.fields(Options)} | {
        each.name: each.default for each in own
    }
    args |= {**getattr(family, "DEFAULTS", {}), **spec.args, "family": spec.family, "widths": dict(spec.widths)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in args.items() if key not in FREE}


def _input(net: Net, preprocess: Preprocess | None) -> dict[str, Any]:
    """The pictures, in timm's terms; ours are resized to the input's height and width, without a crop."""
    found: dict[str, Any] = {"input_size": list(net.spec.input), "pool_size": list(net.pretrained_cfg["pool_size"])}
    if preprocess is None:
        return found
    return found | {
        "mean": [round(m / 255, 6) for m in preprocess.mean],
        "std": [round(s / 255, 6) for s in preprocess.std],
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }


def _entrypoint(theirs: str, ours: str, build_with_cfg: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The function that timm keeps for a name: timm's own builder around ours."""

    def entrypoint(pretrained: bool = False, pretrained_cfg: Any = None, **args: Any) -> nn.Module:
        if pretrained_cfg is None or isinstance(pretrained_cfg, dict):
            with torch.device("meta"):
                described = structure(spec_of(ours)).pretrained_cfg
            pretrained_cfg = {**described, "architecture": theirs, **(pretrained_cfg or {})}
        features = {"feature_cls": FeatureNet, "out_indices": None}
        return build_with_cfg(
            partial(_build, ours), theirs, pretrained, pretrained_cfg=pretrained_cfg, feature_cfg=features, **args
        )

    entrypoint.__name__ = entrypoint.__qualname__ = theirs
    entrypoint.__module__ = HOME
    return entrypoint


def _build(
    name: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    global_pool: str | None = None,
    **args: Any,
) -> Net:
    """Our network by timm's arguments. Raises ArgumentError for those that it does not take."""
    family = families()[spec_of(name).family]
    if "aux" in inspect.signature(family.build).parameters:
        args.setdefault("aux", False)
    if isinstance(args.get("size"), list):  # as JSON has it
        args["size"] = tuple(args["size"])
    try:
        with torch.device(device or torch.get_default_device()):
            net = create_model(name, **args)
    except UsageError as error:
        raise ArgumentError(str(error)) from error
    if global_pool is not None:
        net.reset_classifier(net.num_classes, global_pool)
    return net.to(dtype=dtype)
