"""The building blocks that the families share. Sizes, and what varies by family, are passed in, not subclassed."""

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

from flyweight.ops import Add, Cat, ChannelShuffle, GlobalAvgPool

Activation = Callable[[], nn.Module]


def relu() -> nn.Module:
    """ReLU in place: its input is never needed again, and a tensor less is written."""
    return nn.ReLU(inplace=True)


def relu6() -> nn.Module:
    """min(max(x, 0), 6) in place: the activation of the MobileNets."""
    return nn.ReLU6(inplace=True)


ACTIVATIONS: dict[str, Activation] = {"relu": relu, "relu6": relu6}


class ConvNormAct(nn.Sequential):
    """k × k convolution without bias, batch normalisation, activation (`act=None`: linear)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        act: Activation | None = relu,
    ) -> None:
        conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
        parts: list[tuple[str, nn.Module]] = [("conv", conv), ("norm", nn.BatchNorm2d(out_channels))]
        if act is not None:
            parts.append(("act", act()))
        super().__init__(OrderedDict(parts))


class DepthwiseSeparable(nn.Sequential):
    """3 × 3 depthwise, then 1 × 1 pointwise, each with norm and activation (MobileNet, arXiv:1704.04861, figure 3)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, act: Activation = relu6) -> None:
        super().__init__(
            OrderedDict(
                depthwise=ConvNormAct(in_channels, in_channels, 3, stride, groups=in_channels, act=act),
                pointwise=ConvNormAct(in_channels, out_channels, 1, act=act),
            )
        )


class Residual(nn.Module):
    """act(body(x) + shortcut(x)), the unit of every residual family (ResNet, arXiv:1512.03385, equation 2)."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None, act: Activation = relu) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut or nn.Identity()
        self.add = Add()
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.add(self.body(x), self.shortcut(x)))


class ShuffleUnit(nn.Module):
    """Grouped 1 × 1, shuffle, 3 × 3 depthwise, grouped 1 × 1; plus x, or at stride 2 concatenated to its average pool.

    ShuffleNet, arXiv:1707.01083, figure 2 (b, c): no ReLU after the depthwise convolution. `first_groups` is 1 in the
    unit whose input has too few channels to be grouped (the first of stage 2).
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, first_groups: int, stride: int) -> None:
        super().__init__()
        middle = out_channels // 4
        branch = out_channels - in_channels if stride == 2 else out_channels
        self.squeeze = ConvNormAct(in_channels, middle, 1, groups=first_groups)
        self.shuffle = ChannelShuffle(groups) if groups > 1 else nn.Identity()
        self.depthwise = ConvNormAct(middle, middle, 3, stride, groups=middle, act=None)
        self.expand = ConvNormAct(middle, branch, 1, groups=groups, act=None)
        self.shortcut = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else nn.Identity()
        self.join = Cat() if stride == 2 else Add()
        self.act = relu()

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(self.depthwise(self.shuffle(self.squeeze(x))))
        return self.act(self.join(self.shortcut(x), y))


class Fire(nn.Module):
    """A 1 × 1 squeeze, then parallel 1 × 1 and 3 × 3 expansions, concatenated (SqueezeNet, arXiv:1602.07360, figure 1).

    `conv` builds convolution and activation, with the norm the network uses: `conv(in_channels, out_channels, kernel)`.
    """

    def __init__(
        self, in_channels: int, squeeze: int, expand1x1: int, expand3x3: int, conv: Callable[[int, int, int], nn.Module]
    ) -> None:
        super().__init__()
        self.squeeze = conv(in_channels, squeeze, 1)
        self.expand1x1 = conv(squeeze, expand1x1, 1)
        self.expand3x3 = conv(squeeze, expand3x3, 3)
        self.cat = Cat()

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x)
        return self.cat(self.expand1x1(x), self.expand3x3(x))


class Classifier(nn.Module):
    """Global average pooling, dropout, one linear layer: [N, C, H, W] → logits [N, classes]."""

    def __init__(self, in_features: int, num_classes: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.pool = GlobalAvgPool()
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(in_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.pool(x)))


class ConvClassifier(nn.Module):
    """Dropout, 1 × 1 convolution, ReLU, average (SqueezeNet's head): [N, C, H, W] → logits [N, classes]."""

    def __init__(self, in_features: int, num_classes: int, drop_rate: float, act: bool = True) -> None:
        super().__init__()
        self.drop = nn.Dropout(drop_rate)
        self.conv = nn.Conv2d(in_features, num_classes, 1)
        self.act = relu() if act else nn.Identity()
        self.pool = GlobalAvgPool()

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.act(self.conv(self.drop(x))))
