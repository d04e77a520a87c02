"""Accurate, calibrated and refined deep classifiers with PyTorch Lightning."""

from importlib.metadata import version

__version__ = version("calib-lightning")
