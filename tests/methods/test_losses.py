"""Every criterion against its equation, its invariants and hard inputs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from calib_lightning import methods

from .table import LOSSES, Row

by_loss = pytest.mark.parametrize("row", LOSSES, ids=lambda row: row.module.__name__)


def _case(n=7, k=4, seed=0):
    rng = np.random.default_rng(seed)
    return 3 * rng.normal(size=(n, k)), rng.integers(0, k, size=n), rng.dirichlet(np.ones(k), size=n)


@pytest.mark.parametrize(
    ("row", "soft"),
    [(row, False) for row in LOSSES] + [(row, True) for row in LOSSES if row.soft],
    ids=lambda value: value.module.__name__ if isinstance(value, Row) else "soft" if value else "hard",
)
@pytest.mark.parametrize(("n", "k"), [(7, 4), (1, 3), (40, 11)])
def test_value_and_gradient_equal_the_equation(row, soft, n, k):
    z, labels, mixed = _case(n, k)
    targets = mixed if soft else np.eye(k)[labels]
    logits = torch.tensor(z, requires_grad=True)
    loss = row.build(k)(logits, torch.tensor(targets if soft else labels))
    loss.backward()
    assert loss.item() == pytest.approx(row.reference(z, targets), rel=1e-11)
    gradient = np.zeros_like(z)
    for i in np.ndindex(*z.shape):
        step = np.zeros_like(z)
        step[i] = 1e-6
        gradient[i] = (row.reference(z + step, targets) - row.reference(z - step, targets)) / 2e-6
    np.testing.assert_allclose(logits.grad.numpy(), gradient, atol=1e-8)


@by_loss
def test_gradcheck(row):
    z, labels, _ = _case(n=3, k=3, seed=1)
    logits = torch.tensor(z, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: row.build(3)(x, torch.tensor(labels)), (logits,))


@by_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("answers", ["right", "wrong", "both"])
@pytest.mark.parametrize("n", [1, 6])
def test_extreme_logits_give_finite_loss_and_gradient(row, dtype, answers, n):
    # all rows have the same label
    logits = torch.full((n, 3), -1e4, dtype=dtype)
    logits[:, 0] = 1e4
    labels = torch.full((n,), {"right": 0, "wrong": 1, "both": 0}[answers])
    if answers == "both":
        logits[::2] = logits[::2].flip(-1)
    logits.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = row.build(3)(logits, labels)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@by_loss
@pytest.mark.parametrize("right", [True, False])
def test_batches_without_an_error_and_without_a_hit(row, right):
    z, labels, _ = _case(n=9, k=4, seed=2)
    z[np.arange(9), labels] += 20 if right else -20
    logits = torch.tensor(z, dtype=torch.float32, requires_grad=True)
    loss = row.build(4)(logits, torch.tensor(labels))
    loss.backward()
    assert loss.item() == pytest.approx(row.reference(z, np.eye(4)[labels]), rel=1e-4, abs=1e-5)
    assert logits.grad.isfinite().all()


@by_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(row, dtype):
    z, labels, _ = _case(n=32, k=10, seed=3)
    logits, labels = torch.tensor(z).to(dtype), torch.tensor(labels)
    criterion = row.build(10)
    with torch.autocast("cpu", dtype):
        loss = criterion(logits, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, criterion(logits.float(), labels))


@by_loss
@pytest.mark.parametrize("k", [2, 1000])
def test_few_and_many_classes(row, k):
    if k < row.least_classes:
        with pytest.raises(ValueError, match=str(row.least_classes)):
            row.build(k)(torch.zeros(3, k), torch.zeros(3, dtype=torch.int64))
        return
    z, labels, _ = _case(n=12, k=k, seed=4)
    logits = torch.tensor(z, dtype=torch.float32, requires_grad=True)
    loss = row.build(k)(logits, torch.tensor(labels))
    loss.backward()
    assert loss.item() == pytest.approx(row.reference(z, np.eye(k)[labels]), rel=1e-4)
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().sum() > 0


# others take the same operations
COMPILED = ("AdaFocal", "CrossEntropy", "DCA", "LDAM", "MMCE")


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=() if row.module.__name__ in COMPILED else pytest.mark.slow, id=row.module.__name__)
        for row in LOSSES
    ],
)
def test_compiled_equals_eager(row):
    z, labels, _ = _case(n=16, k=5, seed=5)
    labels, criterion = torch.tensor(labels), row.build(5)
    eager, compiled = (torch.tensor(z, requires_grad=True) for _ in range(2))
    criterion(eager, labels).backward()
    torch._dynamo.reset()
    torch.compile(criterion, backend="aot_eager", fullgraph=True)(compiled, labels).backward()
    torch.testing.assert_close(compiled.grad, eager.grad, rtol=1e-10, atol=1e-12)


@by_loss
def test_bad_input_is_named_before_any_arithmetic(row):
    criterion, logits, labels = row.build(4), torch.zeros(3, 4), torch.tensor([0, 1, 2])
    soft = torch.tensor([[0.5, 0.5, 0, 0], [1.0, 0, 0, 0], [0, 0, 0, 1.0]])
    wrong = [
        (logits, torch.tensor([0, 1, 4]), ValueError, r"hold 4; they must be in 0\.\.3"),
        (logits, torch.tensor([0, -1, 2]), ValueError, "hold -1; they must"),
        (logits, torch.tensor([0, -100, 2]), ValueError, "hold -100; they must"),
        (logits, labels.float(), TypeError, "float32"),
        (logits, labels > 0, TypeError, "bool"),
        (logits, labels[:2], ValueError, r"\(2,\)"),
        (logits, labels[None, :, None], ValueError, r"\(1, 3, 1\)"),
        (logits[:0], labels[:0], ValueError, r"\(0, 4\)"),
        (logits[0], labels, ValueError, r"\(4,\)"),
        (logits.long(), labels, TypeError, "int64"),
    ]
    if row.soft:
        wrong += [
            (logits, soft[:, :3], ValueError, r"\(3, 3\)"),
            (logits, soft.long(), TypeError, "int64"),
            (logits, 2 * soft, ValueError, "sum 2"),
            (logits, torch.tensor([[1.5, -0.5, 0, 0]] * 3), ValueError, "-0.5"),
            (logits, soft * float("nan"), ValueError, "nan"),
        ]
    else:
        wrong += [(logits, soft, ValueError, "soft targets")]
    for bad_logits, bad_labels, error, named in wrong:
        with pytest.raises(error, match=named):
            criterion(bad_logits, bad_labels)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 1.0, 2.0])
def test_focal_gradient_is_finite_at_certainty(gamma):
    logits = torch.tensor([[100.0, -100.0]], requires_grad=True)
    methods.focal_loss(logits, torch.tensor([0]), gamma=gamma).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: methods.focal_loss(z, y, gamma=0.0),
        lambda z, y: methods.label_smoothing_loss(z, y, smoothing=0.0),
        lambda z, y: methods.entropy_regularization_loss(z, y, strength=0.0),
    ],
    ids=["focal gamma 0", "no smoothing", "no entropy"],
)
def test_special_cases_equal_cross_entropy(loss):
    z, labels, _ = _case()
    logits, labels = torch.tensor(z), torch.tensor(labels)
    torch.testing.assert_close(loss(logits, labels), F.cross_entropy(logits, labels), rtol=1e-12, atol=0)


def test_label_smoothing_on_wrong_classes_only_is_a_larger_smoothing():
    # a spread over the K-1 wrong classes equals a * K / (K - 1) spread over all K
    z, labels, _ = _case(k=5)
    wrong_only = np.full((len(labels), 5), 0.2 / 4)
    wrong_only[np.arange(len(labels)), labels] = 0.8
    ours = methods.label_smoothing_loss(torch.tensor(z), torch.tensor(labels), smoothing=0.2 * 5 / 4)
    theirs = F.cross_entropy(torch.tensor(z), torch.tensor(wrong_only))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)


def test_mean_entropy_is_the_sum_over_k():
    z, labels, _ = _case(k=4)
    logits, labels = torch.tensor(z), torch.tensor(labels)
    mean = methods.entropy_regularization_loss(logits, labels, strength=0.4, entropy_reduction="mean")
    total = methods.entropy_regularization_loss(logits, labels, strength=0.1)
    assert mean.item() == pytest.approx(total.item(), rel=1e-12)


def test_brier_bounds():
    certain = torch.tensor([[1e3, 0.0]])
    assert methods.brier_loss(certain, torch.tensor([0])).item() == 0
    assert methods.brier_loss(certain, torch.tensor([1])).item() == 2


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: methods.LabelSmoothingLoss(1.5), "1.5"),
        (lambda: methods.LabelSmoothingLoss(-0.1), "-0.1"),
        (lambda: methods.FocalLoss(-1.0), "-1.0"),
        (lambda: methods.EntropyRegularizationLoss(-2.0), "-2.0"),
        (lambda: methods.EntropyRegularizationLoss(0.1, "max"), "max"),
    ],
)
def test_impossible_settings_are_named(build, named):
    with pytest.raises(ValueError, match=named):
        build()
