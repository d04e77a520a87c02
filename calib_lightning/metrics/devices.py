"""What a device can do; asked as ``devices.x(...)``, so that a test can replace the answer in one place."""

from __future__ import annotations

import torch


def has_float64(device: torch.device) -> bool:
    """Whether ``device`` can hold float64; Apple's MPS cannot, so the state stays on the CPU and batches move there."""
    return device.type != "mps"


def checks_at_once(device: torch.device) -> bool:
    """Whether `update` looks for invalid values on ``device`` itself: on the CPU; elsewhere `compute` reports them."""
    return device.type == "cpu"
