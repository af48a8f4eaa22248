"""Where the tests find real data, without which they skip; and what they must not find: a developer's own weights."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flyweight.train import kernels


def pytest_configure(config: pytest.Config) -> None:
    """Each of several workers keeps to a core of its own: two that want all of them wait for each other."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if worker and hasattr(os, "sched_setaffinity"):
        own = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {own[int(worker) % len(own)]})
        torch.set_num_threads(1)  # OpenMP counted the cores when it was loaded


@pytest.fixture(scope="session", autouse=True)
def no_cached_weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Jobs start from weights that are cached, so the tests have a cache of their own; what is built they share."""
    cache, built = tmp_path_factory.mktemp("cache"), tmp_path_factory.getbasetemp().parent / "flyweight-kernels"
    built.mkdir(exist_ok=True)
    (cache / "kernels").symlink_to(built)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLYWEIGHT_WEIGHTS", raising=False)
        patch.setenv("FLYWEIGHT_CACHE", str(cache))
        kernels.missing()  # else the seconds that building takes would be those of the first job
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder that FLYWEIGHT_TEST_DATA names: cifar-10-python.tar.gz, flowers12/, weights/."""
    folder = os.environ.get("FLYWEIGHT_TEST_DATA")
    if not folder:
        pytest.skip("FLYWEIGHT_TEST_DATA is not set")
    assert Path(folder).is_dir(), f"FLYWEIGHT_TEST_DATA names {folder}, which is no folder"
    return Path(folder)


@pytest.fixture(scope="session")
def fashion_mnist() -> Path:
    """Fashion-MNIST's four original files."""
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing (Debian: apt-get install dataset-fashion-mnist)")
    return folder
