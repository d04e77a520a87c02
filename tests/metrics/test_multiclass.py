import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from calib_lightning.metrics.functional.calibration import ece, signed_gap
from calib_lightning.metrics.functional.classwise import (
    classwise_ece,
    classwise_ece_from_sums,
    classwise_sums,
    weighted_classwise_sums,
)
from calib_lightning.metrics.functional.dark_side import dark_side_assumption, dark_side_from, dark_side_terms
from calib_lightning.metrics.functional.ovo import class_log_odds, ovo_auroc, weighted_ovo_auroc
from calib_lightning.metrics.functional.proper import accuracy, brier, entropy, nll, top_k_accuracy, top_k_rows
from calib_lightning.metrics.functional.refinement import correctness_auroc
from calib_lightning.metrics.functional.temperature import optimal_inverse_temperature
from calib_lightning.metrics.functional.variational import (
    variational_from_table,
    variational_split,
    variational_table,
    weighted_variational,
)
from tests.metrics.golden import golden_set, pair_auroc, random_set
from tests.metrics.test_real_data import SETS, load

NO_ROWS = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def resamples(rows, total, seed=0):
    """Positions drawn with replacement, and how often each row was."""
    drawn = np.random.default_rng(seed).integers(rows, size=(total, rows))
    counts = np.stack([np.bincount(some, minlength=rows) for some in drawn])
    return torch.from_numpy(drawn), torch.from_numpy(counts)


# --- entropy, top-k, soft labels


def test_golden_entropy():
    logits, _ = golden_set()
    assert entropy(logits).item() == pytest.approx(0.696983987644, abs=1e-12)
    assert entropy(logits.softmax(1), input="probs").item() == pytest.approx(0.696983987644, abs=1e-12)


def test_entropy_of_extreme_rows():
    assert entropy(torch.tensor([[3e38, -3e38, 0.0]])).item() == 0.0
    assert entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), input="probs").item() == pytest.approx(math.log(2) / 2)
    assert entropy(torch.full((4, 7), 5.0)).item() == pytest.approx(math.log(7), abs=1e-15)
    assert entropy(torch.randn(4, 1)).item() == 0.0
    with pytest.warns(UserWarning, match="entropy: no rows"):
        assert math.isnan(entropy(NO_ROWS[0]))
    with pytest.raises(ValueError, match="row 0 has nan for class 0"):
        entropy(torch.tensor([[torch.nan, 0.0]]))
    with pytest.raises(TypeError, match="is list"):
        entropy([[0.0, 1.0]])


def rank_of_label(row, label):
    return sorted(range(len(row)), key=lambda k: (-row[k], k)).index(label)


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_top_k_with_ties(k):
    logits, labels = random_set(300, 8, scale=1.0)
    logits = (2 * logits).round()
    expected = [rank_of_label(row, label) < k for row, label in zip(logits.tolist(), labels.tolist(), strict=True)]
    assert top_k_rows(logits, labels, k).tolist() == expected
    assert top_k_accuracy(logits, labels, k=k).item() == pytest.approx(sum(expected) / 300, abs=1e-15)


def test_top_k_limits():
    logits, labels = golden_set()
    assert top_k_accuracy(logits, labels, k=1).item() == accuracy(logits, labels).item()
    assert top_k_accuracy(logits, labels).item() == 1.0
    with pytest.warns(UserWarning, match="no rows"):
        assert math.isnan(top_k_accuracy(*NO_ROWS))
    for k in (0, 1.0, True):
        with pytest.raises(ValueError, match="k is "):
            top_k_accuracy(logits, labels, k=k)


@pytest.mark.parametrize("kind", ["logits", "probs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_labels(kind, dtype):
    logits, _ = random_set(200, 6)
    y = np.random.default_rng(0).dirichlet(np.full(6, 0.2), 200)
    y[:50] = np.round(y[:50])
    y[:50, 0] += 1 - y[:50].sum(1)
    y = np.abs(y)
    y /= y.sum(1, keepdims=True)
    scores = logits if kind == "logits" else logits.softmax(1)
    soft = torch.from_numpy(y).to(dtype)
    y, p = soft.double().numpy(), softmax(logits.numpy())
    assert nll(scores, soft, input=kind).item() == pytest.approx(-(y * np.log(p)).sum(1).mean(), abs=1e-12)
    assert brier(scores, soft, input=kind).item() == pytest.approx(((p - y) ** 2).sum(1).mean(), abs=1e-12)


def test_one_hot_soft_labels_are_hard_labels():
    logits, labels = golden_set()
    soft = torch.nn.functional.one_hot(labels, 5).double()
    for metric in (nll, brier):
        assert metric(logits, soft).item() == pytest.approx(metric(logits, labels).item(), abs=1e-12)
    assert nll(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), input="probs").item() == 0.0
    assert nll(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]]), input="probs").item() == math.inf


def test_wrong_soft_labels():
    logits = torch.zeros(3, 2)
    good = torch.full((3, 2), 0.5)
    for metric in (nll, brier):
        bad = good.clone()
        bad[1] = torch.tensor([-0.1, 1.1])
        with pytest.raises(ValueError, match=r"1 of 3 rows have invalid soft labels; row 1 .* -0\.1 and sums to 1;"):
            metric(logits, bad)
        with pytest.raises(ValueError, match=r"3 of 3 rows .*row 0 .*sums to 100.*Divide counts"):
            metric(logits, 100 * good)
        with pytest.raises(ValueError, match="1 of 3 rows"):
            metric(logits, bad.fill_(0.5).index_fill_(0, torch.tensor([2]), torch.nan))
        with pytest.raises(ValueError, match=r"shape \(3, 3\); they must have the shape \(3, 2\) of the logits"):
            metric(logits, torch.full((3, 3), 1 / 3))
        with pytest.raises(ValueError, match="row 0 has inf for class 0"):
            metric(logits.index_fill(0, torch.tensor([0]), torch.inf), good)
        with pytest.raises(ValueError, match="input is 'auto'"):
            metric(logits, good, input="auto")
        with pytest.raises(TypeError, match=r"logits is .*; it must be a tensor"):
            metric([[0.0, 0.0]], good)
    for metric in (accuracy, top_k_accuracy, classwise_ece, ovo_auroc, optimal_inverse_temperature, dark_side_terms):
        with pytest.raises(TypeError, match=r"labels is .*; it must be class numbers"):
            metric(logits, good)


def test_votes_of_people(real_data):
    counts = np.load(real_data / "cifar-10h" / "cifar10h-counts.npy")
    logits, _ = load(real_data, "cifar10_human_experiments/wrn_28_10_test.npz")
    y, z = counts / counts.sum(1, keepdims=True), logits.double().numpy()
    p = softmax(z)
    log_p = z - z.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    soft = torch.from_numpy(y)
    assert nll(logits, soft).item() == pytest.approx(-(y * log_p).sum(1).mean(), abs=1e-9)
    assert brier(logits, soft).item() == pytest.approx(((p - y) ** 2).sum(1).mean(), abs=1e-9)
    with pytest.raises(ValueError, match=r"labels has shape .* must have shape"):
        nll(logits, torch.from_numpy(counts))


# --- class-wise calibration error


def classwise_by_loops(p, y, n_bins):
    """Class-wise error of the probabilities, whose own dtype the edges have."""
    edges = [np.float64(p.dtype.type(m / n_bins)) for m in range(1, n_bins)]
    p = p.astype(np.float64)
    error = 0.0
    for k in range(p.shape[1]):
        index = np.searchsorted(edges, p[:, k], side="left")
        for m in range(n_bins):
            inside = index == m
            error += abs((y[inside] == k).sum() - p[inside, k].sum())
    return error / (p.shape[0] * p.shape[1])


def test_golden_classwise_ece():
    logits, labels = golden_set()
    assert classwise_ece(logits, labels).item() == pytest.approx(0.038428928373, abs=1e-12)
    assert classwise_ece(logits.softmax(1), labels, input="probs").item() == pytest.approx(0.038428928373, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_bins", [1, 2, 15])
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (5, 1), (7, 3), (1003, 10), (200, 101), (64, 1000)])
def test_classwise_against_loops(rows, classes, n_bins, dtype):
    logits, labels = random_set(rows, classes, scale=3.0)
    probs = logits.softmax(1).to(dtype)
    expected = classwise_by_loops(probs.numpy(), labels.numpy(), n_bins)
    assert classwise_ece(probs, labels, n_bins=n_bins, input="probs").item() == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n_bins", [5, 10, 15])
def test_classwise_edges_belong_to_the_bin_that_ends_there(n_bins, dtype):
    edges = torch.tensor([k / n_bins for k in range(n_bins + 1)], dtype=dtype)
    probs = torch.stack([edges, 1 - edges], dim=1)
    counts = classwise_sums(probs, torch.zeros(n_bins + 1, dtype=torch.int64), n_bins)[1, 0]
    assert counts.tolist() == [2.0] + [1.0] * (n_bins - 1)
    sums = classwise_sums(probs, torch.zeros(n_bins + 1, dtype=torch.int64), n_bins)[0, 0]
    assert sums.tolist() == pytest.approx(edges[1:].double().tolist(), abs=1e-14)


@pytest.mark.parametrize("name", SETS)
def test_classwise_of_real_networks(real_data, name):
    expected = json.loads((real_data / "logits" / "reference_metrics.json").read_text())[name]["cwece15"]
    logits, labels = load(real_data, name)
    assert classwise_ece(logits, labels).item() == pytest.approx(expected, abs=1e-6)
    assert classwise_ece(logits.double(), labels).item() == pytest.approx(expected, abs=1e-12)


def test_classwise_sums_of_batches_add_up():
    logits, labels = random_set(5000, 10)
    probs = logits.float().softmax(1)
    whole = classwise_ece(probs, labels, input="probs").item()
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    for size in (1, 7, 1000):
        parts = zip(probs[order].split(size), labels[order].split(size), strict=True)
        sums = sum(classwise_sums(p, y, 15) for p, y in list(parts)[: 5000 // size + 1])
        assert classwise_ece_from_sums(sums, torch.tensor(5000)).item() == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("n_bins", [1, 15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weighted_classwise_sums_are_those_of_repeated_rows(n_bins, dtype):
    logits, labels = random_set(300, 12)
    probs = logits.to(dtype).softmax(1)
    drawn, counts = resamples(300, 4)
    sums = weighted_classwise_sums(probs, labels, counts, n_bins)
    assert sums.shape == (4, 2, 12, n_bins)
    for some, ours in zip(drawn, sums, strict=True):
        expected = classwise_sums(probs[some], labels[some], n_bins)
        assert torch.allclose(ours, expected, rtol=0, atol=1e-12)
    values = classwise_ece_from_sums(sums, counts.sum(1))
    assert values.shape == (4,)
    expected = [classwise_by_loops(probs[some].numpy(), labels[some].numpy(), n_bins) for some in drawn]
    assert values.tolist() == pytest.approx(expected, abs=1e-13)


def test_classwise_of_an_absent_last_class_and_of_nothing():
    logits, labels = random_set(100, 4)
    labels = labels.clamp(max=2)
    expected = classwise_by_loops(logits.softmax(1).numpy(), labels.numpy(), 15)
    assert classwise_ece(logits, labels).item() == pytest.approx(expected, abs=1e-14)
    with pytest.warns(UserWarning, match="classwise_ece: no rows") as caught:
        assert math.isnan(classwise_ece(*NO_ROWS))
    assert len(caught) == 1
    with pytest.raises(ValueError, match="n_bins is 0"):
        classwise_ece(logits, labels, n_bins=0)


# --- one against one


def ovo_by_pairs(scores, y):
    """Mean of A(i|j) over ordered pairs of classes with rows."""
    present = np.unique(y)
    areas = [
        pair_auroc(scores[(y == i) | (y == j), i], (y == i)[(y == i) | (y == j)])
        for i in present
        for j in present
        if i != j
    ]
    return np.mean(areas) if areas else np.nan


def test_golden_ovo():
    assert ovo_auroc(*golden_set()).item() == pytest.approx(0.942120004884, abs=1e-12)


@pytest.mark.parametrize("classes", [3, 10, 30])
@pytest.mark.parametrize("ties", [False, True])
def test_ovo_against_scikit_learn(classes, ties):
    logits, labels = random_set(900, classes, scale=1.0)
    p = logits.softmax(1)
    if ties:
        p = ((20 * p).round() + 1) / 64
        p[:, 0] += 1 - p.sum(1)
        p = p.clamp_min(0)
        p /= p.sum(1, keepdim=True)
    expected = roc_auc_score(labels.numpy(), p.numpy(), multi_class="ovo", labels=range(classes))
    assert ovo_auroc(p, labels, input="probs").item() == pytest.approx(expected, abs=1e-12)
    if not ties:
        assert ovo_auroc(logits, labels).item() == pytest.approx(expected, abs=1e-12)


def test_ovo_of_two_classes_is_the_binary_area():
    logits, labels = random_set(400, 2)
    expected = roc_auc_score(labels.numpy(), (logits[:, 1] - logits[:, 0]).numpy())
    assert ovo_auroc(logits, labels).item() == pytest.approx(expected, abs=1e-12)


def test_ovo_without_some_classes():
    logits, labels = random_set(300, 6)
    labels = labels.clamp(max=3)
    with pytest.warns(UserWarning, match="2 of 6 classes have no rows") as caught:
        value = ovo_auroc(logits, labels)
    assert len(caught) == 1
    assert value.item() == pytest.approx(ovo_by_pairs(softmax(logits.numpy()), labels.numpy()), abs=1e-12)
    for some, message in ((torch.zeros(300, dtype=torch.int64), "same label"), (NO_ROWS[1], "no rows")):
        with pytest.warns(UserWarning, match=message) as caught:
            assert math.isnan(ovo_auroc(logits[: len(some)], some))
        assert len(caught) == 1
    with pytest.warns(UserWarning, match="same label"):
        assert math.isnan(ovo_auroc(torch.randn(5, 1), torch.zeros(5, dtype=torch.int64)))


@pytest.mark.parametrize("factor", [1, 8, 1000])
def test_ovo_of_overconfident_logits_keeps_its_ranking(factor):
    logits, labels = random_set(600, 5, scale=3.0)
    logits = (factor * logits).float()
    z = logits.double().numpy().astype(np.longdouble)
    margin = np.empty(z.shape)
    for k in range(5):
        rest = np.delete(z, k, axis=1)
        second = rest.max(1)
        margin[:, k] = z[:, k] - second - np.log(np.exp(rest - second[:, None]).sum(1))
    assert class_log_odds(logits).numpy() == pytest.approx(margin, rel=1e-12, abs=1e-12)
    assert ovo_auroc(logits, labels).item() == pytest.approx(ovo_by_pairs(margin, labels.numpy()), abs=1e-12)
    if factor == 1000:
        saturated = ovo_auroc(logits.softmax(1), labels, input="probs").item()
        assert abs(saturated - ovo_by_pairs(margin, labels.numpy())) > 1e-3


def test_ovo_of_constant_rows():
    logits = torch.arange(12.0)[:, None].expand(12, 4)
    assert ovo_auroc(logits, torch.arange(12) % 4).item() == 0.5


@pytest.mark.parametrize("replicates", [3, 70])
def test_weighted_ovo_is_that_of_repeated_rows(replicates):
    # Two rows of the last class, which some resamples lack.
    logits, labels = random_set(60, 7, scale=1.0)
    labels = labels.clamp(max=5)
    labels[:2] = 6
    p = logits.softmax(1)
    drawn, counts = resamples(60, replicates)
    assert replicates < 10 or any(len(labels[some].unique()) < 7 for some in drawn)
    values = weighted_ovo_auroc(p, labels, counts)
    expected = [ovo_by_pairs(p[some].numpy(), labels[some].numpy()) for some in drawn]
    assert values.tolist() == pytest.approx(expected, abs=1e-12)
    assert weighted_ovo_auroc(p, labels, 0.25 * counts).tolist() == pytest.approx(expected, abs=1e-12)
    assert math.isnan(weighted_ovo_auroc(p, labels, torch.zeros(1, 60)).item())


# --- temperature


def test_golden_temperature():
    logits, labels = golden_set()
    fit = optimal_inverse_temperature(logits / 1.6, labels)
    assert fit.beta == pytest.approx(1.675367561955, abs=1e-12)
    assert fit.nll == pytest.approx(0.669823476850, abs=1e-12)
    assert not fit.at_bound


@pytest.mark.parametrize("name", SETS)
def test_temperature_of_real_networks(real_data, name):
    expected = json.loads((real_data / "logits" / "reference_metrics.json").read_text())[name]
    logits, labels = load(real_data, name)
    fit = optimal_inverse_temperature(logits, labels)
    assert 1 / fit.beta == pytest.approx(expected["T_in_sample"], rel=1e-6)
    assert fit.nll == pytest.approx(expected["nll_T"], abs=1e-9)
    scaled = fit.beta * logits.double()
    assert nll(scaled, labels).item() == pytest.approx(fit.nll, abs=1e-12)
    assert ece(scaled, labels).item() == pytest.approx(expected["ece15_T"], abs=1e-6)
    assert brier(scaled, labels).item() == pytest.approx(expected["brier_T"], abs=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.05, 1.0, 20.0, 1e3, 1e5])
def test_temperature_follows_the_scale(scale):
    logits, labels = golden_set()
    fit = optimal_inverse_temperature(scale * logits / 1.6, labels)
    assert fit.beta * scale == pytest.approx(1.675367561955, rel=1e-11)
    assert fit.nll == pytest.approx(0.669823476850, abs=1e-12)


def test_temperature_is_a_minimum_of_hard_cases():
    logits, labels = random_set(10, 4, seed=3)
    cases = {"ten rows": (logits, labels)}
    one_wrong, of_one_wrong = random_set(400, 4)
    of_one_wrong = one_wrong.argmax(1)
    of_one_wrong[0] = one_wrong[0].argmin()
    cases["one wrong"] = one_wrong, of_one_wrong
    cases["half precision"] = (random_set(300, 5)[0].bfloat16(), random_set(300, 5)[1])
    for name, (z, y) in cases.items():
        fit = optimal_inverse_temperature(z, y)
        assert not fit.at_bound, name
        for factor in (0.99, 1.01):
            assert nll(fit.beta * factor * z.double(), y).item() > fit.nll, name
        assert nll(fit.beta * z.double(), y).item() == pytest.approx(fit.nll, abs=1e-13), name


def test_temperature_at_its_bounds():
    logits, _ = random_set(50, 4)
    with pytest.warns(UserWarning, match="all the largest logits") as caught:
        fit = optimal_inverse_temperature(logits, logits.argmax(1))
    assert (len(caught), fit.at_bound, fit.beta) == (1, True, math.exp(16))
    assert fit.nll == pytest.approx(0, abs=1e-12)
    with pytest.warns(UserWarning, match="less than the mean logit"):
        fit = optimal_inverse_temperature(logits, logits.argmin(1))
    assert (fit.at_bound, fit.beta) == (True, math.exp(-16))
    assert fit.nll == pytest.approx(math.log(4), abs=1e-5)
    with pytest.warns(UserWarning, match="all the largest"):
        assert optimal_inverse_temperature(logits[:1], logits[:1].argmax(1)).at_bound


def test_temperature_of_constant_rows_one_class_and_nothing():
    constant = torch.arange(6.0)[:, None].expand(6, 3)
    assert optimal_inverse_temperature(constant, torch.arange(6) % 3) == (1.0, pytest.approx(math.log(3)), False)
    assert optimal_inverse_temperature(torch.randn(4, 1), torch.zeros(4, dtype=torch.int64)) == (1.0, 0.0, False)
    with pytest.raises(ValueError, match="no rows"):
        optimal_inverse_temperature(*NO_ROWS)
    with pytest.raises(ValueError, match="row 1 has nan"):
        optimal_inverse_temperature(torch.tensor([[0.0, 1.0], [torch.nan, 0.0]]), torch.tensor([0, 1]))


# --- variational split


def refit(logits, labels):
    """Refinement by a fit, and smoothing in probabilities."""
    n, classes = logits.shape
    q = softmax(quietly(optimal_inverse_temperature, logits, labels).beta * logits.double().numpy())
    q = q * n / (n + 1) + 1 / (classes * (n + 1))
    return -np.log(q[np.arange(n), labels.numpy()]).mean()


def test_variational_split_of_the_golden_set():
    logits, labels = golden_set()
    for scale in (1.0, 1 / 1.6, 10.0):
        split = variational_split(scale * logits, labels)
        # The smoothing is w = 1/501 on a likelihood of 0.669823476850.
        assert split.refinement.item() == pytest.approx(refit(logits, labels), abs=1e-12)
        assert abs(split.refinement.item() - 0.669823476850) < 1e-3
        assert split.nll.item() == pytest.approx(nll(scale * logits, labels).item(), abs=1e-14)
        assert (split.calibration + split.refinement).item() == pytest.approx(split.nll.item(), abs=1e-14)
    probs = variational_split(logits.softmax(1), labels, input="probs")
    assert probs.refinement.item() == pytest.approx(refit(logits, labels), abs=1e-12)


def test_variational_split_of_separable_and_empty_sets():
    logits, _ = random_set(50, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split = variational_split(logits, logits.argmax(1))
        wrong = variational_split(logits, logits.argmin(1))
    assert split.refinement.item() == pytest.approx(-math.log(50 / 51 + 1 / 204), abs=1e-9)
    assert wrong.refinement.item() == pytest.approx(math.log(4), abs=1e-5)
    with pytest.warns(UserWarning, match="variational_split: no rows") as caught:
        assert all(math.isnan(part) for part in variational_split(*NO_ROWS))
    assert len(caught) == 1
    lost = variational_split(torch.tensor([[1.0, 0.0]] * 3), torch.tensor([0, 0, 1]), input="probs")
    assert lost.nll.item() == lost.calibration.item() == math.inf
    # The best likelihood of one wrong row in three, plus what the smoothing costs.
    best = -(2 * math.log(2 / 3) + math.log(1 / 3)) / 3
    assert best < lost.refinement.item() < best + 0.05


@pytest.mark.parametrize(("rows", "classes"), [(500, 5), (200, 10), (30, 4), (10, 3)])
def test_weighted_variational_is_a_fit_of_repeated_rows(rows, classes):
    logits, labels = golden_set() if rows == 500 else random_set(rows, classes, seed=rows)
    drawn, counts = resamples(rows, 40)
    split = weighted_variational(logits, labels, counts)
    expected = [refit(logits[some], labels[some]) for some in drawn]
    assert split.refinement.tolist() == pytest.approx(expected, abs=1e-6)
    expected = [nll(logits[some], labels[some]).item() for some in drawn]
    assert split.nll.tolist() == pytest.approx(expected, abs=1e-12)
    assert (split.nll - split.refinement).equal(split.calibration)


def test_weighted_variational_of_other_weights():
    logits, labels = random_set(100, 4)
    table = variational_table(logits, labels)
    # Other totals have another smoothing; one without any weight has no value.
    weights = torch.stack([torch.ones(100), 2 * torch.ones(100), torch.zeros(100), (torch.arange(100) < 40).float()])
    split = variational_from_table(table, weights)
    assert math.isnan(split.refinement[2])
    assert math.isnan(split.nll[2])
    expected = [refit(logits, labels), refit(logits.repeat(2, 1), labels.repeat(2)), refit(logits[:40], labels[:40])]
    assert split.refinement[[0, 1, 3]].tolist() == pytest.approx(expected, abs=1e-6)
    for y in (logits.argmax(1), logits.argmin(1)):
        split = weighted_variational(logits, y, weights[:1])
        assert split.refinement.item() == pytest.approx(refit(logits, y), abs=1e-6)
    probs, some = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[1, 1, 0], [1, 1, 1]])
    lost = weighted_variational(probs, torch.tensor([0, 0, 1]), some, input="probs")
    assert lost.nll.tolist() == [0.0, math.inf]
    assert lost.refinement.isfinite().all()


# --- dark side


def share_by_bins(confidence, correct):
    """Share of the non-empty ones of 100 bins whose accuracy is at most their mean confidence."""
    holds = []
    for m in range(100):
        lo, hi = (np.asarray(edge / 100, confidence.dtype) for edge in (m, m + 1))
        inside = (confidence > lo) & (confidence <= hi)
        if inside.any():
            holds.append(correct[inside].mean() <= confidence[inside].astype(np.float64).mean())
    return np.mean(holds)


def test_dark_side_terms_are_not_the_calibration_error():
    logits, labels = golden_set()
    alpha, beta, gamma, residual = (term.item() for term in dark_side_terms(logits, labels))
    assert alpha == pytest.approx(0.724993217869, abs=1e-12)
    assert beta + gamma == pytest.approx(0.592032, abs=5e-7)
    assert alpha - beta - gamma == pytest.approx(0.1330, abs=5e-5)
    error, gap = ece(logits, labels).item(), signed_gap(logits, labels).item()
    assert error == pytest.approx(0.0543, abs=5e-5)
    assert gap == pytest.approx(-0.0390, abs=5e-5)
    assert residual == pytest.approx(error - (alpha - beta - gamma), abs=1e-14)
    assert abs(residual) > 0.05


def test_dark_side_sum_is_the_accuracy_of_a_detector():
    logits, labels = golden_set()
    p = softmax(logits.numpy())
    correct = (p.argmax(1) == labels.numpy())[np.argsort(-p.max(1))]
    # Accepting the first m rows: accuracy of "accepted means correct", by the trapezoid rule over m.
    accepted = np.array([correct[:m].sum() + (~correct[m:]).sum() for m in range(501)]) / 500
    terms = dark_side_terms(logits, labels)
    assert (terms.beta + terms.gamma).item() == pytest.approx(np.trapezoid(accepted, dx=1 / 500), abs=1e-12)


def test_dark_side_of_many_sets_at_once():
    logits, labels = golden_set()
    drawn, _ = resamples(500, 3)
    parts = [
        (logits[i].softmax(1).amax(1).mean(), accuracy(logits[i], labels[i]), correctness_auroc(logits[i], labels[i]))
        for i in drawn
    ]
    columns = [torch.stack(column) for column in zip(*parts, strict=True)]
    errors = torch.stack([ece(logits[i], labels[i]) for i in drawn])
    together = dark_side_from(*columns, errors)
    for b, i in enumerate(drawn):
        alone = dark_side_terms(logits[i], labels[i])
        assert [part[b].item() for part in together] == pytest.approx([part.item() for part in alone], abs=1e-12)


def test_dark_side_with_own_confidence_and_without_errors():
    logits, labels = golden_set()
    confidence = torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    terms = dark_side_terms(logits, labels, confidence=confidence)
    assert terms.alpha.item() == pytest.approx(confidence.mean().item(), abs=1e-15)
    area = correctness_auroc(logits, labels, confidence=confidence).item()
    assert terms.beta.item() == pytest.approx(2 * area * 0.764 * 0.236, abs=1e-14)
    with pytest.warns(UserWarning, match="all 500 rows are correct") as caught:
        terms = dark_side_terms(logits, logits.argmax(1))
    assert len(caught) == 1
    assert terms.gamma.item() == 0.5
    assert math.isnan(terms.beta)
    with pytest.warns(UserWarning, match="no rows") as caught:
        assert all(math.isnan(part) for part in dark_side_terms(*NO_ROWS))
    assert len(caught) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dark_side_assumption_is_a_share_of_bins(dtype):
    logits, labels = golden_set()
    p = logits.to(dtype).softmax(1).numpy()
    confidence, correct = p.max(1), p.argmax(1) == labels.numpy()
    share = dark_side_assumption(torch.from_numpy(p), labels, input="probs")
    assert share.item() == share_by_bins(confidence, correct)
    assert 0.1 < share < 0.9
    assert dark_side_assumption(logits.to(dtype), labels).item() == share
    own = np.random.default_rng(0).random(500)
    found = dark_side_assumption(logits, labels, confidence=torch.from_numpy(own))
    assert found.item() == share_by_bins(own, correct) != share


def test_dark_side_assumption_where_accuracy_and_confidence_are_equal():
    p = torch.tensor([[1.0, 0.0]] * 3 + [[0.6, 0.4]] * 5, dtype=torch.float64)
    right = torch.tensor([0, 0, 0, 0, 1, 0, 1, 0])  # three of three at 1, three of five at 0.6
    assert dark_side_assumption(p, right, input="probs").item() == 1
    assert dark_side_assumption(p, right * 0, input="probs").item() == 0.5
    # 0.1 added ten times is less than 1.
    own = torch.full((10,), 0.1, dtype=torch.float64)
    labels = (torch.arange(10) > 0).long()
    assert dark_side_assumption(p[:1].expand(10, 2), labels, confidence=own, input="probs").item() == 1
    with pytest.warns(UserWarning, match="no rows"):
        assert dark_side_assumption(*NO_ROWS).isnan()


# --- kind of input


def test_the_kind_of_input_is_not_guessed_where_torchmetrics_guesses():
    from torchmetrics.functional.classification import multiclass_calibration_error

    generator = torch.Generator().manual_seed(1)
    logits = torch.rand(400, 4, generator=generator)
    labels = logits.argmax(1)
    # All logits lie in [0, 1], so torchmetrics takes them for probabilities; one more row changes its mind.
    guessed = multiclass_calibration_error(logits, labels, 4, 15).item()
    above = torch.cat([logits, torch.tensor([[1.5, 0.0, 0.0, 0.0]])])
    changed = multiclass_calibration_error(above, torch.cat([labels, labels.new_zeros(1)]), 4, 15).item()
    assert abs(guessed - changed) > 0.2
    # Ours gives the same whatever the range of the numbers: a constant added to the rows leaves them what they are.
    for metric in (classwise_ece, ovo_auroc, nll, brier):
        outside = metric(logits.double() + 8, labels).item()
        assert metric(logits.double(), labels).item() == pytest.approx(outside, abs=1e-9)
        assert metric(logits.double().softmax(1), labels, input="probs").item() == pytest.approx(outside, abs=1e-9)


# --- properties


@st.composite
def sets(draw):
    n, classes = draw(st.integers(2, 30)), draw(st.integers(2, 6))
    # Multiples of 1/64 stay exact when constants are added.
    values = st.integers(-1000, 1000)
    logits = draw(st.lists(values, min_size=n * classes, max_size=n * classes))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n))
    return torch.tensor(logits, dtype=torch.float64).reshape(n, classes) / 64, torch.tensor(labels)


def all_values(logits, labels):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = {
            "entropy": entropy(logits),
            "top": top_k_accuracy(logits, labels, k=2),
            "classwise": classwise_ece(logits, labels),
            "ovo": ovo_auroc(logits, labels),
            "refinement": variational_split(logits, labels).refinement,
            "beta": dark_side_terms(logits, labels).beta,
        }
        values = {key: value.item() for key, value in values.items()}
        return values | {"nll": optimal_inverse_temperature(logits, labels).nll}


@settings(max_examples=40, deadline=None)
@given(sets(), st.randoms(use_true_random=False))
def test_order_of_rows_and_constants_do_not_matter(data, random):
    logits, labels = data
    before = all_values(logits, labels)
    order = list(range(len(labels)))
    random.shuffle(order)
    shift = torch.tensor([[random.randint(-256, 256) / 4] for _ in order], dtype=torch.float64)
    after = all_values(logits[order] + shift, labels[order])
    assert after == pytest.approx(before, abs=1e-9, nan_ok=True)


@settings(max_examples=40, deadline=None)
@given(sets())
def test_bounds(data):
    logits, labels = data
    values = all_values(logits, labels)
    assert 0 <= values["entropy"] <= math.log(logits.shape[1]) + 1e-12
    assert accuracy(logits, labels).item() <= values["top"] <= 1
    assert 0 <= values["classwise"] <= 1
    assert math.isnan(values["ovo"]) or 0 <= values["ovo"] <= 1
    assert values["nll"] <= min(nll(logits, labels).item(), math.log(logits.shape[1])) + 1e-5


# --- other devices


@pytest.mark.gpu
def test_devices_give_what_the_cpu_gives():
    logits, labels = random_set(1000, 30)
    logits = (4 * logits).round() / 4
    probs = logits.softmax(1)
    on_device = probs.cuda(), labels.cuda()
    counts = resamples(1000, 3)[1]
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums = classwise_sums(*on_device, 15)
        hits = top_k_rows(*on_device, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(sums.cpu(), classwise_sums(probs, labels, 15), rtol=0, atol=1e-11)
    assert hits.cpu().equal(top_k_rows(probs, labels, 5))
    weighted = weighted_classwise_sums(*on_device, counts.cuda(), 15).cpu()
    assert torch.allclose(weighted, weighted_classwise_sums(probs, labels, counts, 15), rtol=0, atol=1e-11)
    areas = weighted_ovo_auroc(*on_device, counts.cuda()).cpu()
    assert areas.tolist() == pytest.approx(weighted_ovo_auroc(probs, labels, counts).tolist(), abs=1e-12)
    split = weighted_variational(logits.cuda(), on_device[1], counts.cuda()).refinement.cpu()
    assert split.tolist() == pytest.approx(weighted_variational(logits, labels, counts).refinement.tolist(), abs=1e-9)
