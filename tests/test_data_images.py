"""One preprocessing: any picture, upright, RGB or grey, straight to the size; one sentence for what cannot be read."""

import io
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from flyweight.data.images import header, read_image, resize, to_pixels
from flyweight.errors import DataError, UsageError


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(pixels: NDArray[np.uint8], form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def test_native_size_keeps_the_bytes(tmp_path: Path) -> None:
    pixels = noise(17, 23)
    (tmp_path / "a.png").write_bytes(encoded(pixels))
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), encoded(pixels), Image.fromarray(pixels), pixels):
        assert np.array_equal(to_pixels(source, (17, 23), 3), pixels)


def test_resizing_is_antialiased_without_a_crop() -> None:
    stripes = np.zeros((8, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = to_pixels(stripes, (4, 8), 3)
    assert small.shape == (4, 8, 3)
    assert abs(small.astype(int) - 128).max() < 24, "aliasing would give 0 or 255"
    edge = np.zeros((10, 40, 1), np.uint8)
    edge[:, :10] = 255
    row = to_pixels(edge, (4, 4), 1)[0, :, 0]
    assert row[0] > 200 > 50 > row[2], "a centre crop would lose the light edge"


def test_every_mode_and_format_is_read(tmp_path: Path) -> None:
    picture = Image.fromarray(np.kron(noise(3, 4), np.ones((8, 8, 1), np.uint8)))
    saved = {"a.jpg": "RGB", "b.png": "RGBA", "c.webp": "RGB", "d.gif": "P", "e.bmp": "RGB", "f.png": "P",
             "g.png": "L", "h.png": "1", "i.jpg": "CMYK", "j.tif": "RGB", "k.ppm": "RGB", "l.png": "LA"}  # fmt: skip
    for name, mode in saved.items():
        picture.convert(mode).save(tmp_path / name)
        assert to_pixels(tmp_path / name, (12, 16), 3).shape == (12, 16, 3)
        assert to_pixels(tmp_path / name, (12, 16), 1).shape == (12, 16, 1)
        assert header(tmp_path / name) is not None
    expected = np.asarray(picture.resize((16, 12), Image.Resampling.BILINEAR)).astype(int)
    for name in ("b.png", "e.bmp", "j.tif", "k.ppm"):
        assert np.array_equal(to_pixels(tmp_path / name, (12, 16), 3), expected)
    assert abs(to_pixels(tmp_path / "a.jpg", (12, 16), 3) - expected).mean() < 20


def test_content_counts_and_not_the_suffix(tmp_path: Path) -> None:
    (tmp_path / "picture.txt").write_bytes(encoded(noise(5, 5)))
    assert np.array_equal(to_pixels(tmp_path / "picture.txt", (5, 5), 3), noise(5, 5))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:4, :8] = 255  # a light corner, top left
    turns = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
             5: lambda a: a.swapaxes(0, 1), 6: np.rot90, 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
             8: lambda a: np.rot90(a, 3)}  # fmt: skip
    stored = Image.fromarray(np.ascontiguousarray(turns[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(to_pixels(tmp_path / "turned.png", (8, 16), 3), upright)


def test_alpha_and_transparent_palettes_change_no_colour() -> None:
    indexed = Image.fromarray(noise(9, 9)).convert("P")
    buffer = io.BytesIO()
    indexed.save(buffer, "PNG", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(to_pixels(buffer.getvalue(), (9, 9), 3), np.asarray(indexed.convert("RGB")))


def faulty() -> dict[str, tuple[bytes, str]]:
    """Files that must be refused, each with a word of its reason."""
    jpeg, png = encoded(noise(64, 64), "JPEG"), encoded(noise(64, 64))
    deep = io.BytesIO()
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(deep, "PNG")
    floats = io.BytesIO()
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(floats, "TIFF")
    return {
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "truncated.png": (png[: len(png) // 2], "decoded"),
        "header.jpg": (jpeg[:20], "damaged"),
        "empty.jpg": (b"", "empty"),
        "text.jpg": (b"just some words, not a picture at all", "no image"),
        "bomb.png": (png_header(30_000, 30_000), "megapixels"),
        "large.png": (png_header(10_000, 10_000), "100 megapixels"),
        "above.png": (png_header(8_001, 8_001), "megapixels"),
        "deep.png": (deep.getvalue(), "16-bit"),
        "floats.tif": (floats.getvalue(), "floating-point"),
        "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "no image"),
    }


@pytest.mark.parametrize("name", faulty())
def test_a_bad_file_gives_one_sentence_with_its_name(tmp_path: Path, name: str) -> None:
    content, word = faulty()[name]
    (tmp_path / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning on the terminal would be a second sentence
        with pytest.raises(DataError, match=word) as caught:
            read_image(tmp_path / name, 3)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / name))
    assert "\n" not in message
    assert ": " in message
    with pytest.raises(DataError):
        read_image(content, 3)


def test_the_limit_is_on_pixels_and_lets_smaller_images_pass() -> None:
    with pytest.raises(DataError, match="decoded"):  # its header is fine, its data are not there
        read_image(png_header(8_000, 8_000), 3)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"missing\.png does not exist"):
        read_image(tmp_path / "missing.png", 3)
    with pytest.raises(DataError, match="no regular file"):
        read_image(tmp_path, 3)


@pytest.mark.parametrize("shape", [(4, 4, 2), (4,), (0, 4, 3)])
def test_arrays_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="uint8"):
        read_image(np.zeros(shape, np.uint8), 3)


def test_float_arrays_are_refused() -> None:
    with pytest.raises(DataError, match="not float64"):
        read_image(np.zeros((4, 4, 3)), 3)  # pyright: ignore[reportArgumentType]


def test_warning_filters_are_as_before_after_many_threads() -> None:
    before = list(warnings.filters)
    content = encoded(noise(40, 40), "JPEG")
    threads = [threading.Thread(target=lambda: [read_image(content, 3) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


def test_resize_takes_height_before_width() -> None:
    assert resize(Image.new("L", (50, 20)), (3, 7)).shape == (3, 7, 1)
