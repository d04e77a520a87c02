"""The fixed classifier of BalCAL: a simplex equiangular tight frame behind a residual adaptor."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib_lightning.core import Encoder
from calib_lightning.core.submodules import evaluating
from calib_lightning.functional import at_least_float32

_MOMENTUM = 0.01


def simplex_etf(num_features: int, num_classes: int) -> Tensor:
    """Draw a simplex equiangular tight frame, ``M = sqrt(K / (K - 1)) P (I - 11^T / K)``.

    ``P`` has orthonormal columns, from the QR decomposition of a uniform random matrix. The columns of ``M`` have
    norm 1 and pairwise cosine ``-1 / (K - 1)``: K directions that are as far apart as possible.

    Args:
        num_features: d, at least K.
        num_classes: K, at least 2.

    Returns:
        ``M``, ``(d, K)`` float32.

    Example:
        >>> frame = simplex_etf(8, 3)
        >>> torch.allclose(frame.T @ frame, 1.5 * torch.eye(3) - 0.5, atol=1e-6)
        True
    """
    basis, _ = torch.linalg.qr(torch.rand(num_features, num_classes, dtype=torch.float64, device="cpu"))
    frame: Tensor = math.sqrt(num_classes / (num_classes - 1)) * (basis - basis.mean(dim=1, keepdim=True))
    return frame.float()


class ETFBranch(nn.Module):
    """Residual adaptor and fixed classifier of BalCAL, on a feature map ``F`` of C channels.

    ``F' = F + conv(relu(bn(conv(relu(bn(F))))))``, ``h = gap(relu(bn(F')))`` scaled to norm 1, logits ``s h M``. As in
    the authors' network, BatchNorm has momentum 0.01, and the convolutions start from ``N(0, 2 / (9 C_out))``.

    Args:
        channels: C, at least K.
        num_classes: K.
        width: Channels between the two 3x3 convolutions.
        scale: ``s``.

    Attributes:
        etf: ``M``, ``(C, K)``: see `simplex_etf`.
    """

    etf: Tensor

    def __init__(self, channels: int, num_classes: int, width: int, scale: float) -> None:
        super().__init__()
        self.adaptor = nn.Sequential(
            nn.BatchNorm2d(channels, momentum=_MOMENTUM),
            nn.ReLU(),
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width, momentum=_MOMENTUM),
            nn.ReLU(),
            nn.Conv2d(width, channels, 3, padding=1, bias=False),
        )
        self.norm = nn.BatchNorm2d(channels, momentum=_MOMENTUM)
        for layer in self.adaptor:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        self.scale = scale
        self.register_buffer("etf", simplex_etf(channels, num_classes))

    def forward(self, feature_map: Tensor) -> Tensor:
        """Logits ``(N, K)``, float32 or wider, of feature maps ``(N, C, H, W)``."""
        activation = F.relu(self.norm(feature_map + self.adaptor(feature_map)))
        # The logits are in [-s, s], where half precision has only a few hundred values.
        with torch.autocast(activation.device.type, enabled=False):
            features = F.normalize(at_least_float32(activation).mean(dim=(2, 3)), dim=-1)
            return self.scale * (features @ at_least_float32(self.etf))


@torch.no_grad()
def feature_map_channels(encoder: Encoder, num_classes: int) -> int:
    """Count the channels of the feature map before the encoder's last block, for a frame of K directions.

    The encoder and the random state are left unchanged.

    Args:
        encoder: An encoder of blocks.
        num_classes: K.

    Returns:
        C, at least K.

    Raises:
        NoBlocksError: If the encoder is not a sequence of blocks.
        ValueError: If there is no feature map ``(N, C, H, W)``, or C is below K.
    """
    blocks = encoder.blocks[:-1]
    config: Any = getattr(encoder.network, "pretrained_cfg", {})
    size = config.get("input_size", (3, 32, 32))[1:]
    weight = next(encoder.parameters())
    with evaluating(encoder):
        feature_map: Tensor = blocks(weight.new_zeros((1, encoder.in_channels, *size)))
    if feature_map.ndim != 4 or getattr(encoder.network, "output_fmt", "NCHW") != "NCHW":
        raise ValueError(
            f"The encoder {encoder.name!r} returns {tuple(feature_map.shape)} before its last block; BalCAL needs a "
            "feature map (N, C, H, W). Choose a convolutional network, such as resnet18_cifar, resnet50 or "
            "convnext_tiny."
        )
    channels = feature_map.shape[1]
    if channels < num_classes:
        raise ValueError(
            f"The feature map of the encoder {encoder.name!r} has {channels} channels; an equiangular frame needs at "
            f"least as many as there are classes ({num_classes}). Choose a wider encoder."
        )
    return channels
