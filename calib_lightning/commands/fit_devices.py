"""What is looked at in the configuration of a trainer before it is built."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import (
    AcceleratorRegistry,
    CPUAccelerator,
    CUDAAccelerator,
    MPSAccelerator,
    XLAAccelerator,
)

_ACCELERATORS: dict[str, Any] = {
    "tpu": XLAAccelerator,
    "mps": MPSAccelerator,
    "cuda": CUDAAccelerator,
    "cpu": CPUAccelerator,
}
"""In the order in which Lightning chooses one."""
_ACCELERATORS |= {"gpu": MPSAccelerator if MPSAccelerator.is_available() else CUDAAccelerator}


def check_device(trainer: Namespace) -> None:
    """Refuse devices that this machine does not have, and numbers that the trainer only fails on later.

    Args:
        trainer: Configuration of the trainer.

    Raises:
        ValueError: If it asks for them.
    """
    name, devices = trainer.accelerator, trainer.devices
    if isinstance(name, str):
        here = {key: kind for key, kind in _ACCELERATORS.items() if kind.is_available()}
        if name in AcceleratorRegistry.available_accelerators() - set(_ACCELERATORS):
            return  # of another package
        if name != "auto" and name not in here:
            known = "is not on this machine" if name in _ACCELERATORS else "is not known"
            raise ValueError(
                f"trainer.accelerator is {name!r}, which {known}; it must be one of auto, {', '.join(here)}. Leave it "
                "out to use what there is."
            )
        kind = here.get(name, next(iter(here.values())))
        try:
            found = True if devices == "auto" else kind.parse_devices(devices)
        except (MisconfigurationException, TypeError, ValueError):
            found = None
        if not found:
            several = kind is not CPUAccelerator
            allowed = "a number above 0" + (", -1 (all), or a list of the numbers of devices" if several else "")
            have = f" This machine has {kind.auto_device_count()}." if several else ""
            raise ValueError(f"trainer.devices is {devices!r}; it must be {allowed}, or auto.{have}")
    if trainer.accumulate_grad_batches < 1:
        raise ValueError(
            f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}; it must be at least 1. Leave it "
            "out for a step after each batch."
        )
