"""Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift (BN-Inception).

Ioffe & Szegedy, arXiv:1502.03167: GoogLeNet with batch normalisation and two 3 × 3 convolutions for each 5 × 5. As
pytorchcv has it, after the Caffe network: biases beside the norms, a plain first convolution where the paper's is
separable, and pools that 4c and 4d project to 128 channels, not 96. The Inception-v2 of the later paper (Rethinking,
arXiv:1512.00567, section 6) is another network, for 299 pixels, with n × n kernels factorised into 1 × n and n × 1;
once its first 7 × 7 is three 3 × 3 and its auxiliary head normalised, that paper calls it Inception-v3.
"""

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from flyweight.blocks import Options, Row, stack
from flyweight.initialise import kaiming_uniform
from flyweight.net import Net, Rules
from flyweight.ops import SameMaxPool2d
from flyweight.zoo.resnet import LEAF

AVG = partial(nn.AvgPool2d, 3, 1, 1)


def inception(c1: int, r3: int, c3: int, rd: int, cd: int, pool: Callable[[], nn.Module], p: int) -> Row:
    """A row of figure 5: 1 × 1; 3 × 3 reduced, 3 × 3; double 3 × 3 reduced, double 3 × 3; pool, projection."""
    return [[(c1, 1)], [(r3, 1), (c3, 3)], [(rd, 1), (cd, 3), (cd, 3)], [pool, (p, 1)]]


def reduction(r3: int, c3: int, rd: int, cd: int) -> Row:
    """A row of figure 5 that halves the size: no 1 × 1 branch, the pool passes through.

    The reference's pool rounds up; SAME reads the same of an even size, and of an odd one what the convolutions read.
    """
    return [[(r3, 1), (c3, 3, 2, 1)], [(rd, 1), (cd, 3), (cd, 3, 2, 1)], [partial(SameMaxPool2d, 3, 2)]]


POOL = partial(nn.MaxPool2d, 3, 2, ceil_mode=True)
STEMS: dict[str, dict[str, Row]] = {
    "imagenet": {"conv1": (64, 7, 2, 3), "pool1": POOL, "conv2": (64, 1), "conv3": (192, 3), "pool2": POOL},
    "cifar": {"conv1": (64, 3), "conv2": (64, 1), "conv3": (192, 3)},
}
BODY: dict[str, Row] = {
    "inception3a": inception(64, 64, 64, 64, 96, AVG, 32),
    "inception3b": inception(64, 64, 96, 64, 96, AVG, 64),
    "inception3c": reduction(128, 160, 64, 96),
    "inception4a": inception(224, 64, 96, 96, 128, AVG, 128),
    "inception4b": inception(192, 96, 128, 96, 128, AVG, 128),
    "inception4c": inception(160, 128, 160, 128, 160, AVG, 128),
    "inception4d": inception(96, 128, 192, 160, 192, AVG, 128),
    "inception4e": reduction(128, 192, 192, 256),
    "inception5a": inception(352, 192, 320, 160, 224, AVG, 128),
    "inception5b": inception(352, 192, 320, 192, 224, partial(nn.MaxPool2d, 3, 1, 1), 128),
}


def add_biases(net: nn.Module) -> None:
    """Gives every convolution a bias. The norm after it repeats it, but the reference counts and stores it."""
    for leaf in net.modules():
        if isinstance(leaf, nn.Conv2d) and leaf.bias is None:
            leaf.bias = nn.Parameter(torch.zeros(leaf.out_channels))


def build(o: Options) -> Net:
    """BN-Inception; `stem` "imagenet" (stride 8 in all) or "cifar" (convolutions that keep the size)."""
    stages, channels = stack(o, o.in_chans, STEMS[o.stem] | BODY)
    net = Net(stages, o.classifier(channels))
    add_biases(net)
    return net


# pytorchcv's stages, from 1, hold these modules.
UNITS = {
    module: f"stage{stage}.unit{unit}"
    for stage, modules in enumerate((("3a", "3b"), ("3c", "4a", "4b", "4c", "4d"), ("4e", "5a", "5b")), start=1)
    for unit, module in enumerate(modules, start=1)
}
STEM = {"1": "conv1", "2": "conv2.conv1", "3": "conv2.conv2"}
REDUCING = ("3c", "4e")
MODULE = r"features\.inception(..)\.branches\.branch(\d)\.conv(\d)\.(conv|norm)"


def pytorchcv(match: re.Match[str]) -> str:
    """A branch with one convolution has no number for it; without a pool before it, it is the branch itself."""
    name, branch, conv, leaf = match.groups()
    single = {} if name in REDUCING else {"1": "", "4": ".conv"}
    inner = single.get(branch, f".conv{conv}")
    return f"features.{UNITS[name]}.branches.branch{branch}{inner}.{LEAF[leaf]}"


# Caffe's names of branch and convolution, as the halving modules number them from 2.
CAFFE = {
    "11": "1x1",
    "21": "3x3_reduce",
    "22": "3x3",
    "31": "double_3x3_reduce",
    "32": "double_3x3_1",
    "33": "double_3x3_2",
    "42": "pool_proj",
}
CAFFE_STEM = {"1": "conv1_7x7_s2", "2": "conv2_3x3_reduce", "3": "conv2_3x3"}


def cadene(match: re.Match[str]) -> str:
    """All on one level, the norm by the name of its convolution."""
    name, branch, conv, leaf = match.groups()
    side = CAFFE[f"{int(branch) + (name in REDUCING)}{conv}"]
    return f"inception_{name}_{side}{'_bn' if leaf == 'norm' else ''}"


NAMES: dict[str, Rules] = {
    "cadene": [
        (r"features\.conv(\d)\.conv", lambda m: CAFFE_STEM[m[1]]),
        (r"features\.conv(\d)\.norm", lambda m: f"{CAFFE_STEM[m[1]]}_bn"),
        (MODULE, cadene),
        (r"head\.fc", "last_linear"),
    ],
    "pytorchcv": [
        (r"features\.conv(\d)\.(conv|norm)", lambda m: f"features.init_block.{STEM[m[1]]}.{LEAF[m[2]]}"),
        (MODULE, pytorchcv),
        (r"head\.fc", "output"),
    ],
}

initialise = kaiming_uniform
REFERENCE = "pytorchcv bninception"
VARIANTS = {"inception_v2": {}}
CANDIDATES = {"large": ("inception_v2",), "small": ("inception_v2",)}
WIDTHS = (0.125, 0.25, 0.5, 1.0)
