"""`metrics.csv`: a process that dies while it is written again loses no row."""

import csv

import pytest

from calib_lightning.callbacks import RunLogger


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, and what is on disk is what a new process finds."""


def write(folder, first=0, rows=20):
    logger = RunLogger(folder, before_step=first)
    for step in range(first, rows):
        logger.log_metrics({"loss": step / 8}, step)
    return logger


def steps(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


WHOLE = [(step, step / 8) for step in range(20)]


def die_in_the_middle(monkeypatch):
    def writerows(self, rows):
        for number, row in enumerate(rows):
            if number == 6:
                raise Killed
            self.writerow(row)

    monkeypatch.setattr(csv.DictWriter, "writerows", writerows)


@pytest.mark.parametrize("first", [20, 14])
def test_a_resume_that_is_killed_while_it_takes_the_file_over_loses_no_row(tmp_path, monkeypatch, first):
    write(tmp_path)
    die_in_the_middle(monkeypatch)
    with pytest.raises(Killed):
        RunLogger(tmp_path, before_step=first).log_metrics({"loss": 0.0}, first)
    assert steps(tmp_path) == WHOLE
    monkeypatch.undo()
    write(tmp_path, first)
    assert steps(tmp_path) == WHOLE


def test_a_run_that_is_killed_while_a_new_column_is_added_loses_no_row(tmp_path, monkeypatch):
    logger = write(tmp_path)
    die_in_the_middle(monkeypatch)
    with pytest.raises(Killed):
        logger.log_metrics({"loss": 20 / 8, "accuracy": 0.5}, 20)
    assert steps(tmp_path) == WHOLE
    monkeypatch.undo()
    write(tmp_path, 20).log_metrics({"loss": 20 / 8, "accuracy": 0.5}, 20)
    assert steps(tmp_path) == [*WHOLE, (20, 20 / 8)]
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [row["accuracy"] for row in csv.DictReader(file)] == [""] * 20 + ["0.5"]


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_part_of_a_last_row_is_no_row(tmp_path, cut):
    write(tmp_path)
    path = tmp_path / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-cut])
    write(tmp_path, 20)
    RunLogger(tmp_path, before_step=20).log_metrics({"loss": 20 / 8}, 20)
    assert steps(tmp_path) == [*WHOLE[:-1], (20, 20 / 8)]


def test_part_of_a_header_is_no_header(tmp_path):
    (tmp_path / "metrics.csv").write_text("lo")
    write(tmp_path)
    assert steps(tmp_path) == WHOLE


def table(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_an_epoch_has_one_row_with_all_that_was_logged_in_it(tmp_path):
    logger = RunLogger(tmp_path)
    for epoch in range(3):
        logger.log_metrics({"train/step_loss": 1.0, "epoch": epoch}, 10 * epoch + 4)
        logger.log_metrics({"train/step_loss": 0.5, "epoch": epoch}, 10 * epoch + 8)
        logger.log_metrics({"val/nll": epoch / 4, "epoch": epoch}, 10 * epoch + 9)
        logger.log_metrics({"train/nll": epoch / 8, "epoch": epoch}, 10 * epoch + 9)
    rows = table(tmp_path)
    assert list(rows[0]) == ["epoch", "step", "train/nll", "train/step_loss", "val/nll"]
    expected = [(epoch, 10 * epoch + 9, epoch / 8, 0.5, epoch / 4) for epoch in range(3)]
    assert [tuple(map(float, row.values())) for row in rows] == expected


def test_a_run_resumed_within_an_epoch_goes_on_in_its_row(tmp_path):
    RunLogger(tmp_path).log_metrics({"train/step_loss": 1.0, "epoch": 0}, 4)
    RunLogger(tmp_path, before_step=5).log_metrics({"val/nll": 0.25, "epoch": 0}, 9)
    assert table(tmp_path) == [{"epoch": "0", "step": "9", "train/step_loss": "1.0", "val/nll": "0.25"}]


def test_a_run_that_is_killed_while_a_row_grows_loses_nothing(tmp_path, monkeypatch):
    logger = RunLogger(tmp_path)
    for epoch in range(8):
        logger.log_metrics({"val/nll": 0.5, "epoch": epoch}, epoch)
        logger.log_metrics({"train/nll": 0.25, "epoch": epoch}, epoch)
    before = table(tmp_path)
    die_in_the_middle(monkeypatch)
    with pytest.raises(Killed):
        logger.log_metrics({"val/ece": 0.1, "epoch": 7}, 7)
    assert table(tmp_path) == before
