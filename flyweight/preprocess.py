"""How a picture becomes the network's input: one value, used in training, written into every export and config."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flyweight.data.images import ImageSource, to_pixels


@dataclass(frozen=True)
class Preprocess:
    """Upright, RGB or grey, bilinear to `size` (height, width), then (pixel − mean) / std with both in 0…255 units."""

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def pixels(self, source: ImageSource) -> np.ndarray:
        """A picture (path, Pillow image or array) as uint8 [H, W, C]. Raises DataError naming a file that is none."""
        return to_pixels(source, self.size, self.channels)

    def at(self, size: int, channels: int) -> "Preprocess":
        """Much the same normalisation for square pictures of another size; for other channels, by their mean.

        A mean that all channels share is rounded, for what `of` says.
        """
        mean, std = self.mean, self.std
        if channels != self.channels:
            mean, std = ((sum(values) / len(values),) * channels for values in (mean, std))
        if len(set(mean)) == 1:
            mean = (float(round(mean[0])),) * channels
        return Preprocess((size, size), channels, mean, std)

    def to_json(self) -> dict[str, Any]:
        """The value as it stands in config.json and in the ONNX metadata."""
        return asdict(self) | {"resize": "bilinear"}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Preprocess":
        """The inverse of `to_json`."""
        height, width = value["size"]
        return cls((height, width), value["channels"], tuple(value["mean"]), tuple(value["std"]))

    @classmethod
    def of(cls, images: np.ndarray) -> "Preprocess":
        """Statistics of training images, uint8 [N, H, W, C]: one whole-numbered mean and one deviation of all channels.

        The same values for all channels because then the exported file takes pixels without any arithmetic; taken from
        up to 2,000 images.
        """
        sample = np.asarray(images[:: max(1, len(images) // 2000)], dtype=np.float32)
        _, height, width, channels = images.shape
        mean, std = float(round(float(sample.mean()))), max(1.0, round(float(sample.std()), 3))
        return cls((height, width), channels, (mean,) * channels, (std,) * channels)
