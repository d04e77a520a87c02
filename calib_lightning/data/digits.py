"""The 8 x 8 digits of scikit-learn: real images without a download."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from calib_lightning.data.base import BenchmarkDataModule
from calib_lightning.data.card import Card
from calib_lightning.data.source import Source
from calib_lightning.data.split import SplitSpec, cut_balanced

_TEST_SIZE, _TEST_SEED = 400, 1797


class DigitsDataModule(BenchmarkDataModule):
    """Handwritten digits of Alpaydin and Kaynak (UCI, 1998): 1,797 grey images (1, 8, 8) in 10 classes.

    A fixed test set has 40 images of each class, 400 in total; the split divides the other 1,397. The 17 ink levels of
    the file, 0 to 16, become bytes by ``round(level * 255 / 16)``, so 16 is full brightness and all levels remain
    distinct. Source rows are positions among all 1,797.

    Args:
        split: How the 1,397 images are divided; by default 100 for validation, 200 for calibration.
        **options: ``batch_size``, ``num_workers`` and other sets, as in `BenchmarkDataModule`.

    Example:
        >>> data = DigitsDataModule()
        >>> data.setup()
        >>> {name: len(data.source_rows(name)) for name in data.set_names}
        {'train': 1097, 'val': 100, 'calibration': 200, 'test': 400}
    """

    card = Card(
        10,
        (1_397, 0, 400),
        (1, 8, 8),
        0,
        "CC BY 4.0",
        "https://archive.ics.uci.edu/dataset/80 (included in scikit-learn)",
    )
    num_classes = 10
    # of the images outside the test set
    mean = (0.3052,)
    std = (0.3760,)
    class_names = tuple("0123456789")
    default_split: ClassVar[SplitSpec] = SplitSpec(val=100, calibration=200)

    def load_train(self) -> Source:
        """Read the images outside the test set."""
        file, test = _read()
        return _pick(file, np.setdiff1d(np.arange(len(file.target)), test))

    def load_test(self) -> Source:
        """Read the fixed test set."""
        return _pick(*_read())


def _read() -> tuple[Any, NDArray[np.int64]]:
    file = load_digits()
    (test,) = cut_balanced(file.target, {"test": _TEST_SIZE}, num_classes=10, seed=_TEST_SEED)
    return file, test


def _pick(file: Any, rows: NDArray[np.int64]) -> Source:
    image = np.rint(file.images[rows] * (255 / 16)).astype(np.uint8)[:, None]
    label = file.target[rows].astype(np.int64)
    return Source(torch.from_numpy(image), torch.from_numpy(label), torch.from_numpy(rows))
