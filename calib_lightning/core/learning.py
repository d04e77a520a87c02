"""Criteria that learn from the run: what a module tells them, for the whole training or for one stage of it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from calib_lightning.core.data_in_use import datamodule_in_use
from calib_lightning.core.distributed import own_rows
from calib_lightning.core.evaluated_module import EvaluatedModule
from calib_lightning.types import Prediction


class LearningCriterion(nn.Module):
    """A criterion with a memory: of the samples of each step (`CRLLoss`), or of the validation (`AdaFocalLoss`).

    A `ClassificationModule` calls these hooks for its criterion and for what that wraps, also in a stage that has the
    criterion. State that is the same on all processes goes into buffers.
    """

    first_epoch: int = 0
    """Epoch in which the criterion came into use."""

    def check(self, trainer: Trainer, transform: nn.Module | None, epochs: range) -> None:
        """Reject a stage in which the criterion cannot learn; called before training.

        Args:
            trainer: The trainer, in the set-up of a fit.
            transform: The batch transform that is used with the criterion, if any.
            epochs: The epochs of the stage.

        Raises:
            ValueError: If it cannot.
        """

    def look_at(self, batch: Any) -> None:
        """Reject batches from which the criterion cannot learn; called in the first step of a fit, or in every step.

        Args:
            batch: A training batch.

        Raises:
            ValueError: If it cannot.
        """

    def renew(self) -> None:
        """Forget everything; called where a stage begins, before the weights of a checkpoint arrive."""

    def begin_fit(self, trainer: Trainer, *, fresh: bool) -> None:
        """Called at the start of a fit whose criterion this is.

        Args:
            trainer: The trainer; its training loader is known.
            fresh: Whether the fit is a new one, neither resumed nor continued.
        """

    def begin_step(self, trainer: Trainer, batch: Any) -> None:
        """Called before each training step.

        Args:
            trainer: The trainer.
            batch: The batch as the training step receives it.
        """

    def end_step(self) -> None:
        """Called at the end of each training step."""

    def end_epoch(self) -> None:
        """Called at the end of each training epoch, on all processes."""

    def see(self, logits: Tensor, labels: Tensor) -> None:
        """Called with every validation batch of a fit, except those of the sanity check.

        Args:
            logits: ``(N, K)``.
            labels: ``(N,)``.
        """

    def end_validation(self) -> None:
        """Called after each such validation, on all processes."""

    def epoch_rows(self) -> dict[str, Tensor]:
        """Rows that this process has collected in the current epoch, as in `ClassificationModule.epoch_rows`."""
        return {}

    def restore_epoch_rows(self, rows: dict[str, Tensor]) -> None:
        """Restore this process's rows, as returned by `epoch_rows`; before the buffers are loaded."""


def learners_of(criterion: Any) -> list[LearningCriterion]:
    """The criterion and the criteria that it wraps, as far as they learn."""
    parts = criterion.modules() if isinstance(criterion, nn.Module) else ()
    return [part for part in parts if isinstance(part, LearningCriterion)]


def rows_of(criterion: Any) -> dict[str, Tensor]:
    """The rows of all learners of a criterion, under names of their own."""
    parts = enumerate(learners_of(criterion))
    return {f"criterion/{number}/{name}": rows for number, part in parts for name, rows in part.epoch_rows().items()}


def restore_rows(criterion: Any, saved: dict[str, list[Tensor]], rank: int) -> dict[str, Tensor]:
    """Give the learners their rows of this process; return the others, which are the method's."""
    own = {name: own_rows(parts, rank) for name, parts in saved.items()}
    for number, part in enumerate(learners_of(criterion)):
        prefix = f"criterion/{number}/"
        rows = {name.removeprefix(prefix): value for name, value in own.items() if name.startswith(prefix)}
        if rows:
            part.restore_epoch_rows(rows)
    return {name: rows for name, rows in own.items() if not name.startswith("criterion/")}


def will_validate(trainer: Trainer, epochs: range) -> bool:
    """Whether a fit has a validation set and reads it in these epochs, as far as that is known in its set-up."""
    every = trainer.check_val_every_n_epoch  # None: by steps
    if trainer.limit_val_batches == 0 or not any(every is None or (epoch + 1) % every == 0 for epoch in epochs):
        return False
    known = getattr(datamodule_in_use(trainer), "has_validation", None)
    return known if isinstance(known, bool) else trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined()


class TeachingModule(EvaluatedModule):
    """The part of a `ClassificationModule` that calls the hooks of a `LearningCriterion`."""

    criterion: Any

    def on_train_start(self) -> None:
        """Let the criterion check the data and prepare; subclasses must call it."""
        fresh = self.trainer.global_step == 0 and self.trainer.ckpt_path is None
        for part in learners_of(self.criterion):
            part.begin_fit(self.trainer, fresh=fresh)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Tell the criterion which batch comes."""
        for part in learners_of(self.criterion):
            part.begin_step(self.trainer, batch)

    def end_learning_step(self) -> None:
        """Tell the criterion that the step has ended."""
        for part in learners_of(self.criterion):
            part.end_step()

    def on_train_epoch_end(self) -> None:
        """Let the criterion share what it has learned in the epoch."""
        for part in learners_of(self.criterion):
            part.end_epoch()

    def validation_step(self, batch: Any, batch_idx: int) -> Prediction:  # type: ignore[override]
        """Add one batch to the validation metrics, and tell the criterion."""
        prediction = super().validation_step(batch, batch_idx)
        if self._learns:
            for part in learners_of(self.criterion):
                part.see(prediction.logits, self._checked(batch).label)
        return prediction

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics; let the criterion learn from the validation."""
        super().on_validation_epoch_end()
        if self._learns:
            for part in learners_of(self.criterion):
                part.end_validation()

    @property
    def _learns(self) -> bool:
        return self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
