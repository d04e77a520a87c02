"""Benchmarks: data modules, splits, long tails and loaders that resume exactly."""

from calib_lightning.data.augmix import AugMixViews
from calib_lightning.data.base import BenchmarkDataModule
from calib_lightning.data.cifar import CIFAR10DataModule, CIFAR100DataModule
from calib_lightning.data.digits import DigitsDataModule
from calib_lightning.data.loader import ResumableLoader
from calib_lightning.data.longtail import long_tail_counts, long_tail_rows
from calib_lightning.data.sets import FileSet, ImageFiles, InMemorySet
from calib_lightning.data.source import Source
from calib_lightning.data.split import SplitSpec
from calib_lightning.data.toy import ToyDataModule
from calib_lightning.data.transforms import Compose, CropFlip, Normalize
from calib_lightning.data.views import CleanViews, ContrastiveViews, ResizedCropFlip

__all__ = [
    "AugMixViews",
    "BenchmarkDataModule",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "CleanViews",
    "Compose",
    "ContrastiveViews",
    "CropFlip",
    "DigitsDataModule",
    "FileSet",
    "ImageFiles",
    "InMemorySet",
    "Normalize",
    "ResizedCropFlip",
    "ResumableLoader",
    "Source",
    "SplitSpec",
    "ToyDataModule",
    "long_tail_counts",
    "long_tail_rows",
]
