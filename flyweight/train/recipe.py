"""How a network is trained, as data."""

from dataclasses import asdict, dataclass
from typing import Any

# Up to this size pictures are shifted by whole pixels; larger ones are photographs and are zoomed, turned and toned.
SMALL = 48


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum over a one-cycle schedule that ends when the time does."""

    batch_size: int = 128
    """Pictures in a step."""
    learning_rate: float = 0.2
    """The schedule's peak, for a batch of `batch_size`."""
    momentum: float = 0.9
    """Nesterov momentum."""
    weight_decay: float = 5e-4
    """L2 penalty on convolution and linear weights; biases and norms have none."""
    warm_up: float = 0.2
    """Share of the training over which the rate rises linearly to its peak; then it falls linearly to zero."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes (arXiv:1512.00567, section 7)."""
    ema: float = 0.02
    """The averaged weights forget over this share of the training so far; they are what is evaluated and kept."""
    shift: int = 4
    """Small pictures: largest shift in pixels, the border reflected."""
    zoom: float = 0.35
    """Photographs: smallest share of the area that a random crop keeps."""
    tone: float = 0.3
    """Photographs: largest relative change of brightness and contrast."""
    flip: bool = True
    """Mirror half of the pictures left to right."""
    cutout: float = 0.0
    """Side of a grey square put at a random place, as a share of the picture's side (arXiv:1708.04552)."""

    features: float = 1.0
    """Learning rate of the last stage of features, as a share of the classifier's."""
    depth: float = 1.0
    """Learning rate of a stage, as a share of that of the stage behind it."""
    head_first: float = 0.0
    """Share of the training in which only the classifier learns (arXiv:2202.10054)."""

    def to_json(self) -> dict[str, Any]:
        """As it is recorded."""
        return asdict(self)


def recipe_for(size: int) -> Recipe:
    """The defaults for training from scratch at `size` pixels."""
    if size <= SMALL:
        return Recipe()
    return Recipe(batch_size=32, learning_rate=0.05)


# For networks that start from weights of other pictures.
FINE_TUNING = Recipe(batch_size=32, learning_rate=0.05, zoom=0.5, features=0.2, depth=0.9, head_first=0.15)


def rate(recipe: Recipe, progress: float) -> float:
    """The learning rate at `progress` in [0, 1]: a triangle that peaks at `warm_up` (arXiv:1708.07120)."""
    if progress < recipe.warm_up:
        return recipe.learning_rate * progress / recipe.warm_up
    return recipe.learning_rate * max(0.0, 1 - progress) / (1 - recipe.warm_up)
