"""Batch normalisation folded into the convolution before it: the network that is deployed."""

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flyweight.affine import fold_bias, fold_kernel, norm_scale
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
    scale, mean = norm_scale(_array(norm.weight), _array(norm.running_var), norm.eps), _array(norm.running_mean)
    before = np.zeros_like(mean) if conv.bias is None else _array(conv.bias)
    bias = fold_bias(before, mean, scale, _array(norm.bias))
    conv.weight.copy_(torch.from_numpy(fold_kernel(_array(conv.weight), scale)))
    conv.bias = nn.Parameter(torch.from_numpy(bias).to(conv.weight.device))


def _array(tensor: torch.Tensor) -> NDArray:
    return tensor.detach().cpu().numpy()
