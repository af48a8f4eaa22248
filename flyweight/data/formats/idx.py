"""MNIST-style IDX files (http://yann.lecun.com/exdb/mnist/): train-* and t10k-*, plain or gzipped, in one folder."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from flyweight.data.cache import Rows
from flyweight.data.source import Source
from flyweight.errors import DataError

SPLIT_PREFIXES = {"train": "train", "test": "t10k"}
UINT8 = 0x08
MAX_DEFLATE_RATIO = 1032
MAX_BYTES = 4_000_000_000
AT_ONCE = 1 << 22  # bytes read


def open(path: Path) -> Source:
    """Grey images; names of the classes come from classes.txt, one a line, or are "0", "1" … without it."""
    if not path.is_dir():
        raise DataError(f"{path} is a file; give the folder that holds train-images-idx3-ubyte.gz and the others")
    images, labels = zip(*(_pair(path, prefix) for prefix in _prefixes(path).values()), strict=True)
    if len({part.shape[1:] for part in images}) > 1:
        raise DataError(f"the images in {path} differ in size between train and t10k: they are not one data set")
    splits = {split: len(part) for split, part in zip(_prefixes(path), images, strict=True)}
    all_labels = np.concatenate(labels).astype(np.int64)
    licence = sorted(path.glob("LICENSE*"))
    return Source(
        root=path,
        name=path.resolve().name,
        images=_joined(images),
        labels=all_labels,
        classes=_classes(path, int(all_labels.max()) + 1),
        splits=np.repeat(list(splits), list(splits.values())),
        names=[f"{split}/{index}" for split, count in splits.items() for index in range(count)],
        channels=1,
        size=(images[0].shape[1], images[0].shape[2]),
        licence=f"see {licence[0].name} in the data" if licence else "not stated",
    )


def _joined(parts: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """The images [n, H, W] of all splits, as [N, H, W, 1]."""
    rows = Rows((sum(map(len, parts)), *parts[0].shape[1:], 1))
    for part in parts:
        rows.append(part)
    return rows.array()


def _prefixes(path: Path) -> dict[str, str]:
    """The splits whose files are there; train must be, t10k may be absent as a whole."""
    return {
        split: prefix
        for split, prefix in SPLIT_PREFIXES.items()
        if split == "train" or any(path.glob(f"{prefix}-*-ubyte*"))
    }


def _pair(path: Path, prefix: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images [n, H, W] and labels [n] of one split."""
    images = _read(_file(path, f"{prefix}-images-idx3-ubyte"), dims=3)
    label_file = _file(path, f"{prefix}-labels-idx1-ubyte")
    labels = _read(label_file, dims=1)
    if len(images) != len(labels):
        raise DataError(f"{label_file} holds {len(labels)} labels for {len(images)} images: take files of one data set")
    return images, labels


def _file(path: Path, name: str) -> Path:
    for file in (path / f"{name}.gz", path / name):
        if file.is_file():
            return file
    raise DataError(f"{path} lacks {name} (or {name}.gz): put it there")


def _read(file: Path, dims: int) -> NDArray[np.uint8]:
    """The array of an IDX file; never more is read than its header promises."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            shape = _shape(file, stream, dims)
            promised = math.prod(shape)
            # Room is made at once for what is promised, so a header that cannot be true must not ask.
            possible = file.stat().st_size * (MAX_DEFLATE_RATIO if file.suffix == ".gz" else 1)
            rows, found = Rows(shape if promised <= possible else (0,)), 0
            while promised <= possible and found <= promised and (part := stream.read(AT_ONCE)):
                rows.append(part)
                found += len(part)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read ({error}): download it again") from error
    if found != promised:
        relation = "fewer" if found < promised else "more"
        raise DataError(f"{file} holds {relation} bytes than the {promised} its header promises: download it again")
    return rows.array()


def _shape(file: Path, stream: BinaryIO | gzip.GzipFile, dims: int) -> tuple[int, ...]:
    """From the header: two zero bytes, the type, the number of dimensions, each dimension as a big-endian uint32."""
    head = stream.read(4 + 4 * dims)
    if len(head) != 4 + 4 * dims or head[:4] != bytes([0, 0, UINT8, dims]):
        raise DataError(f"{file} is no IDX file of bytes in {dims} dimension{'s' * (dims > 1)}: download it again")
    shape = tuple(int(value) for value in np.frombuffer(head, dtype=">u4", offset=4))
    if not 0 < math.prod(shape) <= MAX_BYTES:
        raise DataError(f"{file} promises {math.prod(shape)} bytes; between 1 and {MAX_BYTES} are read: check the file")
    return shape


def _classes(path: Path, count: int) -> tuple[str, ...]:
    file = path / "classes.txt"
    if not file.is_file():
        return tuple(str(label) for label in range(count))
    try:
        names = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8: save it as UTF-8, one class name a line") from error
    names = [name.strip() for name in names if name.strip()]
    if len(names) < count or len(set(names)) < len(names):
        raise DataError(f"{file} must name {count} classes, each once, one a line; it names {len(set(names))}")
    return tuple(names)
