"""Matrix scaling, with and without ODIR, and the full map behind it."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from calib_lightning.posthoc.dirichlet import Dirichlet
from calib_lightning.posthoc.linear import FullMap, Ridge, full_nll
from calib_lightning.posthoc.matrix import MatrixScaling, MatrixScalingODIR
from calib_lightning.posthoc.odir import stratified_folds
from calib_lightning.posthoc.solver import LBFGS, AdamDescent, GradientDescent
from tests.metrics.golden import golden_set, random_set


def golden():
    logits, labels = golden_set()
    return logits / 1.6, labels


def odir(fitted, inputs, labels, strength):
    """The objective by its definition, with squares."""
    classes = inputs.shape[1]
    w, b = fitted.weight.numpy(), fitted.bias.numpy()
    mapped = inputs.numpy() @ w.T + b
    nll = (np.log(np.exp(mapped).sum(1)) - mapped[np.arange(len(labels)), labels.numpy()]).mean()
    off = (w**2).sum() - (np.diag(w) ** 2).sum()
    return nll + strength * off / (classes * (classes - 1)) + strength * (b**2).sum() / classes


def test_golden_value():
    fitted = MatrixScaling(ridge=0.0).fit(*golden())
    assert fitted.report.converged
    assert not fitted.report.at_bound
    assert fitted.report.nll_after == pytest.approx(0.618177962941, abs=1e-12)
    assert float(fitted.bias.mean()) == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize(
    ("strength", "objective", "nll"),
    [(0.01, 0.620097716, 0.618432593), (1.0, 0.643452123, 0.634719122), (100.0, 0.665868183, 0.665200631)],
)
def test_golden_values_with_odir(strength, objective, nll):
    logits, labels = golden()
    fitted = MatrixScalingODIR((strength,)).fit(logits, labels)
    assert fitted.report.converged
    assert odir(fitted, logits, labels, strength) == pytest.approx(objective, abs=1e-9)
    assert fitted.report.nll_after == pytest.approx(nll, abs=1.5e-9)  # Newton steps end at 0.6347191210 for 1.0
    assert float(fitted.penalty) == float(fitted.bias_penalty) == strength
    assert float(fitted.bias.mean()) == pytest.approx(0.0, abs=1e-14)


def test_gradient_against_autograd():
    logits, labels = random_set(900, 300)  # two blocks of rows
    matrix = 0.1 * torch.randn(300, 301, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    matrix.requires_grad_()
    expected = torch.nn.functional.cross_entropy(logits @ matrix[:, :-1].T + matrix[:, -1], labels)
    expected.backward()
    value, gradient = full_nll(logits, labels, matrix.detach())
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-13)
    assert torch.allclose(gradient, matrix.grad, atol=1e-14)


class Recorder:
    """A solver that keeps what it is given."""

    def minimise(self, objective, start, curvature=None):
        self.objective, self.start, self.precondition = objective, start, curvature(start)
        return LBFGS().minimise(objective, start, curvature)


RIDGES = [Ridge(), Ridge(0.03, 0.0, 0.2), Ridge(0.3, 0.02, 0.1)]


@pytest.mark.parametrize("ridge", RIDGES, ids=["none", "odir", "structured"])
def test_gradient_of_the_objective_against_differences(ridge):
    logits, labels = random_set(80, 4)
    recorder = Recorder()
    FullMap(logits, labels).fit(ridge, recorder)
    point = recorder.start + 0.3 * torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gradient = recorder.objective(point)[1]
    for place in range(20):
        step = torch.zeros(20, dtype=torch.float64)
        step[place] = 1e-6
        slope = (recorder.objective(point + step)[0] - recorder.objective(point - step)[0]) / 2e-6
        assert float(gradient[place]) == pytest.approx(float(slope), abs=1e-8)


@pytest.mark.parametrize("ridge", RIDGES, ids=["none", "odir", "structured"])
def test_the_inverse_hessian_is_symmetric_positive_and_of_the_right_size(ridge):
    logits, labels = random_set(400, 4)
    recorder = Recorder()
    FullMap(logits, labels).fit(ridge, recorder)
    eye = torch.eye(20, dtype=torch.float64)
    inverse = torch.stack([recorder.precondition(row) for row in eye])
    assert torch.allclose(inverse, inverse.T, atol=1e-9 * float(inverse.abs().max()))
    assert float(torch.linalg.eigvalsh(inverse)[0]) > 0
    hessian = torch.stack(
        [
            (recorder.objective(recorder.start + 1e-5 * row)[1] - recorder.objective(recorder.start - 1e-5 * row)[1])
            / 2e-5
            for row in eye
        ]
    )
    # Where the objective is curved at all, steps with the inverse are neither far too long nor far too short.
    root = torch.linalg.cholesky(inverse)
    values = torch.linalg.eigvalsh(root.T @ hessian @ root)
    curved = values[values > 1e-6]
    assert len(curved) == 15  # a row added to all rows of M changes nothing
    assert float(curved[0]) > 0.05
    assert float(curved[-1]) < 5


@pytest.mark.parametrize("ridge", [Ridge(0.03, 0.0, 0.2), Ridge(0.3, 0.02, 0.1)], ids=["odir", "structured"])
@pytest.mark.parametrize("absent", [None, 2])
def test_agrees_with_scipy(ridge, absent):
    """Where the diagonal is free, that of a class without labels is held relative to the mean of its column."""
    logits, labels = random_set(300, 4, seed=3)
    if absent is not None:
        logits, labels = logits[labels != absent], labels[labels != absent]
    full = FullMap(logits, labels)
    held = absent is not None and ridge.diagonal == 0.0
    start = np.eye(4, 5)
    if held:
        start[absent, absent] = full.temperature.beta
    others = [k for k in range(4) if k != absent]

    def settled(point):
        matrix = point.reshape(4, 5).copy()
        if held:
            matrix[others, absent] -= matrix[others, absent].mean()
        return matrix

    z, y = logits.numpy(), labels.numpy()
    factors = np.full((4, 5), ridge.off_diagonal)
    factors[:, 4] = ridge.bias
    np.fill_diagonal(factors, ridge.diagonal)
    centre = np.eye(4, 5)
    design = np.hstack([z, np.ones((len(z), 1))])

    def objective(point):
        matrix = settled(point)
        mapped = design @ matrix.T
        p = np.exp(mapped - mapped.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        nll = -np.log(p[np.arange(len(y)), y]).mean()
        p[np.arange(len(y)), y] -= 1
        change = matrix - centre
        gradient = p.T @ design / len(y) + 2 * factors * change
        if held:
            gradient[others, absent] -= gradient[others, absent].mean()
            gradient[absent, absent] = 0.0
        return nll + (factors * change**2).sum(), gradient.ravel()

    reference = minimize(objective, start.ravel(), jac=True, method="BFGS", options={"gtol": 1e-10, "maxiter": 5000})
    fit = full.fit(ridge, LBFGS())
    assert fit.solution.converged
    assert fit.solution.value == pytest.approx(reference.fun, abs=1e-11)
    assert np.allclose(fit.matrix.numpy(), settled(reference.x), atol=1e-6)


def test_matrix_scaling_is_logistic_regression():
    logits, labels = random_set(500, 6, seed=4)
    other = LogisticRegression(C=np.inf, tol=1e-10, max_iter=5000).fit(logits.numpy(), labels.numpy())
    expected = other.predict_log_proba(logits.numpy())
    fitted = MatrixScaling(ridge=0.0).fit(logits, labels)
    nll = -expected[np.arange(500), labels.numpy()].mean()
    assert fitted.report.nll_after == pytest.approx(nll, abs=1e-10)
    assert np.allclose(fitted(logits).numpy(), expected, atol=1e-4)


def test_a_huge_ridge_leaves_the_diagonal_alone():
    logits, labels = golden()
    fitted = MatrixScalingODIR((1e9,)).fit(logits, labels)
    z, y = logits.numpy(), labels.numpy()

    def objective(w):
        mapped = z * w
        p = np.exp(mapped - mapped.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        nll = -np.log(p[np.arange(500), y]).mean()
        p[np.arange(500), y] -= 1
        return nll, (p * z).mean(0)

    reference = minimize(objective, np.ones(5), jac=True, method="BFGS", options={"gtol": 1e-10})
    assert fitted.report.converged
    assert fitted.report.nll_after == pytest.approx(reference.fun, abs=1e-8)
    assert np.allclose(fitted.weight.diagonal().numpy(), reference.x, atol=1e-6)
    assert float((fitted.weight - fitted.weight.diagonal().diag()).abs().max()) < 1e-8
    assert float(fitted.bias.abs().max()) < 1e-8


def test_a_tiny_ridge_is_matrix_scaling():
    logits, labels = golden()
    fitted = MatrixScalingODIR((1e-7,)).fit(logits, labels)
    assert fitted.report.converged
    assert fitted.report.nll_after == pytest.approx(0.618177962941, abs=1e-8)


def test_the_penalty_has_squares():
    """Without squares it would have no least value: a constant added to every weight lowers it and changes nothing."""
    logits, labels = golden()
    fitted = MatrixScalingODIR((10.0,)).fit(logits, labels)
    best = odir(fitted, logits, labels, 10.0)
    for shift in (-1.0, 1.0):
        moved = MatrixScalingODIR((10.0,)).fit(logits, labels)
        moved.weight += shift
        assert torch.allclose(moved(logits), fitted(logits), atol=1e-9)
        assert odir(moved, logits, labels, 10.0) == pytest.approx(
            best
            + 10.0 / 20 * float(((fitted.weight + shift) ** 2 - fitted.weight**2).sum())
            - 10.0 / 20 * float(((fitted.weight.diagonal() + shift) ** 2 - fitted.weight.diagonal() ** 2).sum())
        )
        assert odir(moved, logits, labels, 10.0) > best


def test_conversion_to_sums_that_are_not_normalised():
    logits, labels = golden()
    code = MatrixScalingODIR((0.05,), (0.2,), normalize=False).fit(logits, labels)
    paper = MatrixScalingODIR((0.05 * 5 * 4,), (0.2 * 5,)).fit(logits, labels)
    assert torch.allclose(code.weight, paper.weight, atol=1e-12)
    assert torch.allclose(code.bias, paper.bias, atol=1e-12)
    assert (float(code.penalty), float(code.bias_penalty)) == (0.05, 0.2)
    assert (float(paper.penalty), float(paper.bias_penalty)) == (1.0, 1.0)


def held_out_nll(calibrator, pair, logits, labels, fold, folds):
    """Sum over folds of the loss of the rows held out, by fits from scratch."""
    total = 0.0
    for k in range(folds):
        one = type(calibrator)((pair[0],), (pair[1],)).fit(logits[fold != k], labels[fold != k])
        log_probs = one(logits[fold == k])
        total -= float(log_probs.gather(1, labels[fold == k].unsqueeze(1)).sum())
    return total


@pytest.mark.parametrize("cls", [MatrixScalingODIR, Dirichlet])
@pytest.mark.parametrize(
    ("lambdas", "mus", "folds", "seed"),
    [((0.01, 0.1, 1.0, 10.0), None, 5, 0), ((0.3, 3.0, 30.0), (0.01, 1.0, 100.0), 3, 7)],
)
def test_cross_validation_chooses_what_a_loop_chooses(cls, lambdas, mus, folds, seed):
    logits, labels = golden()
    logits, labels = logits[:200], labels[:200]
    fitted = cls(lambdas, mus, folds, seed=seed).fit(logits, labels)
    fold = stratified_folds(labels, folds, seed)
    pairs = [(a, a) for a in lambdas] if mus is None else [(a, b) for a in lambdas for b in mus]
    scores = {pair: held_out_nll(fitted, pair, logits, labels, fold, folds) for pair in pairs}
    assert (float(fitted.penalty), float(fitted.bias_penalty)) == min(scores, key=scores.get)
    alone = cls((float(fitted.penalty),), (float(fitted.bias_penalty),)).fit(logits, labels)
    assert torch.allclose(fitted.weight, alone.weight, atol=1e-9)


def test_without_folds_the_fitting_rows_choose():
    logits, labels = golden()
    fitted = MatrixScalingODIR(folds=None).fit(logits, labels)
    assert float(fitted.penalty) == 0.01
    assert fitted.report.nll_after == pytest.approx(0.618432593, abs=1e-8)
    assert odir(fitted, logits, labels, 0.01) == pytest.approx(0.620097716, abs=1e-9)


@pytest.mark.parametrize("cls", [MatrixScalingODIR, Dirichlet])
@pytest.mark.parametrize("lambdas", [(1.0,), (1.0, 100.0)])
def test_the_ensemble_averages_probabilities(cls, lambdas):
    logits, labels = golden()
    fitted = cls(lambdas, folds=4, ensemble=True, seed=3).fit(logits, labels)
    assert fitted.weight.shape == (4, 5, 5)
    assert fitted.bias.shape == (4, 5)
    fold = stratified_folds(labels, 4, 3)
    models = [cls((float(fitted.penalty),)).fit(logits[fold != k], labels[fold != k]) for k in range(4)]
    for model, weight in zip(models, fitted.weight, strict=True):
        assert torch.allclose(model.weight, weight, atol=1e-9)
    expected = torch.stack([model(logits).exp() for model in models]).mean(0)
    assert torch.allclose(fitted(logits).exp(), expected, atol=1e-9)
    assert float(fitted(logits).exp().sum(1).sub(1).abs().max()) < 1e-12


def test_an_ensemble_that_is_worse_than_nothing_is_one_model():
    """Good logits, and half of few rows for each of two models."""
    generator = torch.Generator().manual_seed(66)
    logits = 4 * torch.randn(12, 6, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    fitted = MatrixScalingODIR((1e-6,), folds=2, ensemble=True)
    with pytest.warns(UserWarning, match="less likely than the raw"):
        fitted.fit(logits, labels)
    assert fitted.weight.shape == (1, 6, 6)
    assert fitted.report.nll_after <= fitted.report.nll_before + 1e-12
    assert fitted(logits).isfinite().all()


@pytest.mark.parametrize(("rows", "classes", "folds"), [(100, 3, 5), (7, 5, 3), (23, 20, 5), (4, 2, 4)])
def test_folds_are_stratified_and_seeded(rows, classes, folds):
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(rows))
    fold = stratified_folds(labels, folds, 0)
    sizes = torch.bincount(fold, minlength=folds)
    assert int(sizes.max() - sizes.min()) <= 1
    for label in labels.unique():
        of_class = torch.bincount(fold[labels == label], minlength=folds)
        assert int(of_class.max() - of_class.min()) <= 1
    assert torch.equal(fold, stratified_folds(labels, folds, 0))
    assert any(not torch.equal(fold, stratified_folds(labels, folds, seed)) for seed in (1, 2, 3))


@pytest.mark.parametrize("rows", [1, 2, 3, 10])
@pytest.mark.parametrize("ensemble", [False, True])
def test_fewer_rows_than_folds_or_classes(rows, ensemble):
    logits, labels = golden()
    with pytest.warns(UserWarning, match="classes have no|bound"):
        fitted = MatrixScalingODIR(ensemble=ensemble).fit(logits[:rows], labels[:rows])
    assert fitted.weight.isfinite().all()
    assert fitted(logits).isfinite().all()
    assert fitted.report.nll_after <= fitted.report.nll_before + 1e-12


@pytest.mark.parametrize("solver", [GradientDescent(), AdamDescent()], ids=lambda solver: type(solver).__name__)
def test_papers_solvers_report_that_they_stopped_early(solver):
    with pytest.warns(UserWarning, match="before the optimum"):
        fitted = MatrixScaling(solver).fit(*golden())
    assert not fitted.report.converged
    assert fitted.report.passes == 1001
    assert fitted.report.nll_after > 0.618177962941 + 1e-3


def test_one_step_of_gradient_descent_from_the_identity():
    logits, labels = golden()
    with pytest.warns(UserWarning, match="before the optimum"):
        fitted = MatrixScaling(GradientDescent(lr=0.5, epochs=1)).fit(logits, labels)
    residual = logits.softmax(1) - torch.nn.functional.one_hot(labels, 5)
    assert torch.allclose(fitted.weight, torch.eye(5).double() - 0.5 * residual.T @ logits / 500, atol=1e-14)
    assert torch.allclose(fitted.bias, -0.5 * residual.mean(0), atol=1e-14)


def calibrators():
    return [
        MatrixScaling(),
        MatrixScaling(ridge=0.0),
        MatrixScalingODIR((0.01,)),
        MatrixScalingODIR((1e4,)),
        Dirichlet((0.01,)),
        Dirichlet(),
    ]


@pytest.mark.parametrize("calibrator", calibrators(), ids=lambda calibrator: calibrator.name)
class TestHardRows:
    @pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
    def test_never_above_the_raw_likelihood(self, calibrator, scale):
        logits, labels = random_set(60, 4, scale=scale, seed=5)
        report = calibrator.fit(logits, labels).report
        assert report.converged
        assert report.nll_after <= float(torch.nn.functional.cross_entropy(logits, labels)) + 1e-12

    def test_all_right(self, calibrator):
        logits, _ = golden()
        with pytest.warns(UserWarning, match="bound"):
            fitted = calibrator.fit(logits, logits.argmax(1))
        assert fitted.report.at_bound
        assert not fitted.report.converged
        assert float(fitted.weight.abs().max()) < 1e7
        assert fitted.report.nll_after < (1e-6 if calibrator.name != "MatrixScaling" else 0.03)  # T of smoothed targets
        assert fitted(logits.float()).isfinite().all()

    def test_all_wrong(self, calibrator):
        logits, _ = golden()
        with pytest.warns(UserWarning, match="bound"):
            fitted = calibrator.fit(logits, logits.argmin(1))
        assert float(fitted.weight.abs().max()) < 1e7
        assert fitted.report.nll_after < fitted.report.nll_before
        assert fitted(logits.float()).isfinite().all()

    def test_constant_logits(self, calibrator):
        labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
        fitted = calibrator.fit(torch.full((100, 3), 2.0), labels)
        assert fitted.report.converged
        assert fitted.report.nll_after <= fitted.report.nll_before
        assert fitted.weight.isfinite().all()

    def test_an_absent_class(self, calibrator):
        logits, labels = golden()
        keep = labels != 1
        with pytest.warns(UserWarning, match="1 of 5 classes"):
            fitted = calibrator.fit(logits[keep], labels[keep])
        assert fitted.report.converged
        assert not fitted.report.at_bound
        assert float(fitted.weight.abs().max()) < 10
        assert float(fitted.bias.abs().max()) < 10
        assert fitted.report.nll_after < fitted.report.nll_before

    def test_one_class_alone(self, calibrator):
        logits, labels = golden()
        with pytest.warns(UserWarning, match="4 of 5 classes"):
            fitted = calibrator.fit(logits, torch.zeros_like(labels))
        assert fitted.weight.isfinite().all()
        assert fitted.report.nll_after <= fitted.report.nll_before


def test_frozen_rows_of_matrix_scaling():
    logits, labels = golden()
    keep = labels != 1
    with pytest.warns(UserWarning, match="1 of 5 classes"):
        fitted = MatrixScaling(ridge=0.0).fit(logits[keep], labels[keep])
    full = FullMap(logits[keep], labels[keep])
    assert torch.allclose(fitted.weight[1], full.start[1, :-1], rtol=1e-14, atol=0)
    assert torch.allclose(fitted.weight.sum(0), full.start[:, :-1].sum(0), atol=1e-12)


def test_logits_that_are_wrong_but_separable():
    logits = 2.0 * torch.nn.functional.one_hot(torch.arange(30) % 3, 3).double()
    labels = (torch.arange(30) + 1) % 3
    with pytest.warns(UserWarning, match="bound"):
        fitted = MatrixScaling(ridge=0.0).fit(logits, labels)
    assert fitted.report.at_bound
    assert fitted.report.nll_after < 1e-6
    assert fitted.report.accuracy_change == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lambdas": ()}, "lambdas is"),
        ({"lambdas": (1.0, 0.0)}, "lambdas is"),
        ({"mus": (-1.0,)}, "mus is"),
        ({"mus": (float("inf"),)}, "mus is"),
        ({"folds": 1}, "folds is 1"),
        ({"folds": None, "ensemble": True}, "ensemble=True"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MatrixScalingODIR(**arguments)


def test_lists_are_taken():
    assert MatrixScalingODIR([1, 2.0], mus=[3.0]).lambdas == (1, 2.0)


def test_more_classes_than_rows():
    logits, labels = random_set(100, 300)
    fitted = MatrixScalingODIR((1e4,))
    with pytest.warns(UserWarning, match="have no calibration rows"):
        fitted.fit(logits.float(), labels)
    assert fitted.report.nll_after < fitted.report.nll_before
    assert fitted.weight.isfinite().all()


def test_strengths_may_be_an_array():
    calibrator = MatrixScalingODIR(10.0 ** np.arange(-1, 2), mus=np.array([1.0, 2.0]))
    assert calibrator.spec == MatrixScalingODIR((0.1, 1.0, 10.0), mus=(1.0, 2.0)).spec


@pytest.mark.parametrize("cls", [MatrixScalingODIR, Dirichlet])
def test_a_solver_of_the_literature_starts_at_the_identity(cls):
    logits, labels = golden()
    with pytest.warns(UserWarning, match="before the optimum"):
        fitted = cls((1.0,), solver=AdamDescent(epochs=50)).fit(logits, labels)
    inputs = fitted.inputs(logits)
    weight, bias = torch.eye(5).double().requires_grad_(), torch.zeros(5).double().requires_grad_()
    adam = torch.optim.Adam([weight, bias], lr=1e-3)
    for _ in range(50):
        adam.zero_grad()
        off = weight.square().sum() - weight.diagonal().square().sum()
        loss = torch.nn.functional.cross_entropy(inputs @ weight.T + bias, labels)
        (loss + off / 20 + bias.square().mean()).backward()
        adam.step()
    expected = (inputs @ weight.T + bias).log_softmax(1).detach()
    assert torch.allclose(fitted(logits), expected, atol=1e-9)
    assert not fitted.report.converged
    with pytest.raises(TypeError, match="solver is 3"):
        cls(solver=3)
