"""Frozen features: what a network's last layer reads, for every picture, and how far they carry without training."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flyweight.data import Dataset, Splits
from flyweight.errors import UsageError
from flyweight.net import Net
from flyweight.preprocess import Preprocess
from flyweight.train.loop import normalise

BATCH = 100
PENALTIES = (1e-1, 1e0, 1e1, 1e2, 1e3, 1e4)
NEIGHBOURS_AT_ONCE = 1000
COLUMNS = ("split", "class", "picture")
Named = tuple[str, str, str]  # the values of COLUMNS


@dataclass(frozen=True, eq=False)
class Features:
    """float32 [N, F] of the pictures of one split, with their labels and names."""

    values: NDArray[np.float32]
    labels: NDArray[np.int64]
    names: Sequence[str]
    split: str

    def chosen(self, rows: NDArray[np.int64]) -> "Features":
        """Those of some of the pictures."""
        names = [self.names[int(row)] for row in rows]
        return Features(self.values[rows], self.labels[rows], names, self.split)


@torch.no_grad()
def features(net: Net, data: Dataset, preprocess: Preprocess) -> Features:
    """What the network's last layer reads of each picture, in evaluation mode."""
    net.eval()
    found = []
    for start in range(0, len(data), BATCH):
        pixels = data.batch(preprocess.size[0], np.arange(start, min(start + BATCH, len(data))))
        maps = net.forward_features(normalise(torch.from_numpy(pixels), preprocess))
        found.append(net.forward_head(maps, pre_logits=True).numpy())
    return Features(np.concatenate(found), data.labels, data.names, data.split)


def embed(net: Net, splits: Splits, preprocess: Preprocess) -> tuple[Features, Features, Features]:
    """The features of all three splits."""
    all_three = (splits.train, splits.validation, splits.test)
    train, validation, test = (features(net, data, preprocess) for data in all_three)
    return train, validation, test


def write(folder: Path, splits: Sequence[Features], classes: Sequence[str], form: str = "npy") -> list[Path]:
    """Writes the features and what each row is of, in one of the `FORMS`; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    values = np.concatenate([each.values for each in splits])
    named = [
        (each.split, classes[int(label)], name)
        for each in splits
        for label, name in zip(each.labels, each.names, strict=True)
    ]
    return FORMS[form](folder, values, named)


def _write_npy(folder: Path, values: NDArray[np.float32], named: Sequence[Named]) -> list[Path]:
    """features.npy (float32 [N, F]) and features.csv, which names split, class and picture of each row."""
    files = [folder / "features.npy", folder / "features.csv"]
    np.save(files[0], values)
    with files[1].open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["row", *COLUMNS])
        rows.writerows([row, *each] for row, each in enumerate(named))
    return files


def _write_parquet(folder: Path, values: NDArray[np.float32], named: Sequence[Named]) -> list[Path]:
    """features.parquet: split, class, picture, and the features as a list of fixed length of float32."""
    arrow, parquet = arrow_modules()
    texts = [arrow.array(column, arrow.string()) for column in zip(*named, strict=True)]
    lists = arrow.FixedSizeListArray.from_arrays(arrow.array(values.ravel()), values.shape[1])
    file = folder / "features.parquet"
    parquet.write_table(arrow.table([*texts, lists], names=[*COLUMNS, "feature"]), file)
    return [file]


def arrow_modules() -> tuple[Any, Any]:
    """pyarrow and its Parquet part, which only this format needs. Raises UsageError where they are not installed."""
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise UsageError("Parquet needs pyarrow, which is not installed: pip install 'flyweight[parquet]'") from error


FORMS: dict[str, Callable[[Path, NDArray[np.float32], Sequence[Named]], list[Path]]] = {
    "npy": _write_npy,
    "parquet": _write_parquet,
}


def linear_probe(train: Features, validation: Features, test: Features) -> tuple[NDArray[np.int64], float]:
    """The classes that ridge regression on standardised features gives the test pictures, and its penalty.

    The penalty is chosen on the validation pictures; the regression is then fitted to both.
    """
    best = max(PENALTIES, key=lambda penalty: _accuracy(_ridge([train], penalty, validation), validation))
    return _ridge([train, validation], best, test), best


def _ridge(fitted: Sequence[Features], penalty: float, asked: Features) -> NDArray[np.int64]:
    x = np.concatenate([each.values for each in fitted]).astype(np.float64)
    labels = np.concatenate([each.labels for each in fitted])
    mean, std = x.mean(axis=0), x.std(axis=0) + 1e-6
    x = (x - mean) / std
    y = np.eye(labels.max() + 1)[labels]
    shift = y.mean(axis=0)
    weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ (y - shift))
    return (((asked.values - mean) / std) @ weights + shift).argmax(axis=1)


def nearest_neighbours(known: Sequence[Features], asked: Features) -> NDArray[np.int64]:
    """For each picture the row, among the `known` ones in turn, of the most similar picture by cosine."""
    x = _unit(np.concatenate([each.values for each in known]))
    y = _unit(asked.values)
    blocks = [y[i : i + NEIGHBOURS_AT_ONCE] for i in range(0, len(y), NEIGHBOURS_AT_ONCE)]
    return np.concatenate([(block @ x.T).argmax(axis=1) for block in blocks])


def _unit(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-12)


def _accuracy(answers: NDArray[np.int64], data: Features) -> float:
    return float((answers == data.labels).mean())


def judge(train: Features, validation: Features, test: Features) -> dict[str, float]:
    """Accuracy on the test pictures of a linear probe and of the nearest neighbour, their number, the penalty."""
    answers, penalty = linear_probe(train, validation, test)
    labels = np.concatenate([train.labels, validation.labels])
    neighbours = labels[nearest_neighbours([train, validation], test)]
    return {
        "linear_probe_top1": _accuracy(answers, test),
        "nearest_neighbour_top1": _accuracy(neighbours, test),
        "n": len(test.labels),
        "penalty": penalty,
    }
