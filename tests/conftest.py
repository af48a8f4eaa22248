"""Where the tests find real data; without it they skip."""

import os
from pathlib import Path

import pytest


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
