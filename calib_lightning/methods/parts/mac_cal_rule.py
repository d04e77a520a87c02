"""The keep rate of MaC-Cal's masks, which confidence and accuracy set after every epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from calib_lightning.utils.names import check_choice

Reading = Literal["keep", "sparsity"]
HeldOut = bool | Literal["clean_pass"]


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
    check_choice("q_is", q_is, Reading)
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
        held_out: Where confidence and accuracy are measured; only True holds images out. True: on the calibration
            split, with the classifier as deployed. False: over the masked training steps of the epoch, as running
            means. "clean_pass": on all *training* images without augmentation, or their stored features, with the
            classifier as deployed; a further reading of the paper. Features that cannot change are kept, N d values.

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
    held_out: HeldOut = True

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
        check_choice("q_is", self.q_is, Reading)
        if not isinstance(self.held_out, bool) and self.held_out != "clean_pass":
            raise ValueError(
                f"held_out is {self.held_out!r}; it must be True (calibration split), False (masked steps) or "
                "'clean_pass' (training images)."
            )


class KeepRate:
    """The keep rate of a stage: of this epoch and of the next.

    Args:
        rule: How it depends on confidence and accuracy.

    Attributes:
        now: Keep rate of this epoch.
        next: Keep rate of the next epoch, once this one has ended.
    """

    def __init__(self, rule: AdaptiveSparsity) -> None:
        self.rule = rule
        self.now = self.next = rule.start

    def begin_epoch(self, epoch: int, *, first: bool) -> str | None:
        """Take the rate of a new epoch; if it has just reached a bound, say so."""
        before, self.now = self.now, self.rule.start if first else self.next
        self.next = self.now
        if first or self.now == before or self.now not in (self.rule.minimum, 1.0):
            return None
        then = "its classifier is retrained without masks" if self.now == 1.0 else "its classifier may collapse"
        return f"the keep rate has reached its bound {self.now} at epoch {epoch}: from now on {then}."

    def end_epoch(self, confidence: float, accuracy: float, t: int, length: int) -> None:
        """Adapt the rate after epoch t of T to the epoch's figures."""
        rule = self.rule
        eta = decayed_step(t, length, *rule.eta)
        self.next = adapt_keep_rate(
            self.now, confidence, accuracy, gamma=rule.gamma, eta=eta, minimum=rule.minimum, q_is=rule.q_is
        )
