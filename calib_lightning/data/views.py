"""How a training stage prepares its images: unaugmented, cropped, or as two views of each."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib_lightning.data.transforms import Compose
from calib_lightning.types import Views
from calib_lightning.utils.seeding import derive_seed, row_uniform

_RESIZED_CROP, _CONTRAST = 3, 4  # separate these random streams from others
_VIEWS = 2
_TRIES = 10  # boxes drawn before the fallback
_RATIO = (3 / 4, 4 / 3)  # width to height
_CROP_DRAWS = 2 * _TRIES + 3  # area and ratio of every try, position, mirror
_JITTERED, _GRAY = 0.8, 0.2  # fractions of the views
_LUMA = (0.2989, 0.587, 0.114)

# Operations are numbered by their position.
_COLOUR = ("brightness", "contrast", "saturation", "hue")


class CleanViews(Views):
    """Unaugmented, normalised training images; other loaders' images are unchanged.

    Example:
        >>> from calib_lightning.data import Normalize
        >>> transform = CleanViews().transform(Normalize((0.5,), (0.5,)), augment=None, seed=0)
        >>> transform(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8), torch.tensor([0]), 0).unique()
        tensor([1.])
    """

    optional = True

    def transform(self, normalize: nn.Module, augment: nn.Module | None, seed: int) -> nn.Module:
        """Return ``normalize``."""
        return normalize


class ResizedCropFlip(Views):
    """A random crop of each image, resized to the image's size and mirrored with probability 1/2.

    Area, shape and position are drawn as in torchvision's ``RandomResizedCrop`` with the ratio 3/4 to 4/3. This
    replaces the data module's augmentation.

    Args:
        scale: Smallest and largest area of the crop, as a fraction of the image's, in ``(0, 1]``.
        flip: Whether to mirror.

    Raises:
        ValueError: If ``scale`` is out of range.

    Example:
        >>> from calib_lightning.data import Normalize
        >>> transform = ResizedCropFlip().transform(Normalize((0.5,), (0.5,)), augment=None, seed=0)
        >>> transform(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([5, 7]), 0).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, scale: tuple[float, float] = (0.2, 1.0), flip: bool = True) -> None:
        self.scale, self.flip = _checked_scale(scale), flip

    def transform(self, normalize: nn.Module, augment: nn.Module | None, seed: int) -> nn.Module:
        """Crop, mirror, normalise."""
        return Compose(_ResizedCrop(self.scale, self.flip, seed), normalize)


class ContrastiveViews(Views):
    """Two independent views of each image for contrastive learning (Khosla et al., NeurIPS 2020).

    Each view is cropped and mirrored as in `ResizedCropFlip`; with probability 0.8, brightness, contrast, saturation
    and hue are changed in random order; with probability 0.2 it becomes grey; then it is normalised. For grey images
    (C = 1), only brightness and contrast are changed.

    Args:
        scale: Smallest and largest area of the crop, as a fraction of the image's, in ``(0, 1]``.
        jitter: Strengths of brightness, contrast and saturation, in ``[0, 1]``: the factor is drawn from
            ``U(1 - s, 1 + s)``; and of hue, in ``[0, 0.5]``: the shift is ``U(-s, s)`` of the colour circle.
        flip: Whether to mirror; use False for digits and letters.

    Raises:
        ValueError: If ``scale`` or ``jitter`` is out of range.

    Deviations:
        Pixels are rounded to bytes once, at the end; a chain of Pillow operations rounds after each.

    Example:
        >>> from calib_lightning.data import Normalize
        >>> transform = ContrastiveViews().transform(Normalize((0.5,) * 3, (0.5,) * 3), augment=None, seed=0)
        >>> transform(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), 0).shape
        torch.Size([4, 2, 3, 32, 32])
    """

    def __init__(
        self,
        scale: tuple[float, float] = (0.2, 1.0),
        jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1),
        flip: bool = True,
    ) -> None:
        most = (1.0, 1.0, 1.0, 0.5)
        if len(jitter) != len(most) or not all(0 <= s <= high for s, high in zip(jitter, most, strict=True)):
            raise ValueError(
                f"jitter is {tuple(jitter)}; it must hold four strengths: brightness, contrast and saturation in [0, "
                "1], hue in [0, 0.5], such as (0.4, 0.4, 0.4, 0.1)."
            )
        self.scale, self.jitter, self.flip = _checked_scale(scale), tuple(jitter), flip

    def transform(self, normalize: nn.Module, augment: nn.Module | None, seed: int) -> nn.Module:
        """Map images ``(N, C, H, W)`` to views ``(N, 2, C, H, W)``."""
        return _Contrast(normalize, self.scale, self.jitter, self.flip, seed)


# --- crops -----------------------------------------------------------------------------------------------------------


def crop_boxes(draw: Tensor, height: int | Tensor, width: int | Tensor, scale: tuple[float, float]) -> Tensor:
    """Draw boxes ``(N, 4)`` int64, top, left, height, width, like torchvision's ``RandomResizedCrop``, for many images.

    The first of ten tries that fits is used: area ``U(scale) H W``, log-uniform ratio 3/4 to 4/3, rounded sides,
    uniform position; otherwise the largest centred box with an allowed ratio. ``draw``: ``(N, 22)`` float64 in [0, 1).
    """
    tall_side, wide_side = (torch.as_tensor(side, device=draw.device).view(-1, 1) for side in (height, width))
    area = (scale[0] + draw[:, :_TRIES] * (scale[1] - scale[0])) * (tall_side * wide_side)
    low, high = math.log(_RATIO[0]), math.log(_RATIO[1])
    ratio = (low + draw[:, _TRIES : 2 * _TRIES] * (high - low)).exp()
    wide, tall = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (wide > 0) & (wide <= wide_side) & (tall > 0) & (tall <= tall_side)
    # decreasing numbers make argmax well-defined, which it is not for ties of booleans
    first = (fits * torch.arange(_TRIES, 0, -1, device=draw.device)).argmax(dim=1, keepdim=True)
    any_fits = fits.any(dim=1)
    middle_wide = wide_side.minimum((tall_side.double() * _RATIO[1]).round().long())
    middle_tall = tall_side.minimum((wide_side.double() / _RATIO[0]).round().long())
    wide = wide.gather(1, first).squeeze(1).where(any_fits, middle_wide.squeeze(1))
    tall = tall.gather(1, first).squeeze(1).where(any_fits, middle_tall.squeeze(1))
    place = draw[:, 2 * _TRIES : 2 * _TRIES + 2]
    top = (place[:, 0] * (tall_side.squeeze(1) - tall + 1)).long().where(any_fits, (tall_side.squeeze(1) - tall) // 2)
    left = (place[:, 1] * (wide_side.squeeze(1) - wide + 1)).long().where(any_fits, (wide_side.squeeze(1) - wide) // 2)
    return torch.stack((top, left, tall, wide), dim=1)


def resized_crop(image: Tensor, box: Tensor, mirror: Tensor) -> Tensor:
    """Resize a box ``(N, 4)`` of each image bilinearly to the image's size; float32, optionally mirrored.

    Boxes never exceed the image, so torchvision's anti-aliasing would have no effect. Values are not rounded.
    """
    height, width = image.shape[2:]
    top, left, tall, wide = box.unsqueeze(2).double().unbind(1)
    x = torch.arange(width, dtype=torch.float64, device=image.device) + 0.5
    y = torch.arange(height, dtype=torch.float64, device=image.device) + 0.5
    from_x = left + (x * (wide / width) - 0.5).clamp_min(0).minimum(wide - 1)
    from_y = top + (y * (tall / height) - 0.5).clamp_min(0).minimum(tall - 1)
    from_x = torch.where(mirror.unsqueeze(1), from_x.flip(1), from_x)
    # from -1 at the left edge of the first pixel to 1 at the right edge of the last
    to_x, to_y = ((2 * from_x + 1) / width - 1).float(), ((2 * from_y + 1) / height - 1).float()
    shape = (len(image), height, width)
    grid = torch.stack((to_x.unsqueeze(1).expand(shape), to_y.unsqueeze(2).expand(shape)), dim=-1)
    return F.grid_sample(image.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)


class _ResizedCrop(nn.Module):
    def __init__(self, scale: tuple[float, float], flip: bool, seed: int) -> None:
        super().__init__()
        self.scale, self.flip, self.seed = scale, flip, seed

    def forward(self, image: Tensor, index: Tensor, epoch: int) -> Tensor:
        _check_bytes(image)
        draw = row_uniform(index, _CROP_DRAWS, seed=derive_seed(self.seed, epoch, _RESIZED_CROP, 0))
        return _to_bytes(_cropped(image, draw, self.scale, self.flip))


def _cropped(image: Tensor, draw: Tensor, scale: tuple[float, float], flip: bool) -> Tensor:
    mirror = (draw[:, -1] < 0.5) & flip
    return resized_crop(image, crop_boxes(draw, image.shape[2], image.shape[3], scale), mirror)


# --- colours ---------------------------------------------------------------------------------------------------------


def gray(image: Tensor) -> Tensor:
    """Brightness ``(N, 1, H, W)`` of each pixel, ``0.2989 R + 0.587 G + 0.114 B``; grey images are unchanged."""
    if image.shape[1] == 1:
        return image
    return _LUMA[0] * image[:, 0:1] + _LUMA[1] * image[:, 1:2] + _LUMA[2] * image[:, 2:3]


def adjust(image: Tensor, operation: str, amount: Tensor) -> Tensor:
    """Change one colour property of images in ``[0, 255]`` by an amount per image, like torchvision.

    "brightness" blends with black, "contrast" with the mean grey, "saturation" with the grey image (1: no change);
    "hue" rotates the colour circle by a fraction of a turn.
    """
    amount = amount.to(image.dtype).view(-1, 1, 1, 1)
    match operation:
        case "brightness":
            return (image * amount).clamp_(0, 255)
        case "contrast":
            mean = gray(image).mean(dim=(1, 2, 3), keepdim=True)
            return (image * amount).add_(mean * (1 - amount)).clamp_(0, 255)
        case "saturation":
            return (image * amount).add_(gray(image) * (1 - amount)).clamp_(0, 255)
        case _:
            return _turn_hue(image, amount)


def _turn_hue(image: Tensor, turn: Tensor) -> Tensor:
    """Rotate the colour circle; a pixel's largest and smallest channel values are preserved."""
    red, green, blue = image[:, 0:1], image[:, 1:2], image[:, 2:3]
    top = image.amax(dim=1, keepdim=True)
    spread = top - image.amin(dim=1, keepdim=True)
    # hue in sixths of a turn; grey pixels have none
    divisor = torch.where(spread == 0, 1, spread)
    hue = torch.where(
        top == red,
        (green - blue) / divisor,
        torch.where(top == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    hue = (hue + 6 * turn).remainder_(6)
    # how far each channel is below the largest one, as a fraction of the spread: HSV to RGB without its six cases
    below = (2 - (hue - 3).abs(), (hue - 2).abs() - 1, (hue - 4).abs() - 1)
    return torch.cat([top - spread * part.clamp_(0, 1) for part in below], dim=1)


class _Contrast(nn.Module):
    def __init__(
        self, normalize: nn.Module, scale: tuple[float, float], jitter: tuple[float, ...], flip: bool, seed: int
    ) -> None:
        super().__init__()
        self.normalize, self.scale, self.jitter, self.flip, self.seed = normalize, scale, jitter, flip, seed

    def forward(self, image: Tensor, index: Tensor, epoch: int) -> Tensor:
        _check_bytes(image)
        if image.shape[1] not in (1, 3):
            raise ValueError(
                f"The images have shape {tuple(image.shape)}; ContrastiveViews changes colours and needs C = 1 or 3. "
                "Use ResizedCropFlip for other channels."
            )
        draws = _CROP_DRAWS + 2 * len(_COLOUR) + 2
        # order: (view, image)
        draw = torch.cat(
            [row_uniform(index, draws, seed=derive_seed(self.seed, epoch, _CONTRAST, view)) for view in range(_VIEWS)]
        )
        views = _cropped(image.repeat(_VIEWS, 1, 1, 1), draw[:, :_CROP_DRAWS], self.scale, self.flip)
        self._jitter(views, draw[:, _CROP_DRAWS:-1])
        if image.shape[1] == 3:
            rows = (draw[:, -1] < _GRAY).nonzero().squeeze(1)
            views.index_copy_(0, rows, gray(views[rows]).expand(-1, 3, -1, -1))
        found = self.normalize(_to_bytes(views), index.repeat(_VIEWS), epoch)
        return torch.stack(found.chunk(_VIEWS), dim=1) if len(index) else found.view(0, _VIEWS, *found.shape[1:])

    def _jitter(self, views: Tensor, draw: Tensor) -> None:
        """Change the colours of most views in place, each in its own order."""
        operations = _COLOUR if views.shape[1] == 3 else _COLOUR[:2]
        strength = draw.new_tensor(self.jitter)
        amount = (2 * draw[:, : len(_COLOUR)] - 1) * strength
        amount[:, :3] += 1
        order = draw[:, len(_COLOUR) : len(_COLOUR) + len(operations)].argsort(dim=1)
        order = order.where(draw[:, -1:] < _JITTERED, -1)
        for step in order.unbind(1):
            for number, operation in enumerate(operations):
                if self.jitter[number] > 0:
                    rows = (step == number).nonzero().squeeze(1)
                    views.index_copy_(0, rows, adjust(views[rows], operation, amount[rows, number]))


# --- checks ----------------------------------------------------------------------------------------------------------


def _to_bytes(image: Tensor) -> Tensor:
    return image.round_().to(torch.uint8)


def _check_bytes(image: Tensor) -> None:
    if image.dtype != torch.uint8 or image.ndim != 4:
        raise ValueError(
            f"The images are {image.dtype} of shape {tuple(image.shape)}; views need torch.uint8 of shape (N, C, H, "
            "W). Pass the bytes, before normalisation."
        )


def _checked_scale(scale: tuple[float, float]) -> tuple[float, float]:
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(
            f"scale is {tuple(scale)}; it must hold the smallest and the largest area of a crop as fractions of the "
            "image, 0 < smallest <= largest <= 1, such as (0.2, 1.0)."
        )
    return scale[0], scale[1]
