"""Where data is kept once it is decoded: the cache folder, and files without a name for arrays."""

from __future__ import annotations

import errno
import io
import math
import os
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from flyweight.errors import FlyweightError

# Bytes of one array; what is larger goes to a file. So the memory of a job does not grow with its data.
IN_MEMORY = 16_000_000


def cache_folder() -> Path:
    """FLYWEIGHT_CACHE, else flyweight/ in XDG_CACHE_HOME, else ~/.cache/flyweight."""
    if own := os.environ.get("FLYWEIGHT_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "flyweight"


class Rows:
    """uint8 [N, …] appended part after part: kept in memory or, where it is large, in a file that is then mapped.

    The file stands in the cache folder without a name and is gone with the process. Raises FlyweightError where that
    folder cannot be written or its disk is full.
    """

    def __init__(self, shape: Sequence[int], folder: Path | None = None) -> None:
        self.shape, self.folder = tuple(shape), folder or cache_folder()
        self.file: io.BytesIO | io.BufferedRandom = io.BytesIO()
        if math.prod(shape) > IN_MEMORY:
            with _told(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                self.file = _nameless(self.folder)

    def append(self, part: NDArray[np.uint8] | bytes) -> None:
        """Adds some rows, or some of their bytes."""
        with _told(self.folder):
            self.file.write(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)

    def array(self) -> NDArray[np.uint8]:
        """All that was appended; nothing can be appended any more."""
        if isinstance(self.file, io.BytesIO):
            return np.frombuffer(self.file.getbuffer(), np.uint8).reshape(self.shape)
        with _told(self.folder), self.file:
            self.file.flush()
            return np.asarray(np.memmap(self.file, np.uint8, "r", shape=self.shape))


def _nameless(folder: Path) -> io.BufferedRandom:
    return cast(io.BufferedRandom, tempfile.TemporaryFile(dir=folder))


@contextmanager
def _told(folder: Path) -> Generator[None, None, None]:
    try:
        yield
    except OSError as error:
        raise cannot_write(folder, error) from error


def cannot_write(folder: Path, error: OSError) -> FlyweightError:
    """One sentence for what kept the cache from being written."""
    advice = "set FLYWEIGHT_CACHE to a folder"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return FlyweightError(f"the disk of {folder} is full ({error.strerror}): free some, or {advice} elsewhere")
    return FlyweightError(f"the cache folder {folder} cannot be written ({error.strerror}): {advice} that can")
