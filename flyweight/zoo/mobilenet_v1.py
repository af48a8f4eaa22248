"""MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications.

Howard et al., arXiv:1704.04861.
"""

from collections import OrderedDict

from torch import nn

from flyweight.blocks import DepthwiseSeparable, Options
from flyweight.initialise import kaiming_normal_by_group
from flyweight.net import Net

# Table 1: output channels and stride of each depthwise-separable block.
IMAGENET = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
# The form for 32-pixel pictures: a stem that keeps the size, and four blocks of 512 fewer.
CIFAR = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (1024, 2), (1024, 1)]
# stem → stride of the first convolution, rows.
STEMS = {"imagenet": (2, IMAGENET), "cifar": (1, CIFAR)}

DEFAULTS = {"act": "relu6"}


def build(o: Options) -> Net:
    """MobileNetV1; the width multiplier is the paper's α, the input's size its ρ."""
    stride, rows = STEMS[o.stem]
    channels = o.channels(32)
    stages: OrderedDict[str, nn.Module] = OrderedDict(stem=o.conv(o.in_chans, channels, 3, stride))
    for i, (c, s) in enumerate(rows, start=1):
        out = o.channels(c)
        stages[f"block{i}"] = DepthwiseSeparable(o, channels, out, s)
        channels = out
    return Net(stages, o.classifier(channels))


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
