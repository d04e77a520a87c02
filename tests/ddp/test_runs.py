"""Two processes do what one does."""

import json

import numpy as np
import pytest
import torch

from calib_lightning.core import distributed
from calib_lightning.metrics import REPORT
from tests.ddp import cases
from tests.methods.table import ROWS


@pytest.mark.parametrize("number", range(len(ROWS)), ids=lambda number: ROWS[number].module.__name__)
def test_ranks_end_with_equal_weights(pool2, tmp_path, number):
    one, two = pool2.run(cases.fit_method, str(tmp_path), number)
    assert one["digest"] == two["digest"] != one["before"]
    assert one["metrics"] == two["metrics"]


@pytest.mark.parametrize(
    ("size", "batch_size"), [(12, 1), (13, 4), (14, 5), (15, 6), (16, 2), (101, 3), (1, 4), (101, 1000)]
)
def test_evaluation_is_exact_on_a_fixed_table(pool2, size, batch_size):
    alone = cases.test_table(0, 1, size, batch_size)
    assert alone["n"] == size
    assert alone.keys() == {*REPORT, "ovo_auroc", "n"}
    for together in pool2.run(cases.test_table, size, batch_size):
        assert together["n"] == size
        assert together["accuracy"] == alone["accuracy"]
        assert together == pytest.approx(alone, rel=1e-9, abs=1e-9, nan_ok=True)


def test_evaluation_of_a_network_and_its_predictions(pool2, tmp_path):
    alone = cases.test_network(0, 1, str(tmp_path / "one"), None)
    together, _ = pool2.run(cases.test_network, str(tmp_path / "two"), None)
    assert together["metrics"]["test/n"] == alone["metrics"]["test/n"] == 151
    assert together["metrics"]["calibration/n"] == 33
    assert together["metrics"]["test/accuracy"] == alone["metrics"]["test/accuracy"]
    assert together["metrics"] == pytest.approx(alone["metrics"], abs=1e-5, nan_ok=True)
    for name, columns in alone["files"].items():
        np.testing.assert_array_equal(together["files"][name]["index"], columns["index"])
        np.testing.assert_array_equal(together["files"][name]["labels"], columns["labels"])
        np.testing.assert_allclose(together["files"][name]["logits"], columns["logits"], atol=1e-5)


@pytest.mark.parametrize("stop_after", [2, 4, 6, 8])
def test_resumed_run_is_bit_equal_on_two_processes(pool2, tmp_path, stop_after):
    # 99 training images in batches of 2 x 16, the last of them longer: 3 steps an epoch; 6 is the last of one
    whole = pool2.run(cases.fit, str(tmp_path / "whole"))
    stopped = pool2.run(cases.fit, str(tmp_path / "part"), stop_after)
    resumed = pool2.run(cases.fit, str(tmp_path / "part"), None, True)
    assert [part["stopped"] for part in stopped] == [143, 143]
    assert whole[0]["digest"] == whole[1]["digest"] == resumed[0]["digest"] == resumed[1]["digest"]
    assert whole[0]["metrics"] == pytest.approx(resumed[0]["metrics"], rel=1e-6, nan_ok=True)
    for epoch in range(3):
        seen = [row for runs in (stopped, resumed) for run in runs for row in run["rows"].get(epoch, [])]
        assert sorted(seen) == list(range(99))


KEEPS_ROWS = [number for number, row in enumerate(ROWS) if row.file in ("ada_focal", "balcal", "crl")]
STAGED = [number for number, row in enumerate(ROWS) if row.switch is not None]


@pytest.mark.parametrize("number", KEEPS_ROWS, ids=lambda number: ROWS[number].module.__name__)
def test_what_a_method_gathers_in_an_epoch_survives_a_stop(pool2, tmp_path, number):
    # 3 steps an epoch: stopped within the second, whose rows each process has for itself
    whole = pool2.run(cases.fit, str(tmp_path / "whole"), None, False, 0, number)
    stopped = pool2.run(cases.fit, str(tmp_path / "part"), 5, False, 0, number)
    assert [part["steps"] for part in stopped] == [5, 5]
    record = torch.load(tmp_path / "part" / "last.ckpt", weights_only=True)["calib_lightning"]
    if ROWS[number].file != "ada_focal":  # it gathers in validation alone
        for parts in record["epoch_rows"].values():
            assert [len(part) for part in parts] == [32, 32]
    resumed = pool2.run(cases.fit, str(tmp_path / "part"), None, True, 0, number)
    assert whole[0]["digest"] == whole[1]["digest"] == resumed[0]["digest"] == resumed[1]["digest"]


@pytest.mark.parametrize("number", STAGED, ids=lambda number: ROWS[number].module.__name__)
def test_a_staged_method_is_stopped_in_any_stage_on_two_processes(pool2, tmp_path, number):
    # 3 steps in the epoch of the first stage; the second stage begins after them
    whole = pool2.run(cases.fit, str(tmp_path / "whole"), None, False, 0, number)
    for stop in (2, 3, 5):
        folder = str(tmp_path / str(stop))
        stopped = pool2.run(cases.fit, folder, stop, False, 0, number)
        assert [part["stopped"] for part in stopped] == [143, 143]
        resumed = pool2.run(cases.fit, folder, None, True, 0, number)
        assert whole[0]["digest"] == whole[1]["digest"] == resumed[0]["digest"] == resumed[1]["digest"], stop


def test_history_is_of_all_processes_and_outlives_a_change_of_their_number(pool2, tmp_path):
    parts = pool2.run(cases.count_and_save)
    settled = [0, 2, 1, 1]
    for rank, part in enumerate(parts):
        assert part["settled"] == settled
        assert part["begun"] == [a + b for a, b in zip(settled, [[1, 0, 0, 0], [0, 0, 0, 2]][rank], strict=True)]
        assert part["own"] == part["begun"]
    alone = cases.restore_alone(parts[0]["saved"])
    assert alone == [1, 2, 1, 3]


def test_rows_of_fewer_processes_go_to_the_first_of_more(monkeypatch):
    parts = [torch.tensor([[0, 1], [1, 0]]), torch.tensor([[3, 1]])]
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    own = [distributed.own_rows(parts, rank).tolist() for rank in range(3)]
    assert own == [[[0, 1], [1, 0], [3, 1]], [], []]


def test_only_the_first_rank_reads_and_writes_the_run_folder(pool2, tmp_path):
    first, second = pool2.run(cases.fit_recorded, str(tmp_path))
    assert first == ["run.json", "splits.npz"]
    assert second == ["run.json"]
    assert json.loads((tmp_path / "rank-1" / "run.json").read_text())["splits"] == "older"
