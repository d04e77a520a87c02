"""``calib calibrate``: fit calibrators to held-out predictions and say what they do to every test set."""

from calib_lightning.calibrate.command import main

__all__ = ["main"]
