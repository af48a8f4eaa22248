"""SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size.

Iandola et al., arXiv:1602.07360; version 1.1 is the authors' later one, of the same accuracy with 2.4 times less work.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn

from flyweight.blocks import ConvClassifier, Fire, Options, Residual
from flyweight.initialise import kaiming_uniform, small_normal
from flyweight.net import Net, Rules

# version → channels and kernel of the first convolution, the fire modules before which a 3 × 3 max-pool of stride 2 is.
VERSIONS = {"1.0": (96, 7, (2, 5, 9)), "1.1": (64, 3, (2, 4, 6))}
FIRST, LAST = 2, 9  # fire2 … fire9
BYPASSES = ("none", "simple", "complex")


def bypassed(o: Options, fire: Fire, in_channels: int, out_channels: int, bypass: str) -> nn.Module:
    """Section 6: "simple" adds the input where its channels fit, "complex" elsewhere too, through a 1 × 1."""
    if bypass == "none" or (bypass == "simple" and in_channels != out_channels):
        return fire
    projection = o.conv(in_channels, out_channels, 1, act=False) if in_channels != out_channels else None
    return Residual(fire, projection)


def build(
    o: Options,
    version: str = "1.0",
    bypass: str = "none",
    base_e: int = 128,
    incr_e: int = 128,
    freq: int = 2,
    squeeze_ratio: float = 0.125,
    pct_3x3: float = 0.5,
) -> Net:
    """SqueezeNet with the metaparameters of section 5.1, whose defaults give version 1.0.

    Fire module i expands to eᵢ = base_e + incr_e · ⌊i / freq⌋ channels, of which pct_3x3 by 3 × 3 kernels, from
    squeeze_ratio · eᵢ. `stem` "cifar" keeps the picture's size; `norm="batch"` normalises every convolution and drops
    the ReLU on the logits, as training from scratch in minutes needs.
    """
    if bypass not in BYPASSES:
        raise ValueError(f"bypass is one of {', '.join(BYPASSES)}")
    channels, kernel, pools = VERSIONS[version]
    channels = o.channels(channels)
    first = (3, 1, None) if o.stem == "cifar" else (kernel, 2, 0)
    stages: OrderedDict[str, nn.Module] = OrderedDict(stem=o.conv(o.in_chans, channels, *first))
    for i in range(FIRST, LAST + 1):
        if i in pools:
            stages[f"pool{pools.index(i) + 1}"] = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        expanded = base_e + incr_e * ((i - FIRST) // freq)
        expand3x3 = o.channels(round(expanded * pct_3x3), 4)
        expand1x1 = o.channels(expanded - round(expanded * pct_3x3), 4)
        squeeze = o.channels(expanded * squeeze_ratio)
        fire = Fire(o, channels, squeeze, (expand1x1, expand3x3))
        stages[f"fire{i}"] = bypassed(o, fire, channels, expand1x1 + expand3x3, bypass)
        channels = expand1x1 + expand3x3
    act = o.activation() if o.norm == "none" else None
    return Net(stages, ConvClassifier(channels, o.num_classes, o.drop_rate, act))


def initialise(net: nn.Module) -> None:
    """Kaiming-uniform, the last convolution N(0, 0.01), biases 0, as the authors' Caffe network."""
    kaiming_uniform(net)
    if isinstance(net, Net) and isinstance(net.get_classifier(), nn.Conv2d):
        small_normal(net.get_classifier().get_parameter("weight"))


def torchvision(args: Mapping[str, Any]) -> Rules:
    """All layers in one list: the first convolution and its activation, then pools and fire modules in turn."""
    pools, position = VERSIONS[args.get("version", "1.0")][2], 2
    rules: Rules = [(r"features\.stem\.conv", "features.0"), (r"head\.fc", "classifier.1")]
    for i in range(FIRST, LAST + 1):
        position += i in pools
        rules.append((rf"features\.fire{i}\.(\w+)\.conv", rf"features.{position}.\1"))
        position += 1
    return rules


def pytorchcv(args: Mapping[str, Any]) -> Rules:
    """A stage begins at each pool; `bypass="simple"` changes no names there."""
    pools = VERSIONS[args.get("version", "1.0")][2]
    rules: Rules = [(r"features\.stem\.conv", "features.init_block.conv"), (r"head\.fc", "output.final_conv")]
    for stage, (first, end) in enumerate(zip(pools, (*pools[1:], LAST + 1), strict=True), start=1):
        for i in range(first, end):
            unit = rf"features.stage{stage}.unit{i - first + 1}.\1.conv"
            rules.append((rf"features\.fire{i}\.(?:body\.)?((?:squeeze|expand)\w*)\.conv", unit))
    return rules


def cadene(args: Mapping[str, Any]) -> Rules:
    """torchvision's but for the last convolution."""
    return [(r"head\.fc", "last_conv"), *torchvision(args)]


NAMES = {"torchvision": torchvision, "cadene": cadene, "pytorchcv": pytorchcv}
DEFAULTS = {"norm": "none", "drop_rate": 0.5}
REFERENCE = "torchvision"
VARIANTS = {
    "squeezenet1_0": {"version": "1.0"},
    "squeezenet1_1": {"version": "1.1"},
}
CANDIDATES = {"large": ("squeezenet1_1",), "small": ("squeezenet1_1",)}
WIDTHS = (0.25, 0.35, 0.5, 0.75, 1.0)
