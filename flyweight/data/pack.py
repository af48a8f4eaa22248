"""Decode once: every image of a source at every size that is asked for, in memory or as memory-mapped files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from flyweight.data.audit import THUMB
from flyweight.data.cache import Rows, cache_folder, cannot_write
from flyweight.data.images import read_image, resize
from flyweight.data.source import Source
from flyweight.errors import FlyweightError

VERSION = 1  # of the files below; part of their fingerprint
BLOCK = 64  # images a task
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Pack:
    """The pixels of N images: `pixels[s]` is uint8 [N, s, s, C], `thumbs` grey uint8 [N, 16, 16] for finding repeats.

    `damaged` gives the fault of each image that could not be read, by its index; its pixels are zero.
    """

    pixels: Mapping[int, NDArray[np.uint8]]
    thumbs: NDArray[np.uint8]
    damaged: Mapping[int, str]


def pack(source: Source, sizes: Sequence[int], cache: Path | None, progress: Progress) -> Pack:
    """Files go to the cache folder, and are decoded again only if they have changed; arrays stay as they are.

    Raises FlyweightError if the cache folder cannot be written or its disk is full.
    """
    if isinstance(source.images, np.ndarray):
        return _of_array(source, source.images, sizes, cache, progress)
    folder = cache or cache_folder()
    place = folder / "packs" / f"{source.name[:40]}-{_fingerprint(source.images, sizes, source.channels)}"
    found = _read(place, sizes)
    if found:
        progress(len(source), len(source))
        return found
    try:
        _write(source, sizes, place, progress)
    except OSError as error:
        raise cannot_write(folder, error) from error
    written = _read(place, sizes)
    if not written:
        raise FlyweightError(f"the pack {place} cannot be read back: remove it and start again")
    return written


def _of_array(
    source: Source, images: NDArray[np.uint8], sizes: Sequence[int], cache: Path | None, progress: Progress
) -> Pack:
    count, height, width, channels = images.shape
    native = height if height == width else 0
    rows = {size: Rows((count, size, size, channels), cache) for size in sizes if size != native}
    thumbs = Rows((count, THUMB, THUMB), cache)
    done = 0
    with closing(_blocks(images, list(rows), source.channels)) as blocks:
        for block in blocks:
            thumbs.append(block.thumbs)
            for size, values in block.pixels.items():
                rows[size].append(values)
            done += len(block.thumbs)
            progress(done, count)
    pixels = {size: each.array() for size, each in rows.items()}
    if native in sizes:
        pixels[native] = images
    return Pack(pixels, thumbs.array(), {})


def _blocks(images: NDArray[np.uint8] | list[Path], sizes: Sequence[int], channels: int) -> Generator[Pack, None, None]:
    """The images decoded in order, a block at a time, by as many threads as there are cores (Pillow frees the GIL)."""
    executor = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        starts = range(0, len(images), BLOCK)
        parts = (images[start : start + BLOCK] for start in starts)
        yield from executor.map(_block, parts, starts, repeat(sizes), repeat(channels))
    finally:
        executor.shutdown(cancel_futures=True)


def _block(images: NDArray[np.uint8] | list[Path], start: int, sizes: Sequence[int], channels: int) -> Pack:
    pixels = {size: np.zeros((len(images), size, size, channels), np.uint8) for size in sizes}
    thumbs = np.zeros((len(images), THUMB, THUMB), np.uint8)
    damaged: dict[int, str] = {}
    for index, item in enumerate(images):
        try:
            image = read_image(item, channels)
        except FlyweightError as error:
            damaged[start + index] = str(error)
            continue
        for size in sizes:
            pixels[size][index] = resize(image, (size, size))
        thumbs[index] = _thumb(image)
    return Pack(pixels, thumbs, damaged)


def _thumb(image: Image.Image) -> NDArray[np.uint8]:
    return resize(image.convert("L"), (THUMB, THUMB))[..., 0]


def _fingerprint(files: list[Path], sizes: Sequence[int], channels: int) -> str:
    """Of all that the pixels depend on: the files by place, size and time of change, and how they are decoded."""
    digest = hashlib.sha256(repr((VERSION, PIL.__version__, sorted(sizes), channels)).encode())
    for file in files:
        try:
            status = file.stat()
            state = (status.st_size, status.st_mtime_ns)
        except OSError:  # a link to nowhere, which is reported as damaged
            state = ()
        digest.update(repr((os.path.abspath(file), state)).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _write(source: Source, sizes: Sequence[int], place: Path, progress: Progress) -> None:
    """Writes the pack beside its place and moves it there whole, so that a pack is complete wherever there is one."""
    place.parent.mkdir(parents=True, exist_ok=True)
    shapes: dict[str, tuple[int, ...]] = {"thumbs": (len(source), THUMB, THUMB)}
    shapes |= {str(size): (len(source), size, size, source.channels) for size in sizes}
    needed = sum(int(np.prod(shape)) for shape in shapes.values())
    if shutil.disk_usage(place.parent).free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:.0f} MB are needed")
    temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        damaged = _write_arrays(source, shapes, temporary, progress)
        (temporary / "damaged.json").write_text(json.dumps(damaged), encoding="utf-8")
        try:
            temporary.rename(place)
        except OSError:
            if not place.is_dir():  # otherwise another job was faster, and its pack is as good
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_arrays(
    source: Source, shapes: Mapping[str, tuple[int, ...]], folder: Path, progress: Progress
) -> dict[int, str]:
    """Appends block after block to .npy files; gives what was damaged.

    Plain writes, not a writable memory map: on a full disk they raise an error where the map would kill the process.
    """
    damaged: dict[int, str] = {}
    sizes = [int(name) for name in shapes if name != "thumbs"]
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.npy").open("wb")) for name in shapes}
        for name, shape in shapes.items():
            array_header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(files[name], array_header)
        done = 0
        blocks = stack.enter_context(closing(_blocks(source.images, sizes, source.channels)))
        for block in blocks:
            for size, values in block.pixels.items():
                files[str(size)].write(values.data)
            files["thumbs"].write(block.thumbs.data)
            damaged.update(block.damaged)
            done += len(block.thumbs)
            progress(done, len(source))
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    return damaged


def _read(place: Path, sizes: Sequence[int]) -> Pack | None:
    """The pack at its place, memory-mapped; None if there is none, or if a crash of the machine has left it broken."""
    if not place.is_dir():
        return None
    try:
        arrays = {name: _mapped(place / f"{name}.npy") for name in [*map(str, sizes), "thumbs"]}
        damaged = json.loads((place / "damaged.json").read_text(encoding="utf-8"))
        pixels = {size: arrays[str(size)] for size in sizes}
        return Pack(pixels, arrays["thumbs"], {int(index): fault for index, fault in damaged.items()})
    except (OSError, ValueError, EOFError):
        shutil.rmtree(place, ignore_errors=True)
        return None


def _mapped(file: Path) -> NDArray[np.uint8]:
    return np.asarray(np.load(file, mmap_mode="r"))
