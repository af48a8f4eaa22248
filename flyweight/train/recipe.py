"""How a network is trained, as data."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flyweight.errors import UsageError
from flyweight.preprocess import Preprocess

# Up to this size pictures are shifted by whole pixels; larger ones are photographs and are zoomed, turned and toned.
SMALL = 48
SCHEDULES = ("one-cycle", "cosine", "constant")
BORDERS = ("reflected", "black")
OPTIMISERS = ("sgd", "adam", "adamw", "rmsprop", "muon")


@dataclass(frozen=True)
class Recipe:
    """By default SGD with Nesterov momentum over a one-cycle schedule that ends when the time does."""

    batch_size: int = 128
    """Pictures in a step."""
    optimiser: str = "sgd"
    """"sgd" (Nesterov), "adam", "adamw", "rmsprop" (decay 0.9, ε 1.0: arXiv:1512.00567, section 8), or "muon": the
    momentum of convolutions between features made orthogonal, all else by SGD."""
    learning_rate: float = 0.2
    """The schedule's peak, for a batch of `batch_size`."""
    momentum: float = 0.9
    """Of SGD, RMSProp and Muon; the Adams have their own (0.9 and 0.999)."""
    others: float = 1.0
    """Muon: learning rate of what SGD trains, as a share of that of the orthogonal steps."""
    weight_decay: float = 5e-4
    """L2 penalty on convolution and linear weights; biases and norms have none. AdamW and Muon decouple it."""
    schedule: str = "one-cycle"
    """After its rise the learning rate falls linearly to zero ("one-cycle", arXiv:1708.07120), along half a "cosine"
    (arXiv:1608.03983), or stays ("constant")."""
    warm_up: float = 0.2
    """Share of the training over which the rate rises linearly to its peak."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes (arXiv:1512.00567, section 7)."""
    ema: float = 0.02
    """The averaged weights forget over this share of the training so far; they are what is evaluated and kept. 0: the
    last weights themselves."""
    reestimate: int = 0
    """At the end batch statistics are taken anew over so many batches, without augmentation; 0: they stay."""
    balanced: bool = False
    """Draw every class equally often, however many pictures it has."""
    patience: int = 0
    """End the training after so many scorings in a row without a better one; 0: never before the time."""
    distil: float = 0.0
    """Weight of a teacher's answers in the loss, or their share in the targets (arXiv:1503.02531)."""
    temperature: float = 4.0
    """What divides the logits of both before the student is compared with its teacher."""

    resize: tuple[tuple[float, float], ...] = ()
    """Progressive resizing: (until this share of the training, pictures at this share of their side), in order; stages
    too small for the network are left out."""
    shift: int = 4
    """Small pictures: largest shift in pixels."""
    border: str = "reflected"
    """Small pictures: what a shift brings in, the picture "reflected" or "black"."""
    zoom: float = 0.35
    """Photographs: smallest share of the area that a random crop keeps."""
    tone: float = 0.3
    """Photographs: largest relative change of brightness and contrast."""
    flip: bool = True
    """Mirror half of the pictures left to right."""
    operations: int = 0
    """Random changes of each picture out of brightness, contrast, turn and two shears (after arXiv:1909.13719)."""
    magnitude: float = 0.5
    """Strength of these changes, in [0, 1]."""
    cutout: float = 0.0
    """Side of a grey square put at a random place, as a share of the picture's side (arXiv:1708.04552)."""
    mixup: float = 0.0
    """α of Beta(α, α), the share in which two pictures and their targets are averaged (arXiv:1710.09412); 0: never."""
    cutmix: float = 0.0
    """α of the share of a picture that a rectangle of another covers (arXiv:1905.04899); 0: never."""
    mixed: float = 1.0
    """Share of the batches that mixup or cutmix applies to; where both are given, half each."""

    features: float = 1.0
    """Learning rate of the last stage of features, as a share of the classifier's."""
    depth: float = 1.0
    """Learning rate of a stage, as a share of that of the stage behind it."""
    head_first: float = 0.0
    """Share of the training in which only the classifier learns (arXiv:2202.10054)."""

    mean: tuple[float, ...] = ()
    """Fixed mean of each channel, of values from 0 to 1; none: one of all training pictures."""
    std: tuple[float, ...] = ()
    """Fixed deviation, likewise."""
    plain: bool = False
    """Compute as torch does by itself: default memory layout and allocator, float32."""

    def __post_init__(self) -> None:
        for name, known in (("optimiser", OPTIMISERS), ("schedule", SCHEDULES), ("border", BORDERS)):
            if getattr(self, name) not in known:
                raise UsageError(f"a recipe's {name} is one of {', '.join(known)}, not {getattr(self, name)!r}")

    def to_json(self) -> dict[str, Any]:
        """As it is recorded."""
        return asdict(self)


# Adam as most tutorials have it, for ten epochs of CIFAR-10: what the figures in docs/performance.md compare with.
BASELINE = Recipe(
    optimiser="adam",
    learning_rate=1e-3,
    weight_decay=0.0,
    schedule="constant",
    warm_up=0.0,
    label_smoothing=0.0,
    ema=0.0,
    border="black",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
    plain=True,
)
BASELINE_EPOCHS = 10

# For networks that start from weights of other pictures.
FINE_TUNING = Recipe(batch_size=32, learning_rate=0.05, zoom=0.5, features=0.2, depth=0.9, head_first=0.15)

NAMED = {"baseline": BASELINE, "fine-tuning": FINE_TUNING}


def recipe_for(size: int) -> Recipe:
    """The defaults for training from scratch at `size` pixels."""
    if size <= SMALL:
        return Recipe(learning_rate=0.4, resize=((0.6, 0.75),))
    return Recipe(batch_size=32, learning_rate=0.05)


def recipe_named(name: str, size: int) -> Recipe:
    """The recipe of this name, "default" being that for training from scratch at `size` pixels. Raises UsageError."""
    if name == "default":
        return recipe_for(size)
    if name not in NAMED:
        raise UsageError(f"the recipe {name!r} is unknown; known are {', '.join(['default', *NAMED])}")
    return NAMED[name]


def preprocess_for(recipe: Recipe, images: np.ndarray) -> Preprocess:
    """How pictures become input: by the recipe's own statistics, or by those of training images, uint8 [N, H, W, C]."""
    found = Preprocess.of(images)
    if not recipe.mean:
        return found
    if not len(recipe.mean) == len(recipe.std) == found.channels:
        raise UsageError(f"the recipe's mean and deviation are of {len(recipe.mean)} channels, not {found.channels}")
    mean, std = (tuple(255 * value for value in values) for values in (recipe.mean, recipe.std))
    return Preprocess(found.size, found.channels, mean, std)


def rate(recipe: Recipe, progress: float) -> float:
    """The learning rate at `progress` in [0, 1]: a linear rise to its peak at `warm_up`, then the schedule."""
    if progress < recipe.warm_up:
        return recipe.learning_rate * progress / recipe.warm_up
    left = max(0.0, 1 - progress) / (1 - recipe.warm_up)
    fall = {"one-cycle": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}
    return recipe.learning_rate * fall[recipe.schedule]


def side(recipe: Recipe, progress: float, size: int) -> int:
    """The side in pixels at which pictures of `size` are seen at `progress`."""
    return next((round(share * size) for until, share in recipe.resize if progress < until), size)
