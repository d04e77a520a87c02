"""What an encoder is: blocks in sequence that map images to features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calib_lightning.core.submodules import evaluating


class NoBlocksError(RuntimeError):
    """An encoder cannot be written as a plain sequence of blocks; the message says which one and why."""


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
        """How to build this encoder again, with `build_encoder`; plain data, safe to change."""
        return {"name": self.name, "in_channels": self.in_channels}

    @property
    def blocks(self) -> nn.Sequential:
        """Stem, stages and pool: the encoder's own modules, so freezing one here freezes it in the encoder.

        ``encoder(image)`` equals ``encoder.blocks(image).flatten(1)``; a method may stop, mix or cut between blocks.

        Raises:
            NoBlocksError: If the encoder is not a sequence of modules, as a transformer with a class token.
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
                f"The encoder {self.name!r} expects images (N, {self.in_channels}, H, W) and got {tuple(image.shape)}, "
                f"with {found}. Set the number of channels with `encoder: {{name: {self.name}, in_channels: {hint}}}`."
            )
        features: Tensor = self.network(image).flatten(1)
        return features

    def check_images(self, shape: Sequence[int]) -> None:
        """Find out whether the encoder takes images of a shape; nothing is computed and nothing changes.

        Args:
            shape: ``(C, H, W)``.

        Raises:
            ValueError: If it does not.
        """
        channels, *size = shape
        if channels != self.in_channels:
            self.forward(torch.empty(1, *shape, device="meta"))  # says what is wrong
        tensors = (*self.network.named_parameters(), *self.network.named_buffers())
        shadow = {name: value.detach().to("meta") for name, value in tensors}
        try:
            with torch.no_grad(), evaluating(self.network):
                torch.func.functional_call(self.network, shadow, torch.empty(2, *shape, device="meta"))
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"The encoder {self.name!r} cannot take images of {' x '.join(map(str, size))} pixels "
                f"({str(error) or type(error).__name__}). "
                "Choose another encoder, or other images: many data modules have a size."
            ) from error
