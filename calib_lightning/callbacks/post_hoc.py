"""Post-hoc calibration at the end of a training, kept in its checkpoints."""

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

from calib_lightning.callbacks.foreign import as_logits_of, ready
from calib_lightning.core import AtomicCheckpointIO
from calib_lightning.core.distributed import gather_rows
from calib_lightning.core.module import datamodule_in_use
from calib_lightning.core.own_data import image_and_label
from calib_lightning.data.loader import ResumableLoader
from calib_lightning.posthoc import Calibrator, build, calibrator_of, calibrator_record
from calib_lightning.posthoc.saving import FILE_KEY

T = TypeVar("T")


class PostHocCalibrate(Callback):
    """Fits a calibrator to the trained network of any LightningModule and keeps it in the checkpoints.

    When the training is over, the calibration split goes once through the network; afterwards ``calibrator`` belongs to
    the weights that the module then has. The files that the trainer's `ModelCheckpoint` keeps (best and last) get the
    calibrator of *their* weights, so ``load_calibrator("best.ckpt")`` goes with ``load_from_checkpoint("best.ckpt")``.
    A calibrator that cannot be fitted, or a file that cannot be changed, is warned of; it never costs the training.

    Args:
        calibrator: What is fitted; it must not need features.
        loader: Batches ``(image, label, ...)`` of the calibration split, which the network is neither trained nor
            tested on; ``None`` takes the data module's ``calibration_dataloader()``.

    Attributes:
        calibrator: The calibrator; fitted once the training is over, or a checkpoint was loaded.

    Example:
        ``Trainer(callbacks=[PostHocCalibrate(Temperature(), calibration_loader)]).fit(module, train_loader)``
    """

    def __init__(self, calibrator: Calibrator, loader: Iterable[Any] | None = None) -> None:
        if calibrator.needs_features:
            raise ValueError(
                f"{calibrator.name} needs features, which this callback does not have: fit it with fit(logits, labels, "
                "features) after the training."
            )
        self.calibrator, self.loader = calibrator, loader

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before anything is trained, a fit for which there are no calibration rows."""
        if str(getattr(stage, "value", stage)) != "fit":
            return
        if trainer.max_epochs == 0:
            rank_zero_warn("max_epochs is 0: PostHocCalibrate fits behind a training, so it does nothing here.")
        if self.loader is not None:
            return
        data = getattr(trainer, "datamodule", None) or datamodule_in_use(trainer)
        if not callable(getattr(data, "calibration_dataloader", None)):
            raise ValueError(
                "PostHocCalibrate has no calibration split: give PostHocCalibrate(calibrator, loader), or a data "
                "module with a method calibration_dataloader(). The training and test sets cannot take its place."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse an empty calibration split, and forget a calibrator of earlier weights, before anything is trained."""
        self._batches(trainer)
        if self.calibrator.fitted:  # else the checkpoints of this training would hold it beside other weights
            self.calibrator = build(self.calibrator.spec, Calibrator)  # type: ignore[type-abstract]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit to the final weights, then for every checkpoint that is kept."""
        if getattr(trainer, "fast_dev_run", False) or trainer.interrupted:
            return
        try:
            self.calibrator = self._fitted(trainer, pl_module)
        except Exception as error:  # whatever a loader or a module raises, the training is not lost
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
        """The calibrator, once it is fitted."""
        return {FILE_KEY: dict(calibrator_record(self.calibrator))} if self.calibrator.fitted else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the calibrator of a checkpoint; one of another kind than this callback's is left there."""
        if FILE_KEY not in state_dict:
            return
        try:
            found = calibrator_of(state_dict[FILE_KEY], "The checkpoint's record")
        except ValueError as error:
            rank_zero_warn(f"PostHocCalibrate goes on without the calibrator of the checkpoint: {error}")
            return
        if found.spec == self.calibrator.spec:
            self.calibrator = found
        else:
            rank_zero_warn(
                f"The checkpoint holds a {found.name}; it is left there, as {self.calibrator.name} is asked for."
            )

    def _batches(self, trainer: Trainer) -> Iterable[Any]:
        if self.loader is not None:
            return self.loader
        data: Any = datamodule_in_use(trainer) or getattr(trainer, "datamodule", None)
        loader: Iterable[Any] | None = data.calibration_dataloader()
        if loader is None:
            raise ValueError(
                f"PostHocCalibrate: the calibration split of {type(data).__name__} is empty; give it images "
                "(split.calibration), or give PostHocCalibrate(calibrator, loader)."
            )
        return loader

    def _fitted(self, trainer: Trainer, module: LightningModule) -> Calibrator:
        """A calibrator fitted to the module as it is; the same on all processes."""
        batches = self._batches(trainer)
        rows, labels = _on_all(trainer, lambda: _collected(trainer, module, batches))
        # Our loaders give every process its part; of others nothing is known, so each process has read all rows.
        if isinstance(batches, ResumableLoader):
            rows, labels = gather_rows(rows.contiguous()), gather_rows(labels.contiguous())
        return _on_all(trainer, lambda: copy.deepcopy(self.calibrator).fit(rows, labels))

    def _add_to_file(self, trainer: Trainer, module: LightningModule, path: Path) -> None:
        """Put the calibrator of a checkpoint's own weights into its file."""
        reading = trainer.strategy.reduce_boolean_decision(path.is_file(), all=True)
        if not reading:
            rank_zero_warn(f"PostHocCalibrate: {path} is no file that every process can read, and was left as it is.")
            return
        final = {name: value.detach().clone() for name, value in module.state_dict().items()}
        try:
            checkpoint = _on_all(trainer, lambda: torch.load(path, map_location="cpu", weights_only=True))
            # The running statistics of another process than that which saved may differ, and all must fit, or none.
            if trainer.strategy.reduce_boolean_decision(_equal(checkpoint["state_dict"], final), all=True):
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
    """Do something on all processes, or fail on all: those that went on would wait for the one that did not."""
    fault: Exception | None = None
    try:
        done = work()
    except Exception as error:
        fault = error
    if not trainer.strategy.reduce_boolean_decision(fault is None, all=True):
        raise RuntimeError("it failed on another process" if fault is None else f"{type(fault).__name__}: {fault}")
    return done


def _collected(trainer: Trainer, module: LightningModule, batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Logits and labels of all batches of this process."""
    logits, labels = [], []
    with ready(trainer, module):
        for batch in batches:
            image, label = image_and_label(trainer.strategy.batch_to_device(batch), PostHocCalibrate.__name__)
            logits.append(as_logits_of(module(image), PostHocCalibrate.__name__).detach())
            labels.append(label)
    if not logits:
        raise ValueError("the calibration loader gave no batch")
    return torch.cat(logits), torch.cat(labels)


def _keepers(trainer: Trainer) -> list[ModelCheckpoint]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning does not declare it
    return [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]


def _equal(weights: Any, others: dict[str, Tensor]) -> bool:
    if weights.keys() != others.keys():
        return False
    return all(torch.equal(value, others[name].cpu()) for name, value in weights.items() if isinstance(value, Tensor))
