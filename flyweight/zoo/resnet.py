"""Deep Residual Learning for Image Recognition (He et al., arXiv:1512.03385), networks of basic blocks."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from flyweight.blocks import Classifier, ConvNormAct, Residual
from flyweight.net import Net
from flyweight.ops import round_channels


def basic(in_channels: int, out_channels: int, stride: int) -> Residual:
    """Two 3 × 3 convolutions; the shortcut is projected where the shape changes (section 3.3, option B)."""
    body = nn.Sequential(
        OrderedDict(
            conv1=ConvNormAct(in_channels, out_channels, 3, stride),
            conv2=ConvNormAct(out_channels, out_channels, 3, act=None),
        )
    )
    if stride == 1 and in_channels == out_channels:
        return Residual(body)
    return Residual(body, ConvNormAct(in_channels, out_channels, 1, stride, act=None))


def build(
    num_classes: int = 1000,
    in_chans: int = 3,
    width: float = 1.0,
    drop_rate: float = 0.0,
    stem: str = "imagenet",
    layers: Sequence[int] = (2, 2, 2, 2),
    channels: Sequence[int] = (64, 128, 256, 512),
) -> Net:
    """A ResNet of basic blocks: `layers` blocks of `channels` per stage.

    `stem` "imagenet" (7 × 7 of stride 2, then a max-pool), "conv" (3 × 3 of stride 2) or "cifar" (3 × 3 of stride 1).
    """
    now = round_channels(channels[0] * width)
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    kernel, stride = {"imagenet": (7, 2), "conv": (3, 2), "cifar": (3, 1)}[stem]
    stages["stem"] = ConvNormAct(in_chans, now, kernel, stride)
    if stem == "imagenet":
        stages["pool"] = nn.MaxPool2d(3, stride=2, padding=1)
    for stage, (blocks, base) in enumerate(zip(layers, channels, strict=True), start=1):
        out = round_channels(base * width)
        for i in range(blocks):
            stages[f"stage{stage}_block{i + 1}"] = basic(now, out, stride=2 if i == 0 and stage > 1 else 1)
            now = out
    return Net(stages, Classifier(now, num_classes, drop_rate))


def cifar(depth: int) -> dict[str, object]:
    """Section 4.2: depth 6n + 2, three stages of 16, 32 and 64 channels."""
    return {"stem": "cifar", "layers": [(depth - 2) // 6] * 3, "channels": [16, 32, 64]}


VARIANTS = {
    "resnet18": {"layers": [2, 2, 2, 2]},
    "resnet34": {"layers": [3, 4, 6, 3]},
    "resnet10": {"layers": [1, 1, 1, 1]},
    "resnet10_conv": {"layers": [1, 1, 1, 1], "stem": "conv"},
    "resnet8_cifar": cifar(8),
    "resnet14_cifar": cifar(14),
    "resnet20_cifar": cifar(20),
    "resnet32_cifar": cifar(32),
    "resnet44_cifar": cifar(44),
    "resnet56_cifar": cifar(56),
    "resnet110_cifar": cifar(110),
}
CANDIDATES = {"large": ("resnet10", "resnet10_conv"), "small": ("resnet8_cifar", "resnet14_cifar", "resnet20_cifar")}
WIDTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5)
