"""Changes that any network can take, made after it is built: SAME padding, dilation for stride, the features' scale."""

import torch
from torch import Tensor, nn

from flyweight import ops
from flyweight.errors import UsageError
from flyweight.graph import INPUT, WINDOWS, trace
from flyweight.net import Net
from flyweight.ops import SameAvgPool2d, SameConv2d, SameMaxPool2d, Window, dilation, pair


def pad_same(net: nn.Module) -> None:
    """Gives every padded window TensorFlow's SAME padding; windows without padding (VALID there) stay as they are.

    Pools that round up count as padded: on an even size they already read what SAME reads.
    """
    for path, leaf in list(net.named_modules()):
        if isinstance(leaf, nn.Conv2d) and any(pair(leaf.padding)):  # type: ignore[arg-type]
            net.set_submodule(path, _same_conv(leaf))
        elif isinstance(leaf, nn.MaxPool2d) and (leaf.ceil_mode or any(pair(leaf.padding))):
            net.set_submodule(path, SameMaxPool2d(leaf.kernel_size, leaf.stride))
        elif isinstance(leaf, nn.AvgPool2d) and (leaf.ceil_mode or any(pair(leaf.padding))):
            net.set_submodule(path, SameAvgPool2d(leaf.kernel_size, leaf.stride))


def _same_conv(conv: nn.Conv2d) -> SameConv2d:
    kernel, stride = pair(conv.kernel_size), pair(conv.stride)
    same = SameConv2d(conv.in_channels, conv.out_channels, kernel, stride, groups=conv.groups, bias=False)
    same.weight, same.bias = conv.weight, conv.bias
    return same


def dilate(net: Net, output_stride: int) -> None:
    """Replaces strides beyond `output_stride` by dilation: the same weights answer at more positions.

    Every `s`-th position of the result is what the strided network computes (DeepLab, arXiv:1606.00915, section 3.1).
    Raises UsageError where an average pool would need gaps, which it cannot have.
    """
    if output_stride not in (1, 2, 4, 8, 16, 32):
        raise UsageError(f"output_stride is 1, 2, 4, 8, 16 or 32, not {output_stride}")
    net.keep_taps()
    graph = trace(net.features, net.spec.input)
    reached: dict[str, tuple[int, int]] = {}  # of each node: its stride, and the dilation that stands for lost strides
    for node in graph.nodes:
        stride, gap = reached.get(node.inputs[0], (1, 1))
        leaf = node.leaf
        if isinstance(leaf, WINDOWS):
            own = pair(leaf.stride)[0]
            lost = own if stride * own > output_stride else 1
            if lost > 1:
                leaf.stride = (1, 1)
            if gap > 1 and pair(leaf.kernel_size) != (1, 1):
                net.features.set_submodule(node.path, _spread(leaf, gap, node.path))
            stride, gap = stride * own // lost, gap * lost
        reached[node.name] = (stride, gap)


def _spread(leaf: Window, gap: int, path: str) -> nn.Module:
    """The window with its dilation and its padding multiplied by `gap`; its stride is 1."""
    if isinstance(leaf, nn.AvgPool2d):
        raise UsageError(f"{path} is an average pool, which cannot be dilated: choose a larger output_stride")
    gaps = tuple(gap * each for each in dilation(leaf))
    if isinstance(leaf, nn.MaxPool2d):
        # torch pads a pool by half its kernel at most; at stride 1, SAME is the symmetric padding without that limit.
        padded = any(pair(leaf.padding)) or isinstance(leaf, SameMaxPool2d)
        return (SameMaxPool2d if padded else nn.MaxPool2d)(leaf.kernel_size, 1, dilation=gaps)
    leaf.dilation = gaps
    leaf.padding = tuple(gap * each for each in pair(leaf.padding))  # type: ignore[arg-type]
    return leaf


# What answers k times as much to k times its input, for k > 0.
HOMOGENEOUS = (
    *(nn.Identity, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Dropout, nn.Flatten),
    *(ops.Add, ops.Cat, ops.Part, ops.PadChannels, ops.ChannelShuffle, ops.GlobalAvgPool, ops.GlobalMaxPool),
)


@torch.no_grad()
def normalise_features(net: Net, x: Tensor) -> float:
    """Divides all that a network without norms computes by the root mean square of what its classifier reads.

    Such a network passes on the scale of its input `x`, normalised pictures [N, C, H, W]: for values from 0 to 255 no
    learning rate suits a new classifier. Where every layer before it is homogeneous but for the biases, dividing these,
    and the kernels that read the input, divides all values exactly. Elsewhere nothing changes, and the divisor is 1.
    """
    nodes = trace(net, tuple(x.shape[1:])).nodes
    before = nodes[: next(i for i, node in enumerate(nodes) if node.leaf is net.get_classifier())]
    if not all(isinstance(node.leaf, (nn.Conv2d, nn.Linear, *HOMOGENEOUS)) for node in before):
        return 1.0
    scale = float(net.eval().forward_head(net.forward_features(x), pre_logits=True).square().mean().sqrt())
    for node in before:
        if INPUT in node.inputs:
            node.leaf.get_parameter("weight").div_(scale)
        if isinstance(node.leaf, nn.Conv2d | nn.Linear) and node.leaf.bias is not None:
            node.leaf.get_parameter("bias").div_(scale)
    return scale
