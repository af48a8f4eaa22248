"""ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices.

Zhang et al., arXiv:1707.01083.
"""

from collections import OrderedDict

from torch import nn

from flyweight.blocks import Classifier, ConvNormAct, ShuffleUnit
from flyweight.net import Net
from flyweight.ops import round_channels

# Table 1: groups → output channels of stages 2, 3, 4; the stages repeat 4, 8, 4 units, the first of each with stride 2.
STAGES = {
    1: (144, 288, 576),
    2: (200, 400, 800),
    3: (240, 480, 960),
    4: (272, 544, 1088),
    8: (384, 768, 1536),
}
REPEATS = (4, 8, 4)


def build(
    num_classes: int = 1000,
    in_chans: int = 3,
    width: float = 1.0,
    drop_rate: float = 0.0,
    stem: str = "imagenet",
    groups: int = 3,
) -> Net:
    """ShuffleNet V1; `width`: the paper's s in "ShuffleNet s×"; `stem` "imagenet" (stride 4) or "cifar" (stride 1)."""
    channels = round_channels(24 * width, groups)
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    if stem == "imagenet":
        stages["stem"] = ConvNormAct(in_chans, channels, 3, stride=2)
        stages["pool"] = nn.MaxPool2d(3, stride=2, padding=1)
    else:
        stages["stem"] = ConvNormAct(in_chans, channels, 3)
    for stage, (base, repeats) in enumerate(zip(STAGES[groups], REPEATS, strict=True), start=2):
        # The bottleneck, a quarter of the width, is itself grouped; so is what is added to the input at stride 2.
        out = round_channels(base * width, 4 * groups)
        for i in range(repeats):
            first = 1 if stage == 2 and i == 0 else groups
            stages[f"stage{stage}_unit{i + 1}"] = ShuffleUnit(channels, out, groups, first, stride=2 if i == 0 else 1)
            channels = out
    return Net(stages, Classifier(channels, num_classes, drop_rate))


VARIANTS = {f"shufflenet_v1_g{g}": {"groups": g} for g in STAGES} | {
    "shufflenet_v1_g3_small": {"groups": 3, "stem": "cifar"}
}
CANDIDATES = {"large": ("shufflenet_v1_g3",), "small": ("shufflenet_v1_g3_small",)}
WIDTHS = (0.25, 0.5, 0.75, 1.0)
