"""Fixtures that all tests share."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# Read when torch and numpy are loaded, here and in every process of a test: several processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests.ddp.pool import ProcessPool

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background: commands would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Benchmarks are slow; of several workers one runs all tests on process pools; the longest groups come first."""
    for item in items:
        if "benchmarks" in item.path.parts:
            item.add_marker(pytest.mark.slow)
        pools = {"pool2", "pool3"} & set(getattr(item, "fixturenames", ()))
        item.add_marker(pytest.mark.xdist_group("pools" if pools else str(item.path.relative_to(TESTS))))
    long = ("pools", "test_readme.py", "posthoc/test_calibrators.py", "methods/test_methods.py")
    items.sort(key=lambda item: item.get_closest_marker("xdist_group").args[0] not in long)


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


@pytest.fixture(scope="session")
def pl():
    """The package that has the code of ``lightning.pytorch`` once more, which other packages import."""
    return pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed (it is in .[test])")


def _pool(world: int) -> Iterator[ProcessPool]:
    pool = ProcessPool(world)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pool2() -> Iterator[ProcessPool]:
    """Two processes, started by the first test that runs something on them; they live as long as the session."""
    yield from _pool(2)


@pytest.fixture(scope="session")
def pool3() -> Iterator[ProcessPool]:
    """Three processes, started by the first test that runs something on them; they live as long as the session."""
    yield from _pool(3)
