"""Callbacks that record a run, and calibrate or monitor any LightningModule."""

from calib_lightning.callbacks.accelerate import Accelerate
from calib_lightning.callbacks.checkpoints import RunCheckpoint
from calib_lightning.callbacks.clip_gradients import ClipGradients
from calib_lightning.callbacks.figures import LogFigures
from calib_lightning.callbacks.guarded import guarded
from calib_lightning.callbacks.log_run import LogRun
from calib_lightning.callbacks.monitor import CalibrationMonitor
from calib_lightning.callbacks.post_hoc import PostHocCalibrate
from calib_lightning.callbacks.predictions import SavePredictions
from calib_lightning.callbacks.record import RunRecord
from calib_lightning.callbacks.run_logger import RunLogger

__all__ = [
    "Accelerate",
    "CalibrationMonitor",
    "ClipGradients",
    "LogFigures",
    "LogRun",
    "PostHocCalibrate",
    "RunCheckpoint",
    "RunLogger",
    "RunRecord",
    "SavePredictions",
    "guarded",
]
