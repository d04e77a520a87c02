"""Names and constants of the 19 corruptions of Hendrycks and Dietterich (2019), for CIFAR-C and for ImageNet-C."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    *("gaussian_blur", "saturate", "spatter", "speckle_noise"),
)
"""The 15 corruptions of Hendrycks and Dietterich (2019) and their four extra ones."""
SEVERITIES = (1, 2, 3, 4, 5)
Table = Literal["cifar", "imagenet"]
"""Whose constants: those of CIFAR-C, made for 32 x 32 pixels, or of ImageNet-C, for 224 x 224."""
Constants = Mapping[str, tuple[Any, ...]]
"""What a corruption takes at severities 1 to 5."""

_CIFAR: Constants = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation
    "shot_noise": (500, 250, 100, 75, 50),  # photons
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),  # share
    "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),  # standard deviation
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),  # sigma
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),  # sigma, delta, rounds
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),  # radius, sigma
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),  # radius, sigma
    "zoom_blur": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),  # end, step
    "snow": (  # mean, std, zoom, threshold, radius, sigma, mix
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),  # weights of image and photograph
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),  # weight, decay
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),  # scale, shift
    "jpeg_compression": (80, 65, 58, 50, 40),  # quality
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),  # share of the size
    "elastic_transform": (  # alpha, sigma, shift of the three points: shares of `ELASTIC_SIDE`
        (0, 0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    ),
    "spatter": (  # mean, std, sigma, threshold, strength (water) or sigma (mud), whether mud
        (0.62, 0.1, 0.7, 0.7, 0.5, 0),
        (0.65, 0.1, 0.8, 0.7, 0.5, 0),
        (0.65, 0.3, 1, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1),
        (0.65, 0.1, 0.5, 0.68, 0.6, 1),
    ),
}
_IMAGENET: Constants = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "shot_noise": (60, 25, 12, 5, 3),
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
    "speckle_noise": (0.15, 0.2, 0.35, 0.45, 0.6),
    "gaussian_blur": (1, 2, 3, 4, 6),
    "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    "snow": (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    "jpeg_compression": (25, 18, 15, 10, 7),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
    "elastic_transform": (
        (2, 0.7, 0.1),
        (2, 0.08, 0.2),
        (0.05, 0.01, 0.02),
        (0.07, 0.01, 0.02),
        (0.12, 0.01, 0.02),
    ),
    "spatter": (
        (0.65, 0.3, 4, 0.69, 0.6, 0),
        (0.65, 0.3, 3, 0.68, 0.6, 0),
        (0.65, 0.3, 2, 0.68, 0.5, 0),
        (0.65, 0.3, 1, 0.65, 1.5, 1),
        (0.67, 0.4, 1, 0.65, 1.5, 1),
    ),
}
TABLES: Mapping[Table, Constants] = {"cifar": _CIFAR, "imagenet": _IMAGENET}
"""Constants by table and corruption, at severities 1 to 5."""
FROST_STEP: Mapping[Table, int] = {"cifar": 5, "imagenet": 1}
"""Every how many pixels of a frost photograph are kept: CIFAR-C scales it by 0.2."""
ELASTIC_SIDE: Mapping[Table, float] = {"cifar": 1.0, "imagenet": 244 / 224}
"""The unit of elastic_transform's constants, as a share of the image's side; ImageNet-C was made with 244 for 224."""


def table_for(height: int, width: int) -> Table:
    """Choose the constants that fit the size of an image.

    CIFAR-C's were made for 32 x 32 pixels and ImageNet-C's for 224 x 224. Radii are in pixels, and the strong ones of
    ImageNet-C leave nothing to recognise in an image of 64: so images up to that size take CIFAR-C's.

    Args:
        height: Rows of pixels.
        width: Columns of pixels.

    Returns:
        "cifar" up to 64 pixels on the smaller side, else "imagenet".

    Example:
        >>> table_for(28, 28), table_for(224, 224)
        ('cifar', 'imagenet')
    """
    return "cifar" if min(height, width) <= 64 else "imagenet"
