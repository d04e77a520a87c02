"""Benchmarks in this process, whose runs are in processes of their own."""

import pytest

from calib_lightning.commands import benchmark as command

from ..cli.conftest import calib, drawn, forked  # noqa: F401
from .grids import run_without_figures


@pytest.fixture
def run_grid(calib, tmp_path, monkeypatch):  # noqa: F811
    """``run_grid("grid.yaml", ...)`` in ``tmp_path``."""
    monkeypatch.setattr(command, "run_command", run_without_figures)

    def run(*argv):
        return calib("benchmark", *argv)

    return run
