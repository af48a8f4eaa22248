"""A classifier on labelled pictures: accuracy in all and by class, calibration, speed."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flyweight.data import Dataset, Splits, open_source, prepare
from flyweight.errors import FlyweightError, UsageError
from flyweight.export.verify import prepared_answers, wilson
from flyweight.job import FILE as JOB
from flyweight.preprocess import Preprocess
from flyweight.run import open_classifier

BATCH = 64
BINS = 15  # of confidence, as in arXiv:1706.04599
ROUNDS, ROUND_SECONDS = 5, 0.4
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Model:
    """A classifier from a file: `answer` takes uint8 [N, H, W, C] and gives probabilities, float [N, classes]."""

    path: Path
    answer: Callable[[NDArray[np.uint8]], np.ndarray]
    classes: tuple[str, ...]
    preprocess: Preprocess
    threads: int


def open_model(path: Path, threads: int) -> Model:
    """The classifier in a run's folder (the file that ships, where there is one), a .fly, .onnx or .safetensors.

    Raises UsageError where there is none, or where a model.safetensors has no config.json that names its classes.
    """
    if path.is_dir():
        files = [path / name for name in ("model.fly", "model.onnx", "model.safetensors") if (path / name).exists()]
        if not files:
            raise UsageError(f"{path} holds neither model.onnx nor model.safetensors: is it a finished run?")
        path = files[0]
    if path.suffix == ".safetensors":
        return _from_weights(path, threads)
    shipped = open_classifier(path, threads)
    return Model(path, shipped.answers, shipped.classes, shipped.preprocess, threads)


def _from_weights(path: Path, threads: int) -> Model:
    import torch  # only here: an ONNX file is scored without it

    from flyweight.train.inputs import normalise
    from flyweight.weights import load_net, load_preprocess

    net, preprocess = load_net(path), load_preprocess(path)
    classes = _label_names(path.with_name("config.json"), path)
    torch.set_num_threads(threads)

    @torch.inference_mode()
    def answer(pixels: NDArray[np.uint8]) -> np.ndarray:
        return net(normalise(torch.from_numpy(pixels), preprocess)).softmax(1).numpy()

    return Model(path, answer, classes, preprocess, threads)


def _label_names(config: Path, weights: Path) -> tuple[str, ...]:
    if not config.exists():
        raise UsageError(f"{weights} does not name its classes: put the run's config.json beside it")
    try:
        return tuple(json.loads(config.read_text(encoding="utf-8"))["label_names"])
    except (ValueError, KeyError, TypeError) as error:
        raise FlyweightError(f"{config} is damaged ({error!r}): it must list label_names") from error


def evaluate(
    path: Path, data: str, split: str = "test", threads: int = 1, skip_corrupt: bool = False
) -> dict[str, Any]:
    """Scores a classifier on one split of data whose classes are called as its own; JSON values, shares in [0, 1].

    Pictures that the data itself does not hold out are held out as the run did (by the seed in its run.json). Raises
    UsageError where classes, channels or the split do not fit.
    """
    if split not in SPLITS:
        raise UsageError(f"--split is one of {', '.join(SPLITS)}, not {split!r}")
    model = open_model(path, threads)
    source = open_source(data)
    _check_classes(model, source.classes, data)
    if source.channels != model.preprocess.channels:
        raise UsageError(f"{data} has {source.channels} channels and {model.path} takes {model.preprocess.channels}")
    splits = prepare(source, [model.preprocess.size[0]], seed=_seed(model.path), skip_corrupt=skip_corrupt)
    chosen: Dataset = getattr(splits, split)
    labels = np.array([model.classes.index(name) for name in source.classes])[chosen.labels]
    probabilities = prepared_answers(model.answer, chosen, model.preprocess.size[0])
    return {
        "model": str(model.path),
        "data": data,
        "split": split,
        **scores(probabilities, labels, model.classes),
        **_without_repeats(probabilities, labels, splits, split),
        "throughput": throughput(model, chosen),
    }


def _check_classes(model: Model, classes: tuple[str, ...], data: str) -> None:
    lacking, unknown = sorted({*model.classes} - {*classes}), sorted({*classes} - {*model.classes})
    if lacking or unknown:
        parts = [f"{data} lacks {_listed(lacking)}"] * bool(lacking) + [f"it adds {_listed(unknown)}"] * bool(unknown)
        raise UsageError(f"the classes of {data} are not those of {model.path}: {' and '.join(parts)}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _seed(model: Path) -> int:
    """The seed of the run that a file belongs to; else that of a run where none is given."""
    run = model.with_name(JOB)
    try:
        return int(json.loads(run.read_text(encoding="utf-8"))["seed"]) if run.exists() else 0
    except (ValueError, KeyError, TypeError) as error:
        raise FlyweightError(f"{run} is damaged ({error!r}): it must hold the run's seed") from error


def scores(probabilities: np.ndarray, labels: NDArray[np.int64], classes: tuple[str, ...]) -> dict[str, Any]:
    """Accuracy with its 95 % Wilson interval, top-5, calibration, by class, and the confusion.

    `confusion` has a row for each true class and a column for each answer; a class without answers has no precision.
    """
    n, count = len(labels), len(classes)
    predicted = probabilities.argmax(1)
    right = predicted == labels
    confusion = np.zeros((count, count), int)
    np.add.at(confusion, (labels, predicted), 1)
    top5 = (np.argsort(-probabilities, axis=1, kind="stable")[:, :5] == labels[:, None]).any(1)
    by_class = [
        {
            "name": name,
            "n": int(confusion[i].sum()),
            "recall": _ratio(confusion[i, i], confusion[i].sum()),
            "precision": _ratio(confusion[i, i], confusion[:, i].sum()),
        }
        for i, name in enumerate(classes)
    ]
    return {
        "n": n,
        "top1": float(right.mean()),
        "ci95": list(wilson(int(right.sum()), n)),
        "top5": float(top5.mean()),
        "ece": calibration_error(probabilities, labels),
        "classes": by_class,
        "confusion": confusion.tolist(),
    }


def _ratio(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


def calibration_error(probabilities: np.ndarray, labels: NDArray[np.int64], bins: int = BINS) -> float:
    """Σ |B| / n · |accuracy(B) − confidence(B)| over bins B of equal width of the best class's probability.

    The expected calibration error (ECE, Guo et al., arXiv:1706.04599, section 2).
    """
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(bin_of, weights=right - confidence.astype(np.float64), minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def _without_repeats(
    probabilities: np.ndarray, labels: NDArray[np.int64], splits: Splits, split: str
) -> dict[str, dict[str, float]]:
    """`clean`, the accuracy without the test pictures that repeat one of training, where there are such."""
    if split != "test" or not splits.leaked.any() or splits.leaked.all():
        return {}
    right = (probabilities.argmax(1) == labels)[~splits.leaked]
    return {"clean": {"top1": float(right.mean()), "n": len(right), "duplicates": int(splits.leaked.sum())}}


def throughput(model: Model, data: Dataset) -> dict[str, Any]:
    """Images a second from pixels to probabilities, in batches: the median of several rounds and their range."""
    pixels = data.batch(model.preprocess.size[0], slice(0, BATCH))
    model.answer(pixels)
    rounds = []
    for _ in range(ROUNDS):
        done, start = 0, time.perf_counter()
        while done == 0 or time.perf_counter() - start < ROUND_SECONDS:
            model.answer(pixels)
            done += len(pixels)
        rounds.append(done / (time.perf_counter() - start))
    return {
        "images_per_second": {
            "median": statistics.median(rounds),
            "min": min(rounds),
            "max": max(rounds),
            "n": ROUNDS,
        },
        "batch": len(pixels),
        "threads": model.threads,
    }
