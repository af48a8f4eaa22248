"""Heads that answer for every pixel, over the features of any network of the zoo."""

from collections.abc import Sequence

from torch import Tensor, nn

from flyweight.blocks import DepthwiseSeparable, Options
from flyweight.errors import UsageError
from flyweight.initialise import kaiming_normal_by_group, small_normal
from flyweight.net import FeatureNet
from flyweight.ops import Cat, GlobalAvgPool, Resize

RATES = (6, 12, 18)  # of the paper, for maps of about 32 positions a side
DETAIL = 48  # channels that the fine features are reduced to (arXiv:1802.02611, table 1)


def atrous(o: Options, in_channels: int, out_channels: int, rate: int = 1) -> nn.Module:
    """A depthwise-separable 3 × 3 convolution that reads every `rate`-th position; the size stays."""
    block = DepthwiseSeparable(o, in_channels, out_channels)
    for leaf in block.get_submodule("depthwise").children():
        if isinstance(leaf, nn.Conv2d):
            leaf.dilation = leaf.padding = (rate, rate)
    return block


class AtrousPyramid(nn.Module):
    """Context at several scales: a 1 × 1 convolution, atrous ones and the picture's mean, side by side, then 1 × 1.

    [N, C, H, W] → [N, channels, H, W] (DeepLabV3's ASPP, arXiv:1706.05587, section 3.3; separable as in V3+).
    """

    def __init__(self, o: Options, in_channels: int, channels: int = 256, rates: Sequence[int] = RATES) -> None:
        super().__init__()
        point = o.conv(in_channels, channels, 1)
        self.branches = nn.ModuleList([point, *(atrous(o, in_channels, channels, rate) for rate in rates)])
        self.mean = GlobalAvgPool(keep=True)
        self.pooled = o.conv(in_channels, channels, 1)
        self.resize = Resize()
        self.cat = Cat()
        self.project = o.conv((len(rates) + 2) * channels, channels, 1)
        self.drop = nn.Dropout(o.drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        scales = [branch(x) for branch in self.branches]
        context = self.resize(self.pooled(self.mean(x)), x)
        return self.drop(self.project(self.cat(*scales, context)))


class DeepLab(nn.Module):
    """DeepLabV3+ (arXiv:1802.02611, figure 2): normalised [N, C, H, W] → logits [N, num_classes, H, W].

    `backbone` gives two features, the fine one for edges and the coarse one for meaning: that of
    `create_model(…, features_only=True, output_stride=16, out_indices=(1, -1))`, say. Of `o`, `num_classes`, `act`,
    `norm`, `eps` and `drop_rate` count. `rates` suit maps of about 32 positions: divide them for smaller ones. Raises
    UsageError where the backbone gives another number of features.
    """

    def __init__(
        self, backbone: FeatureNet, o: Options, channels: int = 256, rates: Sequence[int] = RATES, detail: int = DETAIL
    ) -> None:
        super().__init__()
        widths = backbone.feature_info.channels()
        if len(widths) != 2:
            raise UsageError(f"DeepLab wants two features of its backbone, not {len(widths)}: set out_indices=(1, -1)")
        self.pyramid = AtrousPyramid(o, widths[1], channels, rates)
        self.detail = o.conv(widths[0], detail, 1)
        self.resize = Resize()
        self.cat = Cat()
        self.refine = nn.Sequential(atrous(o, channels + detail, channels), atrous(o, channels, channels))
        self.classify = nn.Conv2d(channels, o.num_classes, 1)
        kaiming_normal_by_group(self)
        small_normal(self.classify.weight)
        self.backbone = backbone  # after the others were drawn: it has its own weights

    def forward(self, x: Tensor) -> Tensor:
        fine, coarse = self.backbone(x)
        coarse = self.resize(self.pyramid(coarse), fine)
        logits = self.classify(self.refine(self.cat(coarse, self.detail(fine))))
        return self.resize(logits, x)
