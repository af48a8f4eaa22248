"""Rethinking the Inception Architecture for Computer Vision (Inception-v3; Szegedy et al., arXiv:1512.00567).

As torchvision has it, after TensorFlow's code: the first modules keep a branch with one 5 × 5 convolution beside the
two 3 × 3 that replace a 5 × 5 (figure 5); n × n becomes 1 × n and n × 1 (figure 6), with n = 7.
"""

import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from torch import nn

from flyweight.blocks import Classifier, Options, Row, stack
from flyweight.initialise import truncated_normal
from flyweight.net import Net, Rules
from flyweight.zoo.inception_v2 import AVG
from flyweight.zoo.resnet import LEAF

V = 0  # no padding: what "V" (valid) marks in the figures of Inception-v4
MAX = partial(nn.MaxPool2d, 3, 2)
AUX, AUX_WEIGHT = "mixed6e", 0.4  # the weight: TensorFlow's train_image_classifier.py; the paper gives none
AUX_SIDE = 17  # the side of AUX's map at 299 pixels


def factorised5(pool: int) -> Row:
    """Figure 5; the pool is projected to `pool` channels."""
    return [[(64, 1)], [(48, 1), (64, 5)], [(64, 1), (96, 3), (96, 3)], [AVG, (pool, 1)]]


def factorised7(c: int) -> Row:
    """Figure 6, with `c` channels inside the branches."""
    single: list[Row] = [(c, 1), (c, (1, 7)), (192, (7, 1))]
    double: list[Row] = [(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))]
    return [[(192, 1)], single, double, [AVG, (192, 1)]]


def expanded() -> Row:
    """Figure 7: the last 3 × 3 convolutions are a 1 × 3 and a 3 × 1 side by side."""
    split: Row = [[(384, (1, 3))], [(384, (3, 1))]]
    return [[(320, 1)], [(384, 1), split], [(448, 1), (384, 3), split], [AVG, (192, 1)]]


STEM: dict[str, Row] = {
    "conv1": (32, 3, 2, V),
    "conv2": (32, 3, 1, V),
    "conv3": (64, 3),
    "pool1": MAX,
    "conv4": (80, 1),
    "conv5": (192, 3, 1, V),
}
SMALL_STEM: dict[str, Row] = {"conv1": (32, 3), "conv2": (64, 3), "conv3": (192, 3)}
STEMS: dict[str, dict[str, Row]] = {"imagenet": {**STEM, "pool2": MAX}, "cifar": SMALL_STEM}
BODY: dict[str, Row] = {
    "mixed5b": factorised5(32),
    "mixed5c": factorised5(64),
    "mixed5d": factorised5(64),
    "mixed6a": [[(384, 3, 2, V)], [(64, 1), (96, 3), (96, 3, 2, V)], [MAX]],  # figure 10
    "mixed6b": factorised7(128),
    "mixed6c": factorised7(160),
    "mixed6d": factorised7(160),
    "mixed6e": factorised7(192),
    "mixed7a": [[(192, 1), (320, 3, 2, V)], [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2, V)], [MAX]],
    "mixed7b": expanded(),
    "mixed7c": expanded(),
}


def aux_head(o: Options, in_channels: int) -> Classifier:
    """Figure 8 with batch normalisation: pooled to 5 × 5, 1 × 1 to 128 channels, 5 × 5 to 768 values.

    Maps of other sizes than 299 pixels give are resampled to 17 × 17 first, so whatever the net takes, its head takes.
    """
    convolved, hidden = o.channels(128), o.channels(768)
    parts: OrderedDict[str, nn.Module] = OrderedDict(side=nn.AdaptiveAvgPool2d(AUX_SIDE), grid=nn.AvgPool2d(5, 3))
    parts["conv1"] = o.conv(in_channels, convolved, 1)
    parts["conv2"] = o.conv(convolved, hidden, 5, 1, V)
    parts["flat"] = nn.Flatten()
    return Classifier(in_channels, o.num_classes, pool=nn.Sequential(parts), hidden_features=hidden)


def build(o: Options, aux: bool = True) -> Net:
    """Inception-v3; `aux`: with the auxiliary head on the last 17 × 17 module, for training.

    `stem` "imagenet" (stride 8 in all, for 75 pixels and more) or "cifar" (three convolutions that keep the size).
    """
    stages, channels = stack(o, o.in_chans, STEMS[o.stem] | BODY)
    heads: OrderedDict[str, nn.Module] = OrderedDict()
    if aux:
        heads[AUX] = aux_head(o, 4 * o.channels(192))  # `factorised7` ends with four branches of 192
    return Net(stages, o.classifier(channels), heads, AUX_WEIGHT)


# torchvision's names of the convolutions before the body; of the branches of modules, by the modules' first characters.
CONVS = ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")
SIDES = {
    "5": ("1x1", "5x5", "3x3dbl", "_pool"),
    "6a": ("3x3", "3x3dbl"),
    "6": ("1x1", "7x7", "7x7dbl", "_pool"),
    "7a": ("3x3", "7x7x3"),
    "7": ("1x1", "3x3", "3x3dbl", "_pool"),
}
BRANCH_PATH = r"branches\.branch(\d)\.conv(\d)\.(conv|norm)"
SPLIT_PATH = r"branches\.branch(\d)\.split\.branches\.branch(\d)\.conv1\.(conv|norm)"


def branch_name(match: re.Match[str]) -> str:
    """Convolutions are numbered where a branch has several."""
    module, branch, conv, leaf = match.groups()
    side = SIDES.get(module, SIDES.get(module[0], ()))[int(branch) - 1]
    single = side in ("1x1", "_pool") or (module, side) == ("6a", "3x3")
    return f"Mixed_{module}.branch{side}{'' if single else f'_{conv}'}.{LEAF[leaf]}"


def split_name(match: re.Match[str]) -> str:
    """The two side by side are a and b; they are the second or third step, as the branch is the second or third."""
    module, branch, half, leaf = match.groups()
    return f"Mixed_{module}.branch{SIDES['7'][int(branch) - 1]}_{branch}{'ab'[int(half) - 1]}.{LEAF[leaf]}"


def pytorchcv(place: Callable[[str], str]) -> Rules:
    """pytorchcv's names of this and the later Inception nets, which differ in where (`place`) they have a module.

    A module that halves the size has lists of convolutions in all branches; the others not in the first and fourth.
    """
    inner = r"(?:body\.branches\.)?"
    one = r"features\.((?:mixed\d[b-z]|inception|block)\w*)\." + inner + r"branches\.branch([14])\.conv\d\.(conv|norm)"
    names = ("conv1x3", "conv3x1")
    return [
        (r"features\.conv(\d)\.(conv|norm)", lambda m: f"features.init_block.conv{m[1]}.{LEAF[m[2]]}"),
        (one, lambda m: f"{place(m[1])}.branches.branch{m[2]}.conv.{LEAF[m[3]]}"),
        (
            r"features\.(\w+)\." + inner + BRANCH_PATH,
            lambda m: f"{place(m[1])}.branches.branch{m[2]}.conv_list.conv{m[3]}.{LEAF[m[4]]}",
        ),
        (
            r"features\.(\w+)\." + SPLIT_PATH,
            lambda m: f"{place(m[1])}.branches.branch{m[2]}.{names[int(m[3]) - 1]}.{LEAF[m[4]]}",
        ),
        (r"features\.(\w+)\.body\.project", lambda m: f"{place(m[1])}.conv"),
        (r"head\.fc", "output.fc"),
    ]


def unit(module: str) -> str:
    """pytorchcv's stage and unit, from 1: a halving module begins a stage, mixed5b the first."""
    stage = int(module[5]) - 4
    return f"features.stage{stage}.unit{'abcde'.index(module[6]) + (stage > 1)}"


TORCHVISION: Rules = [
    (r"features\.conv(\d)\.(conv|norm)", lambda m: f"Conv2d_{CONVS[int(m[1]) - 1]}.{LEAF[m[2]]}"),
    (r"features\.mixed(..)\." + BRANCH_PATH, branch_name),
    (r"features\.mixed(..)\." + SPLIT_PATH, split_name),
    (r"aux\.mixed6e\.pool\.conv(\d)\.(conv|norm)", lambda m: f"AuxLogits.conv{int(m[1]) - 1}.{LEAF[m[2]]}"),
    (r"aux\.mixed6e\.fc", "AuxLogits.fc"),
    (r"head\.fc", "fc"),
]
CADENE: Rules = [(r"head\.fc", "last_linear"), *TORCHVISION]
NAMES = {"torchvision": TORCHVISION, "timm": TORCHVISION, "cadene": CADENE, "pytorchcv": pytorchcv(unit)}


def initialise(net: nn.Module) -> None:
    """N(0, 0.1) cut at ±2; for the classes of the auxiliary head N(0, 0.001)."""
    truncated_normal(0.1)(net)
    if isinstance(net, Net) and AUX in net.aux:
        truncated_normal(0.001)(net.aux[AUX].get_submodule("fc"))


SIZE = 299
DEFAULTS = {"eps": 1e-3, "drop_rate": 0.5}
REFERENCE = "torchvision"
VARIANTS = {"inception_v3": {}}
CANDIDATES = {"large": ("inception_v3",), "small": ("inception_v3",)}
WIDTHS = (0.125, 0.25, 0.5, 1.0)
