"""The plain network of "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (Jordan, arXiv:2404.00498, section 3.1).

Here with ReLU instead of GELU, which int8 runtimes fuse, and without the frozen whitening of the first layer. It learns
more per second than any other family here: no shortcut to carry, pooling early, few and wide layers.
"""

from collections import OrderedDict

from torch import Tensor, nn

from flyweight.blocks import relu
from flyweight.net import Net
from flyweight.ops import GlobalMaxPool, round_channels

STAGES = (64, 256, 256)
FIRST = 24


def stage(in_channels: int, out_channels: int) -> nn.Sequential:
    """3 × 3 convolution, 2 × 2 max-pool, norm, ReLU; 3 × 3 convolution, norm, ReLU."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["conv1"] = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    parts["pool"] = nn.MaxPool2d(2)
    parts["norm1"], parts["act1"] = nn.BatchNorm2d(out_channels), relu()
    parts["conv2"] = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
    parts["norm2"], parts["act2"] = nn.BatchNorm2d(out_channels), relu()
    return nn.Sequential(parts)


class Head(nn.Module):
    """Global max-pooling, dropout, a linear layer: [N, C, H, W] → logits [N, classes]."""

    def __init__(self, in_features: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.pool, self.drop = GlobalMaxPool(), nn.Dropout(drop_rate)
        self.fc = nn.Linear(in_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.pool(x)))


def build(
    num_classes: int = 1000, in_chans: int = 3, width: float = 1.0, drop_rate: float = 0.0, stem: str = "cifar"
) -> Net:
    """airbench94; `stem` "cifar" (2 × 2, stride 1) or "photo" (two 3 × 3 of stride 2, for 64 pixels and more)."""
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    if stem == "cifar":
        stages["stem"] = nn.Sequential(OrderedDict(conv=nn.Conv2d(in_chans, FIRST, 2), act=relu()))
    else:
        first = nn.Conv2d(in_chans, FIRST, 3, stride=2, padding=1)
        second = nn.Conv2d(FIRST, FIRST, 3, stride=2, padding=1)
        stages["stem"] = nn.Sequential(OrderedDict(conv1=first, act1=relu(), conv2=second, act2=relu()))
    channels = FIRST
    for i, base in enumerate(STAGES, start=1):
        out = round_channels(base * width)
        stages[f"stage{i}"] = stage(channels, out)
        channels = out
    return Net(stages, Head(channels, num_classes, drop_rate))


VARIANTS = {"airbench94": {"stem": "cifar"}, "airbench94_photo": {"stem": "photo"}}
CANDIDATES = {"large": ("airbench94_photo",), "small": ("airbench94",)}
WIDTHS = (0.125, 0.25, 0.375, 0.45, 0.5, 0.75, 1.0)
