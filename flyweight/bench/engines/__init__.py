"""The runtimes that can be measured, one file each: the directory is the registry. Nothing here needs torch.

A runtime's file says `NAME`; `TARGET`, whose files it runs; `OPENS`, a suffix of a file → the suffixes of the files
that belong to it; `NEEDS`, the modules that must be there; `EXTRA`, what of flyweight to install for them; and
`start(exported, threads)`, which gives a function from uint8 [N, H, W, C] to probabilities float32 [N, classes]. Where
modules are not all that is needed, it says `lack()` too: what is missing here, or None; where a file itself says what
preprocess.json would, `stated(data)`; where it computes float layers in fewer bits than float32, `PRECISION`.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from flyweight.errors import UsageError
from flyweight.exported import FLOAT, Exported, read

Run = Callable[[np.ndarray], np.ndarray]


class Part(Protocol):
    """What a runtime and an export target both say of themselves."""

    NAME: str
    NEEDS: tuple[str, ...]
    EXTRA: str


class Engine(Part, Protocol):
    """A runtime."""

    TARGET: str
    OPENS: Mapping[str, tuple[str, ...]]

    @staticmethod
    def start(exported: Exported, threads: int) -> Run:
        """A function from uint8 [N, H, W, C] to probabilities float32 [N, classes], on `threads` cores."""
        ...


@cache
def engines() -> dict[str, Engine]:
    """All runtimes that are known, installed or not, by name."""
    files = [importlib.import_module(f"{__name__}.{each.name}") for each in pkgutil.iter_modules(__path__)]
    return {each.NAME: each for each in cast("list[Engine]", files)}


def missing(needs: tuple[str, ...], extra: str) -> str | None:
    """Which module is not installed and how to install it, or None where all are."""
    absent = next((name for name in needs if importlib.util.find_spec(name.partition(".")[0]) is None), None)
    return None if absent is None else f"{absent} is not installed: pip install 'flyweight[{extra}]'"


def lacking(part: Part) -> str | None:
    """What a runtime or an export target needs and does not find here, with the remedy; None where it can be used."""
    own: Callable[[], str | None] = getattr(part, "lack", lambda: None)
    return missing(part.NEEDS, part.EXTRA) or own()


def installed() -> dict[str, Engine]:
    """The runtimes that can be used here, by name."""
    return {name: each for name, each in engines().items() if lacking(each) is None}


def engine(name: str) -> Engine:
    """The runtime of a name. Raises UsageError where there is none such, or it is not installed."""
    if name not in engines():
        raise UsageError(f"there is no engine {name!r}; there are {', '.join(engines())}")
    found = engines()[name]
    if lack := lacking(found):
        raise UsageError(f"the engine {name} cannot be used: {lack}")
    return found


def precision(name: str, format: str = FLOAT) -> str:
    """What a runtime computes the layers of a file in: "float32", "bfloat16", or as the file's format says."""
    return getattr(engines()[name], "PRECISION", FLOAT) if format == FLOAT else format


def opening(path: Path) -> dict[str, Engine]:
    """The runtimes that open a file, installed or not. Raises UsageError where none does."""
    found = {name: each for name, each in engines().items() if path.suffix in each.OPENS}
    if not found:
        known = sorted({suffix for each in engines().values() for suffix in each.OPENS})
        raise UsageError(f"{path} is of no kind that an engine opens: these end in {', '.join(known)}")
    return found


def read_export(path: Path) -> Exported:
    """The export whose first file is at `path`, with the files that belong to it. Raises UsageError."""
    opener = next(iter(opening(path).values()))
    return read(path, opener.OPENS[path.suffix], getattr(opener, "stated", None))
