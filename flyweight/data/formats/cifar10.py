"""CIFAR-10 in the official python version: its archive, or the folder unpacked from it."""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Collection
from lzma import LZMAError
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from flyweight.data.cache import Rows
from flyweight.data.source import Source
from flyweight.errors import DataError

FOLDER = "cifar-10-batches-py"
META = "batches.meta"
BATCHES = {
    "train": ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"),
    "test": ("test_batch",),
}
MAX_BYTES = 64_000_000  # an official batch has 31 million
# All that pickled arrays of numbers name, by any version of numpy and any protocol (from the third on, bytes need no
# encode); with nothing else admitted, a pickle can run no code.
ADMITTED = {
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


def open(path: Path) -> Source:
    """50,000 training and 10,000 test images of 32 x 32 in 10 classes."""
    files = _from_folder(path) if path.is_dir() else _from_archive(path)
    classes = _classes(path, _unpickle(path, META, files[META]))
    batches = {name: _unpickle(path, name, files[name]) for names in BATCHES.values() for name in names}
    images = {name: _images(path, name, batch) for name, batch in batches.items()}
    labels = {name: _labels(path, name, batch, len(images[name])) for name, batch in batches.items()}
    for name, values in labels.items():
        if values.min() < 0 or values.max() >= len(classes):
            raise _damaged(path, name, f"it has a label outside 0 to {len(classes) - 1}")
    counts = {split: sum(len(images[name]) for name in names) for split, names in BATCHES.items()}
    return Source(
        root=path,
        name="cifar10",
        images=_joined(images.values()),
        labels=np.concatenate(list(labels.values())),
        classes=classes,
        splits=np.repeat(list(counts), list(counts.values())),
        names=[f"{split}/{index}" for split, count in counts.items() for index in range(count)],
        channels=3,
        size=(32, 32),
        licence="no licence is stated; cite A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
    )


def _joined(parts: Collection[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    rows = Rows((sum(map(len, parts)), 32, 32, 3))
    for part in parts:
        rows.append(part)
    return rows.array()


def _from_folder(path: Path) -> dict[str, bytes]:
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    files: dict[str, bytes] = {}
    for name in _wanted():
        file = folder / name
        if not file.is_file():
            raise DataError(f"{folder} lacks {name}: unpack the official python archive of CIFAR-10 again")
        if file.stat().st_size > MAX_BYTES:
            raise _damaged(folder, name, "it is too large")
        files[name] = file.read_bytes()
    return files


def _from_archive(path: Path) -> dict[str, bytes]:
    wanted = {f"{FOLDER}/{name}": name for name in _wanted()}
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = wanted.get(member.name.removeprefix("./"))
                if name is None or not member.isreg():
                    continue
                if member.size > MAX_BYTES:
                    raise _damaged(path, name, "it is too large")
                content = archive.extractfile(member)
                files[name] = content.read() if content else b""
    except (tarfile.TarError, OSError, EOFError, zlib.error, LZMAError) as error:
        raise DataError(f"{path} cannot be read ({error}): download cifar-10-python.tar.gz again") from error
    for name in wanted.values():
        if name not in files:
            raise DataError(f"{path} lacks {FOLDER}/{name}: it is not the official python archive of CIFAR-10")
    return files


def _wanted() -> list[str]:
    return [META, *BATCHES["train"], *BATCHES["test"]]


class _Unpickler(pickle.Unpickler):
    """Reads arrays, containers, numbers and strings, and admits nothing else."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")
        return super().find_class(module_name, global_name)


def _unpickle(path: Path, name: str, content: bytes) -> dict[bytes, Any]:
    try:
        value = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise _damaged(path, name, str(error) or type(error).__name__) from error
    if not isinstance(value, dict):
        raise _damaged(path, name, "it holds no dictionary")
    return cast("dict[bytes, Any]", value)


def _classes(path: Path, meta: dict[bytes, Any]) -> tuple[str, ...]:
    names: list[bytes] = meta.get(b"label_names", [])
    if not _is_list_of(names, bytes) or not names:
        raise _damaged(path, META, "it lists no label names")
    return tuple(name.decode("utf-8", "replace") for name in names)


def _images(path: Path, name: str, batch: dict[bytes, Any]) -> NDArray[np.uint8]:
    """uint8 [n, 32, 32, 3] from rows of 1024 red, 1024 green and 1024 blue values."""
    data: NDArray[np.uint8] = np.asarray(batch.get(b"data"))
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072 or not len(data):
        raise _damaged(path, name, "its data is no uint8 array [n, 3072]")
    return np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _labels(path: Path, name: str, batch: dict[bytes, Any], count: int) -> NDArray[np.int64]:
    values: list[int] = batch.get(b"labels", [])
    if not _is_list_of(values, int) or len(values) != count:
        raise _damaged(path, name, f"its labels are no list of {count} integers")
    return np.array(values, dtype=np.int64)


def _is_list_of(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in cast("list[Any]", values))


def _damaged(path: Path, name: str, why: str) -> DataError:
    return DataError(f"{path}: {name} is not the official one ({why}): download the python version of CIFAR-10 again")
