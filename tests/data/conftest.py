"""Fixtures of the data tests."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cifar10_root(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the real CIFAR-10 files, byte for byte as in the official archive."""
    root = tmp_path_factory.mktemp("cifar10")
    script = real_data / "unpack_cifar.py"
    subprocess.run([sys.executable, script, "cifar10", real_data / "cifar-10-webp", root], check=True)
    return root
