"""Which values the loggers beside a run's CSV file get by default."""

from __future__ import annotations

from calib_lightning.metrics import CORE, METRICS, families

_SIZES = ("n", "sets")


def is_core(key: str) -> bool:
    """Whether a logged key is one of the few by which runs are compared.

    Of a set's metrics those are the six of `metrics.CORE`; of corruptions only their mean counts. What is no metric of
    a set, such as a loss, a method's own figures or an image, is always kept, and so are comparisons with other classes
    (``ood/...``).

    Args:
        key: Such as ``test/ece``.

    Returns:
        Whether it is.

    Example:
        >>> [is_core(key) for key in ("test/ece", "test/smece", "shift/c/fog_3/ece", "shift/c/ece", "train/loss")]
        [True, False, False, True, True]
    """
    name, _, metric = key.rpartition("/")
    if (metric in _SIZES and name) or any(family.severities for family in families([name])):
        return False
    return metric in CORE or metric not in METRICS or name.partition("/")[0] == "ood"
