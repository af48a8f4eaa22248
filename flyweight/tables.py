"""The published tables of MobileNetV1, ShuffleNet V1, SqueezeNet, and of receptive fields, beside our own counts.

Each figure is kept as it is printed, since its digits are its precision. Where ours cannot agree a Reason says why, and
counts once more as the authors must have counted, wherever that can be done.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from flyweight.costs import LayerCost, NetCost, cost

Count = Callable[[NetCost], float]


@dataclass(frozen=True)
class Figure:
    """What a column of a table gives, its unit, and how it is taken from a cost."""

    name: str
    unit: str
    of: Count


@dataclass(frozen=True)
class Reason:
    """Why a published figure differs from ours; `recount` is ours counted in that way."""

    text: str
    recount: Count | None = None


@dataclass(frozen=True)
class Row:
    """One published figure and ours, both in `unit`; `recount` is ours counted in the way that `why` names."""

    source: str
    what: str
    unit: str
    published: str
    ours: float
    why: str = ""
    recount: float | None = None

    def to_json(self) -> dict[str, Any]:
        """All that the row says, in JSON values."""
        return asdict(self) | {"difference": self.difference, "agrees": self.agrees, "holds": self.holds}

    def printed(self, value: float) -> str:
        """A value with as many decimals as the published figure has."""
        return f"{value:.{len(self.published.partition('.')[2])}f}"

    @property
    def figure(self) -> str:
        """The published figure with its unit."""
        return f"{self.published} {self.unit}".rstrip()

    @property
    def difference(self) -> float:
        """Ours minus the published figure."""
        return self.ours - float(self.published)

    @property
    def agrees(self) -> bool:
        """Whether ours is the published figure at the precision in which it is printed."""
        return self.printed(self.ours) == self.published

    @property
    def holds(self) -> bool:
        """Whether the row agrees, or has a reason that our recount, where there is one, confirms."""
        explained = self.why != "" and (self.recount is None or self.printed(self.recount) == self.published)
        return self.agrees or explained


def rows() -> list[Row]:
    """Every figure of the published tables beside ours."""
    return [*_mobilenet_v1(), *_shufflenet_v1(), *_squeezenet(), *_receptive_fields()]


_cost = cache(cost)


def _row(source: str, net: str, figure: Figure, published: str, count: NetCost, why: Reason | None = None) -> Row:
    """A reason is given only where the row needs one."""
    row = Row(source, f"{net}: {figure.name}", figure.unit, published, figure.of(count))
    if why is None or row.agrees:
        return row
    return replace(row, why=why.text, recount=why.recount and why.recount(count))


def _total(count: NetCost, part: str, value: Callable[[LayerCost], int]) -> int:
    """The sum of a value over the layers whose path, or whose class, has `part` in it."""
    return sum(value(layer) for layer in count.layers if part in layer.path or part == layer.leaf)


def _of_params(layer: LayerCost) -> int:
    return layer.params


def _of_macs(layer: LayerCost) -> int:
    return layer.macs


MACS = Figure("MACs", "M", lambda count: count.macs / 1e6)
PARAMS = Figure("parameters", "M", lambda count: count.params / 1e6)
MEBIBYTES = Figure("size", "MiB", lambda count: 4 * count.params / 2**20)

MOBILENET = "MobileNets (arXiv:1704.04861)"
# Table 2: a type of layer, its path in our network, its shares of the multiply-adds and of the parameters in %.
LAYER_TYPES = (
    ("conv 1x1", "pointwise.conv", "94.86", "74.59"),
    ("conv dw 3x3", "depthwise.conv", "3.06", "1.06"),
    ("conv 3x3", "stem.conv", "1.19", "0.02"),
    ("fully connected", "head.fc", "0.18", "24.33"),
)
# Table 6: width multiplier α, millions of multiply-adds and of parameters, at 224 pixels.
ALPHA = ((1.0, "569", "4.2"), (0.75, "325", "2.6"), (0.5, "149", "1.3"), (0.25, "41", "0.5"))
# Table 7: the side in pixels that resolution multiplier ρ leaves, millions of multiply-adds, at α = 1.
RHO = ((224, "569"), (192, "418"), (160, "290"), (128, "186"))
# The authors' checkpoints (tensorflow/models, research/slim/nets/mobilenet_v1.md): α, millions of MACs by side, and of
# parameters.
CHECKPOINTS = (
    (1.0, ((224, "569"), (192, "418"), (160, "291"), (128, "186")), "4.24"),
    (0.75, ((224, "317"), (192, "233"), (160, "162"), (128, "104")), "2.59"),
    (0.5, ((224, "150"), (192, "110"), (160, "77"), (128, "49")), "1.34"),
    (0.25, ((224, "41"), (192, "34"), (160, "21"), (128, "14")), "0.47"),
)

SWAPPED = Reason("two digits are swapped: only with 1.91 do the four shares add up to 100 %")
WEIGHTS_ALONE = "of the weights alone, without biases and batch normalisation"
CUT_OFF = Reason("cut off, not rounded: the authors' checkpoints have 291", lambda count: count.macs // 10**6)
THREE_PER_NORM = Reason(
    "with three values for each channel of batch normalisation, where two are parameters",
    lambda count: (count.params + _total(count, "BatchNorm2d", _of_params) / 2) / 1e6,
)
WITH_POOL = Reason(
    "with one operation for each value that the average pooling reads",
    lambda count: (count.macs + _total(count, "GlobalAvgPool", lambda layer: layer.read)) / 1e6,
)
# α, or α and side → why the checkpoints' MACs differ.
CHECKPOINT_REASONS = {
    (0.5, 224): WITH_POOL,
    (0.25, 192): Reason(
        "with 16 channels in the first convolution, where the other figures at 0.25 have 8",
        lambda count: (count.macs + sum([layer.macs for layer in count.layers if layer.macs][:3])) / 1e6,
    ),
} | {
    (0.75, side): Reason(
        "all at 0.75 leave out the first convolution", lambda count: (count.macs - count.layers[0].macs) / 1e6
    )
    for side, _ in RHO
}


def _share(path: str, value: Callable[[LayerCost], int]) -> Count:
    """The share in % of the layers on a path."""
    return lambda count: 100 * _total(count, path, value) / _total(count, "", value)


def _mobilenet_v1() -> Iterator[Row]:
    full = _cost("mobilenet_v1")
    for kind, path, macs, params in LAYER_TYPES:
        source = f"{MOBILENET}, table 2"
        yield _row(source, kind, Figure("MACs", "%", _share(path, _of_macs)), macs, full, SWAPPED)
        weights = Reason(WEIGHTS_ALONE, _share(path, lambda layer: layer.weights))
        yield _row(source, kind, Figure("parameters", "%", _share(path, _of_params)), params, full, weights)
    for alpha, macs, params in ALPHA:
        count = _cost("mobilenet_v1", width=alpha)
        yield _row(f"{MOBILENET}, table 6", f"{alpha} MobileNet-224", MACS, macs, count)
        yield _row(f"{MOBILENET}, table 6", f"{alpha} MobileNet-224", PARAMS, params, count)
    for side, macs in RHO:
        count = _cost("mobilenet_v1", size=side)
        yield _row(
            f"{MOBILENET}, table 7", f"1.0 MobileNet-{side}", MACS, macs, count, CUT_OFF if side == 160 else None
        )
    for alpha, by_side, params in CHECKPOINTS:
        for side, macs in by_side:
            count, why = _cost("mobilenet_v1", width=alpha, size=side), CHECKPOINT_REASONS.get((alpha, side))
            yield _row("MobileNetV1 checkpoints", f"MobileNet_v1_{alpha}_{side}", MACS, macs, count, why)
        net = f"MobileNet_v1_{alpha}"
        yield _row("MobileNetV1 checkpoints", net, PARAMS, params, _cost("mobilenet_v1", width=alpha), THREE_PER_NORM)


SHUFFLENET = "ShuffleNet (arXiv:1707.01083)"
# Table 1: groups g and the complexity in millions.
GROUPS = ((1, "143"), (2, "140"), (3, "137"), (4, "133"), (8, "137"))
# Table 2: scale s and the complexity in millions, one figure for all g.
SCALES = ((1.0, "140"), (0.5, "38"), (0.25, "13"))
# The authors' code (megvii-model/ShuffleNet-Series, ShuffleNetV1/README.md): s, g, millions of FLOPs (of MACs, that is)
# and of parameters.
SHUFFLENET_CODE = (
    (2.0, 3, "524", "5.4"),
    (2.0, 8, "522", "6.5"),
    (1.5, 3, "292", "3.4"),
    (1.5, 8, "290", "4.3"),
    (1.0, 3, "138", "1.9"),
    (1.0, 8, "138", "2.4"),
    (0.5, 3, "38", "0.7"),
    (0.5, 8, "40", "1.0"),
)

WITHOUT_FC = Reason(
    "without the fully connected layer", lambda count: (count.macs - _total(count, "head.fc", _of_macs)) / 1e6
)
WITHOUT_FC_BIAS = Reason("without biases in the fully connected layer", lambda count: (count.params - 1000) / 1e6)
SCALE_REASONS = {
    1.0: Reason("one figure for all g, which are 133 to 143 in table 1"),
    0.5: Reason("one figure for all g"),
    0.25: Reason(
        "one figure for all g; with 12 channels in the first convolution, not 6 or 8, it is 13 for g = 1 to 4"
    ),
}
CODE_REASONS = {
    (1.0, 3): WITH_POOL,
    (1.5, 3): Reason("the code keeps 24 channels in the first convolution, not 36: then it is 292"),
    (1.5, 8): Reason("the code keeps 24 channels in the first convolution, not 40: then it is 290"),
}


def _shufflenet_v1() -> Iterator[Row]:
    for g, macs in GROUPS:
        yield _row(f"{SHUFFLENET}, table 1", f"g = {g}", MACS, macs, _cost(f"shufflenet_v1_g{g}"), WITHOUT_FC)
    for s, macs in SCALES:
        for g, _ in GROUPS:
            count = _cost(f"shufflenet_v1_g{g}", width=s)
            yield _row(f"{SHUFFLENET}, table 2", f"{s:g}x, g = {g}", MACS, macs, count, SCALE_REASONS[s])
    for s, g, macs, params in SHUFFLENET_CODE:
        count, net = _cost(f"shufflenet_v1_g{g}", width=s), f"ShuffleNetV1 {s}x (group={g})"
        yield _row("ShuffleNetV1 code", net, MACS, macs, count, CODE_REASONS.get((s, g)))
        yield _row("ShuffleNetV1 code", net, PARAMS, params, count, WITHOUT_FC_BIAS if (s, g) == (2.0, 3) else None)


SQUEEZENET = "SqueezeNet (arXiv:1602.07360)"
# Table 1: a layer, its path in our network, the parameters before pruning.
LAYERS = (
    ("conv1", "features.stem", "14208"),
    ("fire2", "features.fire2", "11920"),
    ("fire3", "features.fire3", "12432"),
    ("fire4", "features.fire4", "45344"),
    ("fire5", "features.fire5", "49440"),
    ("fire6", "features.fire6", "104880"),
    ("fire7", "features.fire7", "111024"),
    ("fire8", "features.fire8", "188992"),
    ("fire9", "features.fire9", "197184"),
    ("conv10", "head.fc", "513000"),
    ("total", "", "1248424"),
)
# Figure 3a: squeeze ratio SR, megabytes. Figure 3b: the share of 3 × 3 kernels at SR = 0.5. Table 3: the bypass.
SQUEEZE_RATIOS = ((0.125, "4.8"), (0.75, "19"))
SHARES_3X3 = ((0.01, "5.7"), (0.5, "13"), (0.99, "21"))
BYPASSES = (("none", "4.8"), ("simple", "4.8"), ("complex", "7.7"))

COMPLEX = Reason(
    "not explained: the four 1x1 convolutions that the text describes make 6.1 MiB (6.4 MB); "
    "tried: one around each of the eight fire modules, 7.9 MiB"
)


def _listed(count: NetCost) -> float:
    """Mebibytes as `ls -lh` rounds them: up, to one decimal below ten."""
    size = MEBIBYTES.of(count)
    return math.ceil(10 * size) / 10 if size < 10 else math.ceil(size)


ROUNDED_UP = Reason("in MiB and rounded up, as file listings do", _listed)


def _squeezenet() -> Iterator[Row]:
    plain = _cost("squeezenet1_0")
    for layer, path, params in LAYERS:
        own = Figure("parameters", "", lambda count, path=path: _total(count, path, _of_params))
        yield _row(f"{SQUEEZENET}, table 1", layer, own, params, plain)
    for ratio, size in SQUEEZE_RATIOS:
        count = _cost("squeezenet1_0", squeeze_ratio=ratio)
        yield _row(f"{SQUEEZENET}, figure 3a", f"SR = {ratio}", MEBIBYTES, size, count, ROUNDED_UP)
    for share, size in SHARES_3X3:
        count = _cost("squeezenet1_0", squeeze_ratio=0.5, pct_3x3=share)
        yield _row(f"{SQUEEZENET}, figure 3b", f"{share:.0%} of 3x3", MEBIBYTES, size, count, ROUNDED_UP)
    for bypass, size in BYPASSES:
        count, why = _cost("squeezenet1_0", bypass=bypass), COMPLEX if bypass == "complex" else None
        yield _row(f"{SQUEEZENET}, table 3", f"bypass: {bypass}", MEBIBYTES, size, count, why)


# github.com/google-research/receptive_field, of TF-Slim's networks: its name, ours, pixels.
FIELDS = (
    ("alexnet_v2", "alexnet", "195"),
    ("inception_v2", "inception_v2", "699"),
    ("inception_v3", "inception_v3", "1311"),
    ("inception_v4", "inception_v4", "2071"),
    ("inception_resnet_v2", "inception_resnet_v2", "3039"),
    ("mobilenet_v1", "mobilenet_v1", "315"),
    ("resnet_v1_50", "resnet50", "483"),
    ("resnet_v1_101", "resnet101", "1027"),
    ("resnet_v1_152", "resnet152", "1507"),
)
FIELD = Figure("receptive field", "px", lambda count: count.receptive_field[0])
LAST_UNIT = Reason(
    "TF-Slim strides in the last unit of a stage, not in the first: 8 + 16 + 32 pixels more",
    lambda count: FIELD.of(count) + 8 + 16 + 32,
)


def _receptive_fields() -> Iterator[Row]:
    for name, ours, pixels in FIELDS:
        yield _row(
            "google-research/receptive_field",
            name,
            FIELD,
            pixels,
            _cost(ours),
            LAST_UNIT if "resnet_v1" in name else None,
        )
