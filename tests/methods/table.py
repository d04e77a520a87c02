"""One row for every training-time method: what the shared tests need to know about it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from calib_lightning import methods
from calib_lightning.core import ClassificationModule, LinearHead, StageSwitch, StageTraining


@dataclass(frozen=True)
class Row:
    module: type[ClassificationModule]
    criterion: nn.Module | Callable[[int], nn.Module] | None
    """The criterion with the settings that `reference` has, or how to build it for K classes; None if the method has
    no criterion of its own."""
    reference: Callable[[np.ndarray, np.ndarray], float] | None
    """The equation in float64 numpy, from logits (N, K) and one-hot or soft targets (N, K), written from the paper."""
    file: str
    options: dict[str, Any] = field(default_factory=dict)
    soft: bool = True
    """Whether it can be trained on soft targets."""
    least_classes: int = 2
    switch: Callable[[], StageSwitch] | None = None
    """The switch of a staged method, at epoch 1 unless a test says otherwise; built anew, as it keeps state."""

    def new(self, num_classes: int, at_epoch: int = 1, **options: Any) -> ClassificationModule:
        """The method's module with its options."""
        if self.switch is not None:
            options["switch"] = self.switch()
            options["switch"].at_epoch = at_epoch
        return self.module(num_classes, **self.options, **options)

    def build(self, num_classes: int) -> nn.Module:
        assert self.criterion is not None
        return self.criterion if isinstance(self.criterion, nn.Module) else self.criterion(num_classes)


def _softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def _cross_entropy(z, t):
    return -np.mean(np.sum(t * np.log(_softmax(z)), axis=1))


def _label_smoothing(z, t):
    smoothed = 0.9 * t + 0.1 / z.shape[1]
    return -np.mean(np.sum(smoothed * np.log(_softmax(z)), axis=1))


def _entropy_regularization(z, t):
    p = _softmax(z)
    entropy = -np.sum(p * np.log(p), axis=1)
    return _cross_entropy(z, t) - 0.3 * np.mean(entropy)


def _brier(z, t):
    return np.mean(np.sum((_softmax(z) - t) ** 2, axis=1))


def _focal(z, t):
    p = _softmax(z)
    return -np.mean(np.sum(t * (1 - p) ** 3 * np.log(p), axis=1))


def _counts(k):
    return [10 * (i + 1) for i in range(k)]


def _effective_number(k, beta):
    w = (1 - beta) / (1 - beta ** np.array(_counts(k), dtype=float))
    return w * k / w.sum()


def _class_balanced(z, t):
    return -np.mean(np.sum(t * _effective_number(z.shape[1], 0.99) * np.log(_softmax(z)), axis=1))


def _ldam(z, t):
    n = np.array(_counts(z.shape[1]), dtype=float)
    margin = 0.5 * n**-0.25 / (n**-0.25).max()
    p = _softmax(z - t * 7 * margin)
    w = (t * _effective_number(z.shape[1], 0.99)).sum(axis=1)
    return -np.sum(w * np.log((t * p).sum(axis=1))) / w.sum()


def _reweighted(k):
    criterion = methods.LDAMLoss(_counts(k), scale=7.0, beta=0.99)
    criterion.reweighted = True
    return criterion


ADA_EDGES, ADA_GAMMAS = np.array([0.1, 0.3, 0.5, 0.9]), np.array([2.5, -1.5, 0.4])


def _adapted():
    criterion = methods.AdaFocalLoss(n_bins=3)
    criterion.edges.copy_(torch.tensor(ADA_EDGES))
    criterion.gammas.copy_(torch.tensor(ADA_GAMMAS))
    return criterion


def _ada_focal(z, t):
    total = 0.0
    for p in (t * _softmax(z)).sum(axis=1):
        gamma = ADA_GAMMAS[0]
        for lower, value in zip(ADA_EDGES[1:-1], ADA_GAMMAS[1:], strict=True):
            if p >= lower:
                gamma = value
        total -= ((1 - p) ** gamma if gamma > 0 else (1 + p) ** abs(gamma)) * np.log(p)
    return total / len(z)


def _flsd(z, t):
    own = _softmax(z)[t == 1]
    gammas = np.select([own < 0.2, own < 0.5], [5.0, 3.0], 3.0)
    return -np.mean((1 - own) ** gammas * np.log(own))


def _dual_focal(z, t):
    total = 0.0
    for row, y in zip(_softmax(z), t.argmax(axis=1), strict=True):
        below = row[row < row[y]]
        total -= (1 - row[y] + (below.max() if len(below) else 0.0)) ** 5 * np.log(row[y])
    return total / len(z)


def _mbls(z, t):
    distances = z.max(axis=1, keepdims=True) - z
    return _cross_entropy(z, t) + 0.3 * np.mean(np.maximum(distances - 2.0, 0))


def _mmce_kernel(z, t):
    p = _softmax(z)
    confidence = p.max(axis=1)
    correct = p.argmax(axis=1) == t.argmax(axis=1)
    return confidence, correct, np.exp(-np.abs(confidence[:, None] - confidence) / 0.4)


def _mmce(z, t):
    r, right, kernel = _mmce_kernel(z, t)
    m, n = right.sum(), (~right).sum()
    if not (m and n):
        return _cross_entropy(z, t)
    squared = (
        ((1 - r) @ (kernel * np.outer(right, right)) @ (1 - r)) / m**2
        + (r @ (kernel * np.outer(~right, ~right)) @ r) / n**2
        - 2 * ((1 - r) @ (kernel * np.outer(right, ~right)) @ r) / (m * n)
    )
    return _cross_entropy(z, t) + 2.0 * np.sqrt(squared + 1e-10)


def _mdca(z, t):
    p = _softmax(z)
    focal = -np.mean(np.sum(t * (1 - p) * np.log(p), axis=1))
    return focal + 0.7 * np.mean(np.abs(p.mean(axis=0) - t.mean(axis=0)))


def _dca(z, t):
    p = _softmax(z)
    accuracy = np.mean(t[np.arange(len(z)), p.argmax(axis=1)])
    return _cross_entropy(z, t) + 0.7 * abs(p.max(axis=1).mean() - accuracy)


def _acls(z, t):
    # without the penalty on the other classes: its stopped gradient is no derivative (test_acls.py has that part)
    return _cross_entropy(z, t) + 0.3 * 2.0 * np.mean(np.maximum(z.max(axis=1) - 2.0, 0) ** 2)


def _logit_norm(z, t):
    return _cross_entropy(z / (0.5 * (np.linalg.norm(z, axis=1, keepdims=True) + 1e-7)), t)


def _cpc(z, t):
    total, classes = 0.0, z.shape[1]
    for row, y in zip(z, t.argmax(axis=1), strict=True):
        wrong = np.delete(row, y)
        log_sigmoid = -np.log1p(np.exp(-(wrong[:, None] - wrong)))
        np.fill_diagonal(log_sigmoid, 0.0)
        total += 0.4 * np.sum(np.log1p(np.exp(wrong - row[y]))) / (classes - 1)
        total -= 0.6 * 0.5 * log_sigmoid.sum() / ((classes - 1) * (classes - 2))
    return _cross_entropy(z, t) + total / len(z)


def _adam():
    return StageTraining(lambda params: torch.optim.Adam(params, lr=0.003), batch_size=16)


ROWS = [
    Row(methods.CrossEntropy, methods.CrossEntropyLoss(), _cross_entropy, "cross_entropy"),
    Row(
        methods.LabelSmoothing,
        methods.LabelSmoothingLoss(0.1),
        _label_smoothing,
        "label_smoothing",
        {"smoothing": 0.1},
    ),
    Row(
        methods.EntropyRegularization,
        methods.EntropyRegularizationLoss(0.3),
        _entropy_regularization,
        "entropy_regularization",
        {"strength": 0.3},
    ),
    Row(methods.Brier, methods.BrierLoss(), _brier, "brier"),
    Row(methods.Focal, methods.FocalLoss(3.0), _focal, "focal", {"gamma": 3.0}),
    Row(methods.FocalSchedule, None, None, "focal_schedule", {"gammas": [5.0, 1.0], "milestones": [1]}),
    Row(methods.AdaFocal, _adapted(), _ada_focal, "ada_focal", {"rate": 0.5}, soft=False),
    Row(
        methods.ClassBalanced,
        lambda k: methods.ClassBalancedLoss(_counts(k), 0.99),
        _class_balanced,
        "class_balanced",
        {"beta": 0.99},
    ),
    Row(methods.LDAM, _reweighted, _ldam, "ldam", {"scale": 7.0, "beta": 0.99, "reweight_from": 0.5}, soft=False),
    Row(methods.FLSD, methods.FLSDLoss(3.0), _flsd, "flsd", {"gamma": 3.0}, soft=False),
    Row(methods.DualFocal, methods.DualFocalLoss(5.0), _dual_focal, "dual_focal", {"gamma": 5.0}, soft=False),
    Row(methods.MbLS, methods.MbLSLoss(2.0, 0.3), _mbls, "mbls", {"margin": 2.0, "strength": 0.3}),
    Row(
        methods.MMCE,
        methods.MMCELoss(normalization="paper"),
        _mmce,
        "mmce",
        {"strength": 2.0, "normalization": "paper"},
        soft=False,
    ),
    Row(methods.MDCA, methods.MDCALoss(strength=0.7), _mdca, "mdca", {"strength": 0.7}),
    Row(methods.DCA, methods.DCALoss(strength=0.7), _dca, "dca", {"strength": 0.7}),
    Row(
        methods.ACLS,
        methods.ACLSLoss(margin=2.0, strength=0.3, positive_weight=2.0, negative_weight=0.0),
        _acls,
        "acls",
        {"margin": 2.0, "positive_reference": "min"},
    ),
    Row(
        methods.CPC,
        methods.CPCLoss(0.4, 0.6),
        _cpc,
        "cpc",
        {"discrimination_strength": 0.4, "exclusion_strength": 0.6},
        soft=False,
        least_classes=3,
    ),
    Row(methods.LogitNorm, methods.LogitNormLoss(0.5), _logit_norm, "logit_norm", {"tau": 0.5, "eval_logits": "raw"}),
    Row(methods.CRL, None, None, "crl", {"strength": 0.5}, soft=False),
    Row(methods.Mixup, None, None, "mixup", {"alpha": 0.3}),
    Row(methods.RegMixup, None, None, "regmixup", {"alpha": 10.0}),
    Row(methods.MITL, None, None, "mit_l", {"margin": 0.4}),
    Row(methods.MITA, None, None, "mit_a", {"margin": 0.4}),
    Row(methods.AugMix, None, None, "augmix", {"strength": 6.0, "severity": 2.0}),
    Row(methods.BalCAL, None, None, "balcal", {"delta": 0.9, "adaptor_width": 8}, soft=False),
    Row(methods.PLP, None, None, "plp", {"gamma": 0.5, "cuts": [3, 9, 11]}),
    Row(methods.TwoStage, None, None, "two_stage", switch=lambda: StageSwitch(1, LinearHead)),
    Row(methods.TST, None, None, "tst", switch=lambda: StageSwitch(1, methods.TSTHead, _adam())),
    Row(methods.VTST, None, None, "v_tst", switch=lambda: StageSwitch(1, methods.VTSTHead, _adam())),
    Row(
        methods.ConfidNet,
        None,
        None,
        "confidnet",
        {"error_weight": 2.0},
        switch=lambda: methods.ConfidenceSwitch(1, width=20, training=_adam()),
    ),
    Row(methods.MaCCal, None, None, "mac_cal", switch=lambda: methods.MaskedClassifier(1)),
    Row(
        methods.RefCal,
        None,
        None,
        "refcal",
        {"projection": 16},
        soft=False,
        switch=lambda: StageSwitch(1, LinearHead, StageTraining(criterion=methods.MDCALoss(strength=1.0))),
    ),
]
LOSSES = [row for row in ROWS if row.criterion is not None]
