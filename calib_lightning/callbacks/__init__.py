"""Callbacks: what is written down about a run."""

from calib_lightning.callbacks.checkpoints import RunCheckpoint
from calib_lightning.callbacks.figures import LogFigures
from calib_lightning.callbacks.predictions import SavePredictions
from calib_lightning.callbacks.record import RunRecord
from calib_lightning.callbacks.run_logger import RunLogger

__all__ = ["LogFigures", "RunCheckpoint", "RunLogger", "RunRecord", "SavePredictions"]
