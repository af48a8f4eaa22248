"""Batch normalisation folded into the convolution before it: the network that is deployed."""

import copy

import torch
from torch import nn

from flyweight.graph import Shape, trace


def fold_batchnorm(net: nn.Module, input_shape: Shape) -> nn.Module:
    """A copy in evaluation mode where each BatchNorm2d that alone reads a convolution has been merged into it.

    y = γ (Wx + b − μ) / √(σ² + ε) + β is one convolution; the norm's place is taken by an identity.
    """
    folded = copy.deepcopy(net).eval()
    graph = trace(folded, input_shape)
    by_name = {node.name: node for node in graph.nodes}
    for node in graph.nodes:
        before = by_name.get(node.inputs[0])
        if not isinstance(node.leaf, nn.BatchNorm2d) or before is None or not isinstance(before.leaf, nn.Conv2d):
            continue
        if len(graph.users[before.name]) == 1:
            _merge(before.leaf, node.leaf)
            folded.set_submodule(node.path, nn.Identity())
    return folded


@torch.no_grad()
def _merge(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    bias = conv.bias if conv.bias is not None else torch.zeros_like(norm.running_mean)
    conv.weight.mul_(scale.view(-1, 1, 1, 1))
    conv.bias = nn.Parameter((bias - norm.running_mean) * scale + norm.bias)
