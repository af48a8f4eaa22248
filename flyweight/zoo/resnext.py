"""Aggregated Residual Transformations for Deep Neural Networks (ResNeXt; Xie et al., arXiv:1611.05431)."""

from flyweight.zoo import resnet

build, initialise, WIDTHS = resnet.build, resnet.initialise, (0.125, 0.25, 0.5, 1.0)
NAMES = resnet.NAMES
REFERENCE = "torchvision"
# Table 1: cardinality (groups) and the channels of a group in the first stage.
VARIANTS = {
    "resnext50_32x4d": {**resnet.VARIANTS["resnet50"], "groups": 32, "base_width": 4},
    "resnext101_32x8d": {**resnet.VARIANTS["resnet101"], "groups": 32, "base_width": 8},
}
CANDIDATES = {"large": ("resnext50_32x4d",), "small": ("resnext50_32x4d",)}
