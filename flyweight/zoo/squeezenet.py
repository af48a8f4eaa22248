"""SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size.

Iandola et al., arXiv:1602.07360.
"""

from collections import OrderedDict
from functools import partial

from torch import nn

from flyweight.blocks import ConvClassifier, ConvNormAct, Fire, relu
from flyweight.net import Net
from flyweight.ops import round_channels

# Squeeze and expand (1 × 1 and 3 × 3 alike) channels of the fire modules; "pool" is a 3 × 3 max-pool of stride 2.
ROWS_1_1 = [
    "pool",
    (16, 64),
    (16, 64),
    "pool",
    (32, 128),
    (32, 128),
    "pool",
    (48, 192),
    (48, 192),
    (64, 256),
    (64, 256),
]


def conv_act(in_channels: int, out_channels: int, kernel: int) -> nn.Module:
    """Convolution with bias, then ReLU: the paper's networks have no batch normalisation."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
    return nn.Sequential(OrderedDict(conv=conv, act=relu()))


def build(
    num_classes: int = 1000,
    in_chans: int = 3,
    width: float = 1.0,
    drop_rate: float = 0.5,
    stem: str = "imagenet",
    norm: str = "none",
) -> Net:
    """SqueezeNet 1.1; `norm="batch"` normalises every convolution, which training from scratch in minutes needs.

    `stem` "imagenet" (stride 2, no padding) or "cifar" (stride 1).
    """
    channels = round_channels(64 * width)
    conv = partial(ConvNormAct) if norm == "batch" else conv_act
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    if stem == "cifar":
        stages["stem"] = conv(in_chans, channels, 3)
    elif norm == "batch":
        stages["stem"] = ConvNormAct(in_chans, channels, 3, stride=2)
    else:
        stages["stem"] = nn.Sequential(OrderedDict(conv=nn.Conv2d(in_chans, channels, 3, stride=2), act=relu()))
    pools = fires = 0
    for row in ROWS_1_1:
        if row == "pool":
            pools += 1
            stages[f"pool{pools}"] = nn.MaxPool2d(3, stride=2, ceil_mode=True)
            continue
        squeeze, expand = (round_channels(c * width) for c in row)
        fires += 1
        stages[f"fire{fires + 1}"] = Fire(channels, squeeze, expand, expand, conv)
        channels = 2 * expand
    return Net(stages, ConvClassifier(channels, num_classes, drop_rate, act=norm == "none"))


def initialise(net: Net) -> None:
    """Kaiming-uniform, the last convolution N(0, 0.01), biases 0, as the authors' Caffe net."""
    for leaf in net.modules():
        if isinstance(leaf, nn.Conv2d):
            nn.init.kaiming_uniform_(leaf.weight)
            if leaf.bias is not None:
                nn.init.zeros_(leaf.bias)
    last = net.head.get_submodule("conv")
    assert isinstance(last, nn.Conv2d)
    nn.init.normal_(last.weight, std=0.01)


VARIANTS = {
    "squeezenet1_1": {},
    "squeezenet1_1_bn": {"norm": "batch", "drop_rate": 0.0},
    "squeezenet1_1_small": {"norm": "batch", "drop_rate": 0.0, "stem": "cifar"},
}
CANDIDATES = {"large": ("squeezenet1_1_bn",), "small": ("squeezenet1_1_small",)}
WIDTHS = (0.25, 0.35, 0.5, 0.75, 1.0)
