"""From a folder to three splits: every picture is read, every problem named, and nothing of the user's touched."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from flyweight.data import Dataset, Refused, Splits, open_source, prepare, to_pixels
from flyweight.data.images import resize
from flyweight.errors import DataError


def scene(seed: int, size: tuple[int, int] = (24, 32)) -> NDArray[np.uint8]:
    """A picture with large structures, as a photograph has, and no two alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return resize(Image.fromarray(coarse), size)


def photos(place: Path, *folders: str, each: int = 10) -> Path:
    """`each` PNGs of slightly different sizes in every one of the folders."""
    for number in range(each * len(folders)):
        folder = place / folders[number % len(folders)]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(number, (20 + number % 7, 30 - number % 5))).save(folder / f"{number}.png")
    return place


def run(place: Path, *sizes: int, skip_corrupt: bool = False) -> Splits:
    source = open_source(place)
    cache = place.parent / f"{place.name}-cache"
    return prepare(source, sizes or (16,), skip_corrupt=skip_corrupt, cache=cache)


def refusal(place: Path, *, skip_corrupt: bool = False) -> Refused:
    with pytest.raises(Refused) as caught:
        run(place, skip_corrupt=skip_corrupt)
    assert isinstance(caught.value, DataError)
    assert caught.value.exit_code == 4
    return caught.value


def snapshot(place: Path) -> dict[str, tuple[int, int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_mode, p.read_bytes()) for p in place.rglob("*") if p.is_file()}


def test_splits_are_whole_disjoint_and_hold_the_pixels_of_their_files(tmp_path: Path) -> None:
    place = photos(tmp_path / "photos", "cat", "dog", "eel")
    before = snapshot(place)
    splits = run(place, 16, 24)
    parts = (splits.train, splits.validation, splits.test)
    names = [name for part in parts for name in part.names]
    assert sorted(names) == sorted(p.relative_to(place).as_posix() for p in place.rglob("*.png"))
    for part, name in zip(parts, ("train", "validation", "test"), strict=True):
        assert part.split == name
        assert part.classes == ("cat", "dog", "eel")
        assert part.channels == 3
        assert len(part) == len(part.labels) == len(part.names)
        assert part.sizes == (16, 24)
        assert [part.classes[label] for label in part.labels] == [name.split("/")[0] for name in part.names]
        for size in (16, 24):
            expected = [to_pixels(place / name, (size, size), 3) for name in part.names]
            assert np.array_equal(part.batch(size), np.stack(expected))
    assert snapshot(place) == before
    assert {note.split(" images")[0] for note in splits.notes} == {"5 validation", "6 test"}


def test_mixed_sizes_and_formats_make_one_data_set(tmp_path: Path) -> None:
    place = tmp_path / "mixed"
    kinds = [("jpg", "RGB"), ("png", "RGBA"), ("webp", "RGB"), ("gif", "P"), ("bmp", "RGB"), ("png", "L"),
             ("jpg", "CMYK"), ("png", "1"), ("tif", "RGB"), ("png", "P")]  # fmt: skip
    for number, (suffix, mode) in enumerate(kinds * 2):
        (place / "ab"[number % 2 ^ number // 10]).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(scene(number, (10 + 17 * number, 300 - 13 * number))).convert(mode)
        exif = Image.Exif()
        exif[0x0112] = 1 + number % 8
        options = {"exif": exif} if suffix in ("jpg", "webp", "tif") else {}
        image.save(place / "ab"[number % 2 ^ number // 10] / f"{number}.{suffix}", **options)
    splits = run(place, 32)
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 20
    for part in (splits.train, splits.validation, splits.test):
        for name, pixels in zip(part.names, part.batch(32), strict=True):
            assert np.array_equal(pixels, to_pixels(place / name, (32, 32), 3))
            assert pixels.std() > 5


def test_grey_folders_stay_grey(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / "grey" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray(scene(number)).convert("L")
        grey.save(tmp_path / "grey" / "ab"[number % 2] / f"{number}.png")
    assert run(tmp_path / "grey").train.batch(16).shape[1:] == (16, 16, 1)


def test_subsets_share_the_pixels_and_batches_follow_the_indices(tmp_path: Path) -> None:
    train = run(photos(tmp_path / "photos", "cat", "dog")).train
    subset = train.subset([5, 2, 2])
    assert isinstance(subset, Dataset)
    assert subset.store is train.store
    assert len(subset) == 3
    assert np.array_equal(subset.batch(16), train.batch(16, [5, 2, 2]))
    assert subset.names == (train.names[5], train.names[2], train.names[2])
    assert subset.labels.tolist() == train.labels[[5, 2, 2]].tolist()
    again = subset.subset(np.array([2, 0]))
    assert np.array_equal(again.batch(16), train.batch(16, [2, 5]))
    copy = train.batch(16)
    copy[:] = 0
    assert train.batch(16).any(), "a batch is a copy"


DAMAGE = {
    "empty.jpg": b"",
    "half.png": None,  # the first half of a real one
    "text.jpg": b"words",
    "list.csv": b"file,label\n",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_one_bad_file_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    place = photos(tmp_path / "photos", "cat", "dog")
    whole = (place / "cat" / "0.png").read_bytes()
    (place / "cat" / name).write_bytes(DAMAGE[name] if DAMAGE[name] is not None else whole[: len(whole) // 2])
    before = snapshot(place)
    error = refusal(place)
    assert str(place / "cat" / name) in str(error)
    assert "--skip-corrupt" in str(error)
    assert "\n" not in str(error)
    assert len(error.problems) == 1
    splits = run(place, skip_corrupt=True)
    assert f"cat/{name}" not in splits.train.names + splits.validation.names + splits.test.names
    assert [note for note in splits.notes if note.startswith("left out") and name in note]
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 20
    assert snapshot(place) == before


def test_many_problems_are_counted_the_first_shown_and_all_kept(tmp_path: Path) -> None:
    place = photos(tmp_path / "photos", "cat", "dog")
    (place / "eel").mkdir()
    for number in range(9):
        (place / "cat" / f"bad{number}.jpg").write_bytes(b"words")
    error = refusal(place)
    lines = str(error).splitlines()
    assert lines[0].startswith("10 problems in")
    assert "--skip-corrupt" in lines[0]
    assert len(lines) == 7
    assert lines[-1].endswith("and 5 more")
    assert "bad0.jpg" in lines[1]
    assert len(error.problems) == 10
    assert "eel has no images" in error.problems[-1]
    assert len(refusal(place, skip_corrupt=True).problems) == 1, "an empty class cannot be skipped"


def test_skipping_every_image_of_a_class_is_no_way_out(tmp_path: Path) -> None:
    place = photos(tmp_path / "photos", "cat", "dog")
    (place / "eel").mkdir()
    (place / "eel" / "only.jpg").write_bytes(b"words")
    error = refusal(place, skip_corrupt=True)
    assert "the class eel has no images" in str(error)
    assert "--skip-corrupt" not in str(error)


def test_classes_that_cannot_be_trained_are_refused(tmp_path: Path) -> None:
    assert "one class only (cat)" in str(refusal(photos(tmp_path / "one", "cat")))
    lacking = photos(tmp_path / "lacking", "train/cat", "train/dog", "test/cat")
    assert "the class dog has no images in test" in str(refusal(lacking))
    new = photos(tmp_path / "new", "train/cat", "train/dog", "val/cat", "val/dog", "val/eel")
    assert "the class eel has no images in train" in str(refusal(new))
    few = photos(tmp_path / "few", "cat", "dog", each=2)
    assert "the class cat has 2 images to train on, but needs 3" in str(refusal(few).problems[0])


@pytest.mark.parametrize(("given", "held_out"), [(("train", "test"), {"validation"}), (("train", "val"), {"test"}),
                                                 (("train", "valid", "test"), set())])  # fmt: skip
def test_given_splits_are_kept(given: tuple[str, ...], held_out: set[str], tmp_path: Path) -> None:
    splits = run(photos(tmp_path / "photos", *(f"{split}/{name}" for split in given for name in ("cat", "dog"))))
    for part in (splits.train, splits.validation, splits.test):
        folders = {name.split("/")[0] for name in part.names}
        own = {"train": {"train"}, "validation": {"val", "valid"}, "test": {"test"}}[part.split]
        assert len(part) > 0
        assert folders <= own or (part.split in held_out and folders == {"train"})
        assert any(f"{part.split} images were held out" in note for note in splits.notes) == (part.split in held_out)


def test_repeated_test_images_are_marked_and_noted(tmp_path: Path) -> None:
    place = photos(tmp_path / "photos", "train/cat", "train/dog", "test/cat", "test/dog")
    picture = Image.open(place / "train" / "cat" / "0.png")
    picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(place / "test" / "cat" / "again.png")
    splits = run(place)
    leaked = [name for name, leak in zip(splits.test.names, splits.leaked, strict=True) if leak]
    assert leaked == ["test/cat/again.png"]
    note = next(note for note in splits.notes if "repeat" in note)
    assert note.startswith("1 of the 21 test images")
    assert "test/cat/again.png is train/cat/0.png" in note


def test_held_out_images_have_no_twin_in_training(tmp_path: Path) -> None:
    place = photos(tmp_path / "photos", "cat", "dog")
    for file in [file for file in place.rglob("*.png") if int(file.stem) % 10 < 4]:  # some of the pictures, twice
        Image.open(file).save(file.with_name(f"{file.stem}-again.png"))
    splits = run(place)
    assert not splits.leaked.any()
    assert not any("repeat" in note for note in splits.notes)
    pictures = {part.split: {name.removesuffix(".png").removesuffix("-again") for name in part.names}
                for part in (splits.train, splits.validation, splits.test)}  # fmt: skip
    assert not pictures["train"] & (pictures["validation"] | pictures["test"])
    assert len(splits.validation) + len(splits.test) == 10, "no fewer are held out for that"


def test_imbalance_is_noted(tmp_path: Path) -> None:
    place = photos(tmp_path / "photos", "train/cat", "val/cat", "val/dog", "test/cat", "test/dog", each=22)
    (place / "train" / "dog").mkdir()
    Image.fromarray(scene(999)).save(place / "train" / "dog" / "0.png")
    assert any("cat has 22 training images, dog has 1" in note for note in run(place).notes)


def test_array_sources_stay_in_memory_and_native_pixels_are_not_touched(tmp_path: Path) -> None:
    source = open_source("demo")
    splits = prepare(source, [28, 20], cache=tmp_path / "cache")
    assert splits.train.store[28] is source.images
    assert not (tmp_path / "cache").exists()
    assert isinstance(source.images, np.ndarray)
    row = int(splits.test.rows[7])
    assert np.array_equal(splits.test.batch(20, [7])[0], to_pixels(source.images[row], (20, 20), 1))
    assert (splits.train.rows < 7000).all()
    assert set(splits.test.names[0].split("/")) == {"test", "0"}


def test_progress_is_told_to_the_end(tmp_path: Path) -> None:
    source = open_source(photos(tmp_path / "photos", "cat", "dog", each=40))
    seen: list[tuple[int, int]] = []
    prepare(source, [16], cache=tmp_path / "cache", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (80, 80)
    assert len(seen) > 1
