"""From stored pixels to what a network is given, for training and for evaluation."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flyweight.data import augment
from flyweight.preprocess import Preprocess
from flyweight.train.recipe import SMALL, Recipe


def normalise(images: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 [N, H, W, C] → float32 [N, C, H, W] in channels-last memory, (pixel − mean) / std."""
    n, height, width, channels = images.shape
    # Rows of pixels, so that what differs by channel is a long vector.
    mean, std = (torch.tensor(values).repeat(width) for values in (preprocess.mean, preprocess.std))
    x = images.reshape(n, height, width * channels).float().sub_(mean).div_(std)
    return x.view(n, height, width, channels).permute(0, 3, 1, 2)


def augmented(
    images: Tensor, truth: Tensor, classes: int, preprocess: Preprocess, recipe: Recipe, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A training batch: uint8 [N, H, W, C] varied by the recipe → float32 [N, C, H, W] in channels-last memory.

    `truth` is labels, int64 [N], or the classes' shares, float32 [N, classes], as targets are where pictures are mixed.
    """
    if max(preprocess.size) <= SMALL:
        moved = augment.shift_and_flip(images, recipe.shift, recipe.flip, rng, recipe.border)
        x = normalise(moved, preprocess)
    else:
        x = augment.zoom_and_turn(normalise(images, preprocess), recipe.zoom, recipe.flip, rng)
        x = augment.tone(x, recipe.tone, rng)
    if recipe.operations:
        x = augment.vary(x, recipe.operations, recipe.magnitude, rng)
    if recipe.cutout:
        x = augment.cutout(x, recipe.cutout, rng)
    x, targets = _mixed(x, truth, classes, recipe, rng)
    layout = torch.contiguous_format if recipe.plain else torch.channels_last
    return x.contiguous(memory_format=layout), targets


def _mixed(x: Tensor, truth: Tensor, classes: int, recipe: Recipe, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix on a share of the batches."""
    if not recipe.mixup and not recipe.cutmix:
        return x, truth
    drawn, choice = torch.rand(2, generator=rng).tolist()
    if drawn >= recipe.mixed:
        return x, truth
    targets = truth if truth.is_floating_point() else F.one_hot(truth, classes).float()
    first = recipe.mixup and (not recipe.cutmix or choice < 0.5)
    mix, alpha = (augment.mixup, recipe.mixup) if first else (augment.cutmix, recipe.cutmix)
    return mix(x, targets, alpha, rng)


def shrunk(x: Tensor, side: int) -> Tensor:
    """The pictures [N, C, H, W] by averages of areas at `side` pixels."""
    return x if x.shape[-1] == side else F.interpolate(x, (side, side), mode="area")


def epoch_order(labels: np.ndarray, balanced: bool, rng: np.random.Generator) -> np.ndarray:
    """Positions of the pictures of one epoch: a permutation, or as many with every class equally often.

    Balanced, the pictures of a class are used up before any of them comes again.
    """
    n = len(labels)
    if not balanced:
        return rng.permutation(n)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    each = -(-n // len(members))
    drawn = [np.concatenate([rng.permutation(own) for _ in range(-(-each // len(own)))])[:each] for own in members]
    return rng.permutation(np.concatenate(drawn))[:n]
