"""AdaFocal: focal loss whose gamma follows the calibration of each confidence bin (Ghosh et al., NeurIPS 2022)."""

from __future__ import annotations

from typing import NoReturn, Unpack

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from calib_lightning.core import ClassificationModule, LearningCriterion, ModuleOptions
from calib_lightning.core.distributed import gather_rows
from calib_lightning.core.learning import will_validate
from calib_lightning.functional import at_least_float32, checked_batch
from calib_lightning.utils.described import Described


def ada_focal_loss(logits: Tensor, labels: Tensor, *, edges: Tensor, gammas: Tensor) -> Tensor:
    """AdaFocal loss (Ghosh et al., 2022), with the gamma of the bin that contains ``p_y``.

    ``-mean_n (1 - p_y)^g log p_y`` where ``g >= 0``, ``-mean_n (1 + p_y)^|g| log p_y`` (inverse focal) where ``g < 0``.
    Bins are ``[lo, hi)``; the first also holds smaller values, the last larger ones. The choice of the bin carries no
    gradient.

    Args:
        logits: ``(N, K)``.
        labels: ``(N,)`` int64.
        edges: Bounds ``(B + 1,)`` of the bins, ascending.
        gammas: ``(B,)``.

    Returns:
        Scalar, in nats.

    Deviations:
        The batch mean is used; the authors sum, and clip the gradient. ``1 - p`` is clamped to at least 1e-12.

    Example:
        >>> bins = {"edges": torch.tensor([0.0, 0.5, 1.0]), "gammas": torch.tensor([0.0, 1.0])}
        >>> round(ada_focal_loss(torch.zeros(1, 2), torch.tensor([0]), **bins).item(), 4)
        0.3466
    """
    logits, labels = checked_batch(logits, labels, soft=False)
    log_probs = logits.log_softmax(dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    probs = log_probs.exp()
    bins = torch.searchsorted(edges[1:-1].to(probs.dtype), probs.detach(), right=True)
    gamma = gammas.to(probs.dtype)[bins]
    base = torch.where(gamma >= 0, torch.expm1(log_probs).neg().clamp_min(1e-12), 1.0 + probs)
    return -(base.pow(gamma.abs()) * log_probs).mean()


def equal_mass_edges(confidence: Tensor, n_bins: int) -> Tensor:
    """Bounds of equal-mass confidence bins (Ghosh et al., 2022), by linear interpolation of the ranks.

    Args:
        confidence: ``(N,)``, N at least 1.
        n_bins: B.

    Returns:
        ``(B + 1,)`` float64, ascending, from the smallest to the largest confidence.

    Example:
        >>> equal_mass_edges(torch.tensor([0.5, 0.75, 1.0]), 1)
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    ordered = confidence.double().sort().values
    rank = torch.linspace(0, len(ordered), n_bins + 1, dtype=torch.float64, device=ordered.device)
    rank = rank.clamp_max(len(ordered) - 1)
    low = rank.floor().long()
    high = (low + 1).clamp_max(len(ordered) - 1)
    return ordered[low] + (rank - low) * (ordered[high] - ordered[low])


class AdaFocalLoss(Described, LearningCriterion):
    """Criterion of `ada_focal_loss`; its bins and gammas are buffers that `adapt` updates.

    As the criterion of a module or of a stage it is adapted after each validation within the fit, except the sanity
    check, to the whole validation split; a stage starts with equal bins and gammas of 1.

    Args:
        n_bins: B.
        rate: How strongly a bin's gap changes its gamma, above 0.
        gamma_max: Largest gamma.
        gamma_min: Smallest gamma, below 0.
        switch: Magnitude below which a gamma changes sign, above 0.

    Raises:
        ValueError: If a setting is out of range.

    Attributes:
        edges: ``(B + 1,)`` float64, initially of equal width.
        gammas: ``(B,)`` float64, initially 1.

    Example:
        >>> criterion = AdaFocalLoss(n_bins=1)
        >>> criterion.adapt(torch.tensor([0.5, 1.0]), torch.tensor([False, False]))  # over-confident
        >>> criterion.gammas.item() > 1
        True
    """

    edges: Tensor
    gammas: Tensor

    def __init__(
        self,
        n_bins: int = 15,
        rate: float = 1.0,
        gamma_max: float = 20.0,
        gamma_min: float = -2.0,
        switch: float = 0.2,
    ) -> None:
        super().__init__()
        if n_bins < 1:
            raise ValueError(f"n_bins is {n_bins}; it must be at least 1. The paper uses 15.")
        if not 0 < rate < float("inf"):
            raise ValueError(f"rate is {rate}; it must be above 0 and finite. The paper uses 1.")
        if not (0 < switch <= gamma_max < float("inf") and -float("inf") < gamma_min <= -switch):
            raise ValueError(
                f"gamma_min is {gamma_min}, switch {switch} and gamma_max {gamma_max}; they must satisfy 0 < switch <= "
                "gamma_max and gamma_min <= -switch. The paper uses -2, 0.2 and 20."
            )
        self.rate, self.gamma_max, self.gamma_min, self.switch = rate, gamma_max, gamma_min, switch
        self.register_buffer("edges", torch.linspace(0, 1, n_bins + 1, dtype=torch.float64))
        self.register_buffer("gammas", torch.ones(n_bins, dtype=torch.float64))
        self._validated: list[tuple[Tensor, Tensor]] = []

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss (scalar) of logits ``(N, K)`` and labels ``(N,)``."""
        return ada_focal_loss(logits, labels, edges=self.edges, gammas=self.gammas)

    def adapt(self, confidence: Tensor, correct: Tensor) -> None:
        """Update bins and gammas after an epoch (Ghosh et al., 2022).

        ``g <- g exp(rate E_b)`` where ``g > 0``, ``g exp(-rate E_b)`` where ``g < 0``; ``E_b`` is mean confidence minus
        accuracy in the equal-mass bin ``(lo, hi]``, 0 in an empty one. A gamma that gets closer to 0 than ``switch``
        changes sign; all are clamped to ``[gamma_min, gamma_max]``. The smallest confidence is in no bin.

        Args:
            confidence: Validation confidences ``(N,)``; N = 0 changes nothing.
            correct: ``(N,)``, whether each prediction is correct.
        """
        if not len(confidence):
            return
        n_bins = len(self.gammas)
        confidence = confidence.double()
        edges = equal_mass_edges(confidence, n_bins).to(self.edges.device)
        bins = torch.searchsorted(edges, confidence, right=False) - 1
        inside = bins >= 0
        # float64 even if a run of lower precision has cast the buffers
        gaps = torch.zeros(n_bins, dtype=torch.float64, device=confidence.device)
        gaps.index_add_(0, bins[inside], (confidence - correct.double())[inside])
        gaps /= torch.bincount(bins[inside], minlength=n_bins).clamp_min(1)
        gammas = self.gammas.double()
        gammas = gammas * torch.exp(self.rate * gaps * gammas.sign())
        crossed = gammas.abs() < self.switch
        gammas = torch.where(crossed, -self.switch * gammas.sign(), gammas).clamp(self.gamma_min, self.gamma_max)
        # in place: DDP keeps references
        self.edges.copy_(edges)
        self.gammas.copy_(gammas)

    def check(self, trainer: Trainer, transform: nn.Module | None, epochs: range) -> None:
        """Reject a stage without a validation."""
        if not will_validate(trainer, epochs):
            _refuse()

    def renew(self) -> None:
        """Return to equal bins and gammas of 1."""
        self.edges.copy_(torch.linspace(0, 1, len(self.edges), dtype=torch.float64))
        self.gammas.fill_(1)
        self._validated.clear()

    def begin_fit(self, trainer: Trainer, *, fresh: bool) -> None:
        """Reject a fit without validation batches."""
        self._validated.clear()
        if not sum(trainer.num_val_batches):
            _refuse()

    def see(self, logits: Tensor, labels: Tensor) -> None:
        """Keep confidences of a validation."""
        confidence, predicted = at_least_float32(logits).softmax(dim=-1).max(dim=-1)
        self._validated.append((confidence, predicted == labels))

    def end_validation(self) -> None:
        """Update bins and gammas."""
        nothing = self.gammas.new_empty(0, dtype=torch.float32)
        confidence = torch.cat([part for part, _ in self._validated] or [nothing])
        correct = torch.cat([part.float() for _, part in self._validated] or [nothing])
        self._validated.clear()
        self.adapt(gather_rows(confidence), gather_rows(correct))


def _refuse() -> NoReturn:
    raise ValueError(
        "There are no validation batches in the epochs of AdaFocal; it needs them to update its gammas. Give the data "
        "a validation split (data.init_args.split.val above 0), do not set limit_val_batches to 0, and choose "
        "check_val_every_n_epoch so that a validation falls into these epochs."
    )


class AdaFocal(ClassificationModule):
    """Train with AdaFocal (Ghosh, Schaaf and Gormley, NeurIPS 2022).

    Paper: Ghosh et al. 2022.
    Mechanism: focal loss whose gamma follows the validation gap of each confidence bin.
    Extra cost: none beyond validation.

    The criterion is `AdaFocalLoss`, whose bins and gammas are saved in checkpoints.

    Args:
        num_classes: K; the command line takes it from the data.
        n_bins: Number of confidence bins.
        rate: How strongly a bin's gap changes its gamma.
        gamma_max: Largest gamma.
        gamma_min: Smallest gamma, below 0.
        switch: Magnitude below which a gamma changes sign.
        **options: See `ClassificationModule`.

    Example:
        >>> AdaFocal(10, encoder="digits_cnn").criterion.gammas.shape
        torch.Size([15])
    """

    def __init__(
        self,
        num_classes: int,
        n_bins: int = 15,
        rate: float = 1.0,
        gamma_max: float = 20.0,
        gamma_min: float = -2.0,
        switch: float = 0.2,
        **options: Unpack[ModuleOptions],
    ) -> None:
        criterion = AdaFocalLoss(n_bins, rate, gamma_max, gamma_min, switch)
        super().__init__(num_classes, criterion=criterion, **options)
