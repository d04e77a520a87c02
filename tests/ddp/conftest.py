"""Process pools that live as long as the session."""

from collections.abc import Iterator

import pytest

from tests.ddp.pool import ProcessPool


def _pool(world: int) -> Iterator[ProcessPool]:
    pool = ProcessPool(world)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pool2() -> Iterator[ProcessPool]:
    """Two processes, started by the first test that runs something on them."""
    yield from _pool(2)


@pytest.fixture(scope="session")
def pool3() -> Iterator[ProcessPool]:
    """Three processes, started by the first test that runs something on them."""
    yield from _pool(3)
