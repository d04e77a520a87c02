"""Vector scaling, and the diagonal map that it shares with structured vector scaling."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from calib_lightning.posthoc.linear import DiagonalMap, diagonal_nll, separates
from calib_lightning.posthoc.matrix import MatrixScaling
from calib_lightning.posthoc.solver import LBFGS, AdamDescent, GradientDescent, PlainLBFGS
from calib_lightning.posthoc.temperature import Temperature
from calib_lightning.posthoc.vector import VectorScaling
from tests.metrics.golden import golden_set, random_set
from tests.metrics.test_real_data import load


def golden():
    logits, labels = golden_set()
    return logits / 1.6, labels


def raw_nll(logits, labels):
    return float(torch.nn.functional.cross_entropy(logits.double(), labels))


def test_golden_values():
    fitted = VectorScaling(ridge=0.0).fit(*golden())
    assert fitted.report.converged
    assert not fitted.report.at_bound
    assert fitted.report.nll_after == pytest.approx(0.650991676774, abs=1e-12)
    assert fitted.weight.tolist() == pytest.approx([2.12486, 1.64952, 1.77273, 1.79562, 1.33241], abs=1e-5)
    assert fitted.bias.tolist() == pytest.approx([-0.52500, 0.15527, -0.05741, -0.19553, 0.62268], abs=1e-5)


def test_gradient_against_autograd():
    logits, labels = random_set(700, 400)  # two blocks of rows
    matrix = torch.randn(2, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    expected = torch.nn.functional.cross_entropy(logits * matrix[0] + matrix[1], labels)
    expected.backward()
    value, gradient = diagonal_nll(logits, labels, matrix.detach())
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-13)
    assert torch.allclose(gradient, matrix.grad, atol=1e-14)


@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_agrees_with_scipy(ridge):
    logits, labels = random_set(300, 4, seed=2)
    z, y = logits.numpy(), labels.numpy()

    def objective(point):
        w, b = point[:4], point[4:]
        mapped = z * w + b
        p = np.exp(mapped - mapped.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        residual = p.copy()
        residual[np.arange(300), y] -= 1
        gradient = np.concatenate([(residual * z).mean(0), residual.mean(0)]) + 2 * ridge * np.append(w - 1, b)
        return -np.log(p[np.arange(300), y]).mean() + ridge * ((w - 1) ** 2).sum() + ridge * (b**2).sum(), gradient

    reference = minimize(objective, np.repeat([1.0, 0.0], 4), jac=True, method="BFGS", options={"gtol": 1e-10})
    fit = DiagonalMap(logits, labels).fit(ridge, LBFGS(), 1.0)
    assert fit.solution.value == pytest.approx(reference.fun, abs=1e-12)
    bias = reference.x[4:] - reference.x[4:].mean()
    assert np.allclose(fit.matrix.numpy(), [reference.x[:4], bias], atol=1e-7)


def test_transform_is_the_equation_and_keeps_the_dtype():
    logits, labels = golden()
    fitted = VectorScaling().fit(logits, labels)
    mapped = logits.numpy() * fitted.weight.numpy() + fitted.bias.numpy()
    expected = mapped - np.log(np.exp(mapped).sum(1, keepdims=True))
    assert np.allclose(fitted(logits).numpy(), expected, atol=1e-13)
    assert fitted(logits.float()).dtype == torch.float32
    assert np.allclose(fitted(logits.float()).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("solver", "gap"),
    [(GradientDescent(), 0.07596), (AdamDescent(), 0.00532), (PlainLBFGS(), 0.0436)],
    ids=lambda value: type(value).__name__,
)
def test_papers_solvers_start_at_the_identity_and_report_that_they_stopped_early(solver, gap):
    logits, labels = golden()
    with pytest.warns(UserWarning, match="before the optimum"):
        fitted = VectorScaling(solver).fit(logits, labels)
    assert not fitted.report.converged
    assert not fitted.report.at_bound
    assert fitted.report.nll_after - 0.650991676774 == pytest.approx(gap, rel=1e-2)


def test_one_step_of_gradient_descent_from_the_identity():
    logits, labels = golden()
    with pytest.warns(UserWarning, match="before the optimum"):
        fitted = VectorScaling(GradientDescent(lr=0.5, epochs=1)).fit(logits, labels)
    residual = logits.softmax(1) - torch.nn.functional.one_hot(labels, 5)
    assert torch.allclose(fitted.weight, 1 - 0.5 * (residual * logits).mean(0), atol=1e-14)
    assert torch.allclose(fitted.bias, -0.5 * residual.mean(0), atol=1e-14)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize(("rows", "classes"), [(3, 2), (10, 10), (200, 3), (200, 50)])
def test_never_above_the_raw_likelihood(rows, classes, scale):
    logits, labels = random_set(rows, classes, scale=scale, seed=rows)
    with pytest.warns() if len(labels.unique()) < classes or rows < 20 else torch.no_grad():
        report = VectorScaling().fit(logits, labels).report
    assert report.at_bound == (rows == 3)  # all right, so T is at its bound
    assert report.converged == (rows > 3)
    assert report.nll_after <= raw_nll(logits, labels) + 1e-12


def test_the_result_does_not_depend_on_the_scale_of_the_logits():
    logits, labels = golden()
    expected = VectorScaling().fit(logits, labels)(logits)
    for scale in (1e-4, 1e4):
        fitted = VectorScaling().fit(scale * logits, labels)
        assert fitted.report.converged
        assert torch.allclose(fitted(scale * logits), expected, atol=1e-4)


def test_absent_classes_keep_the_temperature():
    logits, labels = golden()
    keep = (labels != 1) & (labels != 3)
    with pytest.warns(UserWarning, match="2 of 5 classes"):
        fitted = VectorScaling(ridge=0.0).fit(logits[keep], labels[keep])
    assert fitted.report.converged
    assert not fitted.report.at_bound
    assert fitted.weight[1] == fitted.weight[3]  # 1/T
    others = fitted.bias[[0, 2, 4]].mean()
    assert torch.allclose(fitted.bias[[1, 3]], others.expand(2), atol=1e-12)
    assert fitted.bias.abs().max() < 5
    assert fitted.report.nll_after < fitted.report.nll_before


@pytest.mark.parametrize("rows", [1, 500])
def test_separable_rows_end_at_a_bound(rows):
    logits, _ = golden()
    logits = logits[:rows]
    with pytest.warns(UserWarning, match="bound"):
        fitted = VectorScaling(ridge=0.0).fit(logits, logits.argmax(1))
    assert fitted.report.at_bound
    assert fitted.weight.isfinite().all()
    assert fitted.bias.isfinite().all()
    assert fitted.weight.abs().max() < 1e7
    assert not fitted.report.converged
    assert fitted.report.nll_after < 1e-6
    assert fitted(logits.float()).isfinite().all()


def test_rows_that_no_temperature_but_a_weight_separates():
    logits = torch.tensor([[1.0, 0.9], [1.0, 0.8], [-1.0, -0.5], [-1.0, -0.4]]).double()
    labels = torch.tensor([0, 0, 1, 1])
    shifted = logits + torch.tensor([0.0, 1.0])
    with pytest.warns(UserWarning, match="bound"):
        fitted = VectorScaling(ridge=0.0).fit(shifted, labels)
    assert fitted.report.nll_after < 1e-6 < fitted.report.nll_before
    assert fitted.weight.abs().max() < 1e7


@pytest.mark.parametrize("scaling", [VectorScaling, MatrixScaling])
def test_with_a_ridge_separated_rows_have_an_optimum(scaling):
    """Biases of 1 and -1 make all rows right; no temperature does, so nothing is at a bound."""
    logits = 4 * torch.randn(400, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shifted = logits + torch.tensor([1.0, 0.0, -1.0])
    best = shifted.topk(2).values
    clear = best[:, 0] - best[:, 1] > 0.9
    logits, labels = logits[clear], shifted[clear].argmax(1)
    with pytest.warns(UserWarning, match="only the ridge holds") as warned:
        report = scaling(ridge=1e-4).fit(logits, labels).report
    assert report.accuracy_change > 0
    assert report.converged
    assert not report.at_bound
    assert not any("bound" in str(warning.message) for warning in warned)
    with pytest.warns(UserWarning, match="bound"):
        report = scaling(ridge=0.0).fit(logits, labels).report
    assert report.at_bound
    assert not report.converged


def test_constant_logits_give_the_frequencies():
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    fitted = VectorScaling(ridge=0.0).fit(torch.full((10, 3), 2.5), labels)
    assert fitted.report.converged
    assert torch.allclose(fitted(torch.full((1, 3), 2.5)).exp(), torch.tensor([[0.6, 0.3, 0.1]]), atol=1e-6)


def test_many_classes_of_few_rows():
    """Two rows a class: many classes are told apart by their own logit, so their weights grow as far as it matters."""
    logits, labels = random_set(1000, 500)
    with pytest.warns(UserWarning, match="have no calibration rows"):
        report = VectorScaling().fit(logits.float(), labels).report
    assert report.converged
    assert report.nll_after < report.nll_before


def test_separates():
    logits = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert separates(logits, torch.tensor([0, 1]))
    assert not separates(logits, torch.tensor([0, 0]))
    assert not separates(torch.zeros(1, 2), torch.tensor([0]))  # a tie is not right


def test_the_ridge_is_the_one_documented():
    logits, labels = random_set(400, 3)
    beta = Temperature().fit(logits, labels).beta
    fitted = VectorScaling().fit(logits, labels)
    ridge = 3 / 400 * (10 * 3 / 400)
    matrix = DiagonalMap(logits * beta, labels).fit(ridge, LBFGS(), 1.0).matrix
    assert torch.allclose(fitted.weight, matrix[0] * beta, atol=1e-9)
    assert torch.allclose(fitted.bias, matrix[1], atol=1e-9)
    assert fitted.report.notes == ()


def held_out(calibrator, logits, labels, rows):
    """Loss of other rows before and after a fit to the first rows."""
    after = calibrator.fit(logits[:rows], labels[:rows])(logits[rows:].double())
    return raw_nll(logits[rows:], labels[rows:]), raw_nll(after, labels[rows:])


@pytest.mark.parametrize("rows", [300, 1000])
@pytest.mark.parametrize("scaling", [VectorScaling, MatrixScaling])
def test_few_rows_of_many_real_classes_do_no_harm_and_are_named(real_data, scaling, rows):
    logits, labels = load(real_data, "expected_cost/cifar100_resnet-20")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="rows are few for"):
        before, after = held_out(scaling(), logits[order], labels[order], rows)
    assert after < before


def test_equal_rows_with_different_labels_do_not_explode():
    logits = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    with pytest.warns(UserWarning, match="2 rows are few for 6 parameters"):
        fitted = VectorScaling().fit(logits, torch.tensor([0, 1]))
    other = torch.tensor([[0.0, 1.0, 2.0], [3.0, -2.0, 0.0]])
    assert raw_nll(fitted(other), torch.tensor([2, 1])) < 10.0


@pytest.mark.parametrize("scaling", [VectorScaling, MatrixScaling])
def test_bad_ridges(scaling):
    for arguments in ({"ridge": -1.0}, {"ridge": float("nan")}, {"ridge": 0.1, "solver": GradientDescent()}):
        with pytest.raises(ValueError, match="ridge is"):
            scaling(**arguments)
