"""Squeeze-and-Excitation Networks (Hu et al., arXiv:1709.01507): residual blocks that weigh their channels.

`se` gives the same to every residual and MobileNet family; these are the paper's own networks.
"""

from flyweight.zoo import resnet, resnext

build, initialise, WIDTHS = resnet.build, resnet.initialise, (0.125, 0.25, 0.5, 1.0)
NAMES = {library: resnet.NAMES[library] for library in ("timm", "pytorchcv")}
REFERENCE = "timm legacy_seresnet50, legacy_seresnext50_32x4d"
RATIO = {"se": 1 / 16}  # section 4.4: a reduction of 16
VARIANTS = {
    "se_resnet18": {**resnet.VARIANTS["resnet18"], **RATIO},
    "se_resnet50": {**resnet.VARIANTS["resnet50"], **RATIO},
    "se_resnext50_32x4d": {**resnext.VARIANTS["resnext50_32x4d"], **RATIO},
    "se_resnet20_cifar": {**resnet.VARIANTS["resnet20_cifar"], **RATIO},
}
CANDIDATES = {"large": ("se_resnet18",), "small": ("se_resnet20_cifar",)}
