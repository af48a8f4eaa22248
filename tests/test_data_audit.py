"""Repeats are found, mirrored ones too, and look-alikes are not; classes that cannot be trained are named."""

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from flyweight.data import open_source, prepare
from flyweight.data.audit import MAX_LEVELS, MAX_OF_CONTRAST, class_problems, imbalance, twins
from flyweight.data.images import resize

Thumbs = NDArray[np.uint8]


def scenes(n: int, seed: int = 0, contrast: float = 50) -> Thumbs:
    """Thumbnails with large structures, as photographs have: 4 x 4 noise made smooth."""
    coarse = np.random.default_rng(seed).normal(128, contrast, (n, 4, 4)).clip(0, 255).astype(np.uint8)
    return np.stack([resize(Image.fromarray(scene), (16, 16))[..., 0] for scene in coarse])


def brute_force(a: Thumbs, b: Thumbs) -> NDArray[np.int64]:
    """The definition, in float64, for a few images."""
    found = []
    for thumb in a.astype(float):
        both = np.stack([thumb, thumb[:, ::-1]])
        distances = np.sqrt(((both[:, None] - b[None]) ** 2).mean((2, 3))).min(0)
        limit = min(MAX_LEVELS, MAX_OF_CONTRAST * thumb.std())
        found.append(distances.argmin() if distances.min() <= limit else -1)
    return np.array(found)


def test_planted_repeats_are_found_by_the_definition() -> None:
    rng = np.random.default_rng(1)
    b = scenes(700)
    a = scenes(600, seed=2)
    chosen = rng.choice(700, 300, replace=False)
    noisy = b[chosen] + rng.normal(0, 1, (300, 16, 16)) * rng.uniform(0, 5, (300, 1, 1))
    a[::2] = noisy.clip(0, 255).astype(np.uint8)
    a[::4] = a[::4, :, ::-1]
    a[::6] = (a[::6] * 0.98).astype(np.uint8)  # darker by two levels
    found = twins(a, b)
    assert np.array_equal(found, brute_force(a, b))
    assert 60 < (found >= 0).sum() < 300, "some of the noise is over the limit, some is not"
    assert set(found[found >= 0].tolist()) <= set(chosen.tolist())


@pytest.mark.parametrize(("shift", "found"), [(2, 0), (-2, 0), (4, -1), (-4, -1)])
def test_a_little_lighter_or_darker_is_a_repeat(shift: int, found: int) -> None:
    thumb = scenes(1).clip(10, 245)
    assert twins(thumb, (thumb.astype(int) + shift).astype(np.uint8)).tolist() == [found]


def test_an_image_is_not_its_own_twin() -> None:
    a = scenes(300)
    assert (twins(a) == -1).all()
    assert (twins(a, a) == np.arange(300)).all()
    a[7] = a[200]
    a[8] = a[201][:, ::-1]
    a[9] = (a[9].astype(int) + a[9][:, ::-1]) // 2  # its own mirror image
    expected = np.full(300, -1)
    expected[[7, 200, 8, 201]] = [200, 7, 201, 8]
    assert np.array_equal(twins(a), expected)


def test_plain_images_repeat_nothing() -> None:
    black = np.zeros((5, 16, 16), np.uint8)
    faint = black + np.random.default_rng(0).integers(0, 3, black.shape, dtype=np.uint8)
    for plain in (black, black + 255, faint):
        assert (twins(plain) == -1).all()
        assert (twins(plain, plain) == -1).all()


def test_low_contrast_needs_a_closer_match() -> None:
    faint = scenes(200, contrast=5)
    distances = np.sqrt(((faint[:, None].astype(float) - faint[None]) ** 2).mean((2, 3)))
    assert (np.sort(distances, axis=1)[:, 1] < MAX_LEVELS).any(), "else this test says nothing"
    assert (twins(faint) == -1).all()


def test_nothing_to_compare() -> None:
    some, none = scenes(3), np.zeros((0, 16, 16), np.uint8)
    assert twins(some, none).tolist() == [-1, -1, -1]
    assert twins(none, some).shape == (0,)
    assert twins(none).shape == (0,)


def test_a_photograph_saved_again_is_a_twin(tmp_path: Path) -> None:
    photo = Image.fromarray(scenes(1, seed=5)[0]).convert("RGB").resize((320, 240))
    thumbs = []
    for image, quality in ((photo, 95), (photo.resize((200, 150)), 60), (photo.transpose(Image.Transpose(0)), 60)):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        thumbs.append(resize(Image.open(buffer).convert("L"), (16, 16))[..., 0])
    assert twins(np.stack(thumbs[:1]), np.stack(thumbs[1:2])).tolist() == [0]
    assert twins(np.stack(thumbs[:1]), np.stack(thumbs[2:])).tolist() == [0]


def test_the_repeats_of_the_flowers_are_exactly_the_listed_ones(real_data: Path, tmp_path: Path) -> None:
    splits = prepare(open_source(real_data / "flowers12"), [32], cache=tmp_path)
    lines = (real_data / "flowers12_duplicates.txt").read_text().splitlines()
    listed = {line.split("\t")[0] for line in lines}
    assert {name for name, leaked in zip(splits.test.names, splits.leaked, strict=True) if leaked} == listed
    assert any(note.startswith(f"{len(listed)} of the 240 test images repeat") for note in splits.notes)


def test_class_problems_are_all_named() -> None:
    labels = np.array([0, 0, 1, 2, 2])
    splits = np.array(["train", "test", "train", "train", "test"])
    assert class_problems(labels[[0, 1, 3, 4]], splits[[0, 1, 3, 4]], ("a", "b", "c")) == [
        "the class b has no images: add some, or remove it"
    ]
    assert class_problems(labels, splits, ("a", "b", "c")) == ["the class b has no images in test: add some there"]
    assert "one class only (a)" in class_problems(np.zeros(3, np.int64), np.array([""] * 3), ("a",))[0]
    assert class_problems(labels, np.array([""] * 5), ("a", "b", "c")) == []


def test_imbalance_is_noted_beyond_ten_to_one() -> None:
    assert imbalance(np.repeat([0, 1], [20, 2]), ("a", "b")) == ""
    assert "a has 21 training images, b has 2" in imbalance(np.repeat([0, 1], [21, 2]), ("a", "b"))
