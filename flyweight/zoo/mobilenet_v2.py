"""MobileNetV2: Inverted Residuals and Linear Bottlenecks (Sandler et al., arXiv:1801.04381)."""

import re
from collections import OrderedDict
from collections.abc import Iterable

from torch import nn

from flyweight.blocks import InvertedResidual, Options, Residual
from flyweight.initialise import kaiming_normal_by_group
from flyweight.net import FINAL, Net, Rules
from flyweight.zoo import mobilenet_v1

# Table 2: expansion factor t, output channels c, repeats n, stride s of the first of them.
ROWS = [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]
# The usual form for 32-pixel pictures: the first convolution and the first row that halves the picture keep its size.
CIFAR = [*ROWS[:1], (6, 24, 2, 1), *ROWS[2:]]
# stem → stride of the first convolution, rows.
STEMS = {"imagenet": (2, ROWS), "cifar": (1, CIFAR)}
LAST = 1280


def build(o: Options) -> Net:
    """MobileNetV2; the width multiplier does not make the last convolution narrower (section 4)."""
    stride, rows = STEMS[o.stem]
    channels = o.channels(32)
    stages: OrderedDict[str, nn.Module] = OrderedDict(stem=o.conv(o.in_chans, channels, 3, stride))
    for t, c, n, s in rows:
        out = o.channels(c)
        for i in range(n):
            stride = s if i == 0 else 1
            block = InvertedResidual(o, channels, t * channels, out, stride=stride)
            stages[f"block{len(stages)}"] = Residual(block) if stride == 1 and channels == out else block
            channels = out
    last = max(LAST, o.channels(LAST))
    stages[FINAL] = o.conv(channels, last, 1)
    return Net(stages, o.classifier(last))


BLOCK = r"features\.block(\d+)\.(?:body\.)?"
# Convolutions of a block in timm; norms are bn1, bn2, bn3. The first block has no expansion.
TIMM_FIRST = {"depthwise": ("conv_dw", 1), "project": ("conv_pw", 2)}
TIMM_LATER = {"expand": ("conv_pw", 1), "depthwise": ("conv_dw", 2), "project": ("conv_pwl", 3)}


def timm_blocks(channels: Iterable[int]) -> Rules:
    """timm's names of the stem and of inverted residuals with these output channels."""
    place = mobilenet_v1.places(channels)

    def block(match: re.Match[str]) -> str:
        stage, number = place[int(match[1]) - 1]
        conv, norm = (TIMM_FIRST if match[1] == "1" else TIMM_LATER)[match[2]]
        return f"blocks.{stage}.{number}." + (conv if match[3] == "conv" else f"bn{norm}")

    stem: Rules = [(r"features\.stem\.conv", "conv_stem"), (r"features\.stem\.norm", "bn1")]
    return [*stem, (BLOCK + r"(expand|depthwise|project)\.(conv|norm)", block)]


def torchvision(match: re.Match[str]) -> str:
    """Layers numbered from the expansion on, which the first block lacks, those with an activation one level down."""
    position = ["expand", "depthwise", "project"].index(match[2]) - (match[1] == "1")
    norm = int(match[3] == "norm")
    layer = str(position + norm) if match[2] == "project" else f"{position}.{norm}"
    return f"features.{match[1]}.conv.{layer}"


END: Rules = [(r"features\.final\.conv", "conv_head"), (r"features\.final\.norm", "bn2"), (r"head\.fc", "classifier")]
NAMES: dict[str, Rules] = {
    "torchvision": [
        (r"features\.stem\.conv", "features.0.0"),
        (r"features\.stem\.norm", "features.0.1"),
        (BLOCK + r"(expand|depthwise|project)\.(conv|norm)", torchvision),
        (r"features\.final\.conv", "features.18.0"),
        (r"features\.final\.norm", "features.18.1"),
        (r"head\.fc", "classifier.1"),
    ],
    "timm": [*timm_blocks(c for _, c, n, _ in ROWS for _ in range(n)), *END],
}

DEFAULTS = {"act": "relu6", "drop_rate": 0.2}
initialise = kaiming_normal_by_group
REFERENCE = "torchvision; timm mobilenetv2_050"
VARIANTS = {
    "mobilenet_v2": {},
    "mobilenet_v2_075": {"width": 0.75},
    "mobilenet_v2_050": {"width": 0.5},
    "mobilenet_v2_035": {"width": 0.35},
}
CANDIDATES = {"large": ("mobilenet_v2",), "small": ("mobilenet_v2",)}
WIDTHS = (0.125, 0.25, 0.35, 0.5, 0.75, 1.0)
