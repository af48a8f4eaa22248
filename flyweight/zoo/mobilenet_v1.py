"""MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications.

Howard et al., arXiv:1704.04861.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import Any

from torch import nn

from flyweight.blocks import DepthwiseSeparable, Options
from flyweight.initialise import kaiming_normal_by_group
from flyweight.net import Net, Rules
from flyweight.zoo.resnet import LEAF

# Table 1: output channels and stride of each depthwise-separable block.
IMAGENET = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
# The form for 32-pixel pictures: a stem that keeps the size, and four blocks of 512 fewer.
CIFAR = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (1024, 2), (1024, 1)]
# stem → stride of the first convolution, rows.
STEMS = {"imagenet": (2, IMAGENET), "cifar": (1, CIFAR)}

DEFAULTS = {"act": "relu6"}


def build(o: Options, separable: bool = True) -> Net:
    """MobileNetV1; the width multiplier is the paper's α, the input's size its ρ.

    Without `separable` every block is a plain 3 × 3 convolution: the "Conv MobileNet" of the paper's table 4.
    """
    stride, rows = STEMS[o.stem]
    channels = o.channels(32)
    stages: OrderedDict[str, nn.Module] = OrderedDict(stem=o.conv(o.in_chans, channels, 3, stride))
    for i, (c, s) in enumerate(rows, start=1):
        out = o.channels(c)
        stages[f"block{i}"] = DepthwiseSeparable(o, channels, out, s) if separable else o.conv(channels, out, 3, s)
        channels = out
    return Net(stages, o.classifier(channels))


def places(channels: Iterable[int]) -> list[tuple[int, int]]:
    """Stage and number, from 0, of each block in libraries that call a run of equal output channels a stage."""
    runs = enumerate(groupby(channels))
    return [(stage, number) for stage, (_, run) in runs for number, _ in enumerate(run)]


def block(
    args: Mapping[str, Any], named: Callable[[int, int, str, str], str]
) -> tuple[str, Callable[[re.Match[str]], str]]:
    """The rule for all blocks; `named` takes stage, number, "depthwise" or "pointwise", and "conv" or "norm"."""
    place = places(c for c, _ in STEMS[args.get("stem", "imagenet")][1])
    return r"features\.block(\d+)\.(\w+)\.(conv|norm)", lambda m: named(*place[int(m[1]) - 1], m[2], m[3])


def timm(args: Mapping[str, Any]) -> Rules:
    """Norms have numbers."""
    layers = {"depthwise": {"conv": "conv_dw", "norm": "bn1"}, "pointwise": {"conv": "conv_pw", "norm": "bn2"}}
    return [
        (r"features\.stem\.conv", "conv_stem"),
        (r"features\.stem\.norm", "bn1"),
        block(args, lambda stage, number, layer, leaf: f"blocks.{stage}.{number}.{layers[layer][leaf]}"),
        (r"head\.fc", "classifier"),
    ]


def pytorchcv(args: Mapping[str, Any]) -> Rules:
    """Stages and units are numbered from 1; the activation is always ReLU."""
    if args.get("act", DEFAULTS["act"]) != "relu":
        return []
    layers = {"depthwise": "dw_conv", "pointwise": "pw_conv"}

    def named(stage: int, number: int, layer: str, leaf: str) -> str:
        return f"features.stage{stage + 1}.unit{number + 1}.{layers[layer]}.{LEAF[leaf]}"

    return [
        (r"features\.stem\.conv", "features.init_block.conv"),
        (r"features\.stem\.norm", "features.init_block.bn"),
        block(args, named),
        (r"head\.fc", "output"),
    ]


NAMES = {"timm": timm, "pytorchcv": pytorchcv}

initialise = kaiming_normal_by_group
REFERENCE = "timm mobilenetv1_100"
VARIANTS = {
    "mobilenet_v1": {},
    "mobilenet_v1_075": {"width": 0.75},
    "mobilenet_v1_050": {"width": 0.5},
    "mobilenet_v1_025": {"width": 0.25},
    "mobilenet_v1_cifar": {"stem": "cifar", "act": "relu"},
}
CANDIDATES = {"large": ("mobilenet_v1",), "small": ("mobilenet_v1_cifar",)}
WIDTHS = (0.125, 0.25, 0.35, 0.5, 0.75, 1.0)
