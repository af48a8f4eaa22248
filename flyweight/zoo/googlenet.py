"""Going Deeper with Convolutions (GoogLeNet, Inception v1; Szegedy et al., arXiv:1409.4842).

As torchvision has it: with batch normalisation, and 3 × 3 kernels in the branch whose kernels the paper has as 5 × 5.
"""

import re
from collections import OrderedDict
from collections.abc import Callable

from torch import nn

from flyweight.blocks import Branches, Classifier, Options
from flyweight.initialise import truncated_normal
from flyweight.net import Net, Rules
from flyweight.zoo.resnet import LEAF

# Table 1: channels of 1 × 1; 3 × 3 reduced, 3 × 3; 5 × 5 reduced, 5 × 5; pool projection. "pool": the kernel.
ROWS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "pool3": 3,
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "pool4": 2,
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
AUX = ("4a", "4d")
AUX_DROP = 0.7


def inception(o: Options, in_channels: int, row: tuple[int, ...]) -> tuple[Branches, int]:
    """An inception module with dimension reductions (figure 2b), and its output channels."""
    c1, r3, c3, r5, c5, p = (o.channels(c) for c in row)
    three = OrderedDict(reduce=o.conv(in_channels, r3, 1), conv=o.conv(r3, c3, 3))
    five = OrderedDict(reduce=o.conv(in_channels, r5, 1), conv=o.conv(r5, c5, 3))
    pool = OrderedDict(pool=nn.MaxPool2d(3, stride=1, padding=1), project=o.conv(in_channels, p, 1))
    branches = {"conv1": o.conv(in_channels, c1, 1)}
    branches |= {name: nn.Sequential(parts) for name, parts in {"conv3": three, "conv5": five, "pool": pool}.items()}
    return Branches(OrderedDict(branches)), c1 + c3 + c5 + p


def aux_head(o: Options, in_channels: int) -> Classifier:
    """Section 5: average-pooled to 4 × 4, a 1 × 1 convolution to 128 channels, 1024 hidden units."""
    convolved = o.channels(128)
    grid = nn.Sequential(
        OrderedDict(grid=nn.AdaptiveAvgPool2d(4), conv=o.conv(in_channels, convolved, 1), flat=nn.Flatten())
    )
    hidden = nn.Sequential(OrderedDict(fc=nn.Linear(16 * convolved, 1024), act=o.activation()))
    return Classifier(in_channels, o.num_classes, AUX_DROP, grid, hidden, 1024)


def build(o: Options, aux: bool = True) -> Net:
    """GoogLeNet; `aux`: with the two auxiliary heads on 4a and 4d, for training.

    `stem` "imagenet" (stride 8 in all) or "cifar" (two convolutions that keep the size).
    """
    first, channels = o.channels(64), o.channels(192)
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    if o.stem == "cifar":
        stages["conv1"], stages["conv3"] = o.conv(o.in_chans, first, 3), o.conv(first, channels, 3)
    elif o.stem == "imagenet":
        stages["conv1"] = o.conv(o.in_chans, first, 7, 2)
        stages["pool1"] = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        stages["conv2"], stages["conv3"] = o.conv(first, first, 1), o.conv(first, channels, 3)
        stages["pool2"] = nn.MaxPool2d(3, stride=2, ceil_mode=True)
    else:
        raise ValueError(f'stem is "imagenet" or "cifar", not {o.stem!r}')
    heads: OrderedDict[str, nn.Module] = OrderedDict()
    for name, row in ROWS.items():
        if isinstance(row, int):
            stages[name] = nn.MaxPool2d(row, stride=2, ceil_mode=True)
            continue
        stages[f"inception{name}"], channels = inception(o, channels, row)
        if aux and name in AUX:
            heads[f"inception{name}"] = aux_head(o, channels)
    return Net(stages, o.classifier(channels), heads)


BRANCHES = {
    "conv1": "branch1",
    "conv3.reduce": "branch2.0",
    "conv3.conv": "branch2.1",
    "conv5.reduce": "branch3.0",
    "conv5.conv": "branch3.1",
    "pool.project": "branch4.1",
}


def aux_name(path: str) -> Callable[[re.Match[str]], str]:
    """A path in an auxiliary head; they are numbered from 1."""
    return lambda match: f"aux{AUX.index(match[1]) + 1}." + path.format(LEAF.get(match[match.lastindex or 0]))


NAMES: dict[str, Rules] = {
    "torchvision": [
        (r"features\.conv(\d)\.(conv|norm)", lambda m: f"conv{m[1]}.{LEAF[m[2]]}"),
        (
            r"features\.inception(..)\.branches\.(.+)\.(conv|norm)",
            lambda m: f"inception{m[1]}.{BRANCHES[m[2]]}.{LEAF[m[3]]}",
        ),
        (r"aux\.inception(..)\.pool\.conv\.(conv|norm)", aux_name("conv.{}")),
        (r"aux\.inception(..)\.hidden\.fc", aux_name("fc1")),
        (r"aux\.inception(..)\.fc", aux_name("fc2")),
        (r"head\.fc", "fc"),
    ]
}

DEFAULTS = {"eps": 1e-3, "drop_rate": 0.2}
initialise = truncated_normal(0.01)
REFERENCE = "torchvision"
VARIANTS = {"googlenet": {}}
CANDIDATES = {"large": ("googlenet",), "small": ("googlenet",)}
WIDTHS = (0.125, 0.25, 0.5, 0.75, 1.0)
