"""Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning: Inception-v4.

Szegedy et al., arXiv:1602.07261, figures 3 to 9, as timm and TensorFlow have it.
"""

from functools import partial

from torch import nn

from flyweight.blocks import Options, Row, stack
from flyweight.initialise import torch_default
from flyweight.net import Net
from flyweight.zoo.inception_v3 import MAX, SMALL_STEM, V

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


initialise = torch_default
SIZE = 299
DEFAULTS = {"eps": 1e-3, "drop_rate": 0.2}  # figure 9: dropout keeps 0.8
REFERENCE = "timm inception_v4"
VARIANTS = {"inception_v4": {}}
CANDIDATES = {"large": ("inception_v4",), "small": ("inception_v4",)}
WIDTHS = (0.125, 0.25, 0.5, 1.0)
