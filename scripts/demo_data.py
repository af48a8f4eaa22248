"""Build the demo's data, a stratified subset of Fashion-MNIST, from the four original files.

    python scripts/demo_data.py [--source DIR] [--target DIR]

Debian's package dataset-fashion-mnist installs the originals. The same originals give the same files, byte for byte,
wherever Python is built with the same zlib.
"""

import argparse
import gzip
import struct
from pathlib import Path

import numpy as np

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
PER_CLASS = {"train": 700, "t10k": 160}  # 8,600 images: what fits into 4 MB
SEED = 0


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array in a gzipped IDX file: two zero bytes, the type (8), the rank, big-endian uint32 sizes, data."""
    raw = gzip.decompress(path.read_bytes())
    shape = struct.unpack_from(f">{raw[3]}I", raw, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def write_idx(path: Path, array: np.ndarray) -> None:
    """Gzip without a name and a time, so that the bytes depend on the array alone."""
    header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    with path.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write(header + array.tobytes())


def choose(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Sorted indices of `per_class` images of each class (RandomState, because NumPy never changes its stream)."""
    random = np.random.RandomState(SEED)
    members = [random.permutation(np.flatnonzero(labels == label))[:per_class] for label in range(len(CLASSES))]
    return np.sort(np.concatenate(members))


def build(source: Path, target: Path) -> None:
    """Write the subset's four files and the class names into `target`."""
    target.mkdir(parents=True, exist_ok=True)
    for split, per_class in PER_CLASS.items():
        images, labels = f"{split}-images-idx3-ubyte.gz", f"{split}-labels-idx1-ubyte.gz"
        all_labels = read_idx(source / labels)
        chosen = choose(all_labels, per_class)
        write_idx(target / images, read_idx(source / images)[chosen])
        write_idx(target / labels, all_labels[chosen])
    (target / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES), encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--target", type=Path, default=Path(__file__).parents[1] / "flyweight" / "demo")
    options = parser.parse_args()
    build(options.source, options.target)
    size = sum(path.stat().st_size for path in options.target.iterdir())
    print(f"{options.target}: {size:,} bytes")


if __name__ == "__main__":
    main()
