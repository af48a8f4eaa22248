"""Packs: decoded once, used again, never half-written, and a full disk is one sentence."""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps

import flyweight.data.cache as cache_module
import flyweight.data.pack as pack_module
from flyweight.data import Splits, open_source, prepare, read_image, to_pixels
from flyweight.data.cache import Rows, cache_folder
from flyweight.errors import FlyweightError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of eight pictures, and a damaged one."""
    rng = np.random.default_rng(0)
    for number in range(16):
        file = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(file)
    (tmp_path / "photos" / "a" / "bad.png").write_bytes(b"words")
    return tmp_path / "photos"


def run(photos: Path, *sizes: int) -> Splits:
    return prepare(open_source(photos), sizes or (32,), skip_corrupt=True, cache=photos.parent / "cache")


def packs(photos: Path) -> list[str]:
    return sorted(os.listdir(photos.parent / "cache" / "packs"))


def no_decoding(*_: object) -> None:
    raise AssertionError("an image was decoded again")


def test_a_second_run_decodes_nothing_and_gives_the_same(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(photos)
    assert isinstance(first.train.store[32].base, np.memmap), "pixels are mapped from the disk, not held in memory"
    monkeypatch.setattr(pack_module, "read_image", no_decoding)
    second = run(photos)
    assert second.notes == first.notes
    assert any("bad.png" in note for note in second.notes)
    for a, b in ((first.train, second.train), (first.validation, second.validation), (first.test, second.test)):
        assert a.names == b.names
        assert np.array_equal(a.batch(32), b.batch(32))
    assert len(packs(photos)) == 1


def test_a_changed_file_or_another_size_is_decoded_anew(photos: Path) -> None:
    before = run(photos)
    Image.new("RGB", (40, 40), (255, 0, 0)).save(photos / "b" / "1.png")
    after = run(photos)
    assert len(packs(photos)) == 2

    def pixels(splits: Splits) -> np.ndarray:
        parts = (splits.train, splits.validation, splits.test)
        return next(part.batch(32, [part.names.index("b/1.png")]) for part in parts if "b/1.png" in part.names)

    assert not np.array_equal(pixels(before), pixels(after))
    assert (pixels(after) == [255, 0, 0]).all()
    assert run(photos, 24, 16, 24).train.sizes == (16, 24)
    assert len(packs(photos)) == 3
    assert run(photos, 16, 24).train.sizes == (16, 24)
    assert len(packs(photos)) == 3


def test_a_file_of_the_same_size_but_another_time_is_decoded_anew(photos: Path) -> None:
    for colour in ((255, 0, 0), (0, 0, 255)):
        file = photos / "b" / "plain.bmp"
        Image.new("RGB", (40, 40), colour).save(file)
        os.utime(file, ns=(0, colour[0]))
        parts = run(photos)
        part = next(p for p in (parts.train, parts.validation, parts.test) if "b/plain.bmp" in p.names)
        assert (part.batch(32, [part.names.index("b/plain.bmp")]) == colour).all()


def test_the_damaged_are_left_out_wherever_they_stand(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_module, "BLOCK", 4)
    splits = run(photos)
    for part in (splits.train, splits.validation, splits.test):
        expected = [to_pixels(photos / name, (32, 32), 3) for name in part.names]
        assert np.array_equal(part.batch(32), np.stack(expected))
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 16


def test_a_broken_pack_is_made_again(photos: Path) -> None:
    whole = run(photos).train.batch(32)
    place = photos.parent / "cache" / "packs" / packs(photos)[0]
    for name in ("32.npy", "thumbs.npy", "damaged.json"):
        (place / name).write_bytes((place / name).read_bytes()[: (place / name).stat().st_size // 2])
        assert np.array_equal(run(photos).train.batch(32), whole)


def test_jobs_that_start_at_once_agree(photos: Path) -> None:
    with ThreadPoolExecutor(4) as executor:
        results = list(executor.map(lambda _: run(photos).train.batch(32), range(4)))
    assert all(np.array_equal(result, results[0]) for result in results)
    assert len(packs(photos)) == 1, "and nothing temporary is left"


def test_an_interrupted_job_leaves_nothing_behind(photos: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(open_source(photos), [32], cache=photos.parent / "cache", progress=interrupt)
    assert packs(photos) == []


LIMITED = """
import resource, sys
from pathlib import Path
from flyweight.data import open_source, prepare
from flyweight.errors import FlyweightError
source = open_source(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    prepare(source, [32], skip_corrupt=True, cache=Path(sys.argv[2]))
except FlyweightError as error:
    print(error)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on the size of files")
def test_a_disk_that_fills_up_is_one_sentence(photos: Path) -> None:
    cache = photos.parent / "cache"
    command = [sys.executable, "-c", LIMITED, str(photos), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert done.stdout.startswith(f"the disk of {cache} is full")
    assert done.stdout.count("\n") == 1
    assert "FLYWEIGHT_CACHE" in done.stdout
    assert done.stderr == ""
    assert packs(photos) == []


def test_too_little_space_is_known_before_anything_is_decoded(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_module, "read_image", no_decoding)
    monkeypatch.setattr(pack_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(FlyweightError, match=r"is full \(0 MB are needed\)"):
        run(photos)


def test_a_cache_that_cannot_be_written_is_one_sentence(photos: Path) -> None:
    (photos.parent / "cache").write_text("a file where the folder should be")
    with pytest.raises(FlyweightError, match=r"the cache folder .*cache cannot be written .*FLYWEIGHT_CACHE"):
        run(photos)


TRAINED = """
import gc, sys
from pathlib import Path
import torch
from flyweight.create import create_model
from flyweight.data import cache, open_source, prepare
from flyweight.train.loop import Clock, Training, logits, train
from flyweight.train.recipe import Recipe, preprocess_for
cache.IN_MEMORY = 500_000
place, size = sys.argv[1], 16
splits = prepare(open_source(place), [size])
recipe, data = Recipe(batch_size=32), splits.train
net = create_model("resnet8_cifar", num_classes=len(data.classes), in_chans=data.channels, size=size)
held_out = splits.validation.subset(range(20))
preprocess = preprocess_for(recipe, data.batch(size, slice(0, 200)))
epochs = 32 * 12 / len(data)
train(Training(net, data, held_out, preprocess, recipe, Clock(epochs=epochs), mode="float32"))
gc.collect()
status = Path("/proc/self/status").read_text()
print(len(data), status.split("RssAnon:")[1].split()[0])
"""


def memory_of_a_training(place: str, cache: Path) -> tuple[int, int]:
    """The pictures trained on, and the anonymous resident memory in KB at the end."""
    command = [sys.executable, "-c", TRAINED, place]
    environment = os.environ | {"FLYWEIGHT_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    count, kilobytes = map(int, done.stdout.split())
    return count, kilobytes


def jpegs(place: Path, count: int) -> str:
    rng = np.random.default_rng(0)
    for number in range(count):
        file = place / f"c{number % 2}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(file)
    return str(place)


def idx(place: Path, count: int) -> str:
    place.mkdir()
    rng = np.random.default_rng(0)
    for kind, values in (
        ("images-idx3", rng.integers(0, 256, (count, 144, 144), dtype=np.uint8)),
        ("labels-idx1", np.arange(count) % 2),
    ):
        header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
        (place / f"train-{kind}-ubyte").write_bytes(header + values.astype(np.uint8).tobytes())
    return f"idx:{place}"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("make", [jpegs, idx])
def test_ten_times_the_data_takes_no_more_memory(make: Callable[[Path, int], str], tmp_path: Path) -> None:
    small, before = memory_of_a_training(make(tmp_path / "small", 300), tmp_path / "cache")
    large, after = memory_of_a_training(make(tmp_path / "large", 3000), tmp_path / "cache")
    assert large > 9 * small
    assert after < 1.1 * before


def test_large_arrays_lie_on_the_disk_and_leave_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    found = []
    for limit in (10**6, 10):
        monkeypatch.setattr(cache_module, "IN_MEMORY", limit)
        rows = Rows(values.shape, tmp_path / "cache")
        for start in range(0, 50, 20):
            rows.append(values[start : start + 20])
        found.append(rows.array())
        assert np.array_equal(found[-1], values)
    assert isinstance(found[1].base, np.memmap)
    assert not isinstance(found[0].base, np.memmap)
    assert list((tmp_path / "cache").iterdir()) == []


def test_large_arrays_that_cannot_be_kept_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "IN_MEMORY", 10)
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(FlyweightError, match=r"the cache folder .*cache cannot be written .*FLYWEIGHT_CACHE"):
        Rows((100, 8, 8, 1), tmp_path / "cache")


def test_jpegs_are_decoded_exactly_as_pillow_does(real_data: Path) -> None:
    for file in sorted((real_data / "flowers12").rglob("*.jpg"))[::40]:
        with Image.open(file) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        assert np.array_equal(np.asarray(read_image(file, 3)), expected)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("USERPROFILE", "/home/somebody")
    for name in ("FLYWEIGHT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == Path("/home/somebody/.cache/flyweight")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/flyweight")
    monkeypatch.setenv("FLYWEIGHT_CACHE", "/own")
    assert cache_folder() == Path("/own")


def test_the_package_imports_no_torch() -> None:
    code = "import sys, flyweight.data; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
