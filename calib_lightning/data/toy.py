"""A tiny synthetic image set for tests and examples."""

from __future__ import annotations

from typing import Any

import torch

from calib_lightning.data.base import BenchmarkDataModule
from calib_lightning.data.source import Source
from calib_lightning.data.split import SplitSpec
from calib_lightning.utils.seeding import row_uniform

_PATTERN, _TRAIN, _TEST = 1, 2, 3  # seeds of the three random streams


class ToyDataModule(BenchmarkDataModule):
    """Grey images (1, 8, 8), each a faint class pattern under uniform noise: learnable, but not perfectly.

    ``pixel = 0.2 * pattern[label] + 0.8 * noise`` with all values uniform in ``[0, 1)``; labels cycle through
    the classes. The images are a function of their row, so they are the same on every machine and in every run.

    Args:
        split: How the training images are divided; by default all are for training.
        batch_size: Batch size per process.
        num_workers: Worker processes that prepare batches.
        train_size: Number of images that the split divides.
        test_size: Number of test images.
        num_classes: K.

    Example:
        >>> data = ToyDataModule(SplitSpec(val=30), train_size=90)
        >>> data.setup()
        >>> data.class_counts
        tensor([20, 20, 20])
    """

    mean = (0.5,)
    std = (0.24,)

    def __init__(
        self,
        split: SplitSpec | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        train_size: int = 300,
        test_size: int = 150,
        num_classes: int = 3,
        **others: Any,
    ) -> None:
        super().__init__(split, batch_size, num_workers, **others)
        for name, value in (("train_size", train_size), ("test_size", test_size), ("num_classes", num_classes)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        self.num_classes = num_classes
        self._sizes = train_size, test_size

    def load_train(self) -> Source:
        """Make the images that the split divides."""
        return self._make(self._sizes[0], _TRAIN)

    def load_test(self) -> Source:
        """Make the test images."""
        return self._make(self._sizes[1], _TEST)

    def _make(self, size: int, seed: int) -> Source:
        row = torch.arange(size)
        label = row % self.num_classes
        pattern = row_uniform(torch.arange(self.num_classes), 64, seed=_PATTERN)
        pixel = 0.2 * pattern[label] + 0.8 * row_uniform(row, 64, seed=seed)
        return Source((pixel * 256).to(torch.uint8).view(size, 1, 8, 8), label)
