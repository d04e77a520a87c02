"""Callbacks for modules that are not ours, on two processes."""

import pytest

from tests.ddp import callback_cases


def test_two_processes_monitor_and_calibrate_as_one_does(pool2, tmp_path):
    alone = callback_cases.monitor_and_calibrate(0, 1, str(tmp_path / "one"))
    one, two = pool2.run(callback_cases.monitor_and_calibrate, str(tmp_path / "two"))
    assert one == two
    assert one["beta"] == one["in_file"] == pytest.approx(alone["beta"], rel=1e-6)
    assert one["values"] == pytest.approx(alone["values"], abs=1e-6)
    assert len(one["values"]) > 20


def test_what_one_process_cannot_use_does_not_hang_the_other(pool2, tmp_path):
    for result in pool2.run(callback_cases.monitor_and_calibrate, str(tmp_path), 1):
        assert result["epoch"] == 1
        assert not result["values"]
