"""Newton's method for affine maps of many classes."""

import pytest
import torch

from calib_lightning.posthoc.curvature import Whitened
from calib_lightning.posthoc.linear import FullMap, Ridge, full_nll
from calib_lightning.posthoc.solver import LBFGS
from tests.metrics.golden import random_set


class Recorder:
    """A solver that keeps the objective and does nothing."""

    def minimise(self, objective, start, curvature=None):
        self.objective = objective
        return LBFGS(max_passes=1).minimise(objective, start)


@pytest.mark.parametrize("absent", [False, True])
def test_many_classes_reach_the_optimum(absent):
    """L-BFGS alone has a gradient of 1e-6 after as many passes."""
    generator = torch.Generator().manual_seed(5)
    z = 2.0 * torch.randn(600, 40, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(z.softmax(1), 1, generator=generator).squeeze(1)
    logits = 2.5 * z[labels > 0] if absent else 2.5 * z
    labels = labels[labels > 0] if absent else labels
    ridge, recorder = Ridge(1.0 / (40 * 39), 0.0, 1.0 / 40), Recorder()
    full = FullMap(logits, labels)
    full.fit(ridge, recorder)
    fit = full.fit(ridge, LBFGS(max_passes=80))
    assert fit.solution.passes <= 80
    assert fit.solution.gradient_norm <= 1e-9
    assert float(recorder.objective(fit.solution.point)[1].abs().max()) <= 1e-9
    if absent:
        assert float(fit.matrix[0, 0]) == pytest.approx(
            full.temperature.beta + float(fit.matrix[1:, 0].mean()), abs=1e-9
        )


def test_the_hessian_product_against_differences_of_the_gradient():
    logits, labels = random_set(300, 40)
    matrix = 0.3 * torch.randn(40, 41, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    change = torch.randn(40, 41, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ends = [full_nll(logits, labels, matrix + step * change)[1] for step in (1e-5, -1e-5)]
    whitened = Whitened(logits)
    product = whitened.times(whitened.probs(matrix), change)
    expected = (ends[0] - ends[1]) / 2e-5
    assert torch.allclose(product, expected, atol=1e-5 * float(expected.abs().max()))
