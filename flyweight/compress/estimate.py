"""What clustering and packing will make of a network, before it is trained."""

from collections.abc import Sequence

import torch
from torch import nn

from flyweight.compress.norms import with_merged_norms
from flyweight.compress.pack import contents_of, packed_bytes
from flyweight.net import Net
from flyweight.preprocess import Preprocess

# What clustering leaves of the float32 bytes of kernels at little loss.
CLUSTERED = 0.1
# Bytes that the temperature, which is fitted in the end, may add to the file.
SPARE = 16


@torch.no_grad()
def clustered_bytes(net: Net, preprocess: Preprocess, classes: Sequence[str], share: float = CLUSTERED) -> int:
    """About the bytes of a packed file in which kernels take `share` of their float32 bytes.

    What the file holds beside kernels, a few bytes a channel and a fixed part, is counted by packing it.
    """
    bare, kernels = with_merged_norms(net), 0
    values = torch.Generator().manual_seed(0)
    for leaf in bare.modules():
        if isinstance(leaf, nn.Conv2d | nn.Linear):
            kernels += leaf.weight.numel()
            leaf.weight.zero_()
        elif isinstance(leaf, nn.BatchNorm2d) and leaf.affine:
            for each in (leaf.weight, leaf.bias):  # after training no two are alike
                each.copy_(torch.randn(each.shape, generator=values).to(torch.bfloat16))
    return packed_bytes(contents_of(bare, preprocess, classes, net.spec.family)) + round(4 * share * kernels)
