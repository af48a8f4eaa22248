"""A folder of class folders, or one with train/ and val/ or test/ that hold class folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import numpy as np

from flyweight.data.images import header, printable
from flyweight.data.source import Source
from flyweight.errors import DataError

SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
IGNORED = {"thumbs.db", "desktop.ini", "__macosx"}  # what file managers leave behind; hidden files are ignored as well


def open(path: Path) -> Source:
    """Every file below a class folder, in the order of its path; whether it is an image shows when it is decoded."""
    if not path.is_dir():
        raise DataError(f"{path} is a file, no folder of class folders: name its format if it has one (cifar10:PATH)")
    try:
        return _open(path)
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror}") from error


def _open(root: Path) -> Source:
    parts, notes = _split_folders(root)
    class_folders = {split: _folders(folder) for split, folder in parts.items()}
    if not any(class_folders.values()):
        raise DataError(f"{root} holds no class folders: put the images of each class into a folder of its own")
    for folder in {root, *parts.values()}:
        notes += _outside_classes(folder)
    classes = sorted({folder.name for folders in class_folders.values() for folder in folders})
    found = [
        (file, classes.index(folder.name), split)
        for split, folders in class_folders.items()
        for folder in folders
        for file in _files(folder)
    ]
    files = [file for file, _, _ in found]
    headers = [known for file in files if (known := header(file))]
    height, width = np.median([size for _, size in headers], axis=0) if headers else (0, 0)
    return Source(
        root=root,
        name=root.resolve().name,
        images=files,
        labels=np.array([label for _, label, _ in found], dtype=np.int64),
        classes=tuple(printable(name) for name in classes),
        splits=np.array([split for _, _, split in found], dtype="<U10"),
        names=[printable(file.relative_to(root).as_posix()) for file in files],
        channels=1 if headers and all(mode in ("L", "1") for mode, _ in headers) else 3,
        size=(round(height), round(width)),
        notes=tuple(notes),
    )


def _split_folders(root: Path) -> tuple[dict[str, Path], list[str]]:
    """The folders that hold class folders, by split ("" if the data names none), and notes on folders passed over."""
    folders = _folders(root)
    named = [folder for folder in folders if folder.name.lower() in SPLIT_FOLDERS]
    parts = {SPLIT_FOLDERS[folder.name.lower()]: folder for folder in named}
    others = [folder for folder in folders if folder not in named]
    # "train" beside "bus" and "car" is a class; beside "test", or alone, it is a split.
    if not named or ("train" in parts and len(named) == 1 and others) or ("train" not in parts and others):
        return {"": root}, []
    if "train" not in parts:
        raise DataError(f"{root} has {named[0].name}/ but no train/: add the training images")
    if len(parts) < len(named):
        raise DataError(f"{root} has two folders for one split ({', '.join(f.name for f in named)}): keep one of them")
    return parts, [f"{folder.name}/ is no train/, val/ or test/ and was not read" for folder in others]


def _outside_classes(folder: Path) -> list[str]:
    """Notes on files beside the class folders; an image there has no label, which is an error."""
    loose = [file for file in _visible(folder) if not file.is_dir()]
    images = [file for file in loose if header(file)]
    if images:
        more = f" (and {len(images) - 1} more)" if len(images) > 1 else ""
        raise DataError(f"{printable(images[0])}{more} lies in no class folder: move it into one, or elsewhere")
    return [f"{printable(file.name)} lies in no class folder and was not read" for file in loose]


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not _ignored(entry.name))


def _folders(folder: Path) -> list[Path]:
    return [entry for entry in _visible(folder) if entry.is_dir()]


def _ignored(name: str) -> bool:
    return name.startswith(".") or name.lower() in IGNORED


def _files(folder: Path) -> list[Path]:
    """All files below the folder. A link to another folder counts as a file, so that it is refused and not lost."""
    found: list[Path] = []
    for top, folders, files in os.walk(folder, onerror=_raise):
        links = [name for name in folders if os.path.islink(os.path.join(top, name))]
        folders[:] = [name for name in folders if not _ignored(name)]
        found += [Path(top, name) for name in files + links if not _ignored(name)]
    return sorted(found)


def _raise(error: OSError) -> NoReturn:
    raise error
