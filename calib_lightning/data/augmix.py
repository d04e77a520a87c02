"""The views of AugMix (Hendrycks et al., ICLR 2020), for batches of uint8 images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import autocontrast, equalize  # type: ignore[attr-defined]

from calib_lightning.utils.seeding import derive_seed, row_uniform

_AUGMIX = 2  # separates this random stream from others
_VIEWS = 2  # mixed views per image
_DEPTH = 3  # maximum length of a chain

# Operations are numbered by their position. None overlaps with the corruptions of CIFAR-C.
OPERATIONS = (
    "autocontrast",
    "equalize",
    "posterize",
    "solarize",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
_GEOMETRIC = OPERATIONS.index("rotate")  # from here on


def posterize(image: Tensor, level: Tensor) -> Tensor:
    """Keep the highest ``4 - int(0.4 level)`` bits of each pixel; uint8 images, levels ``(N,)`` in ``[0, 10]``."""
    bits = 4 - (level * 4 / 10).long()
    return image & (256 - 2 ** (8 - bits)).to(torch.uint8).view(-1, 1, 1, 1)


def solarize(image: Tensor, level: Tensor) -> Tensor:
    """Invert pixels at or above ``256 - int(25.6 level)``; uint8 images, levels ``(N,)`` in ``[0, 10]``."""
    threshold = 256 - (level * 256 / 10).to(torch.int16)  # 256 is not a byte
    return torch.where(image >= threshold.view(-1, 1, 1, 1), 255 - image, image)


def affine(image: Tensor, matrix: Tensor) -> Tensor:
    """Assign each pixel centre ``(x, y)`` the colour at ``(a x + b y + c, d x + e y + f)``, like bilinear Pillow.

    ``matrix`` is ``(N, 2, 3)`` float64, in pixels. Outside the uint8 image ``(N, C, H, W)`` is black; the border is
    not blended. Values are truncated.
    """
    height, width = image.shape[2:]
    x = torch.arange(width, dtype=torch.float64, device=image.device) + 0.5
    y = torch.arange(height, dtype=torch.float64, device=image.device) + 0.5
    # from -1 to 1 over the image; x and y terms are small, so only their sum is computed per pixel
    (a, b, c), (d, e, f) = (matrix * (matrix.new_tensor([[2 / width], [2 / height]]))).permute(1, 2, 0).unsqueeze(-1)
    from_x = (a * x + c - 1).float().unsqueeze(1) + (b * y).float().unsqueeze(2)
    from_y = (d * x + f - 1).float().unsqueeze(1) + (e * y).float().unsqueeze(2)
    inside = (from_x.abs() < 1) & (from_y.abs() < 1)
    grid = torch.stack((from_x, from_y), dim=-1)
    found = F.grid_sample(image.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    # interpolation between equal values may give slightly less
    return found.add_(2**-8).mul_(inside.unsqueeze(1)).to(torch.uint8)


def geometric_matrix(operation: Tensor, level: Tensor, height: int, width: int) -> Tensor:
    """Matrices ``(N, 2, 3)`` float64 of rotations, shears and translations, for `affine`.

    Rotation by ``int(3 level)`` degrees about the centre, shear by ``0.03 level``, translation by ``int(level W / 30)``
    or ``int(level H / 30)`` pixels, in the opposite direction for negative levels; one operation and level per image.
    """
    zero = torch.zeros_like(level)
    degrees = (level * 30 / 10).trunc().where(operation == OPERATIONS.index("rotate"), zero)
    shear_x, shear_y = (
        (level * 0.3 / 10).where(operation == OPERATIONS.index(name), zero) for name in ("shear_x", "shear_y")
    )
    move_x, move_y = (
        (level * (side / 3) / 10).trunc().where(operation == OPERATIONS.index(name), zero)
        for name, side in (("translate_x", width), ("translate_y", height))
    )
    # Rounded as in Pillow: the last bits of a cosine differ between devices.
    cos, sin = (part.round(decimals=15) for part in (degrees.deg2rad().cos(), degrees.deg2rad().sin()))
    centre_x, centre_y = width / 2, height / 2
    rows = (
        (cos, shear_x - sin, centre_x - cos * centre_x + sin * centre_y + move_x),
        (shear_y + sin, cos, centre_y - sin * centre_x - cos * centre_y + move_y),
    )
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def _augment(image: Tensor, number: int, operation: Tensor, level: Tensor) -> Tensor:
    """Apply one operation, or the geometric ones together, to images ``(N, C, H, W)``."""
    match OPERATIONS[number]:
        case "autocontrast":
            return autocontrast(image)
        case "equalize":
            return equalize(image)
        case "posterize":
            return posterize(image, level.abs())
        case "solarize":
            return solarize(image, level.abs())
        case _:
            return affine(image, geometric_matrix(operation, level, image.shape[2], image.shape[3]))


class AugMixViews(nn.Module):
    """Three views of each image, AugMix (Hendrycks et al., ICLR 2020): itself and two mixtures of its augmentations.

    ``x_v = (1 - m) prep(x) + m sum_i w_i prep(chain_i(x))`` with ``m ~ Beta(1, 1)``, ``w ~ Dirichlet(1, ..., 1)`` and
    ``width`` chains of one to three operations, each drawn from `OPERATIONS` with a level ``U(0.1, severity)``.

    Args:
        normalize: ``prep``, called as ``normalize(image, index, epoch)``, such as `Normalize`.
        severity: Maximum level, in ``[0.1, 10]``: at 10, rotations reach 30 degrees, translations a third of the image.
        width: Number of chains per mixture.
        seed: Seed of the run; with the epoch and the row it determines every draw.

    Raises:
        ValueError: If ``severity`` or ``width`` is out of range.

    Deviations:
        Translations are relative to the image's width or height instead of a constant, and images are normalised with
        ``normalize`` instead of 0.5 for mean and standard deviation.

    Example:
        >>> from calib_lightning.data import Normalize
        >>> transform = AugMixViews(Normalize((0.5,), (0.5,)), seed=1)
        >>> transform(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([5, 7]), 0).shape
        torch.Size([2, 3, 1, 8, 8])
    """

    def __init__(self, normalize: nn.Module, severity: float = 3.0, width: int = 3, seed: int = 0) -> None:
        super().__init__()
        if not 0.1 <= severity <= 10:
            raise ValueError(f"severity is {severity}; it must be in [0.1, 10]. The usual value is 3.")
        if width < 1:
            raise ValueError(f"width is {width}; it must be at least 1. The usual value is 3.")
        self.normalize, self.severity, self.width, self.seed = normalize, severity, width, seed

    def forward(self, image: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Return three views of each image.

        Args:
            image: ``(N, C, H, W)`` uint8 with C = 1 or 3.
            index: Row ``(N,)`` int64 of each image, on the image's device.
            epoch: Epoch number.

        Returns:
            ``(N, 3, C, H, W)`` float32: the image and its two mixtures, all normalised.

        Raises:
            ValueError: If the images are not uint8 of shape (N, 1 or 3, H, W).
        """
        if image.dtype != torch.uint8 or image.ndim != 4 or image.shape[1] not in (1, 3):
            raise ValueError(
                f"The images are {image.dtype} of shape {tuple(image.shape)}; AugMix needs torch.uint8 of shape (N, C, "
                "H, W) with C = 1 or 3. Pass the bytes, before normalisation."
            )
        count, width = len(image), self.width
        # per view: m, the cuts of w, and per chain its depth and, per step, operation, level and sign
        draws = width + width * (1 + 3 * _DEPTH)
        draw = row_uniform(index, _VIEWS * draws, seed=derive_seed(self.seed, epoch, _AUGMIX)).view(
            count, _VIEWS, draws
        )
        share, cuts = draw[..., :1], draw[..., 1:width].sort(dim=-1).values
        # gaps between sorted uniform numbers are Dirichlet(1, ..., 1), without logarithms
        weight = torch.cat((torch.zeros_like(share), cuts, torch.ones_like(share)), dim=-1).diff(dim=-1) * share
        # order: (view, chain, image)
        chain_draw = draw[..., width:].reshape(count, _VIEWS * width, 1 + 3 * _DEPTH).transpose(0, 1).flatten(0, 1)
        chains = self._chains(image.repeat(_VIEWS * width, 1, 1, 1), chain_draw).view(_VIEWS, width, *image.shape)
        clean = self.normalize(image, index, epoch)
        views = [clean]
        for view in range(_VIEWS):
            # separate products and sums: fused ones may round differently at the end of a batch
            mixture = clean * _per_image(1 - share[:, view])
            for chain in range(width):
                mixture += self.normalize(chains[view, chain], index, epoch) * _per_image(weight[:, view, chain])
            views.append(mixture)
        return torch.stack(views, dim=1)

    def _chains(self, image: Tensor, draw: Tensor) -> Tensor:
        """Apply one to three operations to every image, in place."""
        depth = (draw[:, 0] * _DEPTH).long() + 1
        for step, numbers in enumerate(draw[:, 1:].view(-1, _DEPTH, 3).unbind(1)):
            operation = (numbers[:, 0] * len(OPERATIONS)).long().where(depth > step, -1)
            level = 0.1 + numbers[:, 1] * (self.severity - 0.1)
            level = torch.where(numbers[:, 2] < 0.5, level, -level)
            for number in range(_GEOMETRIC + 1):
                # geometric operations only differ in their matrix and run together
                chosen = operation == number if number < _GEOMETRIC else operation >= number
                rows = chosen.nonzero().squeeze(1)
                image.index_copy_(0, rows, _augment(image[rows], number, operation[rows], level[rows]))
        return image


def _per_image(value: Tensor) -> Tensor:
    return value.float().view(-1, 1, 1, 1)
