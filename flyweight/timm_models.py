"""The zoo inside timm: `register()` adds every network to timm's registry, under the prefix "fw_"."""

import inspect
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import nn

from flyweight.create import create_model
from flyweight.errors import UsageError
from flyweight.net import FeatureNet, Net
from flyweight.ops import SameAvgPool2d, SameConv2d, SameMaxPool2d
from flyweight.zoo import families, list_models, spec_of, structure

PREFIX = "fw_"
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
    try:
        with torch.device(device or torch.get_default_device()):
            net = create_model(name, **args)
    except UsageError as error:
        raise ArgumentError(str(error)) from error
    if global_pool is not None:
        net.reset_classifier(net.num_classes, global_pool)
    return net.to(dtype=dtype)
