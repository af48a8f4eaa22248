"""The most confident wrong answers, as small pictures for the report."""

import base64
import io
from typing import Any

import numpy as np

from flyweight.data import Dataset, read_image

SIDE = 112  # pixels: 24 photographs of this size keep a report under a megabyte


def worst_mistakes(data: Dataset, probabilities: np.ndarray, most: int) -> list[dict[str, Any]]:
    """Up to `most` wrong answers, most confident first: `{truth, predicted, probability, name, png}`."""
    predicted, sure = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != data.labels)
    worst = wrong[np.argsort(-sure[wrong], kind="stable")][:most]
    return [
        {
            "truth": data.classes[data.labels[i]],
            "predicted": data.classes[predicted[i]],
            "probability": float(sure[i]),
            "name": data.names[i],
            "png": _png(data, int(i)),
        }
        for i in worst
    ]


def _png(data: Dataset, index: int) -> str:
    picture = read_image(data.original(index), data.channels)
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
