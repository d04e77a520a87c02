"""State of a fit, in buffers that are empty before it and get their shapes from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn


class FittedState(nn.Module):
    """A module that keeps its state in buffers, so that it moves with the module and is saved in checkpoints.

    Buffers keep the dtype of the fit even if ``half()``, ``float()`` or ``to(dtype)`` is applied to a module around
    them: rounding would merge the edges of bins and change a temperature by half a percent.
    """

    def register_state(self, *names: str) -> None:
        """Register the buffers that a fit assigns; they are empty until then.

        Args:
            names: Names of the buffers.
        """
        for name in names:
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))

    @property
    def fitted(self) -> bool:
        """Whether it has been fitted."""
        return any(buffer.numel() > 0 for buffer in self.buffers())

    def check_fitted(self) -> None:
        """Raise ``RuntimeError`` if it has not been fitted."""
        if not self.fitted:
            raise RuntimeError(f"{type(self).__name__} is not fitted. Call fit or load a fitted one.")

    def clear_state(self) -> None:
        """Forget the fit."""
        for module in self.modules():
            if isinstance(module, FittedState):
                module.register_state(*module._buffers)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():
            exact = before[name]
            # MPS devices do not support float64.
            if buffer is not None and exact is not None and buffer.dtype != exact.dtype and buffer.device.type != "mps":
                self._buffers[name] = exact.to(buffer.device)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # Shapes depend on the fit, so the buffers take those of the checkpoint.
        for name, buffer in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and buffer is not None:
                self._buffers[name] = torch.empty_like(saved, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
