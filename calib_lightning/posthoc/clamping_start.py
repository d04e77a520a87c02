"""Starting points of Neural Clamping: a random perturbation, or the one that raises the entropy most."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calib_lightning.posthoc.clamping_rows import ClampRows, reduced
from calib_lightning.utils.described import Described


class ClampStart(Described, ABC):
    """An initial perturbation ``delta_0``, the same on every process."""

    @abstractmethod
    def delta(self, rows: ClampRows, like: Tensor) -> Tensor:
        """Compute ``delta_0``.

        Args:
            rows: Images and network.
            like: A tensor of the shape ``(C, H, W)``, dtype and device of the result.

        Returns:
            ``(C, H, W)``.
        """


@dataclass(frozen=True)
class RandomStart(ClampStart):
    """Gaussian noise, as in the experiments of Tang et al. (2024).

    Args:
        scale: Standard deviation in units of the normalised image; 0 starts without a perturbation.
        seed: Any integer.

    Raises:
        ValueError: A scale that is negative or not finite.

    Example:
        >>> RandomStart(0.1).name
        'RandomStart(scale=0.1)'
    """

    scale: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the scale."""
        if not 0.0 <= self.scale < math.inf:
            raise ValueError(f"scale is {self.scale!r}; it must be finite and >= 0. 0.01 is the usual value.")

    def delta(self, rows: ClampRows, like: Tensor) -> Tensor:
        """Draw the noise on the CPU, so that it is the same for all devices; see `ClampStart.delta`."""
        generator = torch.Generator().manual_seed(self.seed)
        return (self.scale * torch.randn(like.shape, generator=generator, dtype=torch.float64)).to(like)


class DataDrivenStart(ClampStart):
    """The perturbation of Theorem 3.2 of Tang et al. (2024), which raises the entropy most to first order.

    With ``g = sum_i grad_x H(softmax(f(x_i)))``, the smallest and largest value ``l`` and ``mu`` of each input over the
    rows, and the valid range ``[low, high]`` of an image, ``delta_0 = sign(g) eta`` with ``eta = l - low`` where
    ``g < 0``, ``high - mu`` where ``g > 0`` and 0 where ``g = 0``. Among the perturbations that keep all rows in the
    range, it is the best one for the linear approximation. Thousands of natural images reach both ends of the range at
    nearly every pixel, so most entries are 0; ``search.start_moved`` is the fraction of the others.

    Args:
        low: Smallest value of each channel in normalised space, ``(0 - mean) / std`` for images in ``[0, 1]``; ``None``
            if `calib calibrate` is to take both from the data of the run.
        high: Largest value of each channel, ``(1 - mean) / std``.

    Raises:
        ValueError: Different numbers of channels, or ``low`` not below ``high``.

    Example:
        >>> DataDrivenStart(low=[-1.0], high=[1.0]).name
        'DataDrivenStart(low=[-1.0], high=[1.0])'
    """

    def __init__(self, low: Sequence[float] | None = None, high: Sequence[float] | None = None) -> None:
        self.low: tuple[float, ...] = ()
        self.high: tuple[float, ...] = ()
        if low is None and high is None:
            return
        self.low, self.high = tuple(map(float, low or ())), tuple(map(float, high or ()))
        if not self.low or len(self.low) != len(self.high):
            raise ValueError(f"low is {low!r} and high {high!r}; both must have one number per channel.")
        if not all(-math.inf < a < b < math.inf for a, b in zip(self.low, self.high, strict=True)):
            raise ValueError(f"low is {low!r} and high {high!r}; they must be finite, and low < high in every channel.")

    def delta(self, rows: ClampRows, like: Tensor) -> Tensor:
        """Go through the rows once, forwards and backwards; see `ClampStart.delta`."""
        channels = like.shape[0]
        if not self.low:
            raise ValueError(
                f"{self.name}: low and high are not given; they must be the range of the images. Pass low=(0 - mean) / "
                "std and high=(1 - mean) / std of their normalisation."
            )
        if len(self.low) != channels:
            raise ValueError(f"{self.name}: low has {len(self.low)} channels; it must have {channels}, as images have.")
        slope, least, largest = _entropy_slope_and_range(rows, like)
        shape = (channels,) + (1,) * (like.ndim - 1)
        low, high = like.new_tensor(self.low).view(shape), like.new_tensor(self.high).view(shape)
        width = high - low
        if bool((least < low - 1e-3 * width).any()) or bool((largest > high + 1e-3 * width).any()):
            raise ValueError(
                f"{self.name}: the images are in [{float(least.min()):g}, {float(largest.max()):g}]; they must be in "
                "that range. Pass low=(0 - mean) / std and high=(1 - mean) / std of their normalisation."
            )
        eta = torch.where(slope < 0, least - low, torch.where(slope > 0, high - largest, 0.0))
        # A gap as small as the rounding of the normalisation counts as none.
        return torch.sign(slope) * torch.where(eta > 1e-5 * width, eta, 0.0)


def _entropy_slope_and_range(rows: ClampRows, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    slope = torch.zeros_like(like)
    least, largest = torch.full_like(like, torch.inf), torch.full_like(like, -torch.inf)
    for image, _ in rows.batches():
        least = torch.minimum(least, image.amin(dim=0))
        largest = torch.maximum(largest, image.amax(dim=0))
        with torch.enable_grad():
            point = image.detach().requires_grad_()
            log_probs = torch.log_softmax(rows.differentiable_logits(point), dim=-1)
            entropy = -(log_probs.exp() * log_probs).sum()
        slope += torch.autograd.grad(entropy, point)[0].sum(dim=0)
    return reduced(slope), reduced(least, "MIN"), reduced(largest, "MAX")
