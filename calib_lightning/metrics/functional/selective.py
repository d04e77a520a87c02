"""What abstaining at low confidence gains: risk against coverage."""

from __future__ import annotations

import torch
from torch import Tensor

from calib_lightning.metrics.functional.checks import InputKind
from calib_lightning.metrics.functional.ordered import Ordered, order_rows
from calib_lightning.metrics.functional.refinement import SLACK
from calib_lightning.metrics.functional.rows import checked_rows
from calib_lightning.metrics.functional.twins import of_ordered
from calib_lightning.metrics.functional.undefined import checked_result, warn_undefined, why_undefined

# digamma(x + 1/2) - log(x) as a continued fraction in x^2, (numerator, constant) from the outermost level inwards. At
# the argument of `_tail` four levels are accurate to 1e-13 for one row, and more accurate for more rows.
_FRACTION = (
    (1 / 24, 7 / 40),
    (0.0616369047619047619, 1.17277885079671656),
    (0.989454113404563517, 3.17213676778640046),
    (5.03515365144058597, 6.17180066172029771),
)
_SHIFT = 3.5


def _tail(m: Tensor) -> Tensor:
    """``digamma(m + 1) - log(m + 3.5)``, smooth and small for large m."""
    # 1 / (m + 1) + 1 / (m + 2) + 1 / (m + 3) lead from digamma(m + 1) to digamma(m + 4), which the fraction gives.
    x = m + _SHIFT
    square = x.square()
    fraction = torch.zeros_like(m)
    for numerator, constant in reversed(_FRACTION):
        fraction = torch.sub(square, fraction, out=fraction).add_(constant).reciprocal_().mul_(numerator)
    middle = x.sub_(1.5)
    outer = torch.div(middle, square.copy_(middle).square_().sub_(1.0), out=square)
    return fraction.sub_(middle.reciprocal_()).sub_(outer, alpha=2.0)


def _harmonic(m: Tensor, n: Tensor) -> Tensor:
    """``1 / (m + 1) + ... + 1 / (m + n) = digamma(m + n + 1) - digamma(m + 1)``."""
    # The difference of two digammas loses as many digits as m / n has; the logarithm of the quotient does not.
    return torch.log1p(n / (m + _SHIFT)) + _tail(m + n) - _tail(m)


def aurc_from_ordered(ordered: Ordered) -> Tensor:
    """`aurc` ``(...)`` of groups ``(..., G)``; a weight of w stands for w rows."""
    # Within a group of n rows with e errors, after m rows with E errors, the j-th row has the expected risk (E + j e /
    # n) / (m + j) over all orders of the group; these sum to e + (E - m e / n) (H(m + n) - H(m)) with the harmonic
    # numbers H.
    count, wrong = ordered.count.flip(-1), ordered.wrong.flip(-1)
    upto = count.cumsum(-1)
    above = upto - count
    tail = _tail(upto)
    # The first group would need the tail at 0, but its weight E - m e / n is 0.
    harmonic = (count / (above + _SHIFT)).log1p_().add_(tail)
    harmonic[..., 1:] -= tail[..., :-1]
    share = wrong / count.clamp_min(torch.finfo(count.dtype).tiny)
    excess = wrong.cumsum(-1).sub_(wrong).sub_(above.mul_(share))
    return (wrong.sum(-1) + excess.mul_(harmonic).sum(-1)) / count.sum(-1)


def e_aurc_from_ordered(ordered: Ordered, exact: bool = False) -> Tensor:
    """`e_aurc` ``(...)`` of groups ``(..., G)``; it is 0 if all rows are correct, or all wrong."""
    # The best AURC at the error rate r is r + (1 - r) log(1 - r) in the limit of many rows; exactly, with all W errors
    # among N rows last, it is (W - (N - W) (H(N) - H(N - W))) / N.
    total, correct = ordered.count.sum(-1), ordered.correct.sum(-1)
    wrong = total - correct
    if exact:
        best = (wrong - correct * _harmonic(correct, wrong)) / total
    else:
        rate = wrong / total
        best = rate + torch.special.xlog1py(correct / total, -rate)
    return aurc_from_ordered(ordered) - best


def augrc_from_ordered(ordered: Ordered) -> Tensor:
    """`augrc` ``(...)`` of groups ``(..., G)``; a weight of w stands for w rows."""
    # An error at rank j counts in the sums from j to N. Within its group its mean rank is m + (n + 1) / 2, and N + 1
    # minus that is (rows below the group) + (n + 1) / 2.
    ranks = ordered.count.cumsum(-1).sub_(ordered.count, alpha=0.5).add_(0.5)
    return ranks.mul_(ordered.wrong).sum(-1) / ordered.count.sum(-1).square()


def coverage_at_risk_from_ordered(ordered: Ordered, risk: float = 0.05) -> Tensor:
    """`coverage_at_risk` ``(...)`` of groups ``(..., G)``; nan where every threshold exceeds the risk."""
    if not 0.0 <= risk <= 1.0:
        raise ValueError(f"risk is {risk!r}; it must be in [0, 1]. The usual value is 0.05.")
    accepted = ordered.count.flip(-1).cumsum(-1)
    errors = ordered.wrong.flip(-1).cumsum(-1)
    # Without rows the quotient is nan, which is not within the risk. Quotients are compared, as products round.
    within = errors.div_(accepted) <= risk * (1.0 + SLACK)
    # A sentinel column for sets without groups.
    largest = torch.nn.functional.pad(torch.where(within, accepted, 0.0), (1, 0)).amax(-1)
    return torch.where(largest > 0, largest / ordered.count.sum(-1), torch.nan)


def risk_at_coverage_from_ordered(ordered: Ordered, coverage: float = 0.8) -> Tensor:
    """`risk_at_coverage` ``(...)`` of groups ``(..., G)``; a weight of w stands for w rows."""
    # If k falls within a group of n rows with e errors and i of them are accepted, these have i e / n errors, the
    # expectation over all orders of the group.
    if not 0.0 < coverage <= 1.0:
        raise ValueError(f"coverage is {coverage!r}; it must be in (0, 1].")
    total = ordered.count.sum(-1)
    # 0.07 * 100 rounds above 7: the slack keeps such products from including another row.
    rows = torch.minimum(torch.ceil(total * (coverage * (1.0 - SLACK))), total)
    count, wrong = ordered.count.flip(-1), ordered.wrong.flip(-1)
    above = count.cumsum(-1).sub_(count)
    # The accepted share of each group; an empty group has no errors, so its share does not matter.
    share = (rows.unsqueeze(-1) - above).div_(count.clamp_min(torch.finfo(count.dtype).tiny)).clamp_(0.0, 1.0)
    return share.mul_(wrong).sum(-1) / rows


def aurc(logits: Tensor, labels: Tensor, *, confidence: Tensor | None = None, input: InputKind = "logits") -> Tensor:
    """Area under the risk-coverage curve (Geifman and El-Yaniv, 2017), a fraction; lower is better.

    ``AURC = mean_j (errors among the j most confident rows) / j`` over j = 1..N. Tables often print it times 1000.

    Deviations: As in Moon et al. (2020) this is the mean over all rows, not a trapezoid rule. Rows with equal
    confidence count with their expectation over all orders; with a stable sort it would depend on their order.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 first.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        confidence: Confidence ``(N,)`` in ``[0, 1]`` that replaces the largest probability.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64 in ``[0, 1]``; nan, with a warning, without rows.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or an invalid value; the first bad row is named.

    Example:
        >>> logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
        >>> aurc(logits, torch.tensor([0, 1, 0]))
        tensor(0.2778, dtype=torch.float64)
    """
    return of_ordered("aurc", aurc_from_ordered, logits, labels, confidence, input)


def e_aurc(
    logits: Tensor,
    labels: Tensor,
    *,
    exact: bool = False,
    confidence: Tensor | None = None,
    input: InputKind = "logits",
) -> Tensor:
    """Excess AURC (Geifman et al., 2019): the cost of the ranking beyond the error rate r; lower is better.

    ``E-AURC = AURC - (r + (1 - r) log(1 - r))``, or with ``exact`` minus the AURC of the N rows with all errors last.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 first.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        exact: Use the optimum for N rows instead of its limit for many rows, which is lower.
        confidence: Confidence ``(N,)`` in ``[0, 1]`` that replaces the largest probability.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64; 0 if all rows are correct, or all wrong; nan, with a warning, without rows.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or an invalid value; the first bad row is named.

    Example:
        >>> logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
        >>> e_aurc(logits, torch.tensor([0, 1, 0]), exact=True)
        tensor(0.1667, dtype=torch.float64)
    """
    return of_ordered("e_aurc", lambda ordered: e_aurc_from_ordered(ordered, exact), logits, labels, confidence, input)


def augrc(logits: Tensor, labels: Tensor, *, confidence: Tensor | None = None, input: InputKind = "logits") -> Tensor:
    """Area under the generalised risk-coverage curve (Traub et al., 2024), a fraction; lower is better.

    ``AUGRC = mean_j (errors among the j most confident rows) / N`` over j = 1..N: the mean chance that a row is
    accepted and wrong.

    Deviations: Rows with equal confidence count with their expectation over all orders.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 first.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        confidence: Confidence ``(N,)`` in ``[0, 1]`` that replaces the largest probability.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64, at most ``(1 + 1 / N) / 2``; nan, with a warning, without rows.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or an invalid value; the first bad row is named.

    Example:
        >>> logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
        >>> augrc(logits, torch.tensor([0, 1, 0]))
        tensor(0.2222, dtype=torch.float64)
    """
    return of_ordered("augrc", augrc_from_ordered, logits, labels, confidence, input)


def coverage_at_risk(
    logits: Tensor,
    labels: Tensor,
    *,
    risk: float = 0.05,
    confidence: Tensor | None = None,
    input: InputKind = "logits",
) -> Tensor:
    """Largest coverage with an error rate of at most ``risk`` (after Geifman and El-Yaniv, 2017); higher is better.

    ``max_t {coverage(t) : risk(t) <= risk}`` over the thresholds t of the confidence that accept at least one row;
    rows with equal confidence are accepted together.

    Deviations: This is the rate on the given rows, without the paper's bound for new rows.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 first.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        risk: Largest error rate of the accepted rows, in ``[0, 1]``.
        confidence: Confidence ``(N,)`` in ``[0, 1]`` that replaces the largest probability.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64 in ``(0, 1]``; nan, with a warning, without rows, and where every threshold exceeds the risk.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape, an invalid value (the first bad row is named) or ``risk`` outside ``[0, 1]``.

    Example:
        >>> logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
        >>> coverage_at_risk(logits, torch.tensor([0, 1, 0]), risk=0.4)
        tensor(1., dtype=torch.float64)
    """
    rows = checked_rows("coverage_at_risk", logits, labels, confidence, input)
    value = coverage_at_risk_from_ordered(order_rows(rows.log_odds, rows.correct), risk)
    if bool(torch.isnan(value)):
        reason = f"no threshold accepts rows with a risk of at most {risk}" if len(labels) else why_undefined(0)
        warn_undefined("coverage_at_risk", (), reason, stacklevel=2)
    return value


def risk_at_coverage(
    logits: Tensor,
    labels: Tensor,
    *,
    coverage: float = 0.8,
    confidence: Tensor | None = None,
    input: InputKind = "logits",
) -> Tensor:
    """Error rate of the ``ceil(coverage N)`` most confident rows (Geifman and El-Yaniv, 2017); lower is better.

    It is one minus the selective accuracy. If the last accepted row is one of several with equal confidence, it is the
    expectation over their orders.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 first.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        coverage: Share of the rows to accept, in ``(0, 1]``.
        confidence: Confidence ``(N,)`` in ``[0, 1]`` that replaces the largest probability.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64 in ``[0, 1]``; nan, with a warning, without rows.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape, an invalid value (the first bad row is named) or ``coverage`` outside ``(0, 1]``.

    Example:
        >>> logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
        >>> risk_at_coverage(logits, torch.tensor([0, 1, 0]), coverage=0.6)
        tensor(0.5000, dtype=torch.float64)
    """
    rows = checked_rows("risk_at_coverage", logits, labels, confidence, input)
    value = risk_at_coverage_from_ordered(order_rows(rows.log_odds, rows.correct), coverage)
    return checked_result("risk_at_coverage", value, len(labels))
