"""Affine maps with off-diagonal and intercept regularisation, and the choice of its strength by cross-validation."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from calib_lightning.posthoc.base import Calibrator
from calib_lightning.posthoc.fit_report import Optimum
from calib_lightning.posthoc.linear import Fit, FullMap, Ridge, full_nll, separates
from calib_lightning.posthoc.solver import LBFGS, Solver, checked_solver
from calib_lightning.utils.seeding import row_uniform

# Strengths can be compared long before the optimum is reached.
_ROUGH = LBFGS(max_passes=40, tolerance=1e-4)
# With some 10,000 parameters and no more rows the last digits of the gradient can take thousands of passes.
_EXACT = LBFGS(max_passes=500, tolerance=1e-8)

Pair = tuple[float, float]


def stratified_folds(labels: Tensor, folds: int, seed: int) -> Tensor:
    """Assign rows to folds, ``(N,)`` int64, whose sizes, overall and within each class, differ by one row at most."""
    index = torch.arange(len(labels), device=labels.device)
    shuffled = row_uniform(index, 1, seed=seed).squeeze(1).argsort()
    # Dealing continues across classes, so that small classes do not all go to the first folds.
    order = shuffled[labels[shuffled].argsort(stable=True)]
    return torch.empty_like(index).index_copy_(0, order, index % folds)


def _mapped(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Log-probabilities of an affine map."""
    return torch.log_softmax(inputs @ weight.mT + bias, dim=-1)


def mapped_log_probs(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``log mean_f softmax(W_f x + b_f)``, ``(N, K)``, for W ``(F, K, K)`` and b ``(F, K)``."""
    each = _mapped(inputs, weight, bias.unsqueeze(1))
    return torch.logsumexp(each, dim=0) - math.log(len(weight))


def _stacked(models: list[Fit]) -> tuple[Tensor, Tensor]:
    """Weights and biases of several maps."""
    matrices = torch.stack([fit.matrix for fit in models])
    return matrices[..., :-1].contiguous(), matrices[..., -1].contiguous()


class _Path(NamedTuple):
    """Fits with all strengths: the sum of the negative log-likelihoods of some rows, the maps, and the passes."""

    scores: dict[Pair, float]
    maps: dict[Pair, Tensor]
    passes: int


class RidgedMatrix(Calibrator):
    """An affine map with off-diagonal and intercept regularisation, ODIR (Kull et al., 2019).

    ``J = NLL + lambda / (K (K-1)) sum_{i != j} W_ij^2 + mu / K sum_j b_j^2``, NLL the mean negative log-likelihood in
    nats. The diagonal is not penalised, since it is the temperature. J is minimised to the optimum, from ``W = I/T``
    with the maximum likelihood temperature T, for strengths in decreasing order.

    Args:
        lambdas: Candidate strengths lambda > 0.
        mus: Candidate strengths mu > 0, each combined with each lambda; ``None`` sets mu = lambda.
        folds: Number of stratified folds of the cross-validation that chooses the strengths by negative log-likelihood;
            ``None`` chooses on the rows of the fit themselves, which nearly always selects the weakest.
        ensemble: Average the probabilities of the folds' models, as the authors do, instead of fitting one model with
            the chosen strengths to all rows.
        normalize: Divide the sums by ``K (K-1)`` and K as above; ``False`` does not, as in the authors' code:
            ``lambda`` here is then ``K (K-1)`` times theirs, and ``mu`` K times.
        seed: Seed of the folds.
        solver: A method of the literature for every fit, from ``W = I, b = 0``, such as `AdamDescent`, as papers have
            stopped; ``None`` fits to the optimum.

    Attributes:
        penalty: The chosen lambda.
        bias_penalty: The chosen mu.
        weight: W, ``(K, K)``; with `ensemble` ``(folds, K, K)``.
        bias: b, ``(K,)``, with mean zero; with `ensemble` ``(folds, K)``.

    Raises:
        TypeError: ``solver`` is not a `Solver`.
        ValueError: No strengths, or one that is not above 0; fewer than two folds, or none with `ensemble`.

    Deviations:
        The authors' code minimises with Adam and stops early; here the optimum is reached unless a solver is given (its
        batches of 128 rows are not imitated: `AdamDescent` takes all rows in each step). For a class without rows the
        diagonal entry stays at 1/T and the rest of its column has mean zero, since the likelihood would otherwise have
        no maximum; the ridge determines the rest.
    """

    preserves_argmax = False
    per_class = True
    weight: Tensor
    bias: Tensor
    penalty: Tensor
    bias_penalty: Tensor

    def __init__(
        self,
        lambdas: Sequence[float] = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4),
        mus: Sequence[float] | None = None,
        folds: int | None = 5,
        ensemble: bool = False,
        normalize: bool = True,
        seed: int = 0,
        solver: Solver | None = None,
    ) -> None:
        super().__init__()
        lambdas = tuple(float(value) for value in lambdas)
        mus = None if mus is None else tuple(float(value) for value in mus)
        for name, values in (("lambdas", lambdas), ("mus", (1.0,) if mus is None else mus)):
            if not values or not all(0.0 < value < math.inf for value in values):
                raise ValueError(f"{name} is {values!r}; it must be one or more numbers > 0. Try (0.1, 1.0, 10.0).")
        if folds is not None and folds < 2:
            raise ValueError(f"folds is {folds!r}; it must be >= 2, or None to choose on the rows of the fit.")
        if folds is None and ensemble:
            raise ValueError("folds is None; it must be >= 2 with ensemble=True, which averages the folds' models.")
        self.lambdas, self.mus = lambdas, mus
        self.folds = folds
        self.ensemble = ensemble
        self.normalize = normalize
        self.seed = seed
        self.solver = checked_solver(solver)
        self.register_state("weight", "bias", "penalty", "bias_penalty")

    @abstractmethod
    def inputs(self, logits: Tensor) -> Tensor:
        """Return the input of the map, ``(N, K)`` in the dtype of the logits."""

    def fit_rows(self, logits: Tensor, labels: Tensor, features: Tensor | None) -> Optimum:
        """Choose the strengths and minimise J; see `Calibrator.fit_rows`."""
        inputs = self.inputs(logits.double())
        full = FullMap(inputs, labels)
        chains = self._chains()
        choose = sum(map(len, chains)) > 1
        # A single row cannot be split into folds.
        folds = min(self.folds or 1, len(labels)) if choose or self.ensemble else 1
        fold = stratified_folds(labels, folds, self.seed)
        parts = [FullMap(inputs[fold != k], labels[fold != k]) for k in range(folds)] if folds > 1 else []
        pair, warm, passes = chains[0][0], None, 0
        if choose and parts:
            paths = [self._path(part, chains, inputs[fold == k], labels[fold == k]) for k, part in enumerate(parts)]
            pair = min(paths[0].scores, key=lambda pair: sum(path.scores[pair] for path in paths))
            passes = sum(path.passes for path in paths)
        elif choose:
            path = self._path(full, chains, inputs, labels)
            pair = min(path.scores, key=path.scores.__getitem__)
            passes, warm = path.passes, path.maps[pair]

        ridge, notes = self._ridge(pair, inputs.shape[1]), []
        models = [self._fit(part, ridge, _EXACT) for part in parts] if self.ensemble else []
        if models:
            averaged = mapped_log_probs(inputs, *_stacked(models))
            if float(F.nll_loss(averaged, labels)) > float(F.nll_loss(torch.log_softmax(logits.double(), -1), labels)):
                notes.append("the average of the folds' models is less likely than the raw logits; one model is used")
                passes += sum(fit.solution.passes for fit in models)
                models = []
        models = models or [self._fit(full, ridge, _EXACT, warm)]
        weight, bias = _stacked(models)
        if not self.ensemble:
            weight, bias = weight[0], bias[0]
        self.weight, self.bias = weight, bias
        self.penalty, self.bias_penalty = inputs.new_tensor(pair[0]), inputs.new_tensor(pair[1])
        return Optimum(
            converged=all(fit.solution.converged for fit in models),
            passes=passes + sum(fit.solution.passes for fit in models),
            gradient_norm=max(fit.solution.gradient_norm for fit in models),
            # Only the diagonal is not held by the ridge.
            at_bound=self.solver is None and any(separates(inputs * fit.matrix.diagonal(), labels) for fit in models),
            notes=tuple(notes),
        )

    def _chains(self) -> list[list[Pair]]:
        """All pairs of strengths, in chains along which no strength increases, for warm starts."""
        lambdas = sorted(set(self.lambdas), reverse=True)
        if self.mus is None:
            return [[(value, value) for value in lambdas]]
        return [[(value, mu) for mu in sorted(set(self.mus), reverse=True)] for value in lambdas]

    def _ridge(self, pair: Pair, classes: int) -> Ridge:
        """Factors of the squared entries for a pair of strengths."""
        shares = (classes * (classes - 1), classes) if self.normalize else (1, 1)
        return Ridge(off_diagonal=pair[0] / shares[0], bias=pair[1] / shares[1])

    def _fit(self, part: FullMap, ridge: Ridge, optimum: LBFGS, warm: Tensor | None = None) -> Fit:
        """Fit by the solver, or else to the optimum."""
        if self.solver is None:
            return part.fit(ridge, optimum, warm)
        # The path of a descent depends on how the objective is written.
        return part.fit(ridge, self.solver, part.identity, as_written=True)

    def _path(self, part: FullMap, chains: list[list[Pair]], inputs: Tensor, labels: Tensor) -> _Path:
        """Fit a part of the rows with all strengths, and score each fit by the likelihood of other rows."""
        path = _Path({}, {}, 0)
        for chain in chains:
            warm = None
            for pair in chain:
                fit = self._fit(part, self._ridge(pair, inputs.shape[1]), _ROUGH, warm)
                warm = path.maps[pair] = fit.matrix
                path.scores[pair] = float(full_nll(inputs, labels, warm)[0]) * len(labels)
                path = path._replace(passes=path.passes + fit.solution.passes)
        return path

    def transform(self, logits: Tensor, features: Tensor | None) -> Tensor:
        """Map, and average over models; see `Calibrator.transform`."""
        inputs = self.inputs(logits)
        weight, bias = self.weight.to(inputs.dtype), self.bias.to(inputs.dtype)
        return mapped_log_probs(inputs, weight, bias) if self.ensemble else _mapped(inputs, weight, bias)
