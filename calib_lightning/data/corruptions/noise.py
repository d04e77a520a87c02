r"""Noise of each pixel and channel: x in [0, 1], constant c.

- gaussian_noise: :math:`x + c\,\epsilon` with :math:`\epsilon \sim N(0, 1)`
- shot_noise: :math:`\mathrm{Poisson}(c x) / c`
- impulse_noise: a share c of the values becomes 0 or 1, with equal chances
- speckle_noise: :math:`x + c\,x\,\epsilon`
"""

from __future__ import annotations

import numpy as np

from calib_lightning.data.corruptions.draws import Floats, Images, Streams, normal, uniform
from calib_lightning.data.corruptions.filters import unit


def gaussian_noise(image: Images, scale: float, rngs: Streams) -> Floats:
    """Add normal noise."""
    return unit(image) + np.float32(scale) * normal(rngs, *image.shape[1:])


def shot_noise(image: Images, photons: float, rngs: Streams) -> Floats:
    """Count photons."""
    rates = image * (photons / 255)
    counts = np.stack([rng.poisson(rate) for rng, rate in zip(rngs, rates, strict=True)])
    return (counts / photons).astype(np.float32)


def impulse_noise(image: Images, share: float, rngs: Streams) -> Floats:
    """Put salt and pepper on it."""
    draw = uniform(rngs, *image.shape[1:])
    noisy = unit(image)
    noisy[draw < share] = 1
    noisy[draw < share / 2] = 0
    return noisy


def speckle_noise(image: Images, scale: float, rngs: Streams) -> Floats:
    """Add normal noise that grows with the value."""
    x = unit(image)
    return x + x * np.float32(scale) * normal(rngs, *image.shape[1:])
