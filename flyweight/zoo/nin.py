"""Network In Network (Lin, Chen and Yan, arXiv:1312.4400): convolutions followed by 1 × 1s, and no hidden layers.

The ImageNet form is the authors' later one, from Caffe's model zoo.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from torch import nn

from flyweight.blocks import ConvClassifier, Options
from flyweight.net import Net, Rules
from flyweight.zoo import squeezenet


class Row(NamedTuple):
    """Channels of a convolution and of the 1 × 1s after it, its kernel; before it a pool, and a dropout or none."""

    channels: Sequence[int]
    kernel: int
    stride: int = 1
    padding: int | None = None
    pool: Callable[[], nn.Module] | None = None
    drop: bool = False


CAFFE_POOL = partial(nn.MaxPool2d, 3, stride=2, ceil_mode=True)
MAX_POOL = partial(nn.MaxPool2d, 3, stride=2, padding=1)
AVG_POOL = partial(nn.AvgPool2d, 3, stride=2, padding=1)
STEMS = {
    "imagenet": [
        Row((96, 96, 96), 11, stride=4, padding=0),
        Row((256, 256, 256), 5, pool=CAFFE_POOL),
        Row((384, 384, 384), 3, pool=CAFFE_POOL),
        Row((1024, 1024), 3, pool=CAFFE_POOL, drop=True),
    ],
    "cifar": [
        Row((192, 160, 96), 5),
        Row((192, 192, 192), 5, pool=MAX_POOL, drop=True),
        Row((192, 192), 3, pool=AVG_POOL, drop=True),
    ],
}


def mlpconv(o: Options, in_channels: int, row: Row) -> tuple[nn.Sequential, int]:
    """A convolution and 1 × 1s after it, a small network at each position (section 3.1), and its output channels."""
    now = o.channels(row.channels[0])
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=o.conv(in_channels, now, row.kernel, row.stride, row.padding)
    )
    for i, base in enumerate(row.channels[1:], start=2):
        out = o.channels(base)
        parts[f"conv{i}"] = o.conv(now, out, 1)
        now = out
    return nn.Sequential(parts), now


def build(o: Options) -> Net:
    """Network In Network; `norm="batch"` normalises every convolution and drops the ReLU on the logits."""
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    now = o.in_chans
    for i, row in enumerate(STEMS[o.stem], start=1):
        if row.pool:
            stages[f"pool{i - 1}"] = row.pool()
        if row.drop:
            stages[f"drop{i - 1}"] = nn.Dropout(o.drop_rate)
        stages[f"mlpconv{i}"], now = mlpconv(o, now, row)
    act = o.activation() if o.norm == "none" else None
    return Net(stages, ConvClassifier(now, o.num_classes, act=act))


NAMES: dict[str, Rules] = {
    "pytorchcv": [
        (r"features\.mlpconv(\d)\.conv(\d)\.conv", r"features.stage\1.unit\2.conv"),
        (r"head\.fc", "output.final_conv.conv"),
    ]
}

DEFAULTS = {"norm": "none", "drop_rate": 0.5}
initialise = squeezenet.initialise
REFERENCE = "Caffe's model zoo (NIN-Imagenet); pytorchcv nin_cifar10"
VARIANTS = {"nin": {}, "nin_cifar": {"stem": "cifar"}}
CANDIDATES = {"large": ("nin",), "small": ("nin_cifar",)}
WIDTHS = (0.125, 0.25, 0.5, 0.75, 1.0)
