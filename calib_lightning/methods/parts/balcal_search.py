"""The search for the balance of BalCAL's two classifiers."""

from __future__ import annotations

from collections.abc import Callable


def find_balance(measure: Callable[[float], tuple[float, float]], delta: float, tolerance: float = 1e-4) -> float:
    """Search for the weight at which confidence equals ``delta`` times accuracy (Ni et al., 2025).

    ``lam = 1`` if the linear classifier alone is less confident than that. Otherwise bisection of ``[0, 1]``: up if
    ``delta * accuracy > confidence`` for the mixture at the midpoint, else down; the last midpoint is the result.

    Args:
        measure: Returns accuracy and mean confidence of the mixture with weight ``lam`` of the linear classifier.
        delta: Target confidence as a fraction of the accuracy.
        tolerance: Interval width at which the search ends.

    Returns:
        ``lam`` in ``[0, 1]``.

    Example:
        >>> round(find_balance(lambda lam: (0.8, lam), delta=0.5), 3)
        0.4
    """

    def is_underconfident(lam: float) -> bool:
        accuracy, confidence = measure(lam)
        return delta * accuracy > confidence

    if is_underconfident(1.0):
        return 1.0
    low, high, middle = 0.0, 1.0, 1.0
    while high - low > tolerance:
        middle = (low + high) / 2.0
        if is_underconfident(middle):
            low = middle
        else:
            high = middle
    return middle
