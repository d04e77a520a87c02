"""Benchmarks: data modules, splits, long tails and exactly resumable loaders."""

from calib_lightning.data.arrays import ArraysDataModule
from calib_lightning.data.augmix import AugMixViews
from calib_lightning.data.base import BenchmarkDataModule
from calib_lightning.data.cifar import CIFAR10DataModule, CIFAR10HDataModule, CIFAR100DataModule
from calib_lightning.data.cifar_shift import (
    CIFAR10CDataModule,
    CIFAR100CDataModule,
    CIFAR101DataModule,
    CIFAR102DataModule,
)
from calib_lightning.data.digits import DigitsDataModule
from calib_lightning.data.downloads import DownloadedDataModule
from calib_lightning.data.folder import FolderDataModule
from calib_lightning.data.imagenet import ImageNetDataModule, ImageNetV2DataModule
from calib_lightning.data.loader import ResumableLoader
from calib_lightning.data.longtail import long_tail_counts, long_tail_rows
from calib_lightning.data.medmnist import MedMNISTDataModule
from calib_lightning.data.mnist import FashionMNISTDataModule, MNISTDataModule
from calib_lightning.data.sets import FileSet, ImageFiles, InMemorySet
from calib_lightning.data.source import Source
from calib_lightning.data.split import SplitSpec
from calib_lightning.data.svhn import SVHNDataModule
from calib_lightning.data.textures import TexturesDataModule
from calib_lightning.data.tiny_imagenet import TinyImageNetDataModule
from calib_lightning.data.toy import ToyDataModule
from calib_lightning.data.transforms import Compose, CropFlip, Normalize
from calib_lightning.data.viewed import ViewedDataset
from calib_lightning.data.views import CleanViews, ContrastiveViews, ResizedCropFlip

__all__ = [
    "ArraysDataModule",
    "AugMixViews",
    "BenchmarkDataModule",
    "CIFAR10CDataModule",
    "CIFAR10DataModule",
    "CIFAR10HDataModule",
    "CIFAR100CDataModule",
    "CIFAR100DataModule",
    "CIFAR101DataModule",
    "CIFAR102DataModule",
    "CleanViews",
    "Compose",
    "ContrastiveViews",
    "CropFlip",
    "DigitsDataModule",
    "DownloadedDataModule",
    "FashionMNISTDataModule",
    "FileSet",
    "FolderDataModule",
    "ImageFiles",
    "ImageNetDataModule",
    "ImageNetV2DataModule",
    "InMemorySet",
    "MNISTDataModule",
    "MedMNISTDataModule",
    "Normalize",
    "ResizedCropFlip",
    "ResumableLoader",
    "SVHNDataModule",
    "Source",
    "SplitSpec",
    "TexturesDataModule",
    "TinyImageNetDataModule",
    "ToyDataModule",
    "ViewedDataset",
    "long_tail_counts",
    "long_tail_rows",
]
