"""Searching for MobileNetV3 (Howard et al., arXiv:1905.02244).

The width multiplier scales the last convolution and the classifier's hidden layer as well, as in torchvision.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from flyweight.blocks import Classifier, InvertedResidual, Options, Residual
from flyweight.initialise import kaiming_normal
from flyweight.net import FINAL, Net, Rules
from flyweight.zoo.mobilenet_v1 import places
from flyweight.zoo.mobilenet_v2 import BLOCK, timm_blocks

Row = tuple[int, int, int, bool, str, int]

# Table 1 and table 2: kernel, expansion size, output channels, squeeze-and-excitation, nonlinearity, stride.
LARGE: list[Row] = [
    (3, 16, 16, False, "RE", 1),
    (3, 64, 24, False, "RE", 2),
    (3, 72, 24, False, "RE", 1),
    (5, 72, 40, True, "RE", 2),
    (5, 120, 40, True, "RE", 1),
    (5, 120, 40, True, "RE", 1),
    (3, 240, 80, False, "HS", 2),
    (3, 200, 80, False, "HS", 1),
    (3, 184, 80, False, "HS", 1),
    (3, 184, 80, False, "HS", 1),
    (3, 480, 112, True, "HS", 1),
    (3, 672, 112, True, "HS", 1),
    (5, 672, 160, True, "HS", 2),
    (5, 960, 160, True, "HS", 1),
    (5, 960, 160, True, "HS", 1),
]
SMALL: list[Row] = [
    (3, 16, 16, True, "RE", 2),
    (3, 72, 24, False, "RE", 2),
    (3, 88, 24, False, "RE", 1),
    (5, 96, 40, True, "HS", 2),
    (5, 240, 40, True, "HS", 1),
    (5, 240, 40, True, "HS", 1),
    (5, 120, 48, True, "HS", 1),
    (5, 144, 48, True, "HS", 1),
    (5, 288, 96, True, "HS", 2),
    (5, 576, 96, True, "HS", 1),
    (5, 576, 96, True, "HS", 1),
]
# table → rows, hidden units of the classifier.
TABLES = {"large": (LARGE, 1280), "small": (SMALL, 1024)}
# stem → stride of the first convolution, and of the first row that halves the picture (V2's form for 32 pixels).
STEMS = {"imagenet": (2, 2), "cifar": (1, 1)}
LAST = 6  # the last convolution's channels as a multiple of the last row's


def build(o: Options, table: str = "large") -> Net:
    """MobileNetV3-Large or -Small by its table; HS rows have the network's activation, RE rows ReLU."""
    rows, hidden = TABLES[table]
    stride, first_halving = STEMS[o.stem]
    channels = o.channels(16)
    stages: OrderedDict[str, nn.Module] = OrderedDict(stem=o.conv(o.in_chans, channels, 3, stride))
    halving = [row[-1] for row in rows].index(2)
    for i, (kernel, expanded, c, se, nonlinearity, s) in enumerate(rows):
        own = replace(o, se=o.se if se else 0.0, act=o.act if nonlinearity == "HS" else "relu")
        out, stride = o.channels(c), first_halving if i == halving else s
        block = InvertedResidual(own, channels, o.channels(expanded), out, kernel, stride)
        stages[f"block{i + 1}"] = Residual(block) if stride == 1 and channels == out else block
        channels = out
    stages[FINAL] = o.conv(channels, LAST * channels, 1)
    units = o.channels(hidden)
    layer = nn.Sequential(OrderedDict(fc=nn.Linear(LAST * channels, units), act=o.activation()))
    return Net(stages, Classifier(LAST * channels, o.num_classes, o.drop_rate, hidden=layer, hidden_features=units))


def torchvision(args: Mapping[str, Any]) -> Rules:
    """All in one list; a block's layers are numbered, so that it matters which of them it has."""
    size = Options(width=args.get("width", 1.0)).channels
    rows = TABLES[args.get("table", "large")][0]
    inputs = [16, *(c for _, _, c, *_ in rows)]

    def layer(match: re.Match[str]) -> str:
        _, expanded, _, se, *_ = rows[int(match[1]) - 1]
        has_expansion = size(expanded) != size(inputs[int(match[1]) - 1])
        parts = ["expand"] * has_expansion + ["depthwise"] + ["se"] * se + ["project"]
        last = {"conv": "0", "norm": "1", "reduce": "fc1", "expand": "fc2"}[match[3]]
        return f"features.{match[1]}.block.{parts.index(match[2])}.{last}"

    return [
        (r"features\.stem\.conv", "features.0.0"),
        (r"features\.stem\.norm", "features.0.1"),
        (BLOCK + r"(\w+)\.(conv|norm|reduce|expand)", layer),
        (r"features\.final\.conv", f"features.{len(rows) + 1}.0"),
        (r"features\.final\.norm", f"features.{len(rows) + 1}.1"),
        (r"head\.hidden\.fc", "classifier.0"),
        (r"head\.fc", "classifier.3"),
    ]


def timm(args: Mapping[str, Any]) -> Rules:
    """As MobileNetV2's; the last convolution is one more stage."""
    channels = [row[2] for row in TABLES[args.get("table", "large")][0]]
    place = places(channels)
    last = place[-1][0] + 1

    def excite(match: re.Match[str]) -> str:
        stage, number = place[int(match[1]) - 1]
        return f"blocks.{stage}.{number}.se.conv_{match[2]}"

    return [
        *timm_blocks(channels),
        (BLOCK + r"se\.(reduce|expand)", excite),
        (r"features\.final\.conv", f"blocks.{last}.0.conv"),
        (r"features\.final\.norm", f"blocks.{last}.0.bn1"),
        (r"head\.hidden\.fc", "conv_head"),
        (r"head\.fc", "classifier"),
    ]


NAMES = {"torchvision": torchvision, "timm": timm}
SWAPPED = {"timm": "head.hidden.fc.weight"}

DEFAULTS = {"act": "hardswish", "eps": 1e-3, "se": 0.25, "gate": "hardsigmoid", "drop_rate": 0.2}
initialise = kaiming_normal
REFERENCE = "torchvision"
VARIANTS = {"mobilenet_v3_large": {"table": "large"}, "mobilenet_v3_small": {"table": "small"}}
CANDIDATES = {
    "large": ("mobilenet_v3_small", "mobilenet_v3_large"),
    "small": ("mobilenet_v3_small", "mobilenet_v3_large"),
}
WIDTHS = (0.125, 0.25, 0.35, 0.5, 0.75, 1.0)
