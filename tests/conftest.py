"""Fixtures that all tests share."""

import os
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # The thread count changes the last bits of a sum; one thread also keeps the two-process tests from fighting.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data, from ``CALIB_DATA`` or beside the repository; skips where there is none."""
    folder = Path(os.environ.get("CALIB_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not a folder (set CALIB_DATA)")
    return folder
