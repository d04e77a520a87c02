"""MaC-Cal: a masked classifier on frozen features, with a sparsity set by confidence and accuracy (Ni et al., 2025).

Its classifier is in `parts.mac_cal_head`, the keep rate of the masks in `parts.mac_cal_rule`, and the figures that set
the rate in `parts.mac_cal_figures`. Here are the stage, which ties them together, and the method.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from functools import partial
from typing import Any, Literal, Unpack, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from calib_lightning.core import ClassificationModule, CosineToEnd, ModuleOptions, StageSwitch
from calib_lightning.core.data_in_use import can_change_views
from calib_lightning.core.own_data import image_and_label
from calib_lightning.core.stages import HeadFactory, StageTraining, SwitchOptions, own_switches
from calib_lightning.data.views import CleanViews
from calib_lightning.methods.cross_entropy import CrossEntropyLoss
from calib_lightning.methods.parts.mac_cal_figures import EpochFigures
from calib_lightning.methods.parts.mac_cal_head import MaskedBottleneck, MaskedHead, MaskedLinearHead, start_from
from calib_lightning.methods.parts.mac_cal_rule import AdaptiveSparsity, KeepRate, Reading
from calib_lightning.utils.names import check_choice
from calib_lightning.utils.seeding import derive_seed, run_seed

Interval = Literal["batch", "epoch"]


class MaskedClassifier(StageSwitch):
    """Retrain a new classifier under random masks on the frozen features (MaC-Cal, Ni et al., arXiv 2508.09116).

    A last stage for any training-time method: in every step the classifier's weights are masked, ``M ~ Bernoulli(q)``,
    and after every epoch ``q`` is adapted to confidence and accuracy (see `adapt_keep_rate`). The ``q`` of an epoch
    applies to its steps, its validation and its checkpoints; the next one takes effect when the next epoch starts.
    Masks are a function of (seed, stage, step) and identical on all processes.

    ``mac_cal/keep``, ``mac_cal/confidence`` and ``mac_cal/accuracy`` are logged for every epoch. Judge calibration
    together with accuracy: a classifier that has collapsed to chance is well calibrated.

    Args:
        at_epoch: First epoch of the stage; -T appends a stage of T epochs.
        classifier: Builds a `MaskedHead` from (d, K), such as ``MaskedBottleneck``.
        sparsity: How the keep rate depends on confidence and accuracy.
        mask_every: "batch" or "epoch".
        warm_start: Whether a `MaskedLinearHead` starts from the weights of the previous linear classifier, scaled so
            that the deployed classifier initially equals it.
        loader: Batches of the calibration split, where the data module has none.
        **options: See `StageSwitch`. Default training: unaugmented images (if the data module is of this package), SGD
            with lr 0.1, momentum 0.9 and weight decay 5e-4, cosine to 0 over the epochs of the stage. Without a
            criterion, methods of this package use cross-entropy; other modules keep their loss.

    Raises:
        TypeError: If the classifier is not a `MaskedHead`, or not a `MaskedLinearHead` for a warm start.
        ValueError: If an option is unknown or the weights of a warm start do not fit; before training, if ``held_out``
            is set and the data module has no calibration split.

    Deviations:
        The defaults differ from the paper in sign (``q`` is a sparsity), scaling (``q W`` when deployed), statistics
        (confidence and accuracy of the deployed classifier on the calibration split, ``gamma = 1``, constant ``eta``),
        classifier (one linear layer) and learning rate (cosine). They use up the calibration images: a post-hoc
        calibrator fitted on the same images is not independent of the network, which a report must mention. Use 1,000
        or more. `paper` and `paper_sparsity` are the two readings of the paper. ``q`` is at least ``minimum``, and the
        update after the last epoch has no effect.

    Example:
        >>> switch = MaskedClassifier(at_epoch=-40, classifier=MaskedBottleneck)
        >>> paper = MaskedClassifier.paper(at_epoch=-40)
    """

    def __init__(
        self,
        at_epoch: int,
        classifier: HeadFactory = MaskedLinearHead,
        sparsity: AdaptiveSparsity | None = None,
        mask_every: Interval = "batch",
        warm_start: bool = False,
        loader: Iterable[Any] | None = None,
        **options: Unpack[SwitchOptions],
    ) -> None:
        check_choice("mask_every", mask_every, Interval)
        self._default_training = options.get("training") is None
        if self._default_training:
            options = {**options, "training": StageTraining(scheduler=CosineToEnd)}
        super().__init__(at_epoch, classifier, **options)
        self.sparsity = AdaptiveSparsity() if sparsity is None else sparsity
        self.mask_every, self.warm_start = mask_every, warm_start
        self._rate = KeepRate(self.sparsity)
        self._figures = EpochFigures(self.features, self.labels, held_out=self.sparsity.held_out, loader=loader)
        self._rank = 0

    @classmethod
    def paper(cls, at_epoch: int, q_is: Reading = "keep", **options: Unpack[SwitchOptions]) -> MaskedClassifier:
        """Return the paper's version: two layers, unscaled, statistics of the masked steps, constant lr.

        Args:
            at_epoch: First epoch of the stage; -T appends a stage of T epochs.
            q_is: "keep" as in the text, which drives ``q`` to a bound, or "sparsity" as in the algorithm.
            **options: ``encoder``, ``head``, ``training``, ``init_from`` and ``batch`` of `StageSwitch`.

        Returns:
            The callback.
        """
        rule = AdaptiveSparsity(gamma=0.95, eta=(0.1, 0.001), q_is=q_is, held_out=False)
        switch = cls(at_epoch, partial(MaskedBottleneck, scaling="none"), rule, **options)
        switch.training.scheduler = None if switch._default_training else switch.training.scheduler
        return switch

    @classmethod
    def paper_sparsity(cls, at_epoch: int, **options: Unpack[SwitchOptions]) -> MaskedClassifier:
        """Like `paper`, with ``q`` read as a sparsity."""
        return cls.paper(at_epoch, q_is="sparsity", **options)

    @property
    def uses_calibration(self) -> bool:
        """Whether the stage uses the calibration split; stored in a run's record."""
        return self.sparsity.held_out is True

    def look_at(self, batch: Any) -> None:
        """Reject batches whose labels cannot be found; called in the first step of a fit."""
        super().look_at(batch)
        self.labels(batch)

    def labels(self, batch: Any) -> Tensor:
        """Return labels ``(N,)`` or soft targets ``(N, K)`` of a batch, where the option ``batch`` says.

        Args:
            batch: A batch of the loader.

        Returns:
            The labels.

        Raises:
            TypeError: If they are not there.
        """
        return image_and_label(batch, type(self).__name__, self.batch)[1]

    def new_head(self, module: LightningModule, old: nn.Module) -> nn.Module:
        """Build the masked classifier with the initial keep rate."""
        head = super().new_head(module, old)
        if not isinstance(head, MaskedHead):
            raise TypeError(
                f"classifier builds a {type(head).__name__}; {type(self).__name__} needs a MaskedHead, such as "
                "MaskedLinearHead or MaskedBottleneck."
            )
        head.check_interval(self.mask_every)
        head.set_keep(self.sparsity.start)
        if self.warm_start:
            start_from(head, old)
        return head

    def masked_head(self, module: LightningModule) -> MaskedHead:
        """The masked classifier in use."""
        return cast(MaskedHead, self.module_head(module))

    # --- hooks -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set cross-entropy as the criterion; reject data without a calibration split before training."""
        if self.training.criterion is None and isinstance(pl_module, ClassificationModule):
            self.training = copy(self.training)  # may be shared with another switch
            self.training.criterion = CrossEntropyLoss()
        if stage == "fit" and self._default_training:
            self.training.views = CleanViews() if can_change_views(trainer) else None  # plain loaders cannot
        super().setup(trainer, pl_module, stage)
        self._rank = trainer.global_rank
        if stage != "fit":
            return
        self.length(trainer)  # must be known
        self._figures.check(trainer, type(self).__name__)
        fresh = not self.active and trainer.ckpt_path is None
        if self.warm_start and self.init_from is not None and fresh and not self.head_loaded:
            raise ValueError(
                f"warm_start is true, but the head of {self.init_from!r} has a different type from this module's. Use "
                "that of a linear classifier and a newly built module, or warm_start=False."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the training data; move the sums of a checkpoint to the device."""
        super().on_train_start(trainer, pl_module)
        self._figures.begin_fit(pl_module, type(self).__name__)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch if due; set the keep rate of the epoch and reset its sums."""
        super().on_train_epoch_start(trainer, pl_module)
        if not self.current:
            return
        news = self._rate.begin_epoch(trainer.current_epoch, first=self.stage_epoch(trainer) == 0)
        if news is not None:
            rank_zero_warn(f"{type(self).__name__}: {news} Check mac_cal/confidence and mac_cal/accuracy.")
        self._figures.begin_epoch(same_features=self.training.frozen_bn == "eval")
        self.masked_head(pl_module).set_keep(self._rate.now)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Draw the masks of the step, identical on all processes."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self.current:
            return
        stage = int(getattr(pl_module, "stage", 0))
        step = (trainer.global_step, batch_idx) if self.mask_every == "batch" else (trainer.current_epoch,)
        head = self.masked_head(pl_module)
        head.draw(derive_seed(run_seed(), stage, *step))
        self._figures.begin_step(head)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Note the weights, if masked ones are to be held."""
        if self.current:
            self.masked_head(pl_module).before_update()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remove the masks; add the step to the sums of the epoch."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not self.current:
            return
        self.masked_head(pl_module).clear()
        self._figures.end_step(batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log; compute the keep rate of the next epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        if not self.current:
            return
        figures = self._figures.measured(pl_module, self.masked_head(pl_module), type(self).__name__)
        if figures is None:  # an epoch without steps
            return
        confidence, accuracy = figures
        self._rate.end_epoch(confidence, accuracy, self.stage_epoch(trainer) + 1, self.length(trainer))
        pl_module.log("mac_cal/keep", self._rate.now)  # identical on all processes, like the others
        pl_module.log("mac_cal/confidence", confidence)
        pl_module.log("mac_cal/accuracy", accuracy)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove masks and hooks of an interrupted step, and stored features."""
        if self.current:
            self.masked_head(pl_module).clear()
        self._figures.forget()
        super().teardown(trainer, pl_module, stage)

    def state_dict(self) -> dict[str, Any]:
        """The state of the switch, the keep rates of this epoch and the next, and the sums per process."""
        rates = {"keep": self._rate.now, "next_keep": self._rate.next}
        return {**super().state_dict(), **rates, "sums": self._figures.sums_by_rank()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from the checkpoint."""
        super().load_state_dict(state_dict)
        self._rate.now, self._rate.next = state_dict["keep"], state_dict["next_keep"]
        self._figures.load_sums(state_dict["sums"], self._rank)


class MaCCal(ClassificationModule):
    """Train with cross-entropy, then retrain a masked classifier on the frozen features (Ni et al., arXiv 2508.09116).

    Paper: Ni, Zhao, Yang and Guo 2025.
    Mechanism: random weight masks on a new classifier, with a rate set by confidence and accuracy.
    Extra cost: none; the second stage only needs the encoder's forward pass, and the calibration split once.

    `MaskedClassifier` is the second stage, and can follow any other method as a callback. Also report post-hoc
    temperature scaling, the baseline that this method must beat. The command line selects the last checkpoint.

    Args:
        num_classes: K; the command line takes it from the data.
        switch: When and how the second stage is trained. Default: ``MaskedClassifier(-40)``, 40 more epochs;
            ``MaskedClassifier.paper(-40)`` and ``MaskedClassifier.paper_sparsity(-40)`` are readings of the paper.
        **options: See `ClassificationModule`; they apply to the first stage.

    Attributes:
        switch: The switch to the second stage.

    Raises:
        TypeError: If ``switch`` is not a `MaskedClassifier`.

    Deviations:
        Those of `MaskedClassifier`: sign, scaling, statistics, classifier and learning rate. The default uses up the
        calibration images: a report must mention a post-hoc calibrator fitted on them.

    Example:
        >>> MaCCal(10, encoder="digits_cnn").switch.at_epoch
        -40
    """

    select_on: str = "last"

    def __init__(
        self, num_classes: int, switch: MaskedClassifier | None = None, **options: Unpack[ModuleOptions]
    ) -> None:
        super().__init__(num_classes, criterion=CrossEntropyLoss(), **options)
        switch = MaskedClassifier(-40) if switch is None else switch
        if not isinstance(switch, MaskedClassifier):
            raise TypeError(f"switch of MaCCal is {switch!r}; it must be an object such as MaskedClassifier(-40).")
        self.switch = switch

    def configure_callbacks(self) -> list[Callback]:
        """Add the switch."""
        return own_switches(self, self.switch)
