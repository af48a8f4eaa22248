"""ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices.

Zhang et al., arXiv:1707.01083.
"""

from collections import OrderedDict

from torch import nn

from flyweight.blocks import Options, ShuffleUnit
from flyweight.initialise import kaiming_uniform
from flyweight.net import Net
from flyweight.ops import ChannelShuffle

# Table 1: groups → output channels of stages 2, 3, 4; the stages repeat 4, 8, 4 units, the first of each with stride 2.
STAGES = {
    1: (144, 288, 576),
    2: (200, 400, 800),
    3: (240, 480, 960),
    4: (272, 544, 1088),
    8: (384, 768, 1536),
}
REPEATS = (4, 8, 4)


def unit(
    o: Options, in_channels: int, out_channels: int, groups: int, stride: int, first: bool, shuffle: bool
) -> ShuffleUnit:
    """A unit of the paper: no ReLU after the depthwise convolution; the network's `first` unit, whose input has too few
    channels for it, does not group its first 1 × 1. The bottleneck has a quarter of the stage's channels."""
    middle = out_channels // 4
    added = out_channels - in_channels if stride == 2 else out_channels
    body: OrderedDict[str, nn.Module] = OrderedDict(
        squeeze=o.conv(in_channels, middle, 1, groups=1 if first else groups)
    )
    if shuffle and groups > 1:
        body["shuffle"] = ChannelShuffle(groups)
    body["depthwise"] = o.depthwise(middle, stride=stride, act=False)
    body["expand"] = o.conv(middle, added, 1, groups=groups, act=False)
    body.update(o.excite(added))
    return ShuffleUnit(o, body, stride)


def small_unit(
    o: Options, in_channels: int, out_channels: int, groups: int, stride: int, first: bool, shuffle: bool
) -> ShuffleUnit:
    """A unit of the form for 32 pixels: the bottleneck is a quarter of what is added, a ReLU follows the depthwise
    convolution, and the first unit shuffles by its own one group, that is not at all."""
    added = out_channels - in_channels if stride == 2 else out_channels
    middle = added // 4
    own = 1 if first else groups
    body: OrderedDict[str, nn.Module] = OrderedDict(squeeze=o.conv(in_channels, middle, 1, groups=own))
    if shuffle and own > 1:
        body["shuffle"] = ChannelShuffle(own)
    body["depthwise"] = o.depthwise(middle, stride=stride)
    body["expand"] = o.conv(middle, added, 1, groups=groups, act=False)
    body.update(o.excite(added))
    return ShuffleUnit(o, body, stride)


def build(o: Options, groups: int = 3, shuffle: bool = True) -> Net:
    """ShuffleNet; the width multiplier is the paper's s in "ShuffleNet s×", `shuffle=False` its table 3.

    `stem` "imagenet": 3 × 3 of stride 2 and a max-pool, or "cifar": 1 × 1, with the units that go with it.
    """
    # What is added to the input at stride 2 is grouped; so is the small form's bottleneck, a quarter of that.
    channels = o.channels(24, 4 * groups if o.stem == "cifar" else groups)
    if o.stem == "cifar":
        stages: OrderedDict[str, nn.Module] = OrderedDict(stem=o.conv(o.in_chans, channels, 1))
    elif o.stem == "imagenet":
        stages = OrderedDict(stem=o.conv(o.in_chans, channels, 3, 2), pool=nn.MaxPool2d(3, stride=2, padding=1))
    else:
        raise ValueError(f'stem is "imagenet" or "cifar", not {o.stem!r}')
    make = small_unit if o.stem == "cifar" else unit
    for stage, (base, repeats) in enumerate(zip(STAGES[groups], REPEATS, strict=True), start=2):
        out = o.channels(base, 4 * groups)
        for i in range(repeats):
            first = stage == 2 and i == 0
            stride = 2 if i == 0 else 1
            stages[f"stage{stage}_unit{i + 1}"] = make(o, channels, out, groups, stride, first, shuffle)
            channels = out
    return Net(stages, o.classifier(channels))


initialise = kaiming_uniform
REFERENCE = "pytorchcv shufflenet_g1_w1 … shufflenet_g8_w1"
VARIANTS = (
    {"shufflenet_v1": {}}
    | {f"shufflenet_v1_g{g}": {"groups": g} for g in STAGES}
    | {f"shufflenet_v1_g{g}_cifar": {"groups": g, "stem": "cifar"} for g in (2, 3)}
)
CANDIDATES = {"large": ("shufflenet_v1_g3",), "small": ("shufflenet_v1_g3_cifar",)}
WIDTHS = (0.25, 0.5, 0.75, 1.0)
