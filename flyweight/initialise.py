"""First weights, as the families' references draw them. Each function takes any module; norms start at 1 and 0."""

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn

Draw = Callable[[Tensor], object]


def draw(net: nn.Module, conv: Draw, linear: Draw) -> None:
    """Draws the weights of convolutions and linear layers, and sets their biases to 0."""
    for leaf in net.modules():
        if isinstance(leaf, nn.Conv2d):
            conv(leaf.weight)
        elif isinstance(leaf, nn.Linear):
            linear(leaf.weight)
        if isinstance(leaf, nn.Conv2d | nn.Linear) and leaf.bias is not None:
            nn.init.zeros_(cast(Tensor, leaf.bias))


def small_normal(weight: Tensor) -> None:
    """N(0, 0.01): what last layers start with, so that the first answers favour no class."""
    nn.init.normal_(weight, std=0.01)


def fan_out(weight: Tensor) -> None:
    """N(0, √(2 / (k² · C_out))), whatever the groups (He et al., arXiv:1502.01852, as torchvision applies it)."""
    nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")


def kaiming_normal(net: nn.Module) -> None:
    """Convolutions by `fan_out`, the classifier N(0, 0.01)."""
    draw(net, fan_out, small_normal)


def kaiming_normal_by_group(net: nn.Module) -> None:
    """N(0, √(2 · groups / (k² · C_out))), as TensorFlow and timm: a depthwise kernel counts its own fan alone."""
    for leaf in net.modules():
        if isinstance(leaf, nn.Conv2d):
            fan = leaf.kernel_size[0] * leaf.kernel_size[1] * leaf.out_channels // leaf.groups
            nn.init.normal_(leaf.weight, std=(2 / fan) ** 0.5)
            if leaf.bias is not None:
                nn.init.zeros_(leaf.bias)
        elif isinstance(leaf, nn.Linear):
            nn.init.uniform_(leaf.weight, -(leaf.out_features**-0.5), leaf.out_features**-0.5)
            nn.init.zeros_(leaf.bias)


def kaiming_uniform(net: nn.Module) -> None:
    """Convolutions U(±√(6 / (k² · C_in / groups))), as Caffe's networks and pytorchcv's; linear layers N(0, 0.01)."""
    draw(net, nn.init.kaiming_uniform_, small_normal)


def truncated_normal(std: float) -> Callable[[nn.Module], None]:
    """N(0, std) cut at ±2, for every layer (Inception's references)."""

    def cut(weight: Tensor) -> None:
        nn.init.trunc_normal_(weight, std=std, a=-2, b=2)

    return lambda net: draw(net, cut, cut)


def torch_default(net: nn.Module) -> None:
    """U(±1 / √fan_in) for weights and biases: torch's own, for references that leave it at that."""
    for leaf in net.modules():
        if isinstance(leaf, nn.Conv2d | nn.Linear):
            leaf.reset_parameters()
