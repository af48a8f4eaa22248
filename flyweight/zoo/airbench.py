"""The plain network of "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (Jordan, arXiv:2404.00498, section 3.1).

Here with ReLU instead of GELU, which int8 runtimes fuse, and without the frozen whitening of the first layer. It learns
more per second than any other family here: no shortcut to carry, pooling early, few and wide layers.
"""

from collections import OrderedDict

from torch import nn

from flyweight.blocks import Classifier, Options
from flyweight.initialise import kaiming_normal
from flyweight.net import Net
from flyweight.ops import GlobalMaxPool

STAGES = (64, 256, 256)
FIRST = 24


def stage(o: Options, in_channels: int, out_channels: int) -> nn.Sequential:
    """3 × 3 convolution, 2 × 2 max-pool, norm, ReLU; 3 × 3 convolution, norm, ReLU."""
    conv, *after = o.conv(in_channels, out_channels).named_children()
    conv1 = nn.Sequential(OrderedDict([conv, ("pool", nn.MaxPool2d(2)), *after]))
    return nn.Sequential(OrderedDict(conv1=conv1, conv2=o.conv(out_channels, out_channels)))


def build(o: Options) -> Net:
    """airbench94; `stem` "cifar" (2 × 2, stride 1) or "photo" (two 3 × 3 of stride 2, for 64 pixels and more)."""
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    if o.stem == "cifar":
        stages["stem"] = nn.Sequential(OrderedDict(conv=nn.Conv2d(o.in_chans, FIRST, 2), act=o.activation()))
    else:
        first, second = nn.Conv2d(o.in_chans, FIRST, 3, 2, 1), nn.Conv2d(FIRST, FIRST, 3, 2, 1)
        stages["stem1"] = nn.Sequential(OrderedDict(conv=first, act=o.activation()))
        stages["stem2"] = nn.Sequential(OrderedDict(conv=second, act=o.activation()))
    channels = FIRST
    for i, base in enumerate(STAGES, start=1):
        out = o.channels(base)
        stages[f"stage{i}"] = stage(o, channels, out)
        channels = out
    return Net(stages, Classifier(channels, o.num_classes, o.drop_rate, GlobalMaxPool()))


initialise = kaiming_normal
REFERENCE = "the paper's code, but for the two changes above"
VARIANTS = {"airbench94": {"stem": "cifar"}, "airbench94_photo": {"stem": "imagenet"}}
CANDIDATES = {"large": ("airbench94_photo",), "small": ("airbench94",)}
WIDTHS = (0.125, 0.25, 0.375, 0.45, 0.5, 0.75, 1.0)
