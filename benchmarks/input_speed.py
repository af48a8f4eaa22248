"""How fast pictures are made ready on one core: batches for training, and decoding photographs into a pack.

python -m benchmarks.input_speed --data cifar10:PATH --photos FOLDER

Prints a table on stderr and JSON on stdout: images a second, the median of several rounds and their range.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flyweight.data import Dataset, open_source, prepare
from flyweight.data.pack import pack
from flyweight.preprocess import Preprocess
from flyweight.train.inputs import augmented
from flyweight.train.recipe import BASELINE, Recipe, preprocess_for

ROUNDS, BATCHES, BATCH = 5, 100, 128
RECIPES = {
    "shift, flip": Recipe(),
    "shift, flip, cutout": Recipe(cutout=0.25),
    "shift, flip, cutmix": Recipe(cutmix=1.0),
    "shift, flip, two operations": Recipe(operations=2),
    "baseline": BASELINE,
}


def rounds(work: Callable[[], int], clock: Callable[[], float], count: int = ROUNDS) -> dict[str, float]:
    """Images a second of `work`, which gives the number of images it did."""
    work()
    speeds = []
    for _ in range(count):
        start = clock()
        speeds.append(work() / (clock() - start))
    return {"median": statistics.median(speeds), "min": min(speeds), "max": max(speeds), "n": count}


def batches(data: Dataset, preprocess: Preprocess, recipe: Recipe) -> dict[str, float]:
    """Reading, varying and normalising random batches on one thread, by its own processor time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rng, order = torch.Generator().manual_seed(0), np.random.default_rng(0)

    def work() -> int:
        for _ in range(BATCHES):
            indices = order.integers(0, len(data), BATCH)
            pixels = torch.from_numpy(data.batch(preprocess.size[0], indices))
            augmented(pixels, torch.from_numpy(data.labels[indices]), len(data.classes), preprocess, recipe, rng)
        return BATCHES * BATCH

    try:
        return rounds(work, time.process_time)
    finally:
        torch.set_num_threads(threads)


def batch_rows(data: Dataset) -> list[dict[str, Any]]:
    """One row for each way to vary small pictures."""
    size = data.sizes[0]
    sample = data.batch(size, slice(0, 2000))
    return [
        {"input": f"batches at {size} px: {name}", **batches(data, preprocess_for(recipe, sample), recipe)}
        for name, recipe in RECIPES.items()
    ]


def decoding_row(photos: str, size: int) -> dict[str, Any]:
    """Decoding, resizing and storing photographs, on all cores that the process may use."""
    source = open_source(photos)

    def work() -> int:
        with tempfile.TemporaryDirectory() as folder:
            pack(source, [size], Path(folder), lambda done, total: None)
        return len(source)

    return {"input": f"photographs to a pack at {size} px", **rounds(work, time.perf_counter, 3)}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="small pictures")
    parser.add_argument("--photos", help="a folder of photographs")
    parser.add_argument("--size", type=int, default=160, help="of the photographs in the pack")
    options = parser.parse_args()
    rows = batch_rows(prepare(open_source(options.data), [32]).train) if options.data else []
    rows += [decoding_row(options.photos, options.size)] if options.photos else []
    for row in rows:
        print(f"{row['input']}: {row['median']:.0f} ({row['min']:.0f} to {row['max']:.0f})", file=sys.stderr)
    print(json.dumps({"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
