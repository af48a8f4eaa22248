"""MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications.

Howard et al., arXiv:1704.04861.
"""

from collections import OrderedDict

from torch import nn

from flyweight.blocks import ACTIVATIONS, Classifier, ConvNormAct, DepthwiseSeparable
from flyweight.net import Net
from flyweight.ops import round_channels

# Table 1: output channels and stride of each depthwise-separable block.
IMAGENET = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
# The form for 32-pixel pictures: a stem that keeps the size, and four blocks of 512 fewer.
CIFAR = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (1024, 2), (1024, 1)]
ROWS = {"imagenet": IMAGENET, "cifar": CIFAR}


def build(
    num_classes: int = 1000,
    in_chans: int = 3,
    width: float = 1.0,
    drop_rate: float = 0.0,
    stem: str = "imagenet",
    act: str = "relu6",
) -> Net:
    """MobileNetV1; `width` is the paper's α, `stem` "imagenet" (stride 2) or "cifar" (stride 1, nine blocks)."""
    activation = ACTIVATIONS[act]
    channels = round_channels(32 * width)
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    stages["stem"] = ConvNormAct(in_chans, channels, 3, stride=2 if stem == "imagenet" else 1, act=activation)
    for i, (c, s) in enumerate(ROWS[stem], start=1):
        out = round_channels(c * width)
        stages[f"block{i}"] = DepthwiseSeparable(channels, out, s, act=activation)
        channels = out
    return Net(stages, Classifier(channels, num_classes, drop_rate))


VARIANTS = {
    "mobilenet_v1": {},
    "mobilenet_v1_075": {"width": 0.75},
    "mobilenet_v1_050": {"width": 0.5},
    "mobilenet_v1_025": {"width": 0.25},
    "mobilenet_v1_cifar": {"stem": "cifar", "act": "relu"},
}
CANDIDATES = {"large": ("mobilenet_v1",), "small": ("mobilenet_v1_cifar",)}
WIDTHS = (0.125, 0.25, 0.35, 0.5, 0.75, 1.0)
