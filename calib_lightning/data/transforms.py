"""Transforms of batches of uint8 images; all random numbers are functions of (seed, epoch, row)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import center_crop, resize, rgb_to_grayscale

from calib_lightning.utils.seeding import derive_seed, row_uniform

Transform = Callable[[Tensor, Tensor, int], Tensor]
"""Maps ``(image (N, C, H, W), index (N,), epoch)`` to images ``(N, C, H, W)``."""

_CROP_FLIP = 1  # separates this random stream from others


class Normalize(nn.Module):
    """Scale uint8 images to ``[0, 1]`` and standardise each channel, ``(x / 255 - mean) / std``.

    Args:
        mean: Mean of each channel, as a fraction of full brightness.
        std: Standard deviation of each channel, in the same units.

    Example:
        >>> transform = Normalize(mean=(0.5,), std=(0.5,))
        >>> transform(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8), torch.tensor([0]), 0).unique()
        tensor([1.])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, image: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Return standardised images.

        Args:
            image: ``(N, C, H, W)`` uint8.
            index: Unused.
            epoch: Unused.

        Returns:
            ``(N, C, H, W)`` float32.
        """
        return image.to(torch.float32).div_(255).sub_(self.mean).div_(self.std)


class CropFlip(nn.Module):
    """Random crop after zero padding and random horizontal flip, the usual augmentation of CIFAR.

    Each image is shifted by up to ``padding`` pixels in each direction, uniformly, and mirrored with probability 1/2.

    Args:
        padding: Black pixels added to each side before cropping to the original size.
        flip: Whether to mirror.
        seed: Seed of the run; with the epoch and the row it determines every draw.

    Example:
        >>> transform = CropFlip(padding=4, seed=1)
        >>> image, index = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([5, 7])
        >>> transform(image, index, 0).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(self, padding: int = 4, flip: bool = True, seed: int = 0) -> None:
        super().__init__()
        if padding < 0:
            raise ValueError(f"padding is {padding}; it must be at least 0. 0 means no crop.")
        self.padding, self.flip, self.seed = padding, flip, seed

    def forward(self, image: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Return augmented images.

        Args:
            image: ``(N, C, H, W)``, any dtype.
            index: Row ``(N,)`` int64 of each image, on the image's device.
            epoch: Epoch number.

        Returns:
            ``(N, C, H, W)``, dtype of the input.
        """
        height, width = image.shape[2:]
        draw = row_uniform(index, 3, seed=derive_seed(self.seed, epoch, _CROP_FLIP))
        top, left = (draw[:, :2] * (2 * self.padding + 1)).long().unbind(1)
        # a view of every window; indexing copies only the selected ones
        windows = F.pad(image, (self.padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
        image = windows[torch.arange(len(image), device=image.device), :, top, left]
        if self.flip:
            image = torch.where((draw[:, 2] < 0.5).view(-1, 1, 1, 1), image.flip(-1), image)
        return image


class Fit(nn.Module):
    """Bring images to other channels and another size: grey repeated or luminance, shorter side resized, centre cut.

    Args:
        channels: 1 (grey) or 3 (RGB), or as many as the images have.
        size: Height and width in pixels.

    Example:
        >>> transform = Fit(3, (32, 32))
        >>> transform(torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.tensor([0, 1]), 0).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(self, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.channels, self.size = channels, size

    def forward(self, image: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Return images of the wanted shape.

        Args:
            image: ``(N, C, H, W)`` uint8.
            index: Unused.
            epoch: Unused.

        Returns:
            ``(N, channels, *size)`` uint8.
        """
        if image.shape[1] != self.channels:
            image = rgb_to_grayscale(image) if self.channels == 1 else image.expand(-1, self.channels, -1, -1)
        if image.shape[2:] != self.size:
            scale = max(wanted / found for wanted, found in zip(self.size, image.shape[2:], strict=True))
            sides = [max(round(found * scale), side) for found, side in zip(image.shape[2:], self.size, strict=True)]
            image = center_crop(resize(image, sides, antialias=True), list(self.size))
        return image


class Compose(nn.Module):
    """Apply transforms in sequence.

    Args:
        *transforms: Modules called as ``transform(image, index, epoch)``, in order.
    """

    def __init__(self, *transforms: nn.Module) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(transforms)

    def forward(self, image: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Return the images after all transforms.

        Args:
            image: ``(N, C, H, W)``, input of the first transform.
            index: Row ``(N,)`` int64 of each image.
            epoch: Epoch number.

        Returns:
            ``(N, C, H, W)``, output of the last transform.
        """
        for transform in self.transforms:
            image = transform(image, index, epoch)
        return image
