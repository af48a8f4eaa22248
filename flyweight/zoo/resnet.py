"""Deep Residual Learning for Image Recognition (He et al., arXiv:1512.03385).

The bottleneck's stride is on its 3 × 3 convolution, as in torchvision, not on the first 1 × 1 as in the paper.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from flyweight.blocks import Options, Residual
from flyweight.initialise import kaiming_normal
from flyweight.net import Net, Rules
from flyweight.ops import PadChannels, round_channels

POOL = partial(nn.MaxPool2d, 3, stride=2, padding=1)
CAFFE_POOL = partial(nn.MaxPool2d, 3, stride=2, ceil_mode=True)
# stem → kernel and stride of the first convolution, the 3 × 3 max-pool of stride 2 that follows.
STEMS: dict[str, tuple[int, int, Callable[[], nn.Module] | None]] = {
    "imagenet": (7, 2, POOL),
    "caffe": (7, 2, CAFFE_POOL),
    "no_pool": (7, 2, None),
    "conv": (3, 2, None),
    "cifar": (3, 1, None),
}
EXPANSION = 4


def basic(o: Options, in_channels: int, out_channels: int, stride: int) -> "OrderedDict[str, nn.Module]":
    """Two 3 × 3 convolutions (figure 5, left)."""
    conv1 = o.conv(in_channels, out_channels, 3, stride)
    conv2 = o.conv(out_channels, out_channels, 3, act=False)
    return OrderedDict([("conv1", conv1), ("conv2", conv2), *o.excite(out_channels)])


def bottleneck(
    o: Options,
    in_channels: int,
    out_channels: int,
    stride: int,
    groups: int,
    base_width: int,
    stride_first: bool = False,
) -> "OrderedDict[str, nn.Module]":
    """1 × 1, (grouped) 3 × 3, 1 × 1 (figure 5, right; ResNeXt, arXiv:1611.05431, figure 3c).

    `base_width` is the channels of a group where `out_channels` is 256, so 64 for one group.
    """
    middle = int(out_channels / EXPANSION * base_width / 64) * groups
    middle = middle if o.width == 1 else round_channels(middle, 8 * groups)
    conv1 = o.conv(in_channels, middle, 1, stride if stride_first else 1)
    conv2 = o.conv(middle, middle, 3, 1 if stride_first else stride, groups=groups)
    conv3 = o.conv(middle, out_channels, 1, act=False)
    return OrderedDict([("conv1", conv1), ("conv2", conv2), ("conv3", conv3), *o.excite(out_channels)])


def identity_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Every second position, and zeros for the channels that are new (section 3.3, option A): no parameters."""
    before = (out_channels - in_channels) // 2
    pad = PadChannels(before, out_channels - in_channels - before)
    return nn.Sequential(OrderedDict(subsample=nn.MaxPool2d(1, stride), pad=pad))


def build(
    o: Options,
    layers: Sequence[int] = (2, 2, 2, 2),
    channels: Sequence[int] = (64, 128, 256, 512),
    block: str = "basic",
    shortcut: str = "projection",
    groups: int = 1,
    base_width: int = 64,
    stride_first: bool = False,
) -> Net:
    """`layers` blocks ("basic" or "bottleneck") of `channels` per stage.

    `shortcut`, where the shape changes, is a "projection" or the "identity". `stem` is "imagenet" (7 × 7 of stride 2,
    then a max-pool), "no_pool" (without it), "conv" (3 × 3 of stride 2) or "cifar" (3 × 3 of stride 1).
    """
    if block not in ("basic", "bottleneck") or shortcut not in ("projection", "identity"):
        raise ValueError('block is "basic" or "bottleneck", shortcut "projection" or "identity"')
    make = (
        partial(bottleneck, groups=groups, base_width=base_width, stride_first=stride_first)
        if block == "bottleneck"
        else basic
    )
    kernel, stride, pool = STEMS[o.stem]
    now = o.channels(channels[0])
    stages: OrderedDict[str, nn.Module] = OrderedDict(stem=o.conv(o.in_chans, now, kernel, stride))
    if pool:
        stages["pool"] = pool()
    for stage, (blocks, base) in enumerate(zip(layers, channels, strict=True), start=1):
        out = o.channels(base) * (EXPANSION if block == "bottleneck" else 1)
        for i in range(blocks):
            stride = 2 if i == 0 and stage > 1 else 1
            body = nn.Sequential(make(o, now, out, stride))
            side = None
            if stride != 1 or now != out:
                identity = shortcut == "identity"
                side = identity_shortcut(now, out, stride) if identity else o.conv(now, out, 1, stride, act=False)
            stages[f"stage{stage}_block{i + 1}"] = Residual(body, side, o.activation())
            now = out
    return Net(stages, o.classifier(now))


def cifar(depth: int) -> dict[str, object]:
    """Section 4.2: depth 6n + 2, three stages of 16, 32 and 64 channels, identity shortcuts."""
    return {"stem": "cifar", "layers": [(depth - 2) // 6] * 3, "channels": [16, 32, 64], "shortcut": "identity"}


LEAF = {"conv": "conv", "norm": "bn"}  # the layers of `Options.conv` in other libraries
BLOCK = r"features\.stage(\d)_block(\d+)\."


def layer(path: str) -> Callable[[re.Match[str]], str]:
    """A path in a block, whose numbers there begin at 0; the block's stage and number, then what else was matched."""
    return lambda match: f"layer{match[1]}.{int(match[2]) - 1}." + path.format(*match.groups()[2:])


BLOCKS: Rules = [
    (BLOCK + r"body\.conv(\d)\.conv", layer("conv{}")),
    (BLOCK + r"body\.conv(\d)\.norm", layer("bn{}")),
    (BLOCK + r"shortcut\.conv", layer("downsample.0")),
    (BLOCK + r"shortcut\.norm", layer("downsample.1")),
]
STEM: Rules = [(r"features\.stem\.conv", "conv1"), (r"features\.stem\.norm", "bn1")]
TORCHVISION: Rules = [*STEM, *BLOCKS, (r"head\.fc", "fc")]
EXCITE = BLOCK + r"body\.se\."
TIMM: Rules = [*TORCHVISION, (EXCITE + "reduce", layer("se.fc1")), (EXCITE + "expand", layer("se.fc2"))]


def pytorchcv(args: Mapping[str, Any]) -> Rules:
    """Numbers begin at 1, as ours; the stem of the small-picture form is one level higher."""
    stem = "features.init_block" if args.get("stem") == "cifar" else "features.init_block.conv"
    unit = r"features.stage\1.unit\2"
    return [
        (r"features\.stem\.conv", f"{stem}.conv"),
        (r"features\.stem\.norm", f"{stem}.bn"),
        (BLOCK + r"body\.conv(\d)\.conv", rf"{unit}.body.conv\3.conv"),
        (BLOCK + r"body\.conv(\d)\.norm", rf"{unit}.body.conv\3.bn"),
        (BLOCK + r"shortcut\.conv", rf"{unit}.identity_conv.conv"),
        (BLOCK + r"shortcut\.norm", rf"{unit}.identity_conv.bn"),
        (EXCITE + "reduce", rf"{unit}.se.conv1"),
        (EXCITE + "expand", rf"{unit}.se.conv2"),
        (r"head\.fc", "output"),
    ]


CADENE: Rules = [(r"head\.fc", "last_linear"), *TORCHVISION]
NAMES = {"torchvision": TORCHVISION, "timm": TIMM, "cadene": CADENE, "pytorchcv": pytorchcv}

initialise = kaiming_normal
REFERENCE = "torchvision"
DEEP = {"block": "bottleneck"}
VARIANTS = {
    "resnet10": {"layers": [1, 1, 1, 1]},
    "resnet10_conv": {"layers": [1, 1, 1, 1], "stem": "conv"},
    "resnet18": {"layers": [2, 2, 2, 2]},
    "resnet34": {"layers": [3, 4, 6, 3]},
    "resnet50": {"layers": [3, 4, 6, 3], **DEEP},
    "resnet101": {"layers": [3, 4, 23, 3], **DEEP},
    "resnet152": {"layers": [3, 8, 36, 3], **DEEP},
} | {f"resnet{depth}_cifar": cifar(depth) for depth in (8, 14, 20, 32, 44, 56, 110)}
CANDIDATES = {"large": ("resnet10", "resnet10_conv"), "small": ("resnet8_cifar", "resnet14_cifar", "resnet20_cifar")}
WIDTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5)
