"""Bayesian binning into quantiles, BBQ (Naeini, Cooper and Hauskrecht, 2015)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from calib_lightning.posthoc.binary import FLOOR, bounded_log_odds
from calib_lightning.posthoc.fit_report import Optimum
from calib_lightning.posthoc.histogram_binning import Binned, equal_mass_edges

_PRIOR_ROWS = 2.0
_LEAST_WEIGHT = 1e-6


class BinningModel(NamedTuple):
    """One binning: inner edges ``(B - 1,)`` in log-odds, posterior means ``(B,)``, and log marginal likelihood."""

    edges: Tensor
    probs: Tensor
    score: float


def binning_model(log_odds: Tensor, hits: Tensor, edges: Tensor) -> BinningModel:
    """Marginal likelihood and posterior means of a binning with a beta prior in each bin.

    With ``n_b`` rows and ``m_b`` hits in bin b, whose middle is ``p_b``, and ``a_b = 2 p_b / B``,
    ``b_b = 2 (1 - p_b) / B``, the likelihood is the product over bins of
    ``G(2 / B) / G(n_b + 2 / B) * G(m_b + a_b) / G(a_b) * G(n_b - m_b + b_b) / G(b_b)``, G the gamma function, and the
    mean ``(m_b + a_b) / (n_b + 2 / B)``.
    """
    bins = len(edges) + 1
    index = torch.bucketize(log_odds, edges)
    rows = torch.bincount(index, minlength=bins).double()
    found = torch.bincount(index, hits.double(), minlength=bins)
    ends = torch.cat([edges.new_zeros(1), torch.sigmoid(edges), edges.new_ones(1)])
    middle = (0.5 * (ends[1:] + ends[:-1])).clamp(FLOOR, 1.0 - FLOOR)
    strength = _PRIOR_ROWS / bins
    above, below = strength * middle, strength * (1.0 - middle)
    terms = math.lgamma(strength) - torch.lgamma(rows + strength)
    terms += torch.lgamma(found + above) - torch.lgamma(above)
    terms += torch.lgamma(rows - found + below) - torch.lgamma(below)
    return BinningModel(edges, (found + above) / (rows + strength), float(terms.sum()))


class BBQ(Binned):
    """Bayesian binning into quantiles (Naeini et al., 2015): the mean of histogram binnings of many sizes.

    Binnings of equal mass with ``N^(1/3) / 10`` to ``10 N^(1/3)`` bins, each weighted by its marginal likelihood; see
    `binning_model`. The state is their weighted mean, itself a step function.

    Deviations: Binnings with less than a millionth of the weight of the best one are left out. Values are kept between
    1e-6 and ``1 - 1e-6``.

    Example:
        >>> bbq = BBQ()
        >>> _ = bbq.fit(torch.linspace(-1, 1, 100), torch.arange(100) % 4 > 0)
        >>> 0.6 < torch.sigmoid(bbq(torch.zeros(1))).item() < 0.9
        True
    """

    def fit_rows(self, log_odds: Tensor, hits: Tensor) -> Optimum:
        """Weigh the binnings; see `BinaryCalibrator.fit_rows`."""
        root = len(hits) ** (1.0 / 3.0)
        sizes = range(max(1, int(root / 10.0)), min(len(hits), math.ceil(10.0 * root)) + 1)
        ordered, order = log_odds.sort()
        models = [binning_model(ordered, hits[order], equal_mass_edges(ordered, size)) for size in sizes]
        best = max(model.score for model in models)
        kept = [model for model in models if model.score >= best + math.log(_LEAST_WEIGHT)]
        edges = torch.unique(torch.cat([model.edges for model in kept]))
        # Each cell between two edges lies inside one bin of every binning: that of its upper end.
        cells = torch.cat([edges, edges.new_full((1,), torch.inf)])
        total = torch.zeros_like(cells)
        for model in kept:
            total += math.exp(model.score - best) * model.probs[torch.bucketize(cells, model.edges)]
        weight = sum(math.exp(model.score - best) for model in kept)
        self.edges, self.values = edges, bounded_log_odds(total / weight)
        return Optimum(passes=len(models))
