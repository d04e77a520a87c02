"""Views for a plain ``DataLoader``: a data set whose images are prepared as a stage asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from calib_lightning.data.transforms import Normalize
from calib_lightning.data.views import CleanViews
from calib_lightning.types import Views
from calib_lightning.utils.seeding import run_seed


class ViewedDataset(Dataset[tuple[Tensor, Any]]):
    """A map-style data set whose images are prepared by `Views`, for methods and stages that ask for them.

    What data modules of this package do in a fit, it does in a plain ``DataLoader``: `RefCal` gets two views of each
    image, a stage those of its training. The draws are a function of (seed, epoch, position). A module of this package
    tells the epoch; in other loops call `set_epoch` before each, as of torch's ``DistributedSampler``.

    Args:
        dataset: Its items are ``(image, label)``, with PIL images or uint8 tensors ``(C, H, W)`` of one size.
        views: Views where nobody asks for others. Default: `CleanViews`, also for validation and test.
        mean: Mean of each channel, as a fraction of full brightness; one value for all, or one per channel.
        std: Standard deviation, likewise.
        seed: Seed of the draws; ``None`` means the seed of the run.

    Raises:
        TypeError: If ``views`` are not `Views`; on reading, if an item has no image and label.
        ValueError: On reading, if an image does not hold bytes.

    Attributes:
        stage_views: What a method or a stage asks for; ``None`` means ``views``.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> from calib_lightning.data import ContrastiveViews
        >>> images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
        >>> image, label = ViewedDataset(TensorDataset(images, torch.arange(4)), ContrastiveViews())[2]
        >>> tuple(image.shape), int(label)
        ((2, 3, 8, 8), 2)
    """

    def __init__(
        self,
        dataset: Any,
        views: Views | None = None,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
        seed: int | None = None,
    ) -> None:
        if views is not None and not isinstance(views, Views):
            raise TypeError(f"views is {views!r}; it must be an object such as ContrastiveViews().")
        self.dataset, self.views, self.seed = dataset, CleanViews() if views is None else views, seed
        self.stage_views: Views | None = None
        self._normalize = Normalize(mean, std)
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # worker processes read it, too
        self._made: tuple[Views, nn.Module] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass.

        Args:
            epoch: Epoch number.
        """
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int) -> tuple[Tensor, Any]:
        item = self.dataset[place]
        if not isinstance(item, list | tuple) or len(item) < 2:
            raise TypeError(
                f"Item {place} of {type(self.dataset).__name__} is a {type(item).__name__}; it must be (image, label)."
                " Let the data set return such pairs."
            )
        views = self.views if self.stage_views is None else self.stage_views
        if self._made is None or self._made[0] is not views:
            seed = run_seed() if self.seed is None else self.seed
            self._made = views, views.transform(self._normalize, None, seed)
        image = self._bytes(place, item[0]).unsqueeze(0)
        made: Tensor = self._made[1](image, torch.tensor([place]), int(self._epoch))
        return made[0], item[1]

    def _bytes(self, place: int, given: Any) -> Tensor:
        """An image as uint8 ``(C, H, W)``."""
        pil = not isinstance(given, Tensor)
        # a copy: the memory of PIL images is read-only
        image: Tensor = torch.from_numpy(np.atleast_3d(np.asarray(given)).transpose(2, 0, 1).copy()) if pil else given
        if image.dtype != torch.uint8 or image.ndim != 3:
            raise ValueError(
                f"The image of item {place} of {type(self.dataset).__name__} is {image.dtype} of shape "
                f"{tuple(image.shape)}; it must be a PIL image or a torch.uint8 tensor (C, H, W). Views work on bytes "
                "and normalise themselves: remove ToTensor() and Normalize() from the data set's transform."
            )
        return image
