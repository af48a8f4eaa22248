"""Every data format in formats/ opens bytes made here and hands over a consistent Source; damaged data is refused."""

import gzip
import io
import os
import pickle
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from flyweight.data import Source, absolute, format_names, open_source
from flyweight.errors import DataError, UsageError


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def tiny_folder(place: Path) -> Path:
    """Two classes, three images each: class folders without splits."""
    for number, name in enumerate(["cat", "dog"] * 3):
        (place / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(6, 8, 3, seed=number)).save(place / name / f"{number}.png")
    return place


def idx_bytes(array: NDArray[np.uint8]) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def tiny_idx(place: Path) -> Path:
    """Five training and three test images of 4 x 6 in three classes; one file plain, the others gzipped."""
    place.mkdir(parents=True, exist_ok=True)
    for prefix, labels in (("train", [0, 1, 2, 1, 0]), ("t10k", [2, 1, 0])):
        images = idx_bytes(noise(len(labels), 4, 6, seed=len(labels)))
        (place / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (place / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(np.array(labels, np.uint8)))
    return place


def cifar_batch(seed: int) -> dict[bytes, object]:
    return {b"data": noise(4, 3072, seed=seed), b"labels": [0, 1, 1, 0]}


def cifar_files() -> dict[str, bytes]:
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    files = {name: pickle.dumps(cifar_batch(seed), protocol=4) for seed, name in enumerate(names)}
    return files | {"batches.meta": pickle.dumps({b"label_names": [b"bird", b"ship"]}, protocol=2)}


def cifar_archive(place: Path, files: dict[str, bytes]) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    with tarfile.open(place / "cifar.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return place / "cifar.tar.gz"


def tiny_cifar10(place: Path) -> Path:
    return cifar_archive(place, cifar_files())


TINY: dict[str, Callable[[Path], Path]] = {"cifar10": tiny_cifar10, "folder": tiny_folder, "idx": tiny_idx}


def snapshot(place: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(place.rglob("*")) if p.is_file()}


# The conformance test: a new format needs a maker of tiny data above.


@pytest.mark.parametrize("name", format_names())
def test_a_format_gives_a_consistent_source(name: str, tmp_path: Path) -> None:
    path = TINY[name](tmp_path / "data")
    before = snapshot(tmp_path)
    source = open_source(f"{name}:{path}")
    assert isinstance(source, Source)
    assert source.root == path
    count = len(source)
    assert count > 0
    assert len(source.images) == len(source.splits) == len(source.names) == count
    assert source.labels.dtype == np.int64
    assert source.labels.min() >= 0
    assert set(source.labels.tolist()) == set(range(len(source.classes)))
    assert len(set(source.classes)) == len(source.classes) >= 2
    assert len(set(source.names)) == count, "names must tell images apart"
    assert set(source.splits.tolist()) <= {"train", "validation", "test", ""}
    assert source.channels in (1, 3)
    assert source.name
    assert source.licence
    assert "\n" not in source.licence
    if isinstance(source.images, np.ndarray):
        assert source.images.dtype == np.uint8
        assert source.images.shape == (count, *source.size, source.channels)
    else:
        assert all(file.is_file() for file in source.images)
    assert snapshot(tmp_path) == before, "a user's files are only ever read"
    again = open_source(f"{name}:{path}")
    assert again.names == source.names
    assert np.array_equal(again.labels, source.labels)


@pytest.mark.parametrize("name", format_names())
def test_a_format_refuses_an_empty_folder_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_source(f"{name}:{tmp_path}")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


# Which format, which path


def test_a_bare_path_is_a_folder_and_a_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_folder(tmp_path / "home" / "a:b")
    assert open_source(str(tmp_path / "home" / "a:b")).name == "a:b"
    assert open_source(tmp_path / "home" / "a:b").name == "a:b"
    tiny_idx(tmp_path / "home" / "digits")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_source("idx:~/digits").name == "digits"
    monkeypatch.chdir(tmp_path / "home" / "a:b")
    assert open_source(".").name == "a:b"


@pytest.mark.parametrize("request_", ["missing/place", "idx:missing/place", "zip:missing/place", "idx:", ""])
def test_a_wrong_request_is_a_usage_error(request_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        open_source(request_)
    message = str(caught.value)
    assert "\n" not in message
    if request_.startswith("zip"):
        assert all(name in message for name in format_names())
    elif "missing" in request_:
        assert "missing/place does not exist" in message


def test_the_demo_comes_with_the_package() -> None:
    source = open_source("demo")
    assert source.channels == 1
    assert len(source.classes) == 10
    assert "LICENSE" in source.licence
    assert source.classes[0] == "T-shirt/top"


# Folders


def picture(file: Path, mode: str = "RGB", size: tuple[int, int] = (8, 6)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(size[1], size[0], 3)).convert(mode).save(file)
    return file


def test_folder_splits_are_kept_and_their_names_forgiven(tmp_path: Path) -> None:
    for split in ("Train", "valid", "test"):
        for name in ("a", "b"):
            picture(tmp_path / split / name / "deep" / "er" / "1.png")
    (tmp_path / "extra").mkdir()
    source = open_source(tmp_path)
    assert source.classes == ("a", "b")
    assert sorted(source.splits.tolist()) == ["test"] * 2 + ["train"] * 2 + ["validation"] * 2
    assert "Train/a/deep/er/1.png" in source.names
    assert any(note.startswith("extra/") for note in source.notes)


def test_train_can_be_a_class(tmp_path: Path) -> None:
    for name in ("bus", "car", "train"):
        picture(tmp_path / name / "1.png")
    assert open_source(tmp_path).classes == ("bus", "car", "train")


@pytest.mark.parametrize("folders", [("test", "val"), ("train", "val", "valid")])
def test_split_folders_that_make_no_sense(tmp_path: Path, folders: tuple[str, ...]) -> None:
    for split in folders:
        picture(tmp_path / split / "a" / "1.png")
    with pytest.raises(DataError, match=r"no train/|two folders"):
        open_source(tmp_path)


def test_what_file_managers_leave_is_ignored(tmp_path: Path) -> None:
    tiny_folder(tmp_path)
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "cat/.hidden.png", "cat/Thumbs.db", "dog/.git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("junk")
    (tmp_path / "__MACOSX" / "cat").mkdir(parents=True)
    source = open_source(tmp_path)
    assert len(source) == 6
    assert source.classes == ("cat", "dog")
    assert source.notes == ()


def test_other_files_in_a_class_folder_are_kept_for_the_audit(tmp_path: Path) -> None:
    tiny_folder(tmp_path)
    (tmp_path / "cat" / "list.txt").write_text("not a picture")
    assert "cat/list.txt" in open_source(tmp_path).names


def test_files_beside_the_class_folders(tmp_path: Path) -> None:
    tiny_folder(tmp_path)
    (tmp_path / "README.md").write_text("about the data")
    assert open_source(tmp_path).notes == ("README.md lies in no class folder and was not read",)
    picture(tmp_path / "stray.png")
    with pytest.raises(DataError, match=r"stray\.png lies in no class folder"):
        open_source(tmp_path)


def test_links_to_files_count_and_links_to_folders_are_not_lost(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "data")
    picture(tmp_path / "elsewhere" / "far.png")
    (tmp_path / "data" / "cat" / "link.png").symlink_to(tmp_path / "elsewhere" / "far.png")
    (tmp_path / "data" / "cat" / "folder").symlink_to(tmp_path / "elsewhere")
    names = open_source(tmp_path / "data").names
    assert "cat/link.png" in names
    assert "cat/folder" in names


def test_grey_only_if_every_image_is_grey(tmp_path: Path) -> None:
    for number, mode in enumerate(["L", "1", "L"]):
        picture(tmp_path / "ab"[number % 2] / f"{number}.png", mode, size=(10 + number, 20))
    source = open_source(tmp_path)
    assert source.channels == 1
    assert source.size == (20, 11)
    picture(tmp_path / "a" / "colour.png")
    assert open_source(tmp_path).channels == 3


@pytest.mark.skipif(os.name == "nt", reason="the file system takes no bytes that are no text")
def test_names_can_be_printed_whatever_their_bytes(tmp_path: Path) -> None:
    tiny_folder(tmp_path)
    strange = os.fsdecode(os.fsencode(tmp_path / "cat") + b"/caf\xe9.png")
    Path(picture(tmp_path / "new.png")).rename(strange)
    "".join(open_source(tmp_path).names).encode("utf-8")


def test_an_archive_without_its_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a file"):
        open_source(tiny_cifar10(tmp_path))


# IDX files


def test_idx_pixels_labels_and_names(tmp_path: Path) -> None:
    place = tiny_idx(tmp_path)
    source = open_source(f"idx:{place}")
    assert np.array_equal(source.images[:5], noise(5, 4, 6, seed=5)[..., None])  # pyright: ignore[reportArgumentType]
    assert source.labels.tolist() == [0, 1, 2, 1, 0, 2, 1, 0]
    assert source.classes == ("0", "1", "2")
    assert source.splits.tolist() == ["train"] * 5 + ["test"] * 3
    assert source.names[5] == "test/0"
    (place / "classes.txt").write_text("shirt\ncoat\n\nbag\n")
    (place / "LICENSE.txt").write_text("MIT")
    named = open_source(f"idx:{place}")
    assert named.classes == ("shirt", "coat", "bag")
    assert named.licence == "see LICENSE.txt in the data"


def test_idx_without_test_files_gives_train_alone(tmp_path: Path) -> None:
    place = tiny_idx(tmp_path)
    for file in place.glob("t10k-*"):
        file.unlink()
    assert set(open_source(f"idx:{place}").splits.tolist()) == {"train"}


def idx_damage() -> dict[str, tuple[str, bytes, str]]:
    """Which file is replaced by which bytes, and a word of the refusal."""
    images, gz = idx_bytes(noise(5, 4, 6)), "train-images-idx3-ubyte.gz"
    huge = bytes([0, 0, 8, 3]) + np.array([60_000, 60_000, 1], ">u4").tobytes()
    beyond = bytes([0, 0, 8, 3]) + np.array([2**32 - 1] * 3, ">u4").tobytes()
    return {
        "short": (gz, gzip.compress(images[:-1]), "fewer bytes"),
        "long": (gz, gzip.compress(images + b"\0"), "more bytes"),
        "bomb": (gz, gzip.compress(images + bytes(30_000_000)), "more bytes"),
        "liar": (gz, gzip.compress(huge), "fewer bytes"),
        "giant": (gz, gzip.compress(beyond), "promises"),
        "zero": (gz, gzip.compress(bytes([0, 0, 8, 3]) + bytes(12)), "promises 0 bytes"),
        "cut gzip": (gz, gzip.compress(images)[:-20], "cannot be read"),
        "no gzip": (gz, images, "cannot be read"),
        "magic": (gz, gzip.compress(b"\1" + images[1:]), "no IDX file"),
        "labels as images": (gz, gzip.compress(idx_bytes(np.zeros(5, np.uint8))), "no IDX file"),
        "fewer labels": ("train-labels-idx1-ubyte", idx_bytes(np.zeros(4, np.uint8)), "4 labels for 5 images"),
        "other size": (gz, gzip.compress(idx_bytes(noise(5, 4, 7))), "differ in size"),
        "few names": ("classes.txt", b"a\nb\n", "must name 3 classes"),
        "twice named": ("classes.txt", b"a\nb\nb\n", "must name 3 classes"),
        "no text": ("classes.txt", b"\xff\xfe\x00", "UTF-8"),
    }


@pytest.mark.parametrize("case", idx_damage())
def test_damaged_idx_files_are_refused_by_name(case: str, tmp_path: Path) -> None:
    name, content, word = idx_damage()[case]
    (tiny_idx(tmp_path) / name).write_bytes(content)
    with pytest.raises(DataError, match=word) as caught:
        open_source(f"idx:{tmp_path}")
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_header_that_lies_costs_no_memory(tmp_path: Path) -> None:
    name, content, _ = idx_damage()["liar"]
    (tiny_idx(tmp_path) / name).write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            open_source(f"idx:{tmp_path}")
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_a_missing_idx_file_is_named(tmp_path: Path) -> None:
    (tiny_idx(tmp_path) / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="lacks t10k-labels-idx1-ubyte"):
        open_source(f"idx:{tmp_path}")


def test_fashion_mnist(fashion_mnist: Path) -> None:
    source = open_source(f"idx:{fashion_mnist}")
    assert len(source) == 70_000
    assert source.size == (28, 28)
    assert source.channels == 1
    assert np.bincount(source.labels).tolist() == [7000] * 10


# CIFAR-10


def test_cifar10_pixels_and_splits(tmp_path: Path) -> None:
    source = open_source(f"cifar10:{tiny_cifar10(tmp_path)}")
    red, green, blue = noise(4, 3072, seed=1)[2].reshape(3, 32, 32)  # the third image of data_batch_2
    assert isinstance(source.images, np.ndarray)
    assert np.array_equal(source.images[6], np.stack([red, green, blue], axis=-1))
    assert source.classes == ("bird", "ship")
    assert source.labels[:4].tolist() == [0, 1, 1, 0]
    assert source.splits.tolist() == ["train"] * 20 + ["test"] * 4
    assert source.names[-1] == "test/3"


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_cifar10_is_read_whatever_the_pickle_protocol(protocol: int, tmp_path: Path) -> None:
    files = {name: pickle.dumps(pickle.loads(content), protocol) for name, content in cifar_files().items()}
    source = open_source(f"cifar10:{cifar_archive(tmp_path, files)}")
    expected = open_source(f"cifar10:{tiny_cifar10(tmp_path)}")
    assert np.array_equal(np.asarray(source.images), np.asarray(expected.images))


def test_cifar10_folders_are_as_the_archive(tmp_path: Path) -> None:
    with tarfile.open(tiny_cifar10(tmp_path / "packed")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    packed = open_source(f"cifar10:{tmp_path / 'packed' / 'cifar.tar.gz'}")
    for folder in (tmp_path / "unpacked", tmp_path / "unpacked" / "cifar-10-batches-py"):
        assert np.array_equal(np.asarray(open_source(f"cifar10:{folder}").images), np.asarray(packed.images))


class Attack:
    """Unpickled by the ordinary unpickler, it would make a folder."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.place,)


def test_a_pickle_can_run_no_code(tmp_path: Path) -> None:
    batch = {b"data": Attack(tmp_path / "attacked"), b"labels": [0]}
    path = cifar_archive(tmp_path, cifar_files() | {"data_batch_3": pickle.dumps(batch)})
    with pytest.raises(DataError, match=r"data_batch_3 .*mkdir"):
        open_source(f"cifar10:{path}")
    assert not (tmp_path / "attacked").exists()


CIFAR_DAMAGE: dict[str, dict[bytes, object]] = {
    "label outside": {b"labels": [0, 1, 1, 2]},
    "negative label": {b"labels": [0, -1, 1, 1]},
    "fewer labels": {b"labels": [0, 1]},
    "no labels": {b"labels": None},
    "text labels": {b"labels": ["0"] * 4},
    "narrow": {b"data": np.zeros((4, 3071), np.uint8)},
    "floats": {b"data": np.zeros((4, 3072), np.float32)},
    "no images": {b"data": np.zeros((0, 3072), np.uint8), b"labels": []},
    "no data": {b"data": None},
}


@pytest.mark.parametrize("case", CIFAR_DAMAGE)
def test_cifar10_batches_of_another_make_are_refused(case: str, tmp_path: Path) -> None:
    damaged = pickle.dumps(cifar_batch(0) | CIFAR_DAMAGE[case], protocol=4)
    path = cifar_archive(tmp_path, cifar_files() | {"test_batch": damaged})
    with pytest.raises(DataError, match="test_batch is not the official one") as caught:
        open_source(f"cifar10:{path}")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1, 2]), pickle.dumps({b"label_names": []})])
def test_cifar10_meta_of_another_make_is_refused(content: bytes, tmp_path: Path) -> None:
    path = cifar_archive(tmp_path, cifar_files() | {"batches.meta": content})
    with pytest.raises(DataError, match=r"batches\.meta is not the official one"):
        open_source(f"cifar10:{path}")


def test_broken_archives_are_refused(tmp_path: Path) -> None:
    path = tiny_cifar10(tmp_path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"no archive", b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"cifar\.tar\.gz"):
            open_source(f"cifar10:{path}")
    files = cifar_files()
    del files["data_batch_4"]
    with pytest.raises(DataError, match="data_batch_4"):
        open_source(f"cifar10:{cifar_archive(tmp_path, files)}")


def test_the_official_archive(real_data: Path) -> None:
    source = open_source(f"cifar10:{real_data / 'cifar-10-python.tar.gz'}")
    assert np.bincount(source.labels).tolist() == [6000] * 10
    assert source.classes[3] == "cat"
    assert (source.splits == "test").sum() == 10_000


def test_data_is_named_by_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "idx:odd").mkdir()
    assert absolute("photos") == str(tmp_path / "photos")
    assert absolute(Path("photos")) == str(tmp_path / "photos")
    assert absolute("idx:mnist") == f"idx:{tmp_path / 'mnist'}"
    assert absolute("idx:odd") == str(tmp_path / "idx:odd"), "a folder of that name is meant"
    assert absolute("demo") == "demo"
    assert absolute("zip:x") == "zip:x", "an unknown format is told as it was written"
