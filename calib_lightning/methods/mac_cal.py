"""MaC-Cal: a masked classifier on frozen features, with a sparsity set by confidence and accuracy (Ni et al., 2025)."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Unpack, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from calib_lightning.core import ClassificationModule, CosineToEnd, Head, LinearHead, ModuleOptions
from calib_lightning.core.distributed import own_rows, rows_by_rank
from calib_lightning.core.module import datamodule_in_use
from calib_lightning.core.own_data import image_and_label
from calib_lightning.core.stages import (
    HeadFactory,
    StageSwitch,
    StageTraining,
    SwitchOptions,
    can_change_loading,
    own_switches,
)
from calib_lightning.core.submodules import evaluating
from calib_lightning.data.views import CleanViews
from calib_lightning.functional import at_least_float32
from calib_lightning.methods.cross_entropy import CrossEntropyLoss
from calib_lightning.utils.seeding import derive_seed, run_seed

Gradient = Literal["restricted", "straight_through"]
Scaling = Literal["expected", "none", "inverted"]
Layers = Literal["both", "first", "last"]
Reading = Literal["keep", "sparsity"]
Interval = Literal["batch", "epoch"]


def _one_of(name: str, value: object, allowed: Any) -> None:
    if value not in get_args(allowed):
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, get_args(allowed)))}.")


# --- the keep rate ---------------------------------------------------------------------------------------------------


def decayed_step(t: int, length: int, first: float = 0.1, last: float = 0.001) -> float:
    """Maximum change of the keep rate after an epoch (Ni et al.), ``eta_t = first exp(ln(last / first) t / T)``.

    Args:
        t: Epoch of the stage, 1 to T.
        length: T, epochs of the stage.
        first: ``eta_0``; the first epoch is already one step further.
        last: ``eta_T``; equal to ``first`` for a constant, both 0 for a fixed keep rate.

    Returns:
        ``eta_t``.

    Raises:
        ValueError: If ``t`` is not in 1..T, or the steps are neither ``first >= last > 0`` nor both 0.

    Example:
        >>> round(decayed_step(1, 40), 4), round(decayed_step(40, 40), 4)
        (0.0891, 0.001)
    """
    if not 1 <= t <= length:
        raise ValueError(f"t is {t}; it must be in 1..{length}, the epochs of this stage.")
    _check_steps(first, last)
    if first == last:
        return first
    return first * math.exp(math.log(last / first) * t / length)


def _check_steps(first: float, last: float) -> None:
    if not (0 < last <= first < math.inf or first == last == 0):
        raise ValueError(
            f"The steps of the keep rate are ({first}, {last}); they must be finite with 0 < last <= first, or both 0 "
            "for a fixed rate. The paper uses 0.1 and 0.001."
        )


def adapt_keep_rate(
    q: float, confidence: float, accuracy: float, *, gamma: float, eta: float, minimum: float, q_is: str
) -> float:
    """Keep rate of the next epoch (Ni et al.), ``q + clip(Conf - gamma Acc, -eta, eta)``, clamped to ``[minimum, 1]``.

    The paper calls ``q`` a keep probability in its text and a sparsity in its algorithm. Read as a sparsity, the
    printed update applies to the drop rate ``1 - q``: a confident network becomes sparser, ``q - clip(...)``.

    Args:
        q: Keep rate of this epoch, a fraction.
        confidence: ``Conf``, mean confidence.
        accuracy: ``Acc``, a fraction.
        gamma: Factor of the accuracy.
        eta: Maximum change.
        minimum: Smallest keep rate.
        q_is: Meaning of the printed ``q``: "keep" or "sparsity".

    Returns:
        The next keep rate (a keep rate for either ``q_is``).

    Raises:
        ValueError: If confidence or accuracy is not finite, or ``q_is`` is unknown.

    Deviations:
        The paper clamps to ``[0, 1]``.

    Example:
        >>> adapt_keep_rate(0.5, 0.75, 0.5, gamma=1.0, eta=0.125, minimum=0.05, q_is="sparsity")
        0.375
    """
    _one_of("q_is", q_is, Reading)
    if not (math.isfinite(confidence) and math.isfinite(accuracy)):
        raise ValueError(
            f"confidence is {confidence} and accuracy {accuracy}; both must be finite. The classifier has diverged: "
            "use a smaller learning rate."
        )
    change = min(max(confidence - gamma * accuracy, -eta), eta)
    return min(max(q + change if q_is == "keep" else q - change, minimum), 1.0)


@dataclass(frozen=True)
class AdaptiveSparsity:
    """How the keep rate of the masks depends on confidence and accuracy (see `adapt_keep_rate`).

    The defaults differ from the paper: see `MaskedClassifier`.

    Args:
        gamma: Factor of the accuracy, above 0; with 1 the target confidence is the accuracy.
        start: Keep rate of the first epoch, at most 1.
        minimum: Smallest keep rate, above 0 and at most ``start``.
        eta: First and last maximum change (see `decayed_step`); equal for a constant, both 0 for a fixed keep rate.
        q_is: Meaning of the paper's printed ``q``: "keep" or "sparsity".
        held_out: Whether to measure confidence and accuracy on the calibration split with the classifier as deployed,
            instead of running means over the masked training steps of the epoch.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> AdaptiveSparsity(gamma=0.95, eta=(0.1, 0.001), q_is="keep", held_out=False).start
        0.5
    """

    gamma: float = 1.0
    start: float = 0.5
    minimum: float = 0.05
    eta: tuple[float, float] = (0.1, 0.1)
    q_is: Reading = "sparsity"
    held_out: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.gamma < math.inf:
            raise ValueError(f"gamma is {self.gamma}; it must be above 0 and finite. The paper's preset uses 0.95.")
        if not 0 < self.minimum <= self.start <= 1:
            raise ValueError(
                f"minimum is {self.minimum} and start {self.start}; they must satisfy 0 < minimum <= start <= 1."
            )
        if len(self.eta) != 2:
            raise ValueError(f"eta is {self.eta}; it must hold two values: the first and the last maximum change.")
        _check_steps(*self.eta)
        _one_of("q_is", self.q_is, Reading)


# --- masked classifiers ----------------------------------------------------------------------------------------------


class MaskedLinear(nn.Module):
    """Linear layer with random weight masks in training, ``z = (M * W) h + b`` with ``M ~ Bernoulli(q)``.

    `draw` creates a mask, `clear` removes it. Without a mask, and always in evaluation mode, the layer is deterministic
    and ``W`` is scaled according to ``scaling``. A masked weight gets no gradient in that step, but momentum and weight
    decay still apply. Biases are never masked.

    Args:
        in_features: Inputs.
        out_features: Outputs.
        bias: Whether there is a ``b``.
        gradient: "restricted" to the weights that are kept, like autograd, or "straight_through": all of ``W`` gets the
            gradient of ``M * W``.
        scaling: "expected": ``q W`` in evaluation, the mean of ``M * W``. "none": ``W``. "inverted": ``M * W / q`` in
            training, ``W`` in evaluation.

    Raises:
        ValueError: If ``gradient`` or ``scaling`` is unknown.

    Attributes:
        keep: ``q``, a scalar buffer, initially 1.
        mask: The mask ``(out, in)``, bool, or ``None``; not a buffer, since it belongs to one step.

    Example:
        >>> layer = MaskedLinear(4, 2, bias=False)
        >>> _ = layer.keep.fill_(0.5)
        >>> layer.draw(seed=1)
        >>> bool((layer(torch.ones(1, 4)) == (layer.weight * layer.mask).sum(dim=1)).all())
        True
    """

    keep: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        gradient: Gradient = "restricted",
        scaling: Scaling = "expected",
    ) -> None:
        super().__init__()
        _one_of("gradient", gradient, Gradient)
        _one_of("scaling", scaling, Scaling)
        plain = nn.Linear(in_features, out_features, bias=bias)  # its initial weights
        self.weight, self.bias = plain.weight, plain.bias
        self.gradient, self.scaling = gradient, scaling
        self.register_buffer("keep", torch.ones(()))
        self.mask: Tensor | None = None

    def draw(self, seed: int) -> None:
        """Draw a mask as a function of seed, keep rate and device type."""
        device = self.weight.device
        generator = torch.Generator(device).manual_seed(seed)
        # compared on the device: reading the rate would synchronise every step
        self.mask = torch.rand(self.weight.shape, generator=generator, device=device) < self.keep

    def clear(self) -> None:
        """Remove the mask."""
        self.mask = None

    def effective_weight(self) -> Tensor:
        """The weights ``(out, in)`` in current use: masked or scaled."""
        if self.mask is None or not self.training:
            return self.weight * self.keep if self.scaling == "expected" else self.weight
        masked = self.weight * self.mask
        if self.gradient == "straight_through":
            masked = self.weight + (masked - self.weight).detach()
        return masked / self.keep if self.scaling == "inverted" else masked

    def forward(self, features: Tensor) -> Tensor:
        """Outputs ``(N, out)`` of inputs ``(N, in)``."""
        return F.linear(features, self.effective_weight(), self.bias)

    def extra_repr(self) -> str:
        """Sizes and options for ``print``."""
        out_features, in_features = self.weight.shape
        bias = self.bias is not None
        return f"{in_features}, {out_features}, bias={bias}, gradient={self.gradient!r}, scaling={self.scaling!r}"


class MaskedHead(Head):
    """A head with masked layers, which share a keep rate but have separate masks.

    A subclass creates at least one `MaskedLinear` and implements ``forward``.
    """

    def layers(self) -> list[MaskedLinear]:
        """The masked layers, from the input up."""
        return [layer for layer in self.modules() if isinstance(layer, MaskedLinear)]

    @property
    def keep(self) -> float:
        """The keep rate of the masks."""
        return float(self.layers()[0].keep)

    def set_keep(self, keep: float) -> None:
        """Set the keep rate of all layers.

        Args:
            keep: In ``(0, 1]``.

        Raises:
            ValueError: If it is outside.
        """
        if not 0 < keep <= 1:
            raise ValueError(f"keep is {keep}; it must be above 0 and at most 1.")
        for layer in self.layers():
            layer.keep.fill_(keep)

    def draw(self, seed: int) -> None:
        """Draw a mask for each layer, each from its own seed."""
        for number, layer in enumerate(self.layers()):
            layer.draw(derive_seed(seed, number))

    def clear(self) -> None:
        """Remove all masks."""
        for layer in self.layers():
            layer.clear()


class MaskedLinearHead(MaskedHead):
    """One masked linear layer (see `MaskedLinear`).

    Args:
        in_features: d, the number of features.
        num_classes: K.
        bias: Whether there is a bias.
        gradient: "restricted" or "straight_through".
        scaling: "expected", "none" or "inverted".

    Example:
        >>> MaskedLinearHead(64, 10)(torch.zeros(2, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = True,
        gradient: Gradient = "restricted",
        scaling: Scaling = "expected",
    ) -> None:
        super().__init__()
        self.linear = MaskedLinear(in_features, num_classes, bias, gradient, scaling)

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(N, K)`` of features ``(N, d)``."""
        logits: Tensor = self.linear(features)
        return logits


class MaskedBottleneck(MaskedHead):
    """Two masked linear layers, the classifier of Ni et al. (see `MaskedLinear`).

    Args:
        in_features: d, the number of features.
        num_classes: K.
        hidden: Units between the layers. Default: ``max(K, d // 4)``.
        activation: Whether there is a ReLU between the layers.
        bias: Whether the layers have biases.
        layers: The masked layers: "both", "first" or "last".
        gradient: "restricted" or "straight_through".
        scaling: "expected", "none" or "inverted".

    Raises:
        ValueError: If an option is unknown, or ``hidden`` is below 1.

    Example:
        >>> MaskedBottleneck(64, 10).hidden
        16
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        hidden: int | None = None,
        activation: bool = True,
        bias: bool = True,
        layers: Layers = "both",
        gradient: Gradient = "restricted",
        scaling: Scaling = "expected",
    ) -> None:
        super().__init__()
        _one_of("layers", layers, Layers)
        if hidden is not None and hidden < 1:
            raise ValueError(f"hidden is {hidden}; it must be at least 1, or None for max(K, d // 4).")
        self.hidden = max(num_classes, in_features // 4) if hidden is None else hidden
        masked = partial(MaskedLinear, bias=bias, gradient=gradient, scaling=scaling)
        plain = partial(nn.Linear, bias=bias)
        self.first = (plain if layers == "last" else masked)(in_features, self.hidden)
        self.last = (plain if layers == "first" else masked)(self.hidden, num_classes)
        self.activation = activation

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(N, K)`` of features ``(N, d)``."""
        inner: Tensor = self.first(features)
        logits: Tensor = self.last(inner.relu() if self.activation else inner)
        return logits


# --- the stage -------------------------------------------------------------------------------------------------------


def confidence_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ``(3,)`` float64: sum of confidences, number of correct rows, number of rows; does not synchronise."""
    if len(labels) != len(logits):
        raise ValueError(
            f"The classifier returned {len(logits)} rows of logits for {len(labels)} labels; there must be one label "
            "per row. Give the stage a criterion and one view per image, or measure with held_out=True."
        )
    device = _summing_device(logits.device)
    logits, labels = logits.to(device), labels.to(device)
    if labels.ndim == 2:
        labels = labels.argmax(dim=-1)
    confidence, predicted = at_least_float32(logits).softmax(dim=-1).max(dim=-1)
    rows = torch.stack([confidence.double(), (predicted == labels).double(), torch.ones_like(confidence).double()])
    return rows.sum(dim=1)


def _summing_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device  # MPS has no float64


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
        **options: Unpack[SwitchOptions],
    ) -> None:
        _one_of("mask_every", mask_every, Interval)
        self._default_training = options.get("training") is None
        if self._default_training:
            options = {**options, "training": StageTraining(scheduler=CosineToEnd)}
        super().__init__(at_epoch, classifier, **options)
        self.sparsity = AdaptiveSparsity() if sparsity is None else sparsity
        self.mask_every, self.warm_start = mask_every, warm_start
        self._keep = self._next_keep = self.sparsity.start
        self._sums: Tensor | None = None
        self._held_out: list[tuple[Tensor, Tensor]] | None = None
        self._rank = 0
        self._logits: Tensor | None = None
        self._hook: RemovableHandle | None = None

    @classmethod
    def paper(cls, at_epoch: int, q_is: Reading = "keep") -> MaskedClassifier:
        """Return the paper's version: two layers, unscaled, statistics of the masked steps, constant lr.

        Args:
            at_epoch: First epoch of the stage; -T appends a stage of T epochs.
            q_is: "keep" as in the text, where positive feedback drives ``q`` to a bound; or "sparsity" as in the
                algorithm.

        Returns:
            The callback.
        """
        rule = AdaptiveSparsity(gamma=0.95, eta=(0.1, 0.001), q_is=q_is, held_out=False)
        switch = cls(at_epoch, partial(MaskedBottleneck, scaling="none"), rule)
        switch.training.scheduler = None
        return switch

    @classmethod
    def paper_sparsity(cls, at_epoch: int) -> MaskedClassifier:
        """Like `paper`, with ``q`` read as a sparsity."""
        return cls.paper(at_epoch, q_is="sparsity")

    @property
    def uses_calibration(self) -> bool:
        """Whether the stage uses the calibration split; stored in a run's record."""
        return self.sparsity.held_out

    def look_at(self, batch: Any) -> None:
        """Reject batches whose labels cannot be found; called in the first step of a fit."""
        super().look_at(batch)
        self.labels(batch)

    def labels(self, batch: Any) -> Tensor:
        """Return labels ``(N,)`` or soft targets ``(N, K)`` of a batch; override it for other batch formats.

        Args:
            batch: As returned by the loader: a tuple or list whose second part is the labels, or a dict with ``image``
                and ``label``.

        Returns:
            The labels.

        Raises:
            TypeError: If the batch is anything else.
        """
        try:
            return image_and_label(batch, type(self).__name__)[1]
        except TypeError as error:
            raise TypeError(f"{error} Or override labels(batch) to return the labels.") from error

    # --- the classifier ----------------------------------------------------------------------------------------------

    def new_head(self, module: LightningModule, old: nn.Module) -> nn.Module:
        """Build the masked classifier with the initial keep rate."""
        head = super().new_head(module, old)
        if not isinstance(head, MaskedHead):
            raise TypeError(
                f"classifier builds a {type(head).__name__}; {type(self).__name__} needs a MaskedHead, such as "
                "MaskedLinearHead or MaskedBottleneck."
            )
        head.set_keep(self.sparsity.start)
        if self.warm_start:
            _start_from(head, old)
        return head

    def masked_head(self, module: LightningModule) -> MaskedHead:
        """The masked classifier in use."""
        head = self.module_head(module)
        assert isinstance(head, MaskedHead)
        return head

    # --- hooks -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set cross-entropy as the criterion; reject data without a calibration split before training."""
        if self.training.criterion is None and isinstance(pl_module, ClassificationModule):
            self.training = copy(self.training)  # may be shared with another switch
            self.training.criterion = CrossEntropyLoss()
        if stage == "fit" and self._default_training:
            # plain loaders cannot change their images
            self.training.views = CleanViews() if can_change_loading(trainer) else None
        super().setup(trainer, pl_module, stage)
        self._rank = trainer.global_rank
        if stage != "fit":
            return
        self.length(trainer)  # must be known
        if self.sparsity.held_out:
            self._calibration_loader(trainer)
        fresh = not self.active and trainer.ckpt_path is None
        if self.warm_start and self.init_from is not None and fresh and not self.head_loaded:
            raise ValueError(
                f"warm_start is true, but the head of {self.init_from!r} has a different type from this module's. Use "
                "the checkpoint of a linear classifier, or warm_start=False."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the sums of a checkpoint to the device."""
        super().on_train_start(trainer, pl_module)
        if self._sums is not None:
            self._sums = self._sums.to(_summing_device(pl_module.device))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch if due; set the keep rate of the epoch and reset its sums."""
        super().on_train_epoch_start(trainer, pl_module)
        if not self.current:
            return
        begins = self.stage_epoch(trainer) == 0
        keep = self.sparsity.start if begins else self._next_keep
        if not begins and keep != self._keep and keep in (self.sparsity.minimum, 1.0):
            meaning = "its classifier is retrained without masks" if keep == 1.0 else "its classifier may collapse"
            rank_zero_warn(
                f"{type(self).__name__}: the keep rate has reached its bound {keep} at epoch {trainer.current_epoch}: "
                f"from now on {meaning}. Check mac_cal/confidence and mac_cal/accuracy."
            )
        self._keep = self._next_keep = keep
        self._sums = None
        if self.training.frozen_bn != "eval":
            self._held_out = None  # the features depend on the BatchNorm statistics
        self.masked_head(pl_module).set_keep(keep)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Draw the masks of the step, identical on all processes."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self.current:
            return
        stage = int(getattr(pl_module, "stage", 0))
        step = (trainer.global_step, batch_idx) if self.mask_every == "batch" else (trainer.current_epoch,)
        head = self.masked_head(pl_module)
        head.draw(derive_seed(run_seed(), stage, *step))
        if not self.sparsity.held_out:
            # for this step only: a permanent hook would be copied and saved with the module
            self._hook = head.register_forward_hook(self._catch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remove the masks; add the step to the sums of the epoch."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not self.current:
            return
        logits = self._logits
        self._end_step(self.masked_head(pl_module))
        if logits is not None:
            sums = confidence_sums(logits, self.labels(batch))
            self._sums = sums if self._sums is None else self._sums + sums

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log; compute the keep rate of the next epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        if not self.current:
            return
        sums = self._held_out_sums(trainer, pl_module) if self.sparsity.held_out else self._sums
        if sums is None:  # an epoch without steps
            return
        total: Tensor = trainer.strategy.reduce(sums.clone(), reduce_op="sum")
        confidence, correct, rows = total.tolist()
        if rows == 0:
            raise ValueError(
                f"{type(self).__name__}: the calibration split has no images to measure the classifier on."
            )
        confidence, accuracy = confidence / rows, correct / rows
        first, last = self.sparsity.eta
        eta = decayed_step(self.stage_epoch(trainer) + 1, self.length(trainer), first, last)
        self._next_keep = adapt_keep_rate(
            self._keep,
            confidence,
            accuracy,
            gamma=self.sparsity.gamma,
            eta=eta,
            minimum=self.sparsity.minimum,
            q_is=self.sparsity.q_is,
        )
        # identical on all processes
        pl_module.log("mac_cal/keep", self._keep)
        pl_module.log("mac_cal/confidence", confidence)
        pl_module.log("mac_cal/accuracy", accuracy)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove masks and hooks of an interrupted step, and stored features."""
        if self.current:
            self._end_step(self.masked_head(pl_module))
        self._held_out = None
        super().teardown(trainer, pl_module, stage)

    def state_dict(self) -> dict[str, Any]:
        """The state of the switch, the keep rates of this epoch and the next, and the sums per process."""
        sums = [] if self._sums is None else [part.cpu() for part in rows_by_rank(self._sums.unsqueeze(0))]
        return {**super().state_dict(), "keep": self._keep, "next_keep": self._next_keep, "sums": sums}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from the checkpoint."""
        super().load_state_dict(state_dict)
        self._keep, self._next_keep = state_dict["keep"], state_dict["next_keep"]
        parts = state_dict["sums"]
        self._sums = own_rows(parts, self._rank).sum(dim=0) if parts else None

    # --- confidence and accuracy -------------------------------------------------------------------------------------

    def _end_step(self, head: MaskedHead) -> None:
        head.clear()
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._logits = None

    def _catch(self, head: nn.Module, inputs: Any, logits: Tensor) -> None:
        self._logits = logits.detach()

    def _calibration_loader(self, trainer: Trainer) -> Any:
        data = datamodule_in_use(trainer)
        make = getattr(data, "calibration_dataloader", None)
        loader = None if make is None else make()
        if loader is None:
            name = "plain loaders" if data is None else type(data).__name__
            raise ValueError(
                f"The data ({name}) has no calibration split, on which {type(self).__name__} measures confidence and "
                "accuracy. Give the data module calibration images (split.calibration, or a method "
                "calibration_dataloader), or use AdaptiveSparsity(held_out=False)."
            )
        return loader

    @torch.no_grad()
    def _held_out_sums(self, trainer: Trainer, module: LightningModule) -> Tensor:
        """Sums over this process's part of the calibration split, with the classifier as deployed."""
        if self._held_out is None:
            batches = (
                (self.features(module, batch), self.labels(batch)) for batch in self._calibration_loader(trainer)
            )
            self._held_out = [(features, labels.to(features.device)) for features, labels in batches]
        head = self.masked_head(module)
        sums = torch.zeros(3, dtype=torch.float64, device=_summing_device(module.device))
        with evaluating(head), trainer.precision_plugin.forward_context():
            for features, labels in self._held_out:
                sums += confidence_sums(head(features), labels)
        return sums


def _start_from(head: MaskedHead, old: nn.Module) -> None:
    """Copy the weights of a linear classifier, scaled so that the deployed classifier equals it."""
    if not isinstance(head, MaskedLinearHead):
        raise TypeError(
            f"warm_start is true, but the classifier is a {type(head).__name__}; it must be a MaskedLinearHead. Use "
            "one, or warm_start=False."
        )
    new, source = head.linear, old.linear if isinstance(old, LinearHead | MaskedLinearHead) else old
    if not isinstance(source, nn.Linear | MaskedLinear):
        raise ValueError(
            f"warm_start is true, but the previous classifier is a {type(old).__name__}; it must be linear. Use "
            "warm_start=False."
        )
    weight = source.effective_weight() if isinstance(source, MaskedLinear) else source.weight
    if weight.shape != new.weight.shape or (source.bias is not None and new.bias is None):
        raise ValueError(
            f"warm_start is true, but the previous classifier, {source}, does not fit {new}: both need the same sizes, "
            "and a bias if the previous one has a bias. Use warm_start=False."
        )
    with torch.no_grad():
        new.weight.copy_(weight / new.keep.to(weight.device) if new.scaling == "expected" else weight)
        if new.bias is not None:
            new.bias.zero_() if source.bias is None else new.bias.copy_(source.bias)


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
        The default differs from the paper in sign, scaling, statistics, classifier and learning rate, and uses up the
        calibration images: a report must mention a post-hoc calibrator fitted on the same images. See
        `MaskedClassifier`.

    Example:
        >>> MaCCal(10, encoder="digits_cnn").switch.at_epoch
        -40
    """

    select_on: ClassVar[str] = "last"

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
