"""Calibration and ranking metrics of any LightningModule during validation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from calib_lightning.callbacks.figures import shows_figures, title_of
from calib_lightning.core.own_data import BatchParts, check_parts, image_and_label
from calib_lightning.functional import at_least_float32, binary_labels, logits_of
from calib_lightning.metrics import REPORT, EvaluationState
from calib_lightning.metrics.functional.checks import seem_probs
from calib_lightning.plots import figures, log_figure


class CalibrationMonitor(Callback):
    """Logs metrics, reliability diagram, confidence histogram and risk-coverage curve of any LightningModule.

    ``forward(image)`` returns logits ``(N, K)``, one logit z of a binary network, which becomes ``(0, z)``, or a
    mapping or an object with such ``logits``. If the validation step calls the module once (``self(image)``), that
    output is used; otherwise the module is called again. On several processes, every row is counted once if the loader
    returns it once. Invalid values (non-finite logits, for example) cause a warning and do not stop the training. A
    module that logs one of the keys itself needs another ``prefix``: Lightning rejects a key that is logged twice in
    ``on_validation_epoch_end``, and a key logged by the step is overridden here.

    Args:
        metrics: Keys of `calib_lightning.metrics.METRICS`; by default those that do not need all K scores per row.
        prefix: The keys are ``<prefix>/<metric>``; with several loaders ``<prefix>/<number>/<metric>``.
        figures_every: ``None`` draws figures of the last validation, at the end of the fit; n also those of every n-th
            epoch; 0 none. They are drawn only where a logger of the trainer shows pictures or has a folder.
        batch: Keys or positions of input and labels in a batch, as in ``("pixel_values", "labels")``, or a function
            ``batch -> (input, labels)``; ``None`` reads ``(image, label, ...)`` and ``{"image": ..., "label": ...}``.

    Example:
        ``Trainer(callbacks=[CalibrationMonitor()]).fit(module, loader, val_loader)`` logs ``monitor/ece`` and others.
    """

    def __init__(
        self,
        metrics: Sequence[str] = REPORT,
        prefix: str = "monitor",
        figures_every: int | None = None,
        batch: BatchParts | None = None,
    ) -> None:
        EvaluationState(metrics)  # rejects unknown keys now, not after an epoch
        if figures_every is not None and figures_every < 0:
            raise ValueError(
                f"figures_every is {figures_every}; it must be at least 0, the number of epochs between figures (0 for "
                "none), or None for those of the last validation."
            )
        self.metrics, self.prefix, self.figures_every = tuple(metrics), prefix, figures_every
        check_parts(batch, type(self).__name__)
        self.batch = batch
        self._states: dict[int, EvaluationState] = {}
        self._outputs: list[Any] = []
        self._hook: Any = None
        self._fault: str | None = None
        self._sound: dict[str, EvaluationState] = {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the metrics."""
        # All processes compute the same sets, even without a batch of them.
        loaders = trainer.val_dataloaders
        count = len(loaders) if isinstance(loaders, list | tuple) else 1
        self._states = {place: EvaluationState(self.metrics).to(pl_module.device) for place in range(count)}
        self._fault, self._sound = None, {}

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Capture the module's output when the step calls it."""
        self._outputs = []
        self._hook = pl_module.register_forward_hook(self._catch)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add one batch."""
        self._stop_listening()
        caught, self._outputs = self._outputs, []
        if trainer.sanity_checking or self._fault is not None:
            return
        try:
            image, labels = image_and_label(batch, type(self).__name__, self.batch)
            found = {id(logits): logits for output in caught if (logits := _logits_of(output, labels)) is not None}
            if len(found) != 1:
                with trainer.precision_plugin.forward_context():
                    output = pl_module(image)
                found = {0: logits_of(output, len(labels))}
            logits = next(iter(found.values()))
            if batch_idx == 0 and seem_probs(at_least_float32(logits.detach())):
                rank_zero_warn(
                    f"CalibrationMonitor: outputs of {type(pl_module).__name__} are all in [0, 1] and each row sums to "
                    "1. If they are probabilities, what is logged is wrong: let forward return logits."
                )
            self._states[dataloader_idx].update(logits.detach(), binary_labels(labels))
        except Exception as error:  # metrics must not stop a run, whatever the module's forward raises
            plain = isinstance(error, TypeError | ValueError)
            self._fault = str(error) if plain else f"{type(error).__name__}: {error}"

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute and log metrics, and draw the figures of this epoch."""
        if trainer.sanity_checking:
            return
        # a faulty process must not leave the others waiting
        sound = trainer.strategy.reduce_boolean_decision(self._fault is None, all=True)
        if not sound:
            warnings.warn(
                f"CalibrationMonitor logs nothing for epoch {trainer.current_epoch}: "
                f"{self._fault or 'another process had invalid input'}",
                stacklevel=2,
            )
            return
        for place, state in self._states.items():
            prefix = self.prefix if len(self._states) == 1 else f"{self.prefix}/{place}"
            try:
                values = {f"{prefix}/{key}": value.float() for key, value in state.compute().items()}
            except Exception as error:  # raised on all processes, since fault counts are summed
                rank_zero_warn(f"CalibrationMonitor logs nothing for epoch {trainer.current_epoch}: {error}")
                continue
            pl_module.log_dict(values, add_dataloader_idx=False)
            self._sound[prefix] = state
        if trainer.state.fn == "validate":  # `trainer.validating` is true within a fit as well
            self._draw(trainer, pl_module)
        elif self.figures_every and trainer.current_epoch % self.figures_every == 0:
            self._draw(trainer, pl_module, trainer.current_epoch)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier validation."""
        self._sound = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the figures of the last validation."""
        self._draw(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hook."""
        self._stop_listening()

    def _draw(self, trainer: Trainer, module: LightningModule, epoch: int | None = None) -> None:
        if self.figures_every == 0 or not shows_figures(trainer):
            return
        for prefix, state in self._sound.items():
            shown = "validation" + prefix.removeprefix(self.prefix) + ("" if epoch is None else f", epoch {epoch}")
            try:
                drawn = figures(state, title=title_of(trainer, module, trainer.val_dataloaders, shown))
            except Exception as error:  # a failed figure must not stop a run
                rank_zero_warn(f"no figures of {prefix}: {error}")
                continue
            for kind, figure in drawn.items():
                log_figure(trainer.loggers, f"{prefix}/{kind}", figure, trainer.global_step, epoch)

    def _catch(self, module: nn.Module, inputs: Any, output: Any) -> None:
        # Under DDP the step itself is a call of the module, whose inputs are the batch and its number.
        if not (inputs and (isinstance(inputs[0], list | tuple) or any(type(part) is int for part in inputs[1:]))):
            self._outputs.append(output)

    def _stop_listening(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _logits_of(output: Any, labels: Tensor) -> Tensor | None:
    """The logits of these rows in an output, if it appears to hold them."""
    try:
        logits = logits_of(output, len(labels))
    except (TypeError, ValueError):
        return None
    return logits if len(logits) == len(labels) else None
