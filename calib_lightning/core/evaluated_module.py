"""Validation, test and prediction of a classifier; one accumulator for each set."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from torch import Tensor, nn

from calib_lightning.core.checkpoint_io import AtomicCheckpointIO, check_checkpoint
from calib_lightning.core.data_facts import class_names_of
from calib_lightning.core.data_in_use import datamodule_in_use, label_distributions_of
from calib_lightning.core.finite import naming_cause
from calib_lightning.core.own_data import Positioned, as_batch
from calib_lightning.functional import at_least_float32
from calib_lightning.metrics import REPORT, EvaluationState, OODDetection, SoftLabelScores, means_of_families
from calib_lightning.metrics.functional import max_prob_log_odds
from calib_lightning.types import Batch, Prediction

UNLABELLED = "ood/"
"""Prefix of sets whose images belong to no class: only their confidence is compared with that of the test set."""
OVO_CLASSES = 200
"""Maximum number of classes for `ovo_auroc`, which keeps all scores of a test set: 80 MB for 50,000 rows."""


class EvaluatedModule(LightningModule):
    """The half of a `ClassificationModule` that reads batches and measures; it knows nothing of training."""

    num_classes: int
    class_names: tuple[str, ...] | None = None
    """Names of the classes that it was trained on, in logit order; ``None`` if unknown."""

    def __init__(self) -> None:
        super().__init__()
        self.val_state = EvaluationState()
        self.test_states = nn.ModuleList()
        self.test_sets: list[str] = []
        self._soft: dict[str, tuple[Tensor, SoftLabelScores]] = {}
        self._ood: dict[str, OODDetection] = {}
        self._rows: dict[str, Tensor] = {}
        self.test_values: dict[str, dict[str, float]] = {}

    @_restricted_classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:  # noqa: N805
        """Lightning's own way back from a checkpoint, after the checksums in the file have been compared."""
        check_checkpoint(checkpoint_path)
        found: Self = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        return found

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the checksums in the file where the trainer's own reader has not."""
        trainer = getattr(self, "_trainer", None)
        if trainer is not None and not isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO):
            check_checkpoint(trainer.ckpt_path)

    def outputs(self, image: Tensor) -> Prediction:
        """Logits and, if the method defines its own, confidences; one pass through the network."""
        return Prediction(self(image))

    def confidence(self, image: Tensor) -> Tensor:
        """Confidence ``(N,)`` in the predicted class: the method's own, or the largest softmax probability."""
        logits, confidence = self.outputs(image)
        return at_least_float32(logits).softmax(dim=-1).amax(dim=-1) if confidence is None else confidence

    # --- evaluation --------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Reset the validation metrics; the sanity check leaves no trace."""
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self._take_class_names()
        self.val_state.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> Prediction:  # type: ignore[override]
        """Add one batch to the validation metrics; return its prediction for callbacks."""
        return self._evaluate(self._checked(batch), self.val_state)

    def on_validation_epoch_end(self) -> None:
        """Compute and log the validation metrics, once."""
        if not self.trainer.sanity_checking:
            self._log_state("val", self.val_state)

    def on_test_start(self) -> None:
        """Make one accumulator per test set, and another one if the set has label distributions."""
        self._take_class_names()
        data = datamodule_in_use(self.trainer)
        loaders = self.trainer.test_dataloaders
        count = len(loaders) if isinstance(loaders, list | tuple) else 1
        self.test_sets = _set_names(getattr(data, "evaluation_names", None), count)
        found = {name: label_distributions_of(data, name) for name in self.test_sets if not _is_unlabelled(name)}
        self._soft = {
            name: (labels.to(self.device), SoftLabelScores().to(self.device))
            for name, labels in found.items()
            if labels is not None
        }
        others = [name for name in self.test_sets if _is_unlabelled(name)] if "test" in self.test_sets else []
        self._rows = {name: torch.zeros((), dtype=torch.int64, device=self.device) for name in self.test_sets}
        self._ood = {name: OODDetection().to(self.device) for name in others}
        report = (*REPORT, "ovo_auroc") if self.num_classes <= OVO_CLASSES else REPORT
        self.test_states = nn.ModuleList(EvaluationState(report) for _ in range(count)).to(self.device)

    def test_step(  # type: ignore[override]
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> Prediction:
        """Add one batch to the metrics of its set; return its prediction for callbacks."""
        state, name, batch = self.test_states[dataloader_idx], self.test_sets[dataloader_idx], self._checked(batch)
        assert isinstance(state, EvaluationState)
        self._rows[name] += len(batch.label)
        if _is_unlabelled(name):
            prediction = self.outputs(batch.image)
            self._compare(prediction, [name], inside=False)
            return prediction
        prediction = self._evaluate(batch, state)
        if name == "test":
            self._compare(prediction, self._ood, inside=True)
        if name in self._soft:
            labels, scores = self._soft[name]
            if bool((batch.index < 0).any()):
                raise ValueError(
                    f"The batches of {name!r} have no index, which label_distributions({name!r}) needs. Let the data "
                    "set return (image, label, index)."
                )
            scores.update(prediction.logits, labels[batch.index])
        return prediction

    def on_test_epoch_end(self) -> None:
        """Compute and log the metrics of every test set, once, and their means over sets that belong together."""
        found: dict[str, dict[str, float]] = {}
        with warnings.catch_warnings(record=True) as caught:  # a hundred shifted sets would say the same
            warnings.simplefilter("always")
            for name, state in zip(self.test_sets, self.test_states, strict=True):
                assert isinstance(state, EvaluationState)
                if name in self._ood:
                    found[name] = self._log_state(name, self._ood[name])
                elif not _is_unlabelled(name):
                    found[name] = self._log_state(name, state)
                    if name in self._soft:
                        self._log_state(name, self._soft[name][1])
                else:
                    continue
                rows: Tensor = self.trainer.strategy.reduce(self._rows[name].clone(), reduce_op="sum")
                self._log_values(f"{name}/", {"n": rows})
        for message, category in {(str(warning.message), warning.category): None for warning in caught}:
            warnings.warn(message, category, stacklevel=2)
        self.test_values = found
        for family, values in means_of_families(found).items():
            self._log_values(f"{family}/", {key: torch.tensor(value) for key, value in values.items()})

    def on_predict_start(self) -> None:
        """Compare the class names with those of the data."""
        self._take_class_names()

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Prediction:
        """Logits and confidence of one batch; labels are ignored."""
        return self.outputs(as_batch(batch, type(self).__name__, labelled=False).image)

    def _evaluate(self, batch: Batch, state: EvaluationState) -> Prediction:
        prediction = self.outputs(batch.image)
        with naming_cause(self, batch.image, prediction.logits):
            state.update(prediction.logits, batch.label, prediction.confidence)
        return prediction

    def _compare(self, prediction: Prediction, names: Iterable[str], *, inside: bool) -> None:
        """Add the confidences of one batch to the comparisons of these sets with the test set."""
        if not self._ood:
            return
        scores = max_prob_log_odds(at_least_float32(prediction.logits))
        for name in names:
            self._ood[name].update(scores, torch.full_like(scores, inside, dtype=torch.bool))

    def _log_state(self, prefix: str, state: EvaluationState | OODDetection | SoftLabelScores) -> dict[str, float]:
        with naming_cause(self):  # on a GPU what is not finite is found here
            values = state.compute()
        self._log_values(f"{prefix}/", values)
        return {key: float(value) for key, value in values.items()}

    def _log_values(self, prefix: str, values: Mapping[str, Tensor]) -> None:
        # compute() has already summed over the ranks. Lightning asks to synchronise them: their largest is exact, while
        # their mean would round.
        logged = {f"{prefix}{name}": value.float() for name, value in values.items()}
        self.log_dict(logged, add_dataloader_idx=False, sync_dist=True, reduce_fx="max")

    def _take_class_names(self) -> None:
        names, known = class_names_of(datamodule_in_use(self.trainer)), self.class_names
        if names is None or names == known:
            return
        if len(names) != self.num_classes:
            raise ValueError(
                f"The data has {len(names)} class names; it must have one for each of the module's {self.num_classes} "
                "classes. Give the names in label order, or use a module with as many classes."
            )
        if known is not None and self.global_rank == 0:
            first = next(k for k in range(len(names)) if names[k] != known[k])
            warnings.warn(
                f"Class {first} of the data is {names[first]!r}, but {known[first]!r} in the network. If the order of "
                "the classes differs, every prediction is wrong. Use data with the classes of the training.",
                stacklevel=2,
            )
        if known is None or self.trainer.state.fn == TrainerFn.FITTING:
            self.class_names = names

    def _call_batch_hook(self, hook_name: str, *args: Any) -> Any:
        """Pass hooks the loader's original batch; the samples' positions are added after the last hook."""
        batch, *rest = args
        if not isinstance(batch, Positioned):
            return super()._call_batch_hook(hook_name, *args)
        batch = Positioned(super()._call_batch_hook(hook_name, batch.batch, *rest), batch.index)
        return batch.attached() if hook_name == "on_after_batch_transfer" else batch

    def _checked(self, batch: Any) -> Batch:
        return as_batch(batch, type(self).__name__)


def _is_unlabelled(name: str) -> bool:
    return name.startswith(UNLABELLED)


def _set_names(names: list[str] | None, count: int) -> list[str]:
    """Names of the evaluated sets, the prefixes of their metrics; plain loaders are numbered."""
    if names is None:
        names = ["test"] if count == 1 else [f"test/{i}" for i in range(count)]
    if len(names) != count:
        raise ValueError(
            f"The data module names {len(names)} sets ({', '.join(names)}); it must name as many as it has test "
            f"loaders ({count})."
        )
    return names
