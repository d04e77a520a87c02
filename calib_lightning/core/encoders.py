"""Encoders by name: our networks for small images, and every timm model."""

from __future__ import annotations

from typing import Any

from calib_lightning.core.encoder_base import Encoder, NoBlocksError
from calib_lightning.core.networks import NETWORKS
from calib_lightning.core.timm_encoder import TimmEncoder
from calib_lightning.types import EncoderSpec

__all__ = ["Encoder", "NoBlocksError", "TimmEncoder", "build_encoder", "encoder_names"]


def encoder_names() -> list[str]:
    """Return the names of our own encoders; every name in ``timm.list_models()`` works too."""
    return sorted(NETWORKS)


def build_encoder(spec: EncoderSpec, *, pretrained: bool | None = None) -> Encoder:
    """Build an encoder from its name, or from its name and options.

    `encoder_names` lists our own networks, which are for small images; any other name is a timm model. Their
    parameters, papers and deviations are in ``docs/networks.md``.

    Args:
        spec: A name, or ``{"name": ..., "in_channels": C, "pretrained": bool}``; the last for timm models only.
        pretrained: Overrides the option; False when a checkpoint provides the weights, so nothing is downloaded.

    Returns:
        A new encoder; ``build_encoder(encoder.spec)`` builds another one with the same options.

    Raises:
        TypeError: If the spec is neither a name nor a dict, or has an unknown option or one of the wrong type.
        ValueError: If the encoder is unknown, ``in_channels`` is not positive, or pretrained weights are requested for
            one of our own encoders.

    Example:
        >>> build_encoder({"name": "resnet18_cifar", "in_channels": 1}).num_features
        512
    """
    options: dict[str, Any] = {"name": spec} if isinstance(spec, str) else spec
    if not isinstance(options, dict) or not isinstance(options.get("name"), str):
        raise TypeError(f"encoder is {spec!r}; it must be a name or {{'name': ..., 'in_channels': ...}}.")
    name, own = options["name"], NETWORKS.get(options["name"])
    unknown = sorted(map(str, set(options) - {"name", "in_channels", "pretrained"}))
    if unknown:
        raise TypeError(
            f"The encoder {name!r} has no option {unknown[0]!r}; allowed options are name, in_channels and pretrained."
        )
    if pretrained is None:
        pretrained = options.get("pretrained", False)
    if type(pretrained) is not bool:
        raise TypeError(f"pretrained of the encoder is {pretrained!r}; it must be true or false.")
    in_channels = options.get("in_channels", own.in_channels if own else 3)
    if type(in_channels) is not int:
        raise TypeError(f"in_channels of the encoder is {in_channels!r}; it must be an integer.")
    if in_channels < 1:
        raise ValueError(f"in_channels of the encoder is {in_channels}; it must be at least 1.")
    if own is None:
        return TimmEncoder(name, in_channels, pretrained)
    if pretrained:
        raise ValueError(f"{name!r} has no pretrained weights. Omit `pretrained`, or choose a timm model.")
    network = own.build(in_channels)
    return Encoder(network, name=name, num_features=own.num_features, in_channels=in_channels)
