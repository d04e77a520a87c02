"""All figures of an evaluated set at once."""

from __future__ import annotations

from matplotlib.figure import Figure

from calib_lightning.metrics import EvaluationState
from calib_lightning.metrics.view import StateView
from calib_lightning.plots.histogram import confidence_histogram
from calib_lightning.plots.reliability import reliability_diagram
from calib_lightning.plots.risk_coverage import risk_coverage_curve


def figures(state: EvaluationState, title: str | None = None) -> dict[str, Figure]:
    """Draw the figures of a set from the state of its metrics.

    With several processes, all must call it: the figures show the rows of all.

    Args:
        state: A state with the parts of ``"ece"`` and ``"correctness_auroc"``, as both are by default.
        title: Title of each figure, such as method and data; the number of rows follows.

    Returns:
        ``"reliability"``, ``"confidence"`` and ``"risk_coverage"``; those without a part in the state are left out.

    Raises:
        ValueError: Batches on a device held invalid values; their number, kind and first batch are named.

    Example:
        >>> state = EvaluationState()
        >>> state.update(torch.eye(3), torch.arange(3))
        >>> sorted(figures(state))
        ['confidence', 'reliability', 'risk_coverage']
    """
    drawn = {}
    with state.sync_context(should_sync=state.sync_on_compute):
        state.check_faults()
        view = StateView(state)
        if "bins" in state.parts:
            drawn["reliability"] = reliability_diagram(view.bins.cpu(), title=title)
        if "ranks" in state.parts:
            ordered = type(view.ordered)(*(sums.cpu() for sums in view.ordered))
            drawn["confidence"] = confidence_histogram(ordered, title=title)
            drawn["risk_coverage"] = risk_coverage_curve(ordered, title=title)
    return drawn
