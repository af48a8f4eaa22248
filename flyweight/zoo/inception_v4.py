"""Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning: Inception-v4.

Szegedy et al., arXiv:1602.07261, figures 3 to 9, as timm and TensorFlow have it.
"""

import re
from functools import partial

from torch import nn

from flyweight.blocks import Options, Row, stack
from flyweight.initialise import torch_default
from flyweight.net import Net, Rules
from flyweight.zoo.inception_v3 import BRANCH_PATH, MAX, SMALL_STEM, SPLIT_PATH, V, pytorchcv
from flyweight.zoo.resnet import LEAF

AVG = partial(nn.AvgPool2d, 3, 1, 1, count_include_pad=False)  # as in TensorFlow, padding does not count

STEM: dict[str, Row] = {  # figure 3
    "conv1": (32, 3, 2, V),
    "conv2": (32, 3, 1, V),
    "conv3": (64, 3),
    "mixed3a": [[MAX], [(96, 3, 2, V)]],
    "mixed4a": [[(64, 1), (96, 3, 1, V)], [(64, 1), (64, (1, 7)), (64, (7, 1)), (96, 3, 1, V)]],
    "mixed5a": [[(192, 3, 2, V)], [MAX]],
}
STEMS: dict[str, dict[str, Row]] = {"imagenet": STEM, "cifar": {**SMALL_STEM, "conv4": (384, 3)}}

SPLIT: Row = [[(256, (1, 3))], [(256, (3, 1))]]
DOUBLE7: list[Row] = [(192, 1), (192, (7, 1)), (224, (1, 7)), (224, (7, 1)), (256, (1, 7))]
A: Row = [[(96, 1)], [(64, 1), (96, 3)], [(64, 1), (96, 3), (96, 3)], [AVG, (96, 1)]]  # figure 4
B: Row = [[(384, 1)], [(192, 1), (224, (1, 7)), (256, (7, 1))], DOUBLE7, [AVG, (128, 1)]]  # figure 5
C: Row = [  # figure 6
    [(256, 1)],
    [(384, 1), SPLIT],
    [(384, 1), (448, (3, 1)), (512, (1, 3)), SPLIT],
    [AVG, (256, 1)],
]
REDUCTION_A: Row = [[(384, 3, 2, V)], [(192, 1), (224, 3), (256, 3, 2, V)], [MAX]]  # figure 7, table 1
REDUCTION_B: Row = [  # figure 8
    [(192, 1), (192, 3, 2, V)],
    [(256, 1), (256, (1, 7)), (320, (7, 1)), (320, 3, 2, V)],
    [MAX],
]
BODY: dict[str, Row] = {  # figure 9
    **{f"inception_a{i}": A for i in range(1, 5)},
    "reduction_a": REDUCTION_A,
    **{f"inception_b{i}": B for i in range(1, 8)},
    "reduction_b": REDUCTION_B,
    **{f"inception_c{i}": C for i in range(1, 4)},
}


def build(o: Options) -> Net:
    """Inception-v4.

    `stem` "imagenet" (stride 8 in all, for 75 pixels and more) or "cifar" (four convolutions that keep the size).
    """
    stages, channels = stack(o, o.in_chans, STEMS[o.stem] | BODY)
    return Net(stages, o.classifier(channels))


POSITIONS = list(STEM | BODY)  # all in one list


def timm(match: re.Match[str]) -> str:
    """Branches and their steps are numbered from 0; a convolution alone in its branch is not."""
    module, branch, conv, leaf = match.groups()
    position = f"features.{POSITIONS.index(module)}"
    if module in ("mixed3a", "mixed5a"):
        return f"{position}.conv.{LEAF[leaf]}"
    alone = branch == "1" and module not in ("mixed4a", "reduction_b")
    joint = "_" if module.startswith("inception_c") and branch in "23" else "."
    return f"{position}.branch{int(branch) - 1}{'' if alone else f'{joint}{int(conv) - 1}'}.{LEAF[leaf]}"


def timm_split(match: re.Match[str]) -> str:
    """The two side by side are a and b; they are step 1 of branch 1, step 3 of branch 2."""
    module, branch, half, leaf = match.groups()
    step = {"2": "branch1_1", "3": "branch2_3"}[branch]
    return f"features.{POSITIONS.index(module)}.{step}{'ab'[int(half) - 1]}.{LEAF[leaf]}"


def unit(module: str) -> str:
    """pytorchcv's stage and unit: three modules belong to its stem, and a halving module begins a stage."""
    if module in STEM:
        return f"features.init_block.block{list(STEM).index(module) - 2}"
    kind, name = module.split("_")  # reduction_a, inception_c3
    if kind == "reduction":
        return f"features.stage{'ab'.index(name) + 2}.unit1"
    stage = "abc".index(name[0]) + 1
    return f"features.stage{stage}.unit{int(name[1]) + (stage > 1)}"


TIMM: Rules = [
    (r"features\.conv(\d)\.(conv|norm)", lambda m: f"features.{int(m[1]) - 1}.{LEAF[m[2]]}"),
    (r"features\.(\w+)\." + BRANCH_PATH, timm),
    (r"features\.(\w+)\." + SPLIT_PATH, timm_split),
    (r"head\.fc", "last_linear"),
]
NAMES: dict[str, Rules] = {
    "timm": TIMM,
    "cadene": TIMM,
    "pytorchcv": [
        (r"features\.(mixed[35]a)\." + BRANCH_PATH, lambda m: f"{unit(m[1])}.branches.branch{m[2]}.conv.{LEAF[m[4]]}"),
        *pytorchcv(unit),
    ],
}

initialise = torch_default
SIZE = 299
DEFAULTS = {"eps": 1e-3, "drop_rate": 0.2}  # figure 9: dropout keeps 0.8
REFERENCE = "timm inception_v4"
VARIANTS = {"inception_v4": {}}
CANDIDATES = {"large": ("inception_v4",), "small": ("inception_v4",)}
WIDTHS = (0.125, 0.25, 0.5, 1.0)
