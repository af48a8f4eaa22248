"""What a network is: the Spec that rebuilds it, and the Net, one contract (timm's names) for every family."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn


@dataclass(frozen=True)
class Spec:
    """All that rebuilds a network's structure, in JSON values: registry, search, checkpoints and reports exchange it.

    `input` is (channels, height, width); `widths` the channels that survive per leaf after pruning.
    """

    family: str
    args: Mapping[str, Any] = field(default_factory=dict)
    input: tuple[int, int, int] = (3, 224, 224)
    widths: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The Spec as JSON values."""
        return {"family": self.family, "args": dict(self.args), "input": list(self.input), "widths": dict(self.widths)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Spec":
        """The inverse of `to_json`."""
        channels, height, width = value["input"]
        return cls(value["family"], value["args"], (channels, height, width), value.get("widths", {}))


class Net(nn.Module):
    """Stages that shrink the picture and a head that names it: uint8-normalised [N, C, H, W] → logits [N, classes]."""

    def __init__(self, stages: "OrderedDict[str, nn.Module]", head: nn.Module) -> None:
        super().__init__()
        self.features = nn.Sequential(stages)
        self.head = head
        self.spec: Spec | None = None

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, C, H, W] → the last feature map."""
        return self.features(x)

    def forward_head(self, x: Tensor) -> Tensor:
        """The last feature map → logits [N, classes]."""
        return self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def initialise(net: nn.Module) -> None:
    """Kaiming-normal convolutions over their outputs, unit norms, zero biases (He et al., arXiv:1502.01852)."""
    for leaf in net.modules():
        if isinstance(leaf, nn.Conv2d):
            # torch's own fan ignores groups, which would draw depthwise kernels far too small.
            fan_out = leaf.kernel_size[0] * leaf.kernel_size[1] * leaf.out_channels // leaf.groups
            nn.init.normal_(leaf.weight, std=(2 / fan_out) ** 0.5)
        elif isinstance(leaf, nn.Linear):
            nn.init.normal_(leaf.weight, std=0.01)
        if isinstance(leaf, nn.Conv2d | nn.Linear) and leaf.bias is not None:
            nn.init.zeros_(cast(Tensor, leaf.bias))
