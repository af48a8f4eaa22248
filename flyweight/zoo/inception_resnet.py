"""Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning: Inception-ResNet-v1 and v2.

Szegedy et al., arXiv:1602.07261, figures 10 to 19. Where the references differ from them: both end with a unit that is
neither scaled nor activated, which v1 has beside the five others; v1, as pytorchcv has it, has FaceNet's head, 512
normalised values before the classes; v2, as timm and TensorFlow have it, has the stem of Inception-v3, twice the units
of figure 15, 320, 1088 and 2080 channels in its stages and a last 1 × 1 convolution to 1536.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from flyweight.blocks import Classifier, Options, Residual, Row, module, stack
from flyweight.initialise import torch_default
from flyweight.net import FINAL, Net, Rules
from flyweight.ops import GlobalAvgPool
from flyweight.zoo import inception_v3
from flyweight.zoo.inception_v3 import MAX, V
from flyweight.zoo.inception_v4 import AVG
from flyweight.zoo.resnet import LEAF


@dataclass(frozen=True)
class Units:
    """`repeats` residual units over the same branches, which are scaled by `scale` (section 3.3).

    `last`: one more follows, neither scaled nor activated.
    """

    branches: Row
    repeats: int
    scale: float
    last: bool = False


STEMS: dict[int, dict[str, dict[str, Row]]] = {
    1: {  # figure 14
        "imagenet": {**inception_v3.STEM, "conv6": (256, 3, 2, V)},
        "cifar": {**inception_v3.SMALL_STEM, "conv4": (256, 3)},
    },
    2: inception_v3.STEMS,
}
BODY: "dict[int, dict[str, Row | Units]]" = {
    1: {
        "block35": Units([[(32, 1)], [(32, 1), (32, 3)], [(32, 1), (32, 3), (32, 3)]], 5, 0.17),
        "mixed6a": [[(384, 3, 2, V)], [(192, 1), (192, 3), (256, 3, 2, V)], [MAX]],
        "block17": Units([[(128, 1)], [(128, 1), (128, (1, 7)), (128, (7, 1))]], 10, 0.10),
        "mixed7a": [
            [(256, 1), (384, 3, 2, V)],
            [(256, 1), (256, 3, 2, V)],
            [(256, 1), (256, 3), (256, 3, 2, V)],
            [MAX],
        ],
        "block8": Units([[(192, 1)], [(192, 1), (192, (1, 3)), (192, (3, 1))]], 5, 0.20, last=True),
    },
    2: {
        "mixed5b": [[(96, 1)], [(48, 1), (64, 5)], [(64, 1), (96, 3), (96, 3)], [AVG, (64, 1)]],
        "block35": Units([[(32, 1)], [(32, 1), (32, 3)], [(32, 1), (48, 3), (64, 3)]], 10, 0.17),
        "mixed6a": [[(384, 3, 2, V)], [(256, 1), (256, 3), (384, 3, 2, V)], [MAX]],
        "block17": Units([[(192, 1)], [(128, 1), (160, (1, 7)), (192, (7, 1))]], 20, 0.10),
        "mixed7a": [
            [(256, 1), (384, 3, 2, V)],
            [(256, 1), (288, 3, 2, V)],
            [(256, 1), (288, 3), (320, 3, 2, V)],
            [MAX],
        ],
        "block8": Units([[(192, 1)], [(192, 1), (224, (1, 3)), (256, (3, 1))]], 9, 0.20, last=True),
    },
}


def residual(o: Options, channels: int, row: Row, scale: float, act: nn.Module | None) -> Residual:
    """Branches and a bare 1 × 1 convolution back to `channels`, scaled and added."""
    branches, mixed = module(o, channels, row)
    parts = [("branches", branches), ("project", nn.Conv2d(mixed, channels, 1)), *o.excite(channels)]
    return Residual(nn.Sequential(OrderedDict(parts)), act=act, scale=scale)


def units(o: Options, channels: int, u: Units) -> list[Residual]:
    """All residual units of a stage."""
    made = [residual(o, channels, u.branches, u.scale, o.activation()) for _ in range(u.repeats)]
    return [*made, residual(o, channels, u.branches, 1.0, None)] if u.last else made


def bottleneck(o: Options, channels: int) -> Classifier:
    """FaceNet's head: dropout, 512 normalised values (a linear layer, as the 1 × 1 convolution that it is), classes."""
    hidden = o.channels(512)
    parts: OrderedDict[str, nn.Module] = OrderedDict(drop=nn.Dropout(o.drop_rate))
    parts["fc"], parts["flat"] = o.conv(channels, hidden, 1, act=False), nn.Flatten()
    return Classifier(channels, o.num_classes, 0.0, GlobalAvgPool(keep=True), nn.Sequential(parts), hidden)


def build(o: Options, version: int = 2) -> Net:
    """Inception-ResNet `version` 1 or 2.

    `stem` "imagenet" (stride 8 in all, for 75 pixels and more) or "cifar" (convolutions that keep the size).
    """
    stages, channels = stack(o, o.in_chans, STEMS[version][o.stem])
    for name, row in BODY[version].items():
        if isinstance(row, Units):
            stages |= {f"{name}_{i}": unit for i, unit in enumerate(units(o, channels, row), start=1)}
        else:
            stages[name], channels = module(o, channels, row)
    if version == 1:
        return Net(stages, bottleneck(o, channels))
    stages[FINAL], channels = module(o, channels, (1536, 1))
    return Net(stages, o.classifier(channels))


# timm's names of the convolutions before the body (v2), and of the stages of residual units.
CONVS = ("1a", "2a", "2b", "3b", "4a")
REPEATS = {"35": "repeat", "17": "repeat_1", "8": "repeat_2"}


def timm_module(module: str) -> str:
    """The last unit stands alone."""
    if module.startswith("mixed"):
        return f"mixed_{module[5:]}"
    kind, number = module.removeprefix("block").split("_")
    return "block8" if module == "block8_10" else f"{REPEATS[kind]}.{int(number) - 1}"


def timm_branch(match: re.Match[str]) -> str:
    """Branches and their steps are numbered from 0; a convolution alone in its branch is not."""
    module, branch, conv, leaf = match.groups()
    alone = branch == "1" and module != "mixed7a"
    return f"{timm_module(module)}.branch{int(branch) - 1}{'' if alone else f'.{int(conv) - 1}'}.{LEAF[leaf]}"


def unit(module: str) -> str:
    """pytorchcv's stage and unit: a halving module begins a stage; v2's first module belongs to the stem."""
    if module == "mixed5b":
        return "features.init_block.block"
    if module.startswith("mixed"):
        return f"features.stage{int(module[5]) - 4}.unit1"
    kind, number = module.removeprefix("block").split("_")
    stage = list(REPEATS).index(kind) + 1
    return f"features.stage{stage}.unit{int(number) + (stage > 1)}"


FACENET: Rules = [  # version 1's head
    (r"head\.hidden\.fc\.conv", "output.fc1"),
    (r"head\.hidden\.fc\.norm", "output.bn"),
    (r"head\.fc", "output.fc2"),
]
FINAL_CONV: Rules = [(r"features\.final\.(conv|norm)", lambda m: f"features.final_conv.{LEAF[m[1]]}")]
TIMM: Rules = [
    (r"features\.conv(\d)\.(conv|norm)", lambda m: f"conv2d_{CONVS[int(m[1]) - 1]}.{LEAF[m[2]]}"),
    (r"features\.(\w+)\.(?:body\.branches\.)?" + inception_v3.BRANCH_PATH, timm_branch),
    (r"features\.(\w+)\.body\.project", lambda m: f"{timm_module(m[1])}.conv2d"),
    (r"features\.final\.(conv|norm)", lambda m: f"conv2d_7b.{LEAF[m[1]]}"),
    (r"head\.fc", "classif"),
]
NAMES: dict[str, Callable[[Mapping[str, Any]], Rules]] = {
    "timm": lambda args: TIMM if args.get("version", 2) == 2 else [],
    "cadene": lambda args: [(r"head\.fc", "last_linear"), *TIMM] if args.get("version", 2) == 2 else [],
    "pytorchcv": lambda args: [*(FACENET if args.get("version") == 1 else FINAL_CONV), *inception_v3.pytorchcv(unit)],
}
SWAPPED = {"pytorchcv": "head.hidden.fc.conv.weight"}

initialise = torch_default
SIZE = 299
DEFAULTS = {"eps": 1e-3, "drop_rate": 0.2}  # figure 15: dropout keeps 0.8
REFERENCE = "pytorchcv inceptionresnetv1, timm inception_resnet_v2"
VARIANTS = {"inception_resnet_v1": {"version": 1}, "inception_resnet_v2": {"version": 2}}
CANDIDATES = {"large": ("inception_resnet_v1",), "small": ("inception_resnet_v1",)}
WIDTHS = (0.125, 0.25, 0.5, 1.0)
