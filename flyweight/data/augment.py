"""Random variation of batches on the CPU: uint8 [N, H, W, C] → float32 [N, C, H, W], channels-last, normalised."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def shift_and_flip(images: Tensor, pixels: int, flip: bool, rng: torch.Generator) -> Tensor:
    """Moves each picture by up to `pixels` in each direction, borders reflected, and mirrors half of them.

    uint8 [N, H, W, C] → the same; one gather does the padding, the crop and the mirror.
    """
    n, height, width, _ = images.shape
    rows = _shifted(n, height, pixels, rng)
    columns = _shifted(n, width, pixels, rng)
    if flip:
        mirrored = torch.rand(n, generator=rng) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    return images[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def _shifted(n: int, length: int, pixels: int, rng: torch.Generator) -> Tensor:
    """[N, length] positions of a window moved by a random offset in [−pixels, pixels], reflected at the borders."""
    offsets = torch.randint(-pixels, pixels + 1, (n, 1), generator=rng)
    positions = (torch.arange(length)[None, :] + offsets).abs()
    return (length - 1) - (length - 1 - positions).abs()


def zoom_and_turn(images: Tensor, smallest_area: float, flip: bool, rng: torch.Generator) -> Tensor:
    """Random crops of photographs: area in [`smallest_area`, 1], aspect in [3/4, 4/3], up to 15° turned, half mirrored.

    float [N, C, H, W] → the same size, bilinear, borders reflected (GoogLeNet's crops, arXiv:1409.4842, section 6).
    """
    n = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=rng)

    side = uniform(smallest_area, 1).sqrt()
    aspect = torch.exp(uniform(-math.log(4 / 3), math.log(4 / 3)) / 2)
    sx, sy = (side * aspect).clamp(max=1), (side / aspect).clamp(max=1)
    angle = uniform(-math.pi / 12, math.pi / 12)
    mirror = torch.where(torch.rand(n, generator=rng) < 0.5, -1.0, 1.0) if flip else torch.ones(n)
    tx, ty = (1 - sx) * uniform(-1, 1), (1 - sy) * uniform(-1, 1)
    cos, sin = torch.cos(angle), torch.sin(angle)
    matrix = torch.stack([sx * cos * mirror, -sy * sin, tx, sx * sin * mirror, sy * cos, ty], dim=1).view(n, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def tone(images: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    """Random brightness and contrast per picture, a little per channel: normalised float [N, C, H, W] → the same."""
    n, c = images.shape[:2]

    def spread(*shape: int) -> Tensor:
        return strength * (2 * torch.rand(*shape, generator=rng) - 1)

    gain = 1 + spread(n, 1, 1, 1) + spread(n, c, 1, 1) / 3
    return images * gain + spread(n, 1, 1, 1) + spread(n, c, 1, 1) / 3


def cutout(images: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Sets a random square, `share` of the side, to the mean (zero): normalised float [N, C, H, W] → the same."""
    n, _, height, width = images.shape
    half = share / 2
    masks = []
    for length in (height, width):
        centre = torch.rand(n, 1, generator=rng) * length
        masks.append((torch.arange(length)[None, :] + 0.5 - centre).abs() < half * length)
    hidden = masks[0][:, None, :, None] & masks[1][:, None, None, :]
    return images.masked_fill(hidden, 0.0)
