"""The building blocks that the families share. Sizes, and what varies by family, are passed in, not subclassed."""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn

from flyweight.ops import Add, Cat, GlobalAvgPool, Mul, Scale, pair, round_channels

Shape2d = int | tuple[int, int]

# Each takes `inplace`: its input is then never needed again, and a tensor less is written.
ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "silu": nn.SiLU,
}
GATES: dict[str, Callable[[], nn.Module]] = {"sigmoid": nn.Sigmoid, "hardsigmoid": nn.Hardsigmoid}
PADDINGS = ("symmetric", "same")
# A norm by channels and ε. Any other layer that takes these two can be added under a name of its own.
NORMS: dict[str, Callable[[int, float], nn.Module] | None] = {
    "batch": nn.BatchNorm2d,
    # Up to 32 groups (arXiv:1803.08494), of 8 channels at least where there are as many.
    "group": lambda channels, eps: nn.GroupNorm(math.gcd(max(1, channels // 8), 32, channels), channels, eps),
    "none": None,
}


@dataclass(frozen=True)
class Options:
    """What every family lets its user choose, and the layers made accordingly.

    `width` multiplies all channels; `stem` "cifar" is every family's form for pictures of about 32 pixels; `se` adds
    squeeze-and-excitation, below 1 as a ratio of a block's channels, from 1 on as their number; `padding` "same" is
    TensorFlow's; `output_stride` replaces strides beyond it by dilation.
    """

    num_classes: int = 1000
    in_chans: int = 3
    width: float = 1.0
    drop_rate: float = 0.0
    stem: str = "imagenet"
    act: str = "relu"
    norm: str = "batch"
    eps: float = 1e-5
    se: float = 0.0
    gate: str = "sigmoid"
    padding: str = "symmetric"
    output_stride: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError with what is wrong and what there is."""
        for name, table in {"act": ACTIVATIONS, "norm": NORMS, "gate": GATES, "padding": PADDINGS}.items():
            if getattr(self, name) not in table:
                raise ValueError(f"{name} is one of {', '.join(table)}, not {getattr(self, name)!r}")
        for name, least in {"num_classes": 0, "in_chans": 1, "width": 0.01, "drop_rate": 0, "eps": 0, "se": 0}.items():
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is a number from {least} on, not {value!r}")
        if self.drop_rate >= 1:
            raise ValueError(f"drop_rate is below 1, not {self.drop_rate}")

    def channels(self, base: float, divisor: int = 8) -> int:
        """`base` times the width multiplier, rounded to a multiple of `divisor`; the paper's own number at width 1."""
        return int(base) if self.width == 1 else round_channels(base * self.width, divisor)

    def activation(self, inplace: bool = True) -> nn.Module:
        """The network's activation. In place is wrong where something else still reads its input."""
        return ACTIVATIONS[self.act](inplace=inplace)

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Shape2d = 3,
        stride: int = 1,
        padding: Shape2d | None = None,
        groups: int = 1,
        act: bool = True,
    ) -> nn.Sequential:
        """Convolution, norm, activation; `padding` is by default what keeps the size at stride 1.

        With a norm the convolution has no bias, which the norm's would repeat.
        """
        if padding is None:
            kh, kw = pair(kernel)
            padding = (kh // 2, kw // 2)
        norm = NORMS[self.norm]
        conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=norm is None)
        parts: OrderedDict[str, nn.Module] = OrderedDict(conv=conv)
        if norm is not None:
            parts["norm"] = norm(out_channels, self.eps)
        if act:
            parts["act"] = self.activation()
        return nn.Sequential(parts)

    def depthwise(self, channels: int, kernel: int = 3, stride: int = 1, act: bool = True) -> nn.Sequential:
        """One k × k filter for each channel, norm, activation."""
        return self.conv(channels, channels, kernel, stride, groups=channels, act=act)

    def separable(self, in_channels: int, out_channels: int, stride: int = 1, act: bool = True) -> nn.Sequential:
        """A bare 3 × 3 depthwise convolution, then 1 × 1, norm, activation (Xception, arXiv:1610.02357, section 3)."""
        depthwise = nn.Conv2d(in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False)
        return nn.Sequential(
            OrderedDict(depthwise=depthwise, pointwise=self.conv(in_channels, out_channels, 1, act=act))
        )

    def excite(self, channels: int, inputs: int | None = None) -> list[tuple[str, nn.Module]]:
        """Squeeze-and-excitation over `channels`, named, or nothing where the network has none.

        A ratio is of `inputs`, by default `channels` themselves.
        """
        if not self.se:
            return []
        squeezed = round_channels((inputs or channels) * self.se) if self.se < 1 else int(self.se)
        return [("se", SqueezeExcite(channels, squeezed, GATES[self.gate]()))]

    def classifier(self, in_features: int) -> "Classifier":
        """Global average pooling, dropout, one linear layer."""
        return Classifier(in_features, self.num_classes, self.drop_rate)


class SqueezeExcite(nn.Module):
    """x · gate(W₂ relu(W₁ mean(x))): channels weighed by what the whole picture shows (SENet, arXiv:1709.01507)."""

    def __init__(self, channels: int, squeezed: int, gate: nn.Module) -> None:
        super().__init__()
        self.pool = GlobalAvgPool(keep=True)
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.act = nn.ReLU(inplace=True)
        self.expand = nn.Conv2d(squeezed, channels, 1)
        self.gate = gate
        self.mul = Mul()

    def forward(self, x: Tensor) -> Tensor:
        return self.mul(x, self.gate(self.expand(self.act(self.reduce(self.pool(x))))))


class DepthwiseSeparable(nn.Sequential):
    """3 × 3 depthwise, then 1 × 1 pointwise, each with norm and activation (MobileNet, arXiv:1704.04861, figure 3)."""

    def __init__(self, o: Options, in_channels: int, out_channels: int, stride: int = 1) -> None:
        depthwise = o.depthwise(in_channels, stride=stride)
        pointwise = o.conv(in_channels, out_channels, 1)
        super().__init__(OrderedDict([("depthwise", depthwise), ("pointwise", pointwise), *o.excite(out_channels)]))


class Residual(nn.Module):
    """act(s · body(x) + shortcut(x)), the unit of every residual family (ResNet, arXiv:1512.03385, equation 2).

    `act=None` leaves the sum as it is; `scale` is s (Inception-ResNet, arXiv:1602.07261, section 3.3). A body that
    begins with an activation must not compute it in place: the shortcut reads the same x.
    """

    def __init__(
        self,
        body: nn.Module,
        shortcut: nn.Module | None = None,
        act: nn.Module | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.body = body
        self.scale = Scale(scale) if scale != 1 else nn.Identity()
        self.shortcut = shortcut or nn.Identity()
        self.add = Add()
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.add(self.scale(self.body(x)), self.shortcut(x)))


class InvertedResidual(nn.Sequential):
    """1 × 1 expansion, depthwise, linear 1 × 1 projection (MobileNetV2, arXiv:1801.04381, figure 3b).

    Without an expansion where `expanded` equals the input; squeeze-and-excitation, if any, before the projection
    (MobileNetV3, arXiv:1905.02244, figure 4). The caller adds the shortcut where the shape stays.
    """

    def __init__(
        self, o: Options, in_channels: int, expanded: int, out_channels: int, kernel: int = 3, stride: int = 1
    ) -> None:
        parts: list[tuple[str, nn.Module]] = []
        if expanded != in_channels:
            parts.append(("expand", o.conv(in_channels, expanded, 1)))
        parts.append(("depthwise", o.depthwise(expanded, kernel, stride)))
        parts += o.excite(expanded)
        parts.append(("project", o.conv(expanded, out_channels, 1, act=False)))
        super().__init__(OrderedDict(parts))


class Branches(nn.Module):
    """Branches over one input, concatenated (Inception, arXiv:1409.4842, figure 2)."""

    def __init__(self, branches: "OrderedDict[str, nn.Module]") -> None:
        super().__init__()
        self.branches = nn.ModuleDict(branches)
        self.cat = Cat()

    def forward(self, x: Tensor) -> Tensor:
        return self.cat(*[branch(x) for branch in self.branches.values()])


# Channels and kernel of a convolution that keeps the size, or channels, kernel, stride and padding.
Conv: TypeAlias = tuple[int, Shape2d] | tuple[int, Shape2d, int, int]
# One step: a convolution, a pool, or branches over one input, each of several steps.
Row: TypeAlias = "Conv | Callable[[], nn.Module] | list[list[Row]]"


def module(o: Options, channels: int, row: Row) -> tuple[nn.Module, int]:
    """What a row stands for, over `channels`, and its output channels."""
    if isinstance(row, tuple):
        out = o.channels(row[0])
        stride, padding = (row[2], row[3]) if len(row) == 4 else (1, None)
        return o.conv(channels, out, row[1], stride, padding), out
    if not isinstance(row, list):
        return row(), channels
    built = [stack(o, channels, {name_of(r, i): r for i, r in enumerate(rows, start=1)}) for rows in row]
    branches = OrderedDict((f"branch{i}", nn.Sequential(parts)) for i, (parts, _) in enumerate(built, start=1))
    return Branches(OrderedDict(branches)), sum(out for _, out in built)


def name_of(row: Row, position: int) -> str:
    """The name of a step within its branch."""
    return f"conv{position}" if isinstance(row, tuple) else "split" if isinstance(row, list) else "pool"


def stack(o: Options, channels: int, rows: Mapping[str, Row]) -> "tuple[OrderedDict[str, nn.Module], int]":
    """Named rows, one after the other, and the channels of the last."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for name, row in rows.items():
        parts[name], channels = module(o, channels, row)
    return parts, channels


class ShuffleUnit(nn.Module):
    """Grouped 1 × 1, shuffle, 3 × 3 depthwise, grouped 1 × 1; plus x, or at stride 2 concatenated to its average pool.

    ShuffleNet, arXiv:1707.01083, figure 2 (b, c). The parts come from the family, whose two forms differ in them.
    """

    def __init__(self, o: Options, body: "OrderedDict[str, nn.Module]", stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(body)
        self.shortcut = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else nn.Identity()
        self.join = Cat() if stride == 2 else Add()
        self.act = o.activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.join(self.shortcut(x), self.body(x)))


class Fire(nn.Module):
    """A 1 × 1 squeeze, then parallel 1 × 1 and 3 × 3 expansions, concatenated (SqueezeNet, arXiv:1602.07360, figure 1).

    `expand` holds the channels of the 1 × 1 and of the 3 × 3 expansion.
    """

    def __init__(self, o: Options, in_channels: int, squeeze: int, expand: tuple[int, int]) -> None:
        super().__init__()
        self.squeeze = o.conv(in_channels, squeeze, 1)
        self.expand1x1 = o.conv(squeeze, expand[0], 1)
        self.expand3x3 = o.conv(squeeze, expand[1], 3)
        self.cat = Cat()

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x)
        return self.cat(self.expand1x1(x), self.expand3x3(x))


class Classifier(nn.Module):
    """Pooling, hidden layers if any, dropout, one linear layer: [N, C, H, W] → logits [N, classes].

    `hidden` ends with `hidden_features` values; `pool` is the global average by default.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        drop_rate: float = 0.0,
        pool: nn.Module | None = None,
        hidden: nn.Module | None = None,
        hidden_features: int | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.hidden_features = in_features, hidden_features or in_features
        self.pool = pool or GlobalAvgPool()
        self.hidden = hidden or nn.Identity()
        self.drop = nn.Dropout(drop_rate)
        self.fc = self.linear(num_classes)

    def linear(self, num_classes: int) -> nn.Module:
        """A new last layer; for no classes, none."""
        return nn.Linear(self.hidden_features, num_classes) if num_classes else nn.Identity()

    def pre_logits(self, x: Tensor) -> Tensor:
        """[N, C, H, W] → [N, hidden_features], what the last layer reads."""
        return self.drop(self.hidden(self.pool(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pre_logits(x))


class ConvClassifier(nn.Module):
    """Dropout, 1 × 1 convolution, activation, average (the head of SqueezeNet and NIN): [N, C, H, W] → logits."""

    def __init__(
        self, in_features: int, num_classes: int, drop_rate: float = 0.0, act: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.in_features = self.hidden_features = in_features
        self.drop = nn.Dropout(drop_rate)
        self.fc = self.linear(num_classes)
        self.act = act or nn.Identity()
        self.pool = GlobalAvgPool()

    def linear(self, num_classes: int) -> nn.Module:
        """A new last convolution; for no classes, none."""
        return nn.Conv2d(self.in_features, num_classes, 1) if num_classes else nn.Identity()

    def pre_logits(self, x: Tensor) -> Tensor:
        """[N, C, H, W] → [N, C]: averaged features; the logits are the average of the convolution's outputs."""
        return self.pool(self.drop(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.act(self.fc(self.drop(x))))
