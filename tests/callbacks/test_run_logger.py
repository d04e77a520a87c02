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
