"""Xception: Deep Learning with Depthwise Separable Convolutions (Chollet, arXiv:1610.02357)."""

import re
from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from flyweight.blocks import Options, Residual
from flyweight.initialise import kaiming_normal
from flyweight.net import Net, Rules
from flyweight.zoo.resnet import LEAF

Row = tuple[tuple[int, ...], int]

# Figure 5: output channels of each separable convolution of a block, stride of the max-pool at its end.
ROWS: list[Row] = [
    ((128, 128), 2),
    ((256, 256), 2),
    ((728, 728), 2),
    *[((728, 728, 728), 1)] * 8,
    ((728, 1024), 2),
]
# The form for 32-pixel pictures: padded first convolutions and a first block that keep the size.
CIFAR: list[Row] = [((128, 128), 1), *ROWS[1:]]
# stem → stride and padding of the first convolution, padding of the second, rows.
STEMS = {"imagenet": (2, 0, 0, ROWS), "cifar": (1, 1, 1, CIFAR)}
EXIT = (1536, 2048)


def block(o: Options, in_channels: int, channels: Sequence[int], stride: int, act_first: bool) -> Residual:
    """Separable convolutions with a ReLU before each, a max-pool where it strides, around them a 1 × 1 shortcut."""
    body: OrderedDict[str, nn.Module] = OrderedDict()
    now = in_channels
    for i, out in enumerate(channels, start=1):
        if i > 1 or act_first:
            body[f"act{i}"] = o.activation(inplace=i > 1)  # the shortcut reads what the first one would overwrite
        body[f"conv{i}"] = o.separable(now, out, act=False)
        now = out
    if stride > 1:
        body["pool"] = nn.MaxPool2d(3, stride, padding=1)
    body.update(o.excite(now))
    same = stride == 1 and in_channels == now
    return Residual(nn.Sequential(body), None if same else o.conv(in_channels, now, 1, stride, act=False))


def build(o: Options) -> Net:
    """Xception; its first two convolutions have no padding."""
    stride, padding1, padding2, rows = STEMS[o.stem]
    first, now = o.channels(32), o.channels(64)
    stages: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=o.conv(o.in_chans, first, 3, stride, padding1), conv2=o.conv(first, now, 3, 1, padding2)
    )
    for i, (bases, stride) in enumerate(rows, start=1):
        channels = [o.channels(base) for base in bases]
        stages[f"block{i}"] = block(o, now, channels, stride, act_first=i > 1)  # conv2 ends with one already
        now = channels[-1]
    for i, base in enumerate(EXIT, start=3):
        out = o.channels(base)
        stages[f"conv{i}"] = o.separable(now, out)
        now = out
    return Net(stages, o.classifier(now))


def timm(match: re.Match[str]) -> str:
    """A block is one list: ReLU (not first in block 1), convolution, norm, and again."""
    block, conv, layer = match.groups()
    position = 3 * int(conv) - 2 - (block == "1")
    last = {"depthwise": f"{position}.conv1", "pointwise.conv": f"{position}.pointwise", "pointwise.norm": position + 1}
    return f"block{block}.rep.{last[layer]}"


# Blocks in pytorchcv's stages: each where the channels grow, the middle flow with the third.
UNITS = ["stage1.unit1", "stage2.unit1", *(f"stage3.unit{i}" for i in range(1, 10)), "stage4.unit1"]
PYTORCHCV = {"depthwise": "conv.dw_conv", "pointwise.conv": "conv.pw_conv", "pointwise.norm": "bn"}
SEPARABLE = r"(depthwise|pointwise\.conv|pointwise\.norm)"
BODY, SHORTCUT = r"features\.block(\d+)\.body\.conv(\d)\." + SEPARABLE, r"features\.block(\d+)\.shortcut\."
TIMM: Rules = [
    (r"features\.conv([12])\.conv", r"conv\1"),
    (r"features\.conv([12])\.norm", r"bn\1"),
    (BODY, timm),
    (SHORTCUT + "conv", r"block\1.skip"),
    (SHORTCUT + "norm", r"block\1.skipbn"),
    (r"features\.conv([34])\.depthwise", r"conv\1.conv1"),
    (r"features\.conv([34])\.pointwise\.conv", r"conv\1.pointwise"),
    (r"features\.conv([34])\.pointwise\.norm", r"bn\1"),
    (r"head\.fc", "fc"),
]
NAMES: dict[str, Rules] = {
    "timm": TIMM,
    "cadene": [(r"head\.fc", "last_linear"), *TIMM],
    "pytorchcv": [
        (r"features\.conv([12])\.(conv|norm)", lambda m: f"features.init_block.conv{m[1]}.{LEAF[m[2]]}"),
        (BODY, lambda m: f"features.{UNITS[int(m[1]) - 1]}.body.block{m[2]}.{PYTORCHCV[m[3]]}"),
        (SHORTCUT + "(conv|norm)", lambda m: f"features.{UNITS[int(m[1]) - 1]}.identity_conv.{LEAF[m[2]]}"),
        (
            r"features\.conv([34])\." + SEPARABLE,
            lambda m: f"features.final_block.conv{int(m[1]) - 2}.{PYTORCHCV[m[2]]}",
        ),
        (r"head\.fc", "output"),
    ],
}

initialise = kaiming_normal
SIZE = 299
REFERENCE = "timm legacy_xception"
VARIANTS = {"xception": {}}
CANDIDATES = {"large": ("xception",), "small": ("xception",)}
WIDTHS = (0.125, 0.25, 0.5, 0.75, 1.0)
