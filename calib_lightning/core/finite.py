"""Weights that are not finite are not saved: no checkpoint that can be used is replaced by one that cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class DivergedError(RuntimeError):
    """A checkpoint was to be saved while weights were not finite."""


def guard_saves(trainer: Trainer) -> None:
    """Refuse to save weights that are not finite, whoever asks the trainer to save; it may be called repeatedly.

    ``trainer.save_checkpoint`` then raises `DivergedError` if a trained parameter or a running statistic is infinite or
    NaN, on all processes if one has such weights. Other buffers than the statistics of batch normalisation may be
    infinite, and so may parameters that are not trained (a mask, say).

    Args:
        trainer: The trainer; callbacks' own hooks would not see a save of weights alone.
    """
    save = trainer.save_checkpoint
    if getattr(save, "func", None) is not _save_finite:
        vars(trainer)["save_checkpoint"] = partial(_save_finite, trainer, save)


def _save_finite(trainer: Trainer, save: Callable[..., None], *args: Any, **options: Any) -> None:
    if trainer.model is not None:  # else Lightning tells what is missing
        _check_finite(trainer)
    save(*args, **options)


def _check_finite(trainer: Trainer) -> None:
    """Collective: all processes refuse alike."""
    bad = [name for name, value in _weights(trainer.lightning_module) if not _is_finite(value)]
    if trainer.strategy.reduce_boolean_decision(not bad, all=True):
        return
    where = f"{bad[0]} and {len(bad) - 1} more" if len(bad) > 1 else bad[0] if bad else "on another process"
    raise DivergedError(
        f"The weights are not finite after step {trainer.global_step} ({where}): training has diverged. They were not "
        "saved, so checkpoints from before are as they were. Go on from one of them, or start again, with a lower "
        "learning rate, ClipGradients or a wider precision."
    )


def _weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield name, parameter.detach()
    for name, part in module.named_modules():
        if isinstance(part, _NormBase):
            for statistic in ("running_mean", "running_var"):
                value = getattr(part, statistic)
                if value is not None:
                    yield f"{name}.{statistic}", value


def _is_finite(value: Tensor) -> bool:
    # a sum is ten times as fast on a CPU, but one of finite values may overflow
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())
