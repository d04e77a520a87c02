"""A training that diverges is named, and its weights are not saved: no checkpoint is replaced by a useless one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class DivergedError(RuntimeError):
    """Training has diverged: weights or logits are not finite, and no checkpoint was written since."""


_REMEDY = "a lower learning rate, ClipGradients or a wider precision"


@contextmanager
def naming_cause(module: LightningModule, image: Tensor | None = None, logits: Tensor | None = None) -> Iterator[None]:
    """Say why a metric refuses what a network has computed: its images, or a training that has diverged.

    Args:
        module: The module.
        image: Images of the batch, if it is known.
        logits: Their logits.

    Raises:
        DivergedError: In place of a ``ValueError`` of the body, in a fit whose logits or weights are not finite.
        ValueError: In place of one, where images are not finite; else the body's own, in training with its step.
    """
    try:
        yield
    except ValueError as error:
        if image is not None and not _is_finite(image):
            bad = (~image.isfinite()).reshape(len(image), -1).any(dim=1)
            raise ValueError(
                f"{int(bad.sum())} of {len(bad)} images of a batch have values that are nan or infinite, the first in "
                f"row {int(bad.nonzero()[0])}. Mend the data, or what augments and normalises it."
            ) from error
        trainer = getattr(module, "_trainer", None)
        if trainer is None or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            raise
        what = "logits" if logits is not None and not _is_finite(logits) else "weights"
        if what == "weights" and all(_is_finite(value) for _, value in _weights(module)):
            raise ValueError(f"In training, at step {trainer.global_step}: {error}") from error
        saved = any(getattr(keeper, "best_model_path", "") for keeper in trainer.checkpoint_callbacks)
        go_on = "Checkpoints from before are as they were: go on from one of them, or start" if saved else "Start"
        raise DivergedError(
            f"Training has diverged in epoch {trainer.current_epoch}, at step {trainer.global_step}: the {what} are "
            f"not finite. {go_on} again with {_REMEDY}."
        ) from error


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
        f"The weights are not finite after step {trainer.global_step} ({where}), in epoch {trainer.current_epoch}: "
        "training has diverged. They were not saved, so checkpoints from before are as they were. Go on from one of "
        f"them, or start again, with {_REMEDY}."
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
