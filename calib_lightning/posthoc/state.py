"""State of a fit: buffers that are empty before it and whose shapes follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class FittedState(nn.Module):
    """A module whose state lies in buffers, so that it moves with the module and travels in checkpoints."""

    def register_state(self, *names: str) -> None:
        """Name buffers that a fit assigns; they are empty until then.

        Args:
            names: Names of the buffers.
        """
        for name in names:
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # The shapes of the state follow from the fit, so the buffers take those of the checkpoint.
        for name, buffer in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and buffer is not None:
                self._buffers[name] = torch.empty_like(saved, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
