"""What is installed: the version, the files in the wheel, the pins, and the data of the demo."""

import gzip
import itertools
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest

import flyweight

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "flyweight" / "demo"


def run(*arguments: str | Path) -> str:
    """The output of this Python with `arguments`, which must succeed."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run("-m", "hatchling", "build", "--target", "wheel", "--directory", folder)
    (path,) = folder.glob("*.whl")
    return path


def test_the_version_is_said_once(wheel: Path) -> None:
    assert wheel.name == f"flyweight-{flyweight.__version__}-py3-none-any.whl"
    sources = [ROOT / "pyproject.toml", *ROOT.glob("flyweight/**/*.py")]
    spelled = [path.name for path in sources if f'"{flyweight.__version__}"' in path.read_text("utf-8")]
    assert spelled == ["__init__.py"]


def test_the_module_runs_as_a_command() -> None:
    assert flyweight.__version__ in run("-m", "flyweight", "--version").split()


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    patterns = (
        "flyweight/**/*.py",
        "flyweight/*.json",
        "flyweight/**/*.jinja",
        "flyweight/**/*.css",
        "flyweight/demo/*",
        "flyweight/py.typed",
    )
    expected = {path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)}
    assert {"flyweight/py.typed", "flyweight/demo/classes.txt", "flyweight/demo/LICENSE"} <= expected
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"flyweight-{flyweight.__version__}.dist-info"
        assert "flyweight = flyweight.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert expected - names == set()
    assert all(name.startswith(("flyweight/", info)) for name in names)


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    asked = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    names = {re.split(r"[^\w.-]", requirement)[0] for requirement in asked} - {project["name"]}
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line.split(" ;")[0] for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert names - {pin.split("==")[0] for pin in pins} == set()


def test_the_demo_is_small_and_balanced() -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 4_000_000
    classes = (DEMO / "classes.txt").read_text("utf-8").splitlines()
    for split in ("train", "t10k"):
        images = gzip.decompress((DEMO / f"{split}-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = np.frombuffer(gzip.decompress((DEMO / f"{split}-labels-idx1-ubyte.gz").read_bytes())[8:], np.uint8)
        counts = np.bincount(labels)
        assert len(counts) == len(classes)
        assert len(set(counts)) == 1
        assert len(images) == 28 * 28 * len(labels)


def test_the_demo_can_be_made_again_from_its_source(fashion_mnist: Path, tmp_path: Path) -> None:
    run("scripts/demo_data.py", "--source", fashion_mnist, "--target", tmp_path)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    shipped = {path.name: path.read_bytes() for path in DEMO.iterdir()}
    assert shipped.keys() - made.keys() == {"LICENSE", "README.md"}
    assert made["classes.txt"] == shipped["classes.txt"]
    for name in (name for name in made if name.endswith(".gz")):
        # zlib's forks compress to other bytes, so the two halves of a file are compared: its header and what it holds.
        assert made[name][:10] == shipped[name][:10]
        assert gzip.decompress(made[name]) == gzip.decompress(shipped[name])
