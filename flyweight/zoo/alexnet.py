"""AlexNet in the form of "One weird trick for parallelizing convolutional neural networks".

Krizhevsky, arXiv:1404.5997: ImageNet Classification with Deep Convolutional Neural Networks (NIPS 2012) on one
processor, without groups and local response normalisation. The net that SqueezeNet's size is measured against.
"""

from collections import OrderedDict
from typing import NamedTuple

from torch import nn

from flyweight.blocks import Classifier, Options
from flyweight.initialise import torch_default
from flyweight.net import Net, Rules


class Stem(NamedTuple):
    """The first convolution, the side of the grid that the classifier sees, and its hidden units."""

    kernel: int
    stride: int
    padding: int
    grid: int
    hidden: int


STEMS = {"imagenet": Stem(11, 4, 2, 6, 4096), "cifar": Stem(3, 1, 1, 2, 1024)}
# Convolutions 2 to 5: output channels, kernel, whether a 3 × 3 max-pool of stride 2 is before it; a last one follows.
ROWS = [(192, 5, True), (384, 3, True), (256, 3, False), (256, 3, False)]


def classifier(o: Options, in_channels: int, grid: int, hidden: int) -> Classifier:
    """The picture as grid × grid positions, two hidden layers, each behind a dropout."""
    pool = nn.Sequential(OrderedDict(grid=nn.AdaptiveAvgPool2d(grid), flat=nn.Flatten()))
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, features in enumerate((in_channels * grid**2, hidden), start=6):
        layers[f"drop{i}"] = nn.Dropout(o.drop_rate)
        layers[f"fc{i}"] = nn.Linear(features, hidden)
        layers[f"act{i}"] = o.activation()
    return Classifier(in_channels, o.num_classes, 0.0, pool, nn.Sequential(layers), hidden)


def build(o: Options) -> Net:
    """AlexNet; `stem` "cifar" keeps the picture's size in the first convolution and has a smaller classifier."""
    stem = STEMS[o.stem]
    channels = o.channels(64)
    stages: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=o.conv(o.in_chans, channels, stem.kernel, stem.stride, stem.padding)
    )
    for i, (base, kernel, pool) in enumerate(ROWS, start=2):
        if pool:
            stages[f"pool{i - 1}"] = nn.MaxPool2d(3, stride=2)
        out = o.channels(base)
        stages[f"conv{i}"] = o.conv(channels, out, kernel)
        channels = out
    stages["pool5"] = nn.MaxPool2d(3, stride=2)
    return Net(stages, classifier(o, channels, stem.grid, o.channels(stem.hidden)))


TORCHVISION = (0, 3, 6, 8, 10)  # its positions of the convolutions
PYTORCHCV = ("stage1.unit1", "stage2.unit1", "stage3.unit1", "stage3.unit2", "stage3.unit3")
CONV = r"features\.conv(\d)\.conv"
NAMES: dict[str, Rules] = {
    "torchvision": [
        (CONV, lambda match: f"features.{TORCHVISION[int(match[1]) - 1]}"),
        (r"head\.hidden\.fc6", "classifier.1"),
        (r"head\.hidden\.fc7", "classifier.4"),
        (r"head\.fc", "classifier.6"),
    ],
    "cadene": [
        (CONV, lambda match: f"_features.{TORCHVISION[int(match[1]) - 1]}"),
        (r"head\.hidden\.fc6", "linear0"),
        (r"head\.hidden\.fc7", "linear1"),
        (r"head\.fc", "last_linear"),
    ],
    "pytorchcv": [
        (CONV, lambda match: f"features.{PYTORCHCV[int(match[1]) - 1]}.conv"),
        (r"head\.hidden\.fc6", "output.fc1.fc"),
        (r"head\.hidden\.fc7", "output.fc2.fc"),
        (r"head\.fc", "output.fc3"),
    ],
}

DEFAULTS = {"norm": "none", "drop_rate": 0.5}
initialise = torch_default
REFERENCE = "torchvision"
VARIANTS = {"alexnet": {}}
CANDIDATES = {"large": ("alexnet",), "small": ("alexnet",)}
WIDTHS = (0.125, 0.25, 0.5, 0.75, 1.0)
