"""Solvers, on functions whose minimum is known or found by scipy."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from calib_lightning.posthoc import MatrixScaling, Temperature, VectorScaling
from calib_lightning.posthoc.solver import LBFGS, AdamDescent, GradientDescent, PlainLBFGS

ALL = (LBFGS(), PlainLBFGS(lr=0.5, steps=200), GradientDescent(lr=0.1), AdamDescent(lr=0.01, epochs=3000))


def bowl(scale, centre):
    """A quadratic with its minimum, 0, at the centre."""

    def objective(x):
        return 0.5 * (scale * (x - centre).square()).sum(), scale * (x - centre)

    return objective


def rosenbrock(x):
    a, b = x[:-1], x[1:]
    gap = b - a.square()
    gradient = torch.zeros_like(x)
    gradient[:-1] += -400 * a * gap - 2 * (1 - a)
    gradient[1:] += 200 * gap
    return (100 * gap.square() + (1 - a).square()).sum(), gradient


def logistic(seed=0, rows=200, size=6):
    """Mean logistic loss with a small ridge."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, size, generator=generator, dtype=torch.float64) * torch.logspace(-2, 2, size)
    sign = (torch.rand(rows, generator=generator) < 0.5).double() * 2 - 1

    def objective(w):
        margin = sign * (x @ w)
        value = torch.nn.functional.softplus(-margin).mean() + 1e-3 * w.square().sum()
        return value, -(x * (sign * torch.sigmoid(-margin)).unsqueeze(1)).mean(0) + 2e-3 * w

    return objective


@pytest.mark.parametrize("solver", ALL, ids=lambda solver: type(solver).__name__)
def test_all_solvers_find_the_minimum_of_a_bowl(solver):
    centre = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    scale = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    calls = []
    objective = bowl(scale, centre)

    def counted(x):
        calls.append(1)
        return objective(x)

    found = solver.minimise(counted, torch.zeros(3, dtype=torch.float64))
    assert torch.allclose(found.point, centre, atol=1e-4)  # the code that PlainLBFGS repeats stops at small changes
    assert found.passes == len(calls)
    value, gradient = objective(found.point)
    assert found.value == float(value)
    assert found.gradient_norm == float(gradient.abs().max())


def test_rosenbrock_to_its_optimum():
    found = LBFGS().minimise(rosenbrock, torch.full((6,), -1.0, dtype=torch.float64))
    assert found.converged
    assert found.gradient_norm <= 1e-9
    assert torch.allclose(found.point, torch.ones(6, dtype=torch.float64), atol=1e-8)
    assert found.passes < 200


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_scipy(seed):
    objective = logistic(seed)
    start = torch.zeros(6, dtype=torch.float64)
    found = LBFGS().minimise(objective, start)

    def plain(w):
        value, gradient = objective(torch.from_numpy(w))
        return float(value), gradient.numpy()

    reference = minimize(plain, start.numpy(), jac=True, method="BFGS", options={"gtol": 1e-10})
    assert found.value == pytest.approx(reference.fun, abs=1e-13)
    assert np.allclose(found.point.numpy(), reference.x, atol=1e-7)


def test_the_inverse_hessian_makes_a_badly_scaled_bowl_two_passes():
    scale = torch.logspace(-4, 4, 20, dtype=torch.float64)
    objective, start = bowl(scale, torch.ones(20, dtype=torch.float64)), torch.zeros(20, dtype=torch.float64)
    alone = LBFGS().minimise(objective, start)
    helped = LBFGS().minimise(objective, start, lambda point: lambda gradient: gradient / scale)
    assert helped.passes == 2
    assert alone.passes > 20
    assert torch.allclose(helped.point, torch.ones(20, dtype=torch.float64))


def test_papers_solvers_ignore_the_inverse_hessian():
    objective, start = rosenbrock, torch.zeros(4, dtype=torch.float64)
    for solver in (PlainLBFGS(), GradientDescent(lr=1e-4, epochs=5), AdamDescent(epochs=5)):
        plain = solver.minimise(objective, start)
        helped = solver.minimise(objective, start, lambda point: lambda gradient: 0.5 * gradient)
        assert torch.equal(plain.point, helped.point)


def test_adam_and_gradient_descent_take_the_textbook_steps():
    objective, start = rosenbrock, torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    point, first, second = start.clone(), 0.0, 0.0
    for step in range(1, 4):
        gradient = objective(point)[1]
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        point = point - 0.01 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    assert torch.allclose(AdamDescent(0.01, 3).minimise(objective, start).point, point, atol=1e-12)
    once = start - 1e-4 * objective(start)[1]
    twice = once - 1e-4 * objective(once)[1]
    assert torch.equal(GradientDescent(1e-4, 2).minimise(objective, start).point, twice)


def test_stops_after_the_most_passes_and_says_so():
    found = LBFGS(max_passes=7).minimise(rosenbrock, torch.full((6,), -1.0, dtype=torch.float64))
    assert found.passes <= 7
    assert not found.converged
    assert found.value <= float(rosenbrock(torch.full((6,), -1.0, dtype=torch.float64))[0])


def test_starts_at_the_optimum():
    centre = torch.ones(2, dtype=torch.float64)
    found = LBFGS().minimise(bowl(torch.ones(2), centre), centre)
    assert found.passes == 1
    assert found.converged
    assert torch.equal(found.point, centre)


def test_never_above_the_start_where_values_are_not_finite():
    def walled(x):  # -log(x) + x for x > 0, with its minimum at 1, and no value elsewhere
        return (-torch.log(x) + x).sum(), 1 - 1 / x

    start = torch.full((3,), 1e-3, dtype=torch.float64)
    found = LBFGS().minimise(walled, start)
    assert torch.allclose(found.point, torch.ones(3, dtype=torch.float64), atol=1e-8)
    assert found.value == pytest.approx(3.0, abs=1e-12)


def test_a_function_that_falls_without_end_stops():
    found = LBFGS().minimise(lambda x: (torch.exp(-x).sum(), -torch.exp(-x)), torch.zeros(2, dtype=torch.float64))
    assert found.converged
    assert math.isfinite(float(found.point.abs().max()))
    assert found.value < 1e-8


def test_a_gradient_that_lies_ends_the_search_at_the_start():
    found = LBFGS().minimise(lambda x: (x.square().sum(), -2 * x - 1), torch.ones(2, dtype=torch.float64))
    assert found.value <= 2.0
    assert not found.converged
    assert found.passes < 200


@pytest.mark.parametrize("calibrator", [Temperature, VectorScaling, MatrixScaling])
def test_what_is_no_solver_is_refused_before_the_fit(calibrator):
    with pytest.raises(TypeError, match=r"solver is 'gd'; it must be a Solver such as PlainLBFGS\(\)"):
        calibrator("gd")
