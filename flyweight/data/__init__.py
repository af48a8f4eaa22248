"""Labelled images: `open_source` finds them, `prepare` decodes, audits and splits them."""

from __future__ import annotations

import importlib
import os
import pkgutil
from pathlib import Path

from flyweight.data import formats
from flyweight.data.dataset import Dataset, Refused, Splits, prepare
from flyweight.data.images import read_image, to_pixels
from flyweight.data.source import Source
from flyweight.errors import UsageError

__all__ = [
    "Dataset",
    "Refused",
    "Source",
    "Splits",
    "absolute",
    "format_names",
    "open_source",
    "prepare",
    "read_image",
    "to_pixels",
]

DEMO = Path(__file__).parents[1] / "demo"


def format_names() -> list[str]:
    """The known data formats: each is a module in formats/."""
    return sorted(module.name for module in pkgutil.iter_modules(formats.__path__))


def absolute(source: str | Path) -> str:
    """The same data by an absolute path, so that it is found again from another working folder."""
    name, colon, path = str(source).partition(":")
    if source == "demo" or not str(source):
        return str(source)
    if colon and path and name in format_names() and not Path(source).exists():
        return f"{name}:{Path(path).expanduser().absolute()}"
    return str(source) if colon and len(name) > 1 and not Path(source).exists() else str(Path(source).absolute())


def open_source(source: str | Path) -> Source:
    """The data at "format:path", at a path (a folder of labelled images), or of the word "demo", which comes along.

    Raises UsageError for an unknown format or a path that does not exist, DataError for data that is refused.
    """
    if source == "":
        raise UsageError("the data has no name: give a folder, FORMAT:PATH or demo")
    if source == "demo":
        return _open("idx", DEMO)
    name, colon, path = str(source).partition(":")
    # A single letter before a colon is a drive of Windows.
    if isinstance(source, Path) or not colon or len(name) == 1 or Path(source).exists():
        return _open("folder", Path(source))
    if name not in format_names():
        raise UsageError(f"{source}: the format {name!r} is unknown; known are {', '.join(format_names())}")
    if not path:
        raise UsageError(f"{source} lacks a path: give {name}:PATH")
    return _open(name, Path(os.path.expanduser(path)))  # shells expand a ~ only at the start of a word


def _open(format_name: str, path: Path) -> Source:
    if not path.exists():
        raise UsageError(f"{path} does not exist: check the path")
    return importlib.import_module(f"{formats.__name__}.{format_name}").open(path)
