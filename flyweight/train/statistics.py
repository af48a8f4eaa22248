"""Batch statistics taken anew, for weights that were averaged or trained on pictures that are not as they will be."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def reestimate(net: nn.Module, batches: Iterable[Tensor]) -> None:
    """Sets the mean and variance of each batch normalisation to their averages over the batches; nothing else changes.

    The batches are of one size. All else is in evaluation mode meanwhile, so nothing is dropped out.
    """
    norms = [leaf for leaf in net.modules() if isinstance(leaf, _BatchNorm) and leaf.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    net.eval()
    for norm in norms:
        norm.train()
    for i, x in enumerate(batches):
        for norm in norms:
            norm.momentum = 1 / (i + 1)  # so that all batches count alike, and what was there before not at all
        net(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    net.eval()
