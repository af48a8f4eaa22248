"""ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design (Ma et al., arXiv:1807.11164)."""

import re
from collections import OrderedDict

from torch import nn

from flyweight.blocks import Branches, Options
from flyweight.initialise import torch_default
from flyweight.net import FINAL, Net, Rules
from flyweight.ops import ChannelShuffle, Part

# Table 5: width → output channels of stages 2, 3, 4; the stages repeat 4, 8, 4 units, the first of each with stride 2.
STAGES = {0.5: (48, 96, 192), 1.0: (116, 232, 464), 1.5: (176, 352, 704), 2.0: (244, 488, 976)}
REPEATS = (4, 8, 4)
FIRST = 24


def unit(o: Options, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Figure 3 (c, d): half of the channels pass as they are, at stride 2 all go both ways; then a shuffle."""
    half = out_channels // 2
    left: OrderedDict[str, nn.Module] = OrderedDict()
    right: OrderedDict[str, nn.Module] = OrderedDict()
    if stride == 1:
        left["part"], right["part"] = Part(0), Part(1)
    else:
        left["depthwise"] = o.depthwise(in_channels, stride=stride, act=False)
        left["pointwise"] = o.conv(in_channels, half, 1)
    right["reduce"] = o.conv(in_channels if stride == 2 else half, half, 1)
    right["depthwise"] = o.depthwise(half, stride=stride, act=False)
    right["pointwise"] = o.conv(half, half, 1)
    right.update(o.excite(half))
    branches = Branches(OrderedDict(left=nn.Sequential(left), right=nn.Sequential(right)))
    return nn.Sequential(OrderedDict(branches=branches, shuffle=ChannelShuffle(2)))


def build(o: Options) -> Net:
    """ShuffleNet V2; widths that table 5 lacks scale its row of 1× to even numbers.

    `stem` "imagenet": 3 × 3 of stride 2 and a max-pool, or "cifar": 3 × 3 of stride 1.
    """
    channels = FIRST
    if o.stem == "cifar":
        stages: OrderedDict[str, nn.Module] = OrderedDict(stem=o.conv(o.in_chans, channels))
    elif o.stem == "imagenet":
        stages = OrderedDict(stem=o.conv(o.in_chans, channels, 3, 2), pool=nn.MaxPool2d(3, stride=2, padding=1))
    else:
        raise ValueError(f'stem is "imagenet" or "cifar", not {o.stem!r}')
    widths = STAGES.get(o.width) or tuple(o.channels(base, 2) for base in STAGES[1.0])
    for stage, (out, repeats) in enumerate(zip(widths, REPEATS, strict=True), start=2):
        for i in range(repeats):
            stages[f"stage{stage}_unit{i + 1}"] = unit(o, channels, out, stride=2 if i == 0 else 1)
            channels = out
    last = 2048 if o.width >= 2 else 1024
    stages[FINAL] = o.conv(channels, last, 1)
    return Net(stages, o.classifier(last))


# torchvision's positions of the convolutions, each followed by its norm; an activation may follow.
POSITIONS = {"left": {"depthwise": 0, "pointwise": 2}, "right": {"reduce": 0, "depthwise": 3, "pointwise": 5}}


def torchvision(match: re.Match[str]) -> str:
    """Branch 1 is the left one."""
    stage, number, side, layer, leaf = match.groups()
    position = POSITIONS[side][layer] + (leaf == "norm")
    return f"stage{stage}.{int(number) - 1}.branch{1 if side == 'left' else 2}.{position}"


NAMES: dict[str, Rules] = {
    "torchvision": [
        (r"features\.stem\.conv", "conv1.0"),
        (r"features\.stem\.norm", "conv1.1"),
        (r"features\.stage(\d)_unit(\d)\.branches\.branches\.(\w+)\.(\w+)\.(conv|norm)", torchvision),
        (r"features\.final\.conv", "conv5.0"),
        (r"features\.final\.norm", "conv5.1"),
        (r"head\.fc", "fc"),
    ]
}

initialise = torch_default
REFERENCE = "torchvision"
VARIANTS = {
    "shufflenet_v2": {},
    "shufflenet_v2_050": {"width": 0.5},
    "shufflenet_v2_150": {"width": 1.5},
    "shufflenet_v2_200": {"width": 2.0},
}
CANDIDATES = {"large": ("shufflenet_v2",), "small": ("shufflenet_v2",)}
WIDTHS = (0.125, 0.25, 0.5, 0.75, 1.0)
