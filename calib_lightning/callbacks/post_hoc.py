"""Post-hoc calibration at the end of training, stored in its checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from calib_lightning.core import AtomicCheckpointIO
from calib_lightning.core.data_in_use import datamodule_in_use
from calib_lightning.core.distributed import gather_rows
from calib_lightning.core.module_record import equal_weights
from calib_lightning.core.own_data import BatchParts, check_parts, image_and_label
from calib_lightning.core.submodules import evaluating
from calib_lightning.core.twins import is_twin
from calib_lightning.data.loader import ResumableLoader
from calib_lightning.functional import binary_labels, logits_of
from calib_lightning.posthoc import Calibrator, build, calibrator_of, calibrator_record
from calib_lightning.posthoc.saving import FILE_KEY
from calib_lightning.utils.stored import load_torch

T = TypeVar("T")


class PostHocCalibrate(Callback):
    """Fits a calibrator to the trained network of any LightningModule and stores it in the checkpoints.

    After training, the calibration split passes once through the network; ``calibrator`` then belongs to the module's
    final weights. The files of the trainer's `ModelCheckpoint` (best and last) get the calibrator of *their* weights,
    so ``load_calibrator("best.ckpt")`` matches ``load_from_checkpoint("best.ckpt")``. If a calibrator cannot be fitted
    or a file cannot be changed, there is only a warning; the training is never lost.

    Args:
        calibrator: The calibrator to fit; it must not need features.
        loader: Batches of the calibration split, which must not be used for training or testing; ``None`` uses the data
            module's ``calibration_dataloader()``.
        batch: Where input and labels are in a batch, as in `CalibrationMonitor`.

    Attributes:
        calibrator: The calibrator; fitted after training, or after loading a checkpoint. Where it could not be fitted,
            ``calibrator.fitted`` is false, its ``report`` is ``None`` and its use is an error.

    Example:
        ``Trainer(callbacks=[PostHocCalibrate(Temperature(), calibration_loader)]).fit(module, train_loader)``
    """

    def __init__(
        self, calibrator: Calibrator, loader: Iterable[Any] | None = None, batch: BatchParts | None = None
    ) -> None:
        if set(calibrator.needs) != {"logits"}:
            raise ValueError(
                f"{calibrator.name} needs {' and '.join(calibrator.needs)}, and this callback has logits alone. Fit it "
                "after training, with CalibratedClassifier(module, calibrator).fit(loader)."
            )
        check_parts(batch, type(self).__name__)
        self.calibrator, self.loader, self.batch = calibrator, loader, batch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reject a fit without calibration data before training starts."""
        if str(getattr(stage, "value", stage)) != "fit":
            return
        if trainer.max_epochs == 0:
            rank_zero_warn("max_epochs is 0: PostHocCalibrate only fits after training, so it does nothing here.")
        if self.loader is not None:
            return
        data = getattr(trainer, "datamodule", None) or datamodule_in_use(trainer)
        if not callable(getattr(data, "calibration_dataloader", None)):
            raise ValueError(
                "PostHocCalibrate has no calibration split. Pass PostHocCalibrate(calibrator, loader), or use a data "
                "module with a method calibration_dataloader(); do not use the training or test set."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reject an empty calibration split, and discard a calibrator of earlier weights, before training starts."""
        self._batches(trainer)
        if self.calibrator.fitted:  # otherwise checkpoints of this training would store it with other weights
            self.calibrator = build(self.calibrator.spec, Calibrator)  # type: ignore[type-abstract]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit to the final weights, then for every checkpoint that is kept."""
        if getattr(trainer, "fast_dev_run", False) or trainer.interrupted:
            return
        try:
            self.calibrator = self._fitted(trainer, pl_module)
        except Exception as error:  # the training must not be lost, whatever a loader or a module raises
            rank_zero_warn(f"PostHocCalibrate: {self.calibrator.name} was not fitted: {error}")
            return
        report = self.calibrator.report
        if report is not None:
            rank_zero_info(
                f"{report.calibrator}, fitted to {report.rows:,} calibration rows: NLL {report.nll_before:.4f} -> "
                f"{report.nll_after:.4f}, ECE {100 * report.ece_before:.2f} -> {100 * report.ece_after:.2f} %"
            )
        files = [
            path for callback in _keepers(trainer) for path in (callback.best_model_path, callback.last_model_path)
        ]
        for path in dict.fromkeys(filter(None, files)):
            self._add_to_file(trainer, pl_module, Path(path))

    def state_dict(self) -> dict[str, Any]:
        """The calibrator, once fitted."""
        return {FILE_KEY: dict(calibrator_record(self.calibrator))} if self.calibrator.fitted else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the calibrator of a checkpoint, unless it differs from this callback's."""
        if FILE_KEY not in state_dict:
            return
        try:
            found = calibrator_of(state_dict[FILE_KEY], "The checkpoint's record")
        except ValueError as error:
            rank_zero_warn(f"PostHocCalibrate continues without the calibrator of the checkpoint: {error}")
            return
        if found.spec == self.calibrator.spec:
            self.calibrator = found
        else:
            rank_zero_warn(
                f"The checkpoint holds a {found.name}; it is ignored, since {self.calibrator.name} is requested."
            )

    def _batches(self, trainer: Trainer) -> Iterable[Any]:
        if self.loader is not None:
            return self.loader
        data: Any = datamodule_in_use(trainer) or getattr(trainer, "datamodule", None)
        loader: Iterable[Any] | None = data.calibration_dataloader()
        if loader is None:
            raise ValueError(
                f"The calibration split of {type(data).__name__} is empty, but PostHocCalibrate needs it. Give it "
                "images (split.calibration), or pass PostHocCalibrate(calibrator, loader)."
            )
        return loader

    def _fitted(self, trainer: Trainer, module: LightningModule) -> Calibrator:
        """A calibrator fitted to the module as it is; identical on all processes."""
        batches = self._batches(trainer)
        rows, labels = _on_all(trainer, lambda: self._collected(trainer, module, batches))
        # Our loaders are split over processes; of others nothing is known, so each process has read all rows.
        if isinstance(batches, ResumableLoader):
            rows, labels = gather_rows(rows.contiguous()), gather_rows(labels.contiguous())
        return _on_all(trainer, lambda: copy.deepcopy(self.calibrator).fit(rows, labels))

    def _collected(self, trainer: Trainer, module: LightningModule, batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
        """Logits and labels of all of this process's batches."""
        logits, labels = [], []
        with evaluating(module), torch.no_grad(), trainer.precision_plugin.forward_context():
            for given in batches:
                batch = trainer.strategy.batch_to_device(given)
                image, label = image_and_label(batch, type(self).__name__, self.batch)
                logits.append(logits_of(module(image), len(label)).detach())
                labels.append(binary_labels(label))
        if not logits:
            raise ValueError("the calibration loader returned no batches")
        return torch.cat(logits), torch.cat(labels)

    def _add_to_file(self, trainer: Trainer, module: LightningModule, path: Path) -> None:
        """Add a calibrator of a checkpoint's own weights to its file."""
        reading = trainer.strategy.reduce_boolean_decision(path.is_file(), all=True)
        if not reading:
            rank_zero_warn(f"PostHocCalibrate: not every process can read {path}; it was not changed.")
            return
        final = {name: value.detach().clone() for name, value in module.state_dict().items()}
        try:
            checkpoint = _on_all(trainer, lambda: load_torch(path))
            # Running statistics may differ between processes, and all must fit or none.
            if trainer.strategy.reduce_boolean_decision(equal_weights(checkpoint["state_dict"], final), all=True):
                fitted = self.calibrator
            else:
                module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
                fitted = self._fitted(trainer, module)
        except Exception as error:  # as above
            reason = str(error).partition("\n")[0]
            rank_zero_warn(f"PostHocCalibrate: {path} was left without a calibrator: {reason}")
            return
        finally:
            module.load_state_dict(final, strict=module.strict_loading)
        state = {FILE_KEY: dict(calibrator_record(fitted))}
        checkpoint["callbacks"] = {**checkpoint.get("callbacks", {}), self.state_key: state}
        if trainer.is_global_zero:
            try:
                AtomicCheckpointIO().save_checkpoint(checkpoint, path)
            except OSError as error:
                rank_zero_warn(f"PostHocCalibrate: {path} was left without a calibrator: {error}")
        trainer.strategy.barrier()


def _on_all(trainer: Trainer, work: Callable[[], T]) -> T:
    """Run ``work`` on all processes, or fail on all: otherwise the others would wait for the one that failed."""
    fault: Exception | None = None
    try:
        done = work()
    except Exception as error:
        fault = error
    if not trainer.strategy.reduce_boolean_decision(fault is None, all=True):
        raise RuntimeError("it failed on another process" if fault is None else f"{type(fault).__name__}: {fault}")
    return done


def _keepers(trainer: Trainer) -> list[ModelCheckpoint]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning does not declare it
    return [callback for callback in callbacks if is_twin(callback, ModelCheckpoint)]
