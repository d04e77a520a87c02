"""Progressively layer-peeled training, PLP (Wang and Zhang, ICML 2024)."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from typing import Unpack

from torch import nn
from torch.optim import Optimizer

from calib_lightning.core import ClassificationModule, Encoder, ModuleOptions
from calib_lightning.core.distributed import check_strategy
from calib_lightning.core.encoders import NoBlocksError, TimmEncoder

PUBLISHED_CUTS = {
    "resnet18_cifar": [3, 9, 15, 24, 30, 39, 45, 54, 57, 60, 62],
    "resnet50_cifar": [33, 54, 72, 84, 93, 102, 120, 129, 141, 150, 161],
}
"""Published cuts by encoder: number of parameter tensors up to the top of each group, from the input up."""


def peeling_epochs(groups: int, max_epochs: int, gamma: float = 1.0) -> list[int]:
    """Epochs at which Wang and Zhang (2024) freeze the next group, ``e_j = floor((j / L)^gamma E)``.

    From epoch ``e_j`` on, the top ``j`` of the ``L`` groups are frozen, ``j = 0..L-1``.

    Args:
        groups: L, at least 2.
        max_epochs: E, at least 1.
        gamma: Shape, above 0: 1 is linear, above 1 freezes earlier, below 1 later.

    Returns:
        ``[e_0, ..., e_{L-1}]``, increasing, ``e_0 = 0``.

    Deviations:
        Nothing is frozen in the first epoch: ``e_j`` is at least 1 for ``j > 0``, which only matters for ``E < L`` or a
        large ``gamma``. If epochs coincide, the highest ``j`` counts.

    Example:
        >>> peeling_epochs(4, 10)
        [0, 2, 5, 7]
    """
    # just enough to correct rounding where the power is an integer
    starts = (math.floor((j / groups) ** gamma * max_epochs + 1e-9) for j in range(1, groups))
    return [0, *(max(1, start) for start in starts)]


def block_cuts(encoder: Encoder, head: nn.Module) -> list[int]:
    """Group the parameters: stem, each residual block of a stage, classifier.

    Adjacent layers outside residual blocks form one group, such as a convolution and its norm.

    Args:
        encoder: Must have blocks.
        head: The classifier.

    Returns:
        Number of parameter tensors from the input up to the top of each group, in the order of
        ``encoder.named_parameters()`` and ``head.named_parameters()``.

    Raises:
        NoBlocksError: If the encoder is not a sequence of blocks.

    Example:
        >>> from calib_lightning.core import LinearHead, build_encoder
        >>> block_cuts(build_encoder("digits_cnn"), LinearHead(96, 10))
        [3, 6, 9, 11]
    """
    stem, *blocks = encoder.blocks
    sizes = [_size(stem)]
    for block in blocks:
        # our blocks are stages; timm's hold a stage and what precedes it
        sizes.extend(_groups(block, holds_stages=isinstance(encoder, TimmEncoder)))
    sizes.append(_size(head))
    cuts, total = [], 0
    for size in sizes:
        if size:
            total += size
            cuts.append(total)
    return cuts


def _groups(module: nn.Module, holds_stages: bool = False) -> Iterator[int]:
    """Number of parameter tensors in each group of a stage, from the input up."""
    if next(module.parameters(recurse=False), None) is not None:
        yield _size(module)
        return
    layers = 0
    for child in module.children():
        if not any(_size(part) for part in child.children()):
            layers += _size(child)
            continue
        yield layers
        layers = 0
        if isinstance(child, nn.Sequential) or holds_stages:
            yield from _groups(child)
        else:
            yield _size(child)
    yield layers


def _size(module: nn.Module) -> int:
    return sum(1 for _ in module.parameters())


class PLP(ClassificationModule):
    """Progressively layer-peeled training (Wang and Zhang, "Calibration Bottleneck", ICML 2024).

    Paper: Wang and Zhang 2024.
    Mechanism: freezes the layers group by group, from the top down.
    Extra cost: none.

    The parameter tensors form ``L`` groups, from the input up. From epoch ``floor((j / L)^gamma E)`` on, where
    ``E = max_epochs`` (of the first stage, if there are more), the top ``j`` groups are frozen (see `peeling_epochs`);
    the lowest group never is. A frozen tensor gets no gradient step, weight decay or momentum update and stays
    bit-identical. The running statistics of BatchNorm are still updated. The published aim is better calibration after
    temperature scaling: report that too.

    The frozen groups are a function of the epoch, so checkpoints store nothing: resume with the same ``max_epochs``.

    Args:
        num_classes: K; the command line takes it from the data.
        gamma: Shape of the schedule, above 0: 1 is linear, above 1 freezes earlier, below 1 later.
        cuts: Number of parameter tensors up to the top of each group, counted over the encoder and then the head,
            increasing; the last is the total. Default: the published ones for ``resnet18_cifar`` and
            ``resnet50_cifar``, else stem, each residual block, classifier (`block_cuts`).
        **options: See `ClassificationModule`.

    Raises:
        NoBlocksError: If the encoder has no blocks and no ``cuts`` are given.
        ValueError: If ``gamma`` or ``cuts`` is invalid; before the first step, if the trainer has no number of epochs,
            or a strategy other than a single device or DDP.

    Deviations:
        See `peeling_epochs`. Frozen tensors keep ``requires_grad``, and their gradients are dropped before each step:
        this works under DDP and needs no state, but saves no time.

    Example:
        >>> PLP(10, encoder="digits_cnn").cuts
        [3, 6, 9, 11]
    """

    def __init__(
        self, num_classes: int, gamma: float = 1.0, cuts: list[int] | None = None, **options: Unpack[ModuleOptions]
    ) -> None:
        if not 0 < gamma < math.inf:
            raise ValueError(f"gamma is {gamma}; it must be above 0 and finite. 1 freezes at equal intervals.")
        super().__init__(num_classes, **options)
        self.gamma = gamma
        self.cuts = self._default_cuts() if cuts is None else self._checked_cuts(cuts)

    def on_fit_start(self) -> None:
        """Reject a trainer without a number of epochs, or with a strategy that defeats freezing."""
        super().on_fit_start()
        epochs = self.trainer.max_epochs
        if epochs is None or epochs < 1:
            raise ValueError(
                f"max_epochs of the trainer is {epochs}, but PLP spreads its schedule over all epochs. Set "
                "trainer.max_epochs. The paper uses 350."
            )
        check_strategy(self.trainer, "PLP")

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Drop the gradients of the frozen groups: optimisers skip parameters without one."""
        super().on_before_optimizer_step(optimizer)
        if self.stage > 0:
            return  # a stage switch does the freezing
        epochs = self.first_stage_epochs or self.trainer.max_epochs
        assert epochs is not None
        starts = peeling_epochs(len(self.cuts), epochs, self.gamma)
        frozen = bisect_right(starts, self.current_epoch) - 1
        if frozen == 0:
            return
        for parameter in self._parameters_upwards()[self.cuts[-1 - frozen] :]:
            parameter.grad = None

    def _parameters_upwards(self) -> list[nn.Parameter]:
        return [*self.encoder.parameters(), *self.head.parameters()]

    def _default_cuts(self) -> list[int]:
        published = PUBLISHED_CUTS.get(self.encoder.name)
        if published is not None:
            return list(published)
        try:
            return block_cuts(self.encoder, self.head)
        except NoBlocksError as error:
            total = len(self._parameters_upwards())
            raise NoBlocksError(
                f"{error} PLP can still train it if you pass cuts, the numbers of parameter tensors from the input up "
                f"to the top of each group; the last one is {total}."
            ) from error

    def _checked_cuts(self, cuts: list[int]) -> list[int]:
        total = len(self._parameters_upwards())
        increasing = all(type(high) is int and low < high for low, high in zip([0, *cuts], cuts, strict=False))
        if len(cuts) < 2 or not increasing or cuts[-1] != total:
            raise ValueError(
                f"cuts is {cuts}; it must hold at least two increasing integers above 0, the last of which is {total}, "
                f"the number of parameter tensors of the encoder {self.encoder.name} and its head."
            )
        return list(cuts)
