"""Aligned Xception, the backbone of DeepLab v3+.

"Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation" (Chen et al., arXiv:1802.02611,
figure 4): Xception with strided separable convolutions in place of max-pools, and a norm after each depthwise one.
Its features are the blocks' sums, before the ReLU that the next block begins with. `aligned_xception`, 20 blocks, is
the 65-layer form but for where the exit flow has its activations.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from flyweight.blocks import Options, Residual
from flyweight.initialise import kaiming_normal
from flyweight.net import Net, Rules
from flyweight.zoo.resnet import LEAF

# Number of blocks in the entry flow → output channels and stride of each.
ENTRIES = {
    3: [(128, 2), (256, 2), (728, 2)],
    5: [(128, 2), (256, 1), (256, 2), (728, 1), (728, 2)],
}
MIDDLE = 728
# Output channels of the three separable convolutions in the last block, whose stride is 2, and after it.
LAST, EXIT = (728, 1024, 1024), (1536, 1536, 2048)
# stem → stride of the first convolution and of the first block.
STEMS = {"imagenet": (2, 2), "cifar": (1, 1)}


def separable(o: Options, in_channels: int, out_channels: int, stride: int = 1, act: bool = False) -> nn.Sequential:
    """3 × 3 depthwise, norm, 1 × 1, norm; with `act` an activation after both norms."""
    depthwise = o.depthwise(in_channels, stride=stride, act=act)
    return nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=o.conv(in_channels, out_channels, 1, act=act)))


def separables(o: Options, in_channels: int, channels: Sequence[int], stride: int, act_first: bool) -> nn.Sequential:
    """An activation before each of the separable convolutions, the first on request; the last one strides."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    now = in_channels
    for i, out in enumerate(channels, start=1):
        if i > 1 or act_first:
            parts[f"act{i}"] = o.activation(inplace=i > 1)  # others read what the first one would overwrite
        parts[f"conv{i}"] = separable(o, now, out, stride if i == len(channels) else 1)
        now = out
    return nn.Sequential(parts)


def block(o: Options, in_channels: int, channels: Sequence[int], stride: int, act_first: bool = True) -> Residual:
    """The shortcut reads the block's input as it is, before the ReLU that the body begins with."""
    body = separables(o, in_channels, channels, stride, act_first)
    for name, layer in o.excite(channels[-1]):
        body.add_module(name, layer)
    same = stride == 1 and in_channels == channels[-1]
    return Residual(body, None if same else o.conv(in_channels, channels[-1], 1, stride, act=False))


def exit_flow(o: Options, in_channels: int, channels: Sequence[int], act: str) -> nn.Sequential:
    """Separable convolutions without a shortcut: activations "inside" them or "between" them (before and after too)."""
    if act == "between":
        flow = separables(o, in_channels, channels, 1, act_first=True)
        flow.add_module("act", o.activation())
        return flow
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    now = in_channels
    for i, out in enumerate(channels, start=1):
        parts[f"conv{i}"] = separable(o, now, out, act=True)
        now = out
    return nn.Sequential(parts)


def build(o: Options, entry: int = 3, middle: int = 16, exit_act: str = "inside") -> Net:
    """Aligned Xception with `entry` (3 or 5) and `middle` blocks, and one more before the exit flow.

    `exit_act` "inside": an activation after the depthwise and the pointwise convolutions of the exit flow, as in
    TensorFlow's DeepLab; "between": before the first, and after each pointwise one, as in the 20-block form.
    """
    if exit_act not in ("inside", "between"):
        raise ValueError(f'exit_act is "inside" or "between", not {exit_act!r}')
    stem_stride, first_stride = STEMS[o.stem]
    first, now = o.channels(32), o.channels(64)
    stages: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=o.conv(o.in_chans, first, 3, stem_stride), conv2=o.conv(first, now)
    )
    rows = [((base,) * 3, stride) for base, stride in [*ENTRIES[entry], *[(MIDDLE, 1)] * middle]]
    for i, (bases, stride) in enumerate([*rows, (LAST, 2)], start=1):
        channels = [o.channels(base) for base in bases]
        # The first block follows an activation, which another one would only repeat.
        stages[f"block{i}"] = block(o, now, channels, first_stride if i == 1 else stride, act_first=i > 1)
        now = channels[-1]
    channels = [o.channels(base) for base in EXIT]
    stages["exit"] = exit_flow(o, now, channels, exit_act)
    return Net(stages, o.classifier(channels[-1]))


LAYERS = {
    "depthwise.conv": "conv_dw",
    "depthwise.norm": "bn_dw",
    "pointwise.conv": "conv_pw",
    "pointwise.norm": "bn_pw",
}


def timm(args: Mapping[str, Any]) -> Rules:
    """Blocks are numbered from 0; the exit flow is one more. The 20-block form is not in timm."""
    if args.get("exit_act", "inside") != "inside":
        return []
    last = args.get("entry", 3) + args.get("middle", 16) + 1
    separable = r"(conv\d)\.(\w+\.\w+)"
    return [
        (r"features\.conv([12])\.(conv|norm)", lambda m: f"stem.{int(m[1]) - 1}.{LEAF[m[2]]}"),
        (r"features\.block(\d+)\.shortcut\.(conv|norm)", lambda m: f"blocks.{int(m[1]) - 1}.shortcut.{LEAF[m[2]]}"),
        (
            r"features\.block(\d+)\.body\." + separable,
            lambda m: f"blocks.{int(m[1]) - 1}.stack.{m[2]}.{LAYERS[m[3]]}",
        ),
        (r"features\.exit\." + separable, lambda m: f"blocks.{last}.stack.{m[1]}.{LAYERS[m[2]]}"),
        (r"head\.fc", "head.fc"),
    ]


NAMES = {"timm": timm}


def xception(args: Mapping[str, Any], path: str) -> str:
    """Where a module of ours has its tensors in Xception, or "" (as DeepLab v3+ in PyTorch starts from its weights).

    The middle flow goes on with copies of Xception's block 11; its block 12 is the last one, and the norm of its conv3
    serves the two that are as wide. Xception has no norm after depthwise convolutions, and pools where a third
    separable convolution strides.
    """
    last = args.get("middle", 16) + 4
    if args.get("entry", 3) != 3:
        return ""
    layers = {"depthwise.conv": "depthwise", "pointwise.conv": "pointwise.conv", "pointwise.norm": "pointwise.norm"}
    if match := re.fullmatch(r"features\.block(\d+)\.(body|shortcut)\.(.+)", path):
        block, side, rest = int(match[1]), match[2], match[3]
        source = f"features.block{12 if block == last else min(block, 11)}.{side}."
        if side == "shortcut":
            return source + rest
        conv, _, layer = rest.partition(".")
        return f"{source}{conv}.{layers[layer]}" if layer in layers else ""
    if match := re.fullmatch(r"features\.exit\.conv(\d)\.(.+)", path):
        conv, layer = int(match[1]), match[2]
        if conv == 2:
            return "features.conv3.pointwise.norm" if layer == "pointwise.norm" else ""
        return f"features.conv{3 if conv == 1 else 4}.{layers[layer]}" if layer in layers else ""
    return path if path.startswith("features.conv") else ""


DONORS = {"xception": xception}

DEFAULTS = {"eps": 1e-3}
initialise = kaiming_normal
SIZE = 299
REFERENCE = "timm xception41, xception65, xception71; AlignedXception of DeepLab v3+ in PyTorch, with true shortcuts"
VARIANTS = {
    "aligned_xception": {"exit_act": "between", "eps": 1e-5, "size": 512},
    "aligned_xception_41": {"middle": 8},
    "aligned_xception_65": {},
    "aligned_xception_71": {"entry": 5},
}
CANDIDATES = {"large": ("aligned_xception_41",), "small": ("aligned_xception_41",)}
WIDTHS = (0.125, 0.25, 0.5, 0.75, 1.0)
