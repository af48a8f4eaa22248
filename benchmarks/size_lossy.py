"""SqueezeNet 1.0 in a packed file of a given size: how often it answers as before, and what its features hold.

python -m benchmarks.size_lossy DATA --size 480000 [--epochs 4] [--held-out]

DATA is a folder as for benchmarks.size, with photographs in flowers12/train and flowers12/test. All is learnt from
training photographs, whose labels only the linear probe reads; the figures are of the test photographs that repeat no
training photograph, and of the network that the file gives back. With --held-out they are of the training photographs
that nothing was learnt from: for choosing settings. JSON on stdout.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.size import ALEXNET_BYTES, PREPROCESS, squeezenet
from flyweight.compress.cluster import Cluster
from flyweight.compress.pack import contents_of, network_of, pack
from flyweight.compress.step import Context
from flyweight.data import Dataset, Splits, open_source, prepare
from flyweight.export.verify import wilson
from flyweight.features import embed, linear_probe
from flyweight.net import Net
from flyweight.packed import open_packed
from flyweight.train.loop import logits
from flyweight.train.losses import distance
from flyweight.train.recipe import Recipe

NAME = "squeezenet1_0"
# Photographs vary less than for training from scratch: the network knows photographs, and is to stay as it is.
RECIPE = Recipe(batch_size=16, zoom=0.6, tone=0.1, warm_up=0.1, temperature=1.0)


def clean(splits: Splits) -> Splits:
    """Without the test photographs that repeat others."""
    return replace(splits, test=splits.test.subset(np.flatnonzero(~splits.leaked)))


def compressed(net: Net, splits: Splits, classes: tuple[str, ...], asked: argparse.Namespace) -> bytes:
    """The packed file of the clustered network."""

    def unlabelled(data: Dataset) -> Dataset:
        return replace(data, labels=np.zeros_like(data.labels), classes=classes)

    train, validation = unlabelled(splits.train), unlabelled(splits.validation)
    context = Context(train, validation, PREPROCESS, RECIPE, epochs=asked.epochs, mode="float32", seed=asked.seed)
    small = Cluster(size=asked.size, pictures=asked.pictures, rate=asked.rate)(net, context)
    return pack(contents_of(small, PREPROCESS, classes, NAME)).data


def probed(net: Net, splits: Splits) -> float:
    """Accuracy on the test photographs of a linear probe of the features."""
    train, validation, test = embed(net, splits, PREPROCESS)
    return float((linear_probe(train, validation, test)[0] == test.labels).mean())


def row(asked: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    splits = clean(prepare(open_source(asked.data / "flowers12"), [PREPROCESS.size[0]]))
    net, classes = squeezenet(asked.data)
    start = time.perf_counter()
    data = compressed(net, splits, classes, asked)
    seconds = time.perf_counter() - start
    if asked.out:
        asked.out.write_bytes(data)
    with TemporaryDirectory() as folder:
        (Path(folder) / "small.fly").write_bytes(data)
        small = network_of(open_packed(Path(folder) / "small.fly"))
    shown = splits.validation if asked.held_out else splits.test
    before, after = (logits(each, shown, PREPROCESS) for each in (net, small))
    same, n = int((before.argmax(1) == after.argmax(1)).sum()), len(shown)
    found = {
        "network": NAME,
        "bytes": len(data),
        "smaller_than_alexnet": ALEXNET_BYTES / len(data),
        "agreement": same / n,
        "interval": wilson(same, n),
        "n": n,
        "distance": float(distance(after, before, 1.0)),
        "seconds": seconds,
        "settings": {key: value for key, value in vars(asked).items() if isinstance(value, int | float)},
    }
    if not asked.held_out:
        found["linear_probe"] = {"float": probed(net, splits), "packed": probed(small, splits)}
    return found


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--size", type=int, default=480_000, help="bytes of the packed file")
    parser.add_argument("--epochs", type=float, default=0.0, help="of training the values; 0: none")
    parser.add_argument("--pictures", type=int, default=256, help="photographs that curvature is learnt from")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", action="store_true", help="score training photographs held out")
    parser.add_argument("--out", type=Path, help="where the packed file is kept")
    return parser.parse_args()


def main() -> None:
    """Prints the row."""
    found = row(options())
    low, high = found["interval"]
    print(
        f"{found['bytes']:,} bytes, {100 * found['agreement']:.1f} % as before ({100 * low:.1f} to {100 * high:.1f}, "
        f"n = {found['n']}), {found['seconds']:.0f} s",
        file=sys.stderr,
    )
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
