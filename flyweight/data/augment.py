"""Random variation of batches on the CPU: uint8 [N, H, W, C] → float32 [N, C, H, W], channels-last, normalised."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TURN, SHEAR = math.pi / 6, 0.5  # of `vary` at full magnitude
OPERATIONS = 5


def shift_and_flip(images: Tensor, pixels: int, flip: bool, rng: torch.Generator, border: str = "reflected") -> Tensor:
    """Moves each picture by up to `pixels` in each direction and mirrors half of them.

    uint8 [N, H, W, C] → the same; one gather does the padding ("reflected" or "black"), the crop and the mirror.
    """
    n, height, width, channels = images.shape
    rows, columns = _offset(n, height, pixels, rng), _offset(n, width, pixels, rng)
    if flip:
        mirrored = torch.rand(n, generator=rng) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    colours = images.reshape(-1, channels)
    first = torch.arange(n)[:, None] * height
    positions = (first + _reflected(rows, height))[:, :, None] * width + _reflected(columns, width)[:, None, :]
    if border == "black":
        outside = [(at < 0) | (at >= length) for at, length in ((rows, height), (columns, width))]
        positions.masked_fill_(outside[0][:, :, None] | outside[1][:, None, :], len(colours))
        colours = torch.cat([colours, colours.new_zeros(1, channels)])
    return colours.index_select(0, positions.flatten()).view(images.shape)


def _offset(n: int, length: int, pixels: int, rng: torch.Generator) -> Tensor:
    """[N, length] positions of a window moved by a random offset in [−pixels, pixels]."""
    return torch.arange(length)[None, :] + torch.randint(-pixels, pixels + 1, (n, 1), generator=rng)


def _reflected(positions: Tensor, length: int) -> Tensor:
    """Positions beyond a border, mirrored at it."""
    return (length - 1) - (length - 1 - positions.abs()).abs()


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
    return _warped(images, [sx * cos * mirror, -sy * sin, tx, sx * sin * mirror, sy * cos, ty])


def _warped(images: Tensor, rows: list[Tensor]) -> Tensor:
    """The pictures seen through affine maps, each given by the six values of its two rows; borders reflected."""
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def tone(images: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    """Random brightness and contrast per picture, a little per channel: normalised float [N, C, H, W] → the same."""
    n, c = images.shape[:2]

    def spread(*shape: int) -> Tensor:
        return strength * (2 * torch.rand(*shape, generator=rng) - 1)

    gain = 1 + spread(n, 1, 1, 1) + spread(n, c, 1, 1) / 3
    return images * gain + spread(n, 1, 1, 1) + spread(n, c, 1, 1) / 3


def vary(images: Tensor, operations: int, magnitude: float, rng: torch.Generator) -> Tensor:
    """`operations` of five changes, drawn for each picture: brightness, contrast, turn, shear along x and along y.

    Normalised float [N, C, H, W] → the same; at magnitude 1 brightness and contrast change by up to 1 (in deviations,
    and as a factor about the picture's mean), the angle by 30°, a shear by half of the side (after arXiv:1909.13719).
    """
    n = len(images)
    chosen = torch.rand(n, OPERATIONS, generator=rng).argsort(dim=1) < operations
    amounts = magnitude * (2 * torch.rand(n, OPERATIONS, generator=rng) - 1) * chosen
    brightness, contrast, angle, along_x, along_y = amounts.unbind(1)
    mean = images.mean(dim=(1, 2, 3))
    images = images * (1 + contrast).view(n, 1, 1, 1) + (brightness - contrast * mean).view(n, 1, 1, 1)
    cos, sin = torch.cos(angle * TURN), torch.sin(angle * TURN)
    x, y, zero = SHEAR * along_x, SHEAR * along_y, torch.zeros(n)
    return _warped(images, [cos - sin * y, cos * x - sin, zero, sin + cos * y, sin * x + cos, zero])


def cutout(images: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Sets a random square, `share` of the side, to the mean (zero), in place: normalised float [N, C, H, W]."""
    n, _, height, width = images.shape
    bounds = []
    for length in (height, width):
        low = torch.rand(n, generator=rng) * length - share * length / 2
        ends = torch.stack([low, low + share * length]) + 0.5
        bounds.append(ends.long().clamp(0, length).tolist())
    pixels = images.numpy()  # a loop over slices of numpy is ten times as fast as a mask over all pixels
    for picture, top, bottom, left, right in zip(pixels, *bounds[0], *bounds[1], strict=True):
        picture[:, top:bottom, left:right] = 0
    return images


def mixup(images: Tensor, targets: Tensor, alpha: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Averages each picture and its soft target [N, classes] with the next ones in the batch (arXiv:1710.09412)."""
    share = _beta(alpha, rng)
    return images.lerp(images.roll(1, 0), share), targets.lerp(targets.roll(1, 0), share)


def cutmix(images: Tensor, targets: Tensor, alpha: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Covers a rectangle of each picture by that of the next one in the batch, in place (arXiv:1905.04899).

    The soft targets [N, classes] are averaged by the share of the area.
    """
    height, width = images.shape[2:]
    side = math.sqrt(_beta(alpha, rng))
    edges = []
    for length in (height, width):
        centre = float(torch.rand((), generator=rng)) * length
        edges.append([min(max(round(centre + sign * side * length / 2), 0), length) for sign in (-1, 1)])
    (top, bottom), (left, right) = edges
    images[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right].roll(1, 0)
    share = (bottom - top) * (right - left) / (height * width)
    return images, targets.lerp(targets.roll(1, 0), share)


def _beta(alpha: float, rng: torch.Generator) -> float:
    """One draw of Beta(α, α) by Jöhnk's method, since torch's own takes no generator."""
    while True:
        x, y = (torch.rand(2, generator=rng, dtype=torch.float64) ** (1 / alpha)).tolist()
        if 0 < x + y <= 1:
            return x / (x + y)
