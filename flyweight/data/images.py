"""From a picture to the pixels that a network sees: the one preprocessing of training, evaluation and prediction."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from flyweight.errors import DataError, UsageError

MAX_MEGAPIXELS = 64
# Plain raster formats only: others that Pillow knows start an interpreter (EPS) or have no size of their own (WMF).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MODES = {1: "L", 3: "RGB"}

ImageSource = Path | str | bytes | Image.Image | NDArray[np.uint8]


def to_pixels(source: ImageSource, size: tuple[int, int], channels: int) -> NDArray[np.uint8]:
    """The uint8 [H, W, C] pixels of a picture for a network whose input is `size` = (H, W); C is 1 (grey) or 3 (RGB).

    Raises DataError, naming the file, for what cannot be read, and UsageError for a file that does not exist.
    """
    return resize(read_image(source, channels), size)


def resize(image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """uint8 [H, W, C]: Pillow's antialiased bilinear filter straight to `size` = (H, W), without a crop."""
    height, width = size
    pixels = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
    return pixels.reshape(height, width, -1)


def read_image(source: ImageSource, channels: int) -> Image.Image:
    """The picture, upright by its EXIF tag, as RGB (`channels` 3) or grey (1); errors as for `to_pixels`.

    An array must be uint8 of shape [H, W] or [H, W, C] with C = 1 (grey), 3 (RGB) or 4 (RGBA).
    """
    if isinstance(source, np.ndarray):
        return _from_array(source).convert(MODES[channels])
    name = _check_file(source)
    try:
        with _pillow_is_quiet, _opened(source) as image:
            fault = _fault(image)
            if not fault:
                return _upright(image, MODES[channels], own=isinstance(source, Image.Image))
    except UnidentifiedImageError:
        fault = f"is damaged, or no image of a known format ({', '.join(FORMATS)}): replace or remove it"
    except Image.DecompressionBombError:
        fault = f"has more than {MAX_MEGAPIXELS} megapixels: make it smaller"
    except MemoryError:
        raise
    except Exception as error:
        # Damaged bytes make Pillow's decoders raise nearly anything: SyntaxError, struct.error, zlib.error, EOFError …
        fault = f"cannot be decoded ({_reason(error)}): replace or remove it"
    raise DataError(f"{name} {fault}")


def _upright(image: Image.Image, mode: str, own: bool) -> Image.Image:
    """The picture turned by its EXIF tag, in `mode`; copied only where that changes it or it is the caller's `own`."""
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    return image if image.mode == mode and not own else image.convert(mode)


def header(path: Path) -> tuple[str, tuple[int, int]] | None:
    """Pillow's mode and (height, width) as stored, read without decoding; None for what is no readable image."""
    try:
        _check_file(path)
        with _pillow_is_quiet, _opened(path) as image:
            return image.mode, (image.height, image.width)
    except Exception:  # the same file gives its reason when it is decoded
        return None


def printable(path: Path | str) -> str:
    """The path as text that any encoding can write: bytes that are no UTF-8 become escapes."""
    return str(path).encode("utf-8", "backslashreplace").decode("utf-8")


def _from_array(pixels: NDArray[np.uint8]) -> Image.Image:
    shape = pixels.shape
    fits = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))
    if pixels.dtype != np.uint8 or not fits or pixels.size == 0:
        raise DataError(f"an image array must be uint8 [H, W] or [H, W, 1, 3 or 4], not {pixels.dtype} {list(shape)}")
    return Image.fromarray(pixels[..., 0] if len(shape) == 3 and shape[2] == 1 else pixels)


def _check_file(source: Path | str | bytes | Image.Image) -> str:
    """The name to use in messages, after the checks that need no decoding."""
    if isinstance(source, Image.Image):
        return "the image"
    if isinstance(source, bytes):
        if not source:
            raise DataError("the image is empty: no bytes were given")
        return "the image"
    path, name = Path(source), printable(source)
    if not path.exists():
        raise UsageError(f"{name} does not exist: check the path")
    if not path.is_file():  # opening a pipe would wait for ever
        raise DataError(f"{name} is no regular file: replace or remove it")
    if path.stat().st_size == 0:
        raise DataError(f"{name} is empty: replace or remove it")
    return name


@contextmanager
def _opened(source: Path | str | bytes | Image.Image) -> Generator[Image.Image, None, None]:
    """The picture with its header read and its pixels not yet decoded."""
    if isinstance(source, Image.Image):
        yield source
        return
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]  # a Pillow may be built without AVIF, say
    with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        yield Image.open(file, formats=known)


def _fault(image: Image.Image) -> str:
    """Why the picture is refused by its header alone, or nothing."""
    if image.width * image.height > MAX_MEGAPIXELS * 1_000_000:
        megapixels = image.width * image.height // 1_000_000
        return f"has {megapixels} megapixels, more than the {MAX_MEGAPIXELS} that are read: make it smaller"
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        # convert("L") would clip such values at 255 instead of scaling them.
        return f"has 16-bit or floating-point pixels (mode {image.mode}): convert it to 8 bits"
    return ""


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()).rstrip(".") or type(error).__name__


class _Quiet:
    """Keeps Pillow's warnings off the terminal while any thread is inside: what matters of them becomes an error here.

    Warning filters belong to the process, so the first thread in sets them and the last one out puts them back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._filters.__exit__(None, None, None)


_pillow_is_quiet = _Quiet()
