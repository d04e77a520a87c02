"""Channels of a network, taken from the data where they are not set."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule

from calib_lightning.core.networks import NETWORKS
from calib_lightning.data import BenchmarkDataModule


def take_channels(model: Namespace, datamodule: LightningDataModule, saved: Any) -> bool:
    """Let an encoder whose channels are not set take those of the checkpoint, or else of the data.

    Args:
        model: Configuration of the model, which is changed.
        datamodule: The data; only that of this package says its channels.
        saved: The encoder in the checkpoint from which the weights come; ``None`` without one.

    Returns:
        Whether the configuration was changed.
    """
    spec = model.get("init_args.encoder")
    asked = {"name": spec} if isinstance(spec, str) else spec
    if not isinstance(asked, dict) or not isinstance(asked.get("name"), str) or "in_channels" in asked:
        return False
    own = NETWORKS.get(asked["name"])
    channels = usual = own.in_channels if own else 3
    if saved is not None:
        channels = saved.get("in_channels", usual) if isinstance(saved, dict) else usual
    elif isinstance(datamodule, BenchmarkDataModule):
        with suppress(ValueError, OSError):  # the check of all files says more
            channels = datamodule.image_channels
    if channels == usual:
        return False
    model.init_args.encoder = {**asked, "in_channels": channels}
    return True


def is_but_for_channels(asked: Any, saved: Any) -> bool:
    """Tell whether an encoder is the saved one but for channels that were taken from the data.

    Args:
        asked: The encoder in a configuration.
        saved: The encoder in a checkpoint.

    Returns:
        Whether it is.
    """
    spec = {"name": asked} if isinstance(asked, str) else asked
    return (
        isinstance(spec, dict)
        and isinstance(saved, dict)
        and {"in_channels": saved.get("in_channels"), **spec} == saved
    )
