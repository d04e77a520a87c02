"""The encoder interface: a sequence of blocks that maps images to features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calib_lightning.core.submodules import evaluating


class NoBlocksError(RuntimeError):
    """An encoder is not a plain sequence of blocks; the message says which encoder and why."""


class Encoder(nn.Module):
    """Maps images ``(N, C, H, W)`` to features ``(N, d)``: blocks in sequence, then flatten.

    Build one with `build_encoder`.

    Args:
        network: The blocks: stem, stages, pool.
        name: The encoder's name.
        num_features: d.
        in_channels: C.

    Attributes:
        num_features: d.
        in_channels: C.
    """

    def __init__(self, network: nn.Module, *, name: str, num_features: int, in_channels: int) -> None:
        super().__init__()
        self.network = network
        self.name = name
        self.num_features = num_features
        self.in_channels = in_channels

    @property
    def spec(self) -> dict[str, Any]:
        """Arguments for `build_encoder` that rebuild this encoder; plain data, safe to change."""
        return {"name": self.name, "in_channels": self.in_channels}

    @property
    def blocks(self) -> nn.Sequential:
        """Stem, stages and pool: the encoder's own modules, so freezing one here freezes it in the encoder.

        ``encoder(image)`` equals ``encoder.blocks(image).flatten(1)``; methods may stop, mix or cut between blocks.

        Raises:
            NoBlocksError: If the encoder is not a sequence of modules, such as a transformer with a class token.
        """
        assert isinstance(self.network, nn.Sequential)
        return self.network

    def forward(self, image: Tensor) -> Tensor:
        """Features ``(N, d)`` of images ``(N, C, H, W)``.

        Raises:
            ValueError: If the images do not have `in_channels` channels.
        """
        if image.ndim != 4 or image.shape[1] != self.in_channels:
            found = f"{image.shape[1]} channels" if image.ndim == 4 else f"{image.ndim} dimensions"
            hint = image.shape[1] if image.ndim == 4 else self.in_channels
            raise ValueError(
                f"The images have shape {tuple(image.shape)}, with {found}; the encoder {self.name!r} expects (N, "
                f"{self.in_channels}, H, W). Set the number of channels with `encoder: {{name: {self.name}, "
                f"in_channels: {hint}}}`, or that of your own images with --data.channels={self.in_channels}."
            )
        features: Tensor = self.network(image).flatten(1)
        return features

    def check_images(self, shape: Sequence[int]) -> None:
        """Check on the meta device that the encoder accepts images of this shape.

        Args:
            shape: ``(C, H, W)``.

        Raises:
            ValueError: If it does not.
        """
        channels, *size = shape
        if channels != self.in_channels:
            self.forward(torch.empty(1, *shape, device="meta"))  # raises with the reason
        tensors = (*self.network.named_parameters(), *self.network.named_buffers())
        shadow = {name: value.detach().to("meta") for name, value in tensors}
        try:
            with torch.no_grad(), evaluating(self.network):
                torch.func.functional_call(self.network, shadow, torch.empty(2, *shape, device="meta"))
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"The encoder {self.name!r} cannot process images of {' x '.join(map(str, size))} pixels "
                f"({str(error) or type(error).__name__}). Choose another encoder or another image size; many data "
                "modules have the option `size`."
            ) from error
