"""Squeeze-and-Excitation Networks (Hu et al., arXiv:1709.01507): residual blocks that weigh their channels.

`se` gives the same to every residual and MobileNet family; these are the paper's own networks.
"""

from collections.abc import Mapping
from typing import Any

from flyweight.net import Rules
from flyweight.zoo import resnet, resnext

build, initialise, WIDTHS = resnet.build, resnet.initialise, (0.125, 0.25, 0.5, 1.0)


def cadene(args: Mapping[str, Any]) -> Rules:
    """And timm's legacy_seresnet50, legacy_seresnext50_32x4d; both with the stem "caffe"."""
    if args.get("stem") != "caffe":
        return []
    return [
        (r"features\.stem\.conv", "layer0.conv1"),
        (r"features\.stem\.norm", "layer0.bn1"),
        *resnet.BLOCKS,
        (resnet.EXCITE + "reduce", resnet.layer("se_module.fc1")),
        (resnet.EXCITE + "expand", resnet.layer("se_module.fc2")),
        (r"head\.fc", "last_linear"),
    ]


NAMES = {"timm": resnet.NAMES["timm"], "cadene": cadene, "pytorchcv": resnet.NAMES["pytorchcv"]}
REFERENCE = "timm legacy_seresnet50, legacy_seresnext50_32x4d"
RATIO = {"se": 1 / 16}  # section 4.4: a reduction of 16
VARIANTS = {
    "se_resnet18": {**resnet.VARIANTS["resnet18"], **RATIO},
    "se_resnet50": {**resnet.VARIANTS["resnet50"], **RATIO},
    "se_resnext50_32x4d": {**resnext.VARIANTS["resnext50_32x4d"], **RATIO},
    "se_resnet20_cifar": {**resnet.VARIANTS["resnet20_cifar"], **RATIO},
}
CANDIDATES = {"large": ("se_resnet18",), "small": ("se_resnet20_cifar",)}
