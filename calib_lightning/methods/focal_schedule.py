"""Focal loss with a decreasing gamma, FLSc-531 (Mukhoti et al., NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Unpack

from calib_lightning.core import ClassificationModule, ModuleOptions
from calib_lightning.methods.focal import FocalLoss


def scheduled_gamma(epoch: int, gammas: Sequence[float], milestones: Sequence[int]) -> float:
    """Gamma of an epoch (Mukhoti et al., 2020): ``gammas[i]`` where i is the number of milestones reached.

    Args:
        epoch: Counted from 0.
        gammas: One more than ``milestones``.
        milestones: First epoch of each gamma except the first, ascending.

    Returns:
        The focusing parameter.

    Example:
        >>> [scheduled_gamma(epoch, (5, 3, 1), (100, 250)) for epoch in (99, 100, 250)]
        [5, 3, 1]
    """
    return gammas[sum(epoch >= milestone for milestone in milestones)]


class FocalSchedule(ClassificationModule):
    """Train with the focal loss and a decreasing gamma, FLSc-531 (Mukhoti et al., NeurIPS 2020).

    Paper: Mukhoti et al. 2020.
    Mechanism: focal loss with decreasing gamma (FLSc-531).
    Extra cost: none.

    Args:
        num_classes: K; the command line takes it from the data.
        gammas: Focusing parameters, one more than ``milestones``; 5, 3, 1 or 5, 3, 2 in the paper.
        milestones: Epochs, counted from 0, at which the next gamma takes effect; 100 and 250 of 350 epochs in the
            paper, 30 and 70 of 100 on Tiny-ImageNet.
        **options: See `ClassificationModule`.

    Raises:
        ValueError: If the numbers of gammas and milestones do not match, a gamma is negative, or the milestones are not
            ascending.

    Example:
        >>> FocalSchedule(10, gammas=[5.0, 3.0], milestones=[2], encoder="digits_cnn").gamma
        5.0
    """

    def __init__(
        self,
        num_classes: int,
        gammas: Sequence[float] = (5.0, 3.0, 1.0),
        milestones: Sequence[int] = (100, 250),
        **options: Unpack[ModuleOptions],
    ) -> None:
        if len(gammas) != len(milestones) + 1:
            raise ValueError(
                f"There are {len(gammas)} gammas for {len(milestones)} milestones; there must be one gamma more than "
                "milestones. The first applies from epoch 0."
            )
        if any(not 0 <= gamma < float("inf") for gamma in gammas):
            raise ValueError(f"gammas is {list(gammas)}; each must be at least 0 and finite.")
        if not all(isinstance(m, int) for m in milestones) or any(b <= a for a, b in pairwise([0, *milestones])):
            raise ValueError(f"milestones is {list(milestones)}; they must be ascending integers above 0.")
        super().__init__(num_classes, criterion=FocalLoss(gammas[0]), **options)
        self.gammas, self.milestones = tuple(gammas), tuple(milestones)

    @property
    def gamma(self) -> float:
        """The focusing parameter of the current epoch."""
        return scheduled_gamma(self.current_epoch, self.gammas, self.milestones)

    def begin_step(self, batch: Any) -> None:
        """Set the gamma of the epoch."""
        assert isinstance(self.criterion, FocalLoss)
        self.criterion.gamma = self.gamma
