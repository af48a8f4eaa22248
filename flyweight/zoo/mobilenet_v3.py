"""Searching for MobileNetV3 (Howard et al., arXiv:1905.02244).

The width multiplier scales the last convolution and the classifier's hidden layer as well, as in torchvision.
"""

from collections import OrderedDict
from dataclasses import replace

from torch import nn

from flyweight.blocks import Classifier, InvertedResidual, Options, Residual
from flyweight.initialise import kaiming_normal
from flyweight.net import FINAL, Net

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


DEFAULTS = {"act": "hardswish", "eps": 1e-3, "se": 0.25, "gate": "hardsigmoid", "drop_rate": 0.2}
initialise = kaiming_normal
REFERENCE = "torchvision"
VARIANTS = {"mobilenet_v3_large": {"table": "large"}, "mobilenet_v3_small": {"table": "small"}}
CANDIDATES = {
    "large": ("mobilenet_v3_small", "mobilenet_v3_large"),
    "small": ("mobilenet_v3_small", "mobilenet_v3_large"),
}
WIDTHS = (0.125, 0.25, 0.35, 0.5, 0.75, 1.0)
