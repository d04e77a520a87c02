"""Class-balanced loss (Cui et al., CVPR 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor, nn

from calib_lightning.core import ClassificationModule, ModuleOptions
from calib_lightning.core.data_facts import training_labels
from calib_lightning.core.data_in_use import datamodule_in_use
from calib_lightning.functional import checked_batch
from calib_lightning.utils.described import Described


def effective_number_weights(class_counts: Sequence[int], beta: float = 0.9999) -> Tensor:
    """Class weights by the effective number of samples (Cui et al., 2019).

    ``w_k`` proportional to ``(1 - beta) / (1 - beta^{n_k})``, scaled to sum to K.

    Args:
        class_counts: ``n_k``, training samples per class, at least 1 each.
        beta: In ``[0, 1)``; 0 weights all classes equally, towards 1 the weights approach ``1 / n_k``.

    Returns:
        ``(K,)`` float64.

    Raises:
        ValueError: If a class has no sample or ``beta`` is outside ``[0, 1)``.

    Example:
        >>> effective_number_weights([10, 10], beta=0.9)
        tensor([1., 1.], dtype=torch.float64)
    """
    counts = checked_counts(class_counts)
    if not 0 <= beta < 1:
        raise ValueError(f"beta is {beta}; it must be in [0, 1). The paper uses 0.9999.")
    weights = (1.0 - beta) / (1.0 - beta**counts)
    return weights * len(weights) / weights.sum()


def checked_counts(class_counts: Sequence[int] | Tensor) -> Tensor:
    """Return training samples per class as ``(K,)`` float64; reject counts that are not integers from 1 on."""
    counts = torch.as_tensor(class_counts).double()
    whole = counts.isfinite() & (counts == counts.round())
    if counts.ndim != 1 or not len(counts) or not bool(((counts >= 1) & whole).all()):
        raise ValueError(
            f"class_counts is {counts.tolist()}; it must hold the number of training samples of each class, integers "
            "of at least 1."
        )
    return counts


def counts_for(module: ClassificationModule, class_counts: Sequence[int] | None) -> Tensor:
    """Class counts ``(K,)`` float64 of a method with a trainer: those passed to it, else those of its data."""
    data = datamodule_in_use(module.trainer)
    given: Sequence[int] | Tensor | None = class_counts
    if given is None:
        given = getattr(data, "class_counts", None)
    if given is None:
        labels = training_labels(data or module.trainer.fit_loop._data_source.instance)
        if labels is not None and (labels >= 0).all():
            given = torch.bincount(labels, minlength=module.num_classes)
    if given is None:
        raise ValueError(
            f"{type(module).__name__} needs the number of training samples per class. Pass class_counts=[...], or "
            "train with a data module that has class_counts or a data set that has its labels as targets or labels."
        )
    counts = checked_counts(given)
    if len(counts) != module.num_classes:
        raise ValueError(
            f"class_counts has {len(counts)} entries; it must have one for each of the {module.num_classes} classes."
        )
    return counts


def class_balanced_loss(logits: Tensor, labels: Tensor, *, class_weights: Tensor) -> Tensor:
    """Class-balanced cross-entropy (Cui et al., 2019), ``L = -mean_n w_{y_n} log p_{n, y_n}``.

    Args:
        logits: ``(N, K)``.
        labels: ``(N,)`` int64, or soft targets ``(N, K)``: then ``-mean_n sum_k w_k t_nk log p_nk``.
        class_weights: ``w``, ``(K,)``, as returned by `effective_number_weights`.

    Returns:
        Scalar, in nats.

    Example:
        >>> weights = torch.tensor([0.5, 1.5])
        >>> round(class_balanced_loss(torch.zeros(1, 2), torch.tensor([0]), class_weights=weights).item(), 4)
        0.3466
    """
    logits, labels = checked_batch(logits, labels, soft=True)
    weighted = class_weights.to(logits.dtype) * logits.log_softmax(dim=-1)
    if labels.ndim == 2:
        return -(labels * weighted).sum(dim=-1).mean()
    return -weighted.gather(-1, labels.unsqueeze(-1)).mean()


class ClassBalancedLoss(Described, nn.Module):
    """Criterion of `class_balanced_loss`.

    Args:
        class_counts: Training samples per class, at least 1 each.
        beta: See `effective_number_weights`.

    Raises:
        ValueError: If a class has no sample or ``beta`` is outside ``[0, 1)``.
    """

    class_weights: Tensor

    def __init__(self, class_counts: Sequence[int], beta: float = 0.9999) -> None:
        super().__init__()
        # not saved: derived from the data
        self.register_buffer("class_weights", effective_number_weights(class_counts, beta), persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss (scalar) of logits ``(N, K)`` and labels ``(N,)`` or ``(N, K)``."""
        return class_balanced_loss(logits, labels, class_weights=self.class_weights)


class ClassBalanced(ClassificationModule):
    """Train with cross-entropy weighted by the effective number of samples per class (Cui et al., CVPR 2019).

    Paper: Cui et al. 2019.
    Mechanism: gives rare classes more weight.
    Extra cost: none.

    Args:
        num_classes: K; the command line takes it from the data.
        class_counts: Training samples per class; ``None`` counts those of the data.
        beta: In ``[0, 1)``; 0 is cross-entropy, towards 1 the weights approach ``1 / n_k``.
        **options: See `ClassificationModule`.

    Raises:
        ValueError: If a setting is out of range; at the start of a fit, if there are no class counts.

    Example:
        >>> ClassBalanced(2, class_counts=[90, 10], encoder="digits_cnn").hparams.beta
        0.9999
    """

    def __init__(
        self,
        num_classes: int,
        class_counts: Sequence[int] | None = None,
        beta: float = 0.9999,
        **options: Unpack[ModuleOptions],
    ) -> None:
        # plain data: saved with the hyper-parameters
        class_counts = None if class_counts is None else checked_counts(class_counts).long().tolist()
        ClassBalancedLoss(class_counts or [1] * num_classes, beta)  # rejects bad values
        super().__init__(num_classes, **options)
        self.class_counts, self.beta = class_counts, beta

    def begin_fit(self) -> None:
        """Build the criterion from the class counts."""
        self.criterion = ClassBalancedLoss(counts_for(self, self.class_counts).long().tolist(), self.beta)
