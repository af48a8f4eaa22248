"""A classifier as the files that a runtime opens: what export targets make and engines load. Needs no torch."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flyweight.errors import FlyweightError, UsageError
from flyweight.preprocess import Preprocess

FLOAT = "float32"
CONTRACT = "preprocess.json"
INT8_MARK = "_int8"


@dataclass(frozen=True)
class Exported:
    """`files` by their names, the one that is opened first; `format` is float32 or the int8 scheme.

    Whatever the target: uint8 pictures of `preprocess.size` in, one probability for each of `classes` out.
    """

    target: str
    format: str
    files: Mapping[str, bytes]
    preprocess: Preprocess
    classes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the file that is opened."""
        return next(iter(self.files))

    @property
    def data(self) -> bytes:
        """What that file holds."""
        return self.files[self.name]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(map(len, self.files.values()))

    def contract(self) -> bytes:
        """preprocess.json: what must be done to a picture before the file takes it, and what its answers mean."""
        height, width = self.preprocess.size
        told = {
            "classes": list(self.classes),
            "preprocess": self.preprocess.to_json(),
            "before": [
                "turn upright by the EXIF tag",
                "RGB" if self.preprocess.channels == 3 else "grey",
                f"resize to {height} x {width} by Pillow's bilinear filter, without a crop",
            ],
            "inside": "(pixel - mean) / std, the network, softmax: give it pixels from 0 to 255",
        }
        return (json.dumps(told, indent=2, ensure_ascii=False) + "\n").encode()

    def written(self, folder: Path) -> Path:
        """Writes the files and preprocess.json into a folder, made where it is missing; the file to open."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in {**self.files, CONTRACT: self.contract()}.items():
            (folder / name).write_bytes(data)
        return folder / self.name


def stem(format: str) -> str:
    """What an export's files are called, without their suffix."""
    return "model" if format == FLOAT else f"model{INT8_MARK}"


Stated = tuple[Preprocess, tuple[str, ...]]


def read(path: Path, beside: tuple[str, ...] = (), stated: Callable[[bytes], Stated] | None = None) -> Exported:
    """The export whose first file is at `path`; `beside` are the suffixes of the files that belong to it.

    Where no preprocess.json lies there, `stated` finds what it would say in the file itself. Raises UsageError where a
    file is missing, FlyweightError where preprocess.json is damaged.
    """
    files: dict[str, bytes] = {}
    for part in (path, *(path.with_suffix(suffix) for suffix in beside)):
        if not part.is_file():
            raise UsageError(f"{part} does not exist: check the path")
        files[part.name] = part.read_bytes()
    if stated is not None and not path.with_name(CONTRACT).exists():
        preprocess, classes = stated(files[path.name])
    else:
        preprocess, classes = _contract(path)
    format = "int8" if path.stem.endswith(INT8_MARK) else FLOAT
    return Exported(path.suffix.removeprefix("."), format, files, preprocess, classes)


def _contract(path: Path) -> Stated:
    beside = path.with_name(CONTRACT)
    if not beside.is_file():
        raise UsageError(f"{beside} does not exist: flyweight export writes it beside {path.name}")
    try:
        told = json.loads(beside.read_text(encoding="utf-8"))
        return Preprocess.from_json(told["preprocess"]), tuple(told["classes"])
    except (ValueError, KeyError, TypeError) as error:
        raise FlyweightError(f"{beside} is damaged ({error!r}): export again") from error
