"""A run that is stopped anywhere and resumed ends bit for bit like one that is not (one process)."""

import pytest

from tests.ddp import cases


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return cases.fit(0, 1, str(tmp_path_factory.mktemp("whole")))


def test_the_same_run_twice_is_the_same(whole, tmp_path):
    again = cases.fit(0, 1, str(tmp_path), workers=2)
    assert again == whole


# 99 training images in batches of 16: 7 steps an epoch
@pytest.mark.parametrize("stop_after", [1, 3, 6, 7, 8, 13, 14, 20, 21])
def test_resumed_run_is_bit_equal(whole, tmp_path, stop_after):
    stopped = cases.fit(0, 1, str(tmp_path), stop_after)
    assert stopped["stopped"] == 143
    resumed = cases.fit(0, 1, str(tmp_path), resume=True)
    assert resumed["steps"] == whole["steps"] == 21
    assert resumed["digest"] == whole["digest"]
    if stop_after < 21:
        # the sums of a begun epoch are continued: float64, in another order
        assert resumed["metrics"] == pytest.approx(whole["metrics"], rel=1e-6)
    for epoch in range(3):
        seen = stopped["rows"].get(epoch, []) + resumed["rows"].get(epoch, [])
        assert sorted(seen) == list(range(99))
        assert seen == whole["rows"][epoch]
