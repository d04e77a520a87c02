"""Run the command line in this process, in a folder of the test's own."""

import io
import os
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from calib_lightning.__main__ import main
from calib_lightning.callbacks import LogFigures

from .forked import Forked


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def drawn():
    """The runs of this test draw their figures; of others they do not, as it takes longer than a short run."""


@pytest.fixture
def calib(tmp_path, monkeypatch, request):
    """``calib("fit", "-c", ...)`` in ``tmp_path``: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(LogFigures, "on_test_epoch_end", Callback.on_test_epoch_end)

    def run(*argv):
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                code = main([str(argument) for argument in argv])
            except SystemExit as leaving:
                code = leaving.code if isinstance(leaving.code, int) else 1
            finally:
                os.environ.pop("PL_GLOBAL_SEED", None)
        said = "".join(f"{warning.message}\n" for warning in caught)
        return Done(code, out.getvalue(), err.getvalue() + said)

    return run


@pytest.fixture
def forked(tmp_path):
    """``forked("fit", ...)``: a `Forked` command in ``tmp_path``, killed when the test ends."""
    started = []

    def start(*argv):
        started.append(Forked(tmp_path, *argv))
        return started[-1]

    yield start
    for process in started:
        process.kill()


TOY = ("--data=ToyDataModule", "--data.split.val=30", "--data.split.calibration=30", "--quiet=true")
QUICK = ("fit", "-c", "quickstart", "--run_dir=runs/quickstart", "--quiet=true")


@pytest.fixture
def only_run(tmp_path):
    """The run folder after exactly one run."""

    def find(root="runs"):
        folders = sorted(path for path in (tmp_path / root).iterdir() if path.is_dir())
        assert len(folders) == 1, folders
        return Path(folders[0])

    return find
