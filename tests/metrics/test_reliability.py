"""The values stay right where sets are cut, large, tied, over-confident, in half precision, broken or degenerate."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from lightning import Trainer
from scipy.special import logsumexp, softmax
from sklearn.metrics import roc_auc_score
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from calib_lightning import metrics
from calib_lightning.core import ClassificationModule
from calib_lightning.metrics import FULL, METRICS, REPORT, EvaluationState, devices
from tests.metrics.ddp_cases import makers
from tests.metrics.golden import EDGE_CONFIDENCE, EDGE_CORRECT, pair_auroc, random_set, reference
from tests.metrics.table import (
    ALL,
    ALL_ZERO,
    NEVER_RIGHT,
    NO_ERRORS,
    NO_SPREAD,
    ONE_LABEL,
    ONE_ROW,
    ONE_SIDED,
    OOD,
    name_of,
    value_of,
)
from tests.metrics.test_calibration import REFERENCES

pytestmark = pytest.mark.filterwarnings("ignore:.*coverage_at_risk_0.05 is nan", "ignore:CoverageAtRisk")

MAKERS = makers()
STATES = ("everything", "histogram", "details")
ORDERED = [key for key, row in METRICS.items() if row.parts == ("ranks",)]
COUNTED = {"accuracy", "top5_accuracy", "ovo_auroc", *ORDERED, *OOD}
"""Read from counts or sorted rows."""


def read(metric, name=""):
    value = metric.compute()
    return {key: v.item() for key, v in value.items()} if isinstance(value, dict) else {name: value.item()}


def fed(metric, logits, labels, size=10**6, view=lambda batch: batch):
    for start in range(0, len(labels), size):
        metric.update(*view((logits[start : start + size], labels[start : start + size])))
    return metric


def close(found, expected, tolerance=1e-12):
    assert found == pytest.approx(expected, rel=tolerance, abs=1e-15, nan_ok=True)


# --- however the rows are cut


@pytest.mark.parametrize("name", MAKERS)
def test_merged_parts_are_the_whole(name):
    maker, view = MAKERS[name]
    logits, labels = random_set(90, 6, scale=3.0)
    whole = read(fed(maker(), logits, labels, view=view), name)
    generator = np.random.default_rng(1)
    exact = {"correctness_auroc", "accuracy"} if name == "histogram" else COUNTED
    for trial in range(20):
        cuts = np.sort(generator.integers(0, 91, size=trial % 4))  # equal cuts leave an empty part between them
        cuts = [0, *(0 if trial == 7 else cut for cut in cuts), 90]
        merged = maker()
        for a, b in itertools.pairwise(cuts):
            part = maker()
            merged.merge_state(fed(part, logits[a:b], labels[a:b], view=view))
        merged.update(*view((logits[:0], labels[:0])))
        found = read(merged, name)
        close(found, whole)
        assert {key: found[key] for key in exact & whole.keys()} == {key: whole[key] for key in exact & whole.keys()}


@pytest.mark.parametrize("size", [1, 7, 500, 701])
@pytest.mark.parametrize("name", [*STATES, *OOD])
def test_neither_order_nor_batches_matter(name, size):
    maker, view = MAKERS[name]
    logits, labels = random_set(701, 11, scale=5.0)
    order = torch.randperm(701, generator=torch.Generator().manual_seed(size))
    whole = read(fed(maker(), logits.float(), labels, view=view), name)
    close(read(fed(maker(), logits[order].float(), labels[order], size, view), name), whole)


# --- many rows


def chunks(classes, kind, dtype):
    """A million rows of moderately right predictions, some ten million numbers at a time."""
    generator = np.random.default_rng(classes)
    rows = min(10**6, 10**7 // classes)
    for _ in range(10**6 // rows):
        logits = generator.normal(scale=3.0, size=(rows, classes)).astype(dtype)
        labels = np.where(generator.random(rows) < 0.7, logits.argmax(1), generator.integers(classes, size=rows))
        if kind == "logits":
            z = logits.astype(np.float64)
            yield logits, labels, softmax(z, axis=1), logsumexp(z, axis=1) - z[np.arange(rows), labels]
        else:
            given = softmax(logits.astype(np.float64), axis=1).astype(dtype)
            probs = given.astype(np.float64)
            yield given, labels, probs, -np.log(probs[np.arange(rows), labels])


def bins_of(values):
    return np.searchsorted(np.arange(16) / 15, values, side="left").clip(1) - 1


@pytest.mark.parametrize(
    "classes", [10, pytest.param(100, marks=pytest.mark.slow), pytest.param(1000, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [
        ("logits", np.float64, 1e-9),
        ("probs", np.float64, 1e-9),
        pytest.param("probs", np.float32, 1e-9, marks=pytest.mark.slow),
        pytest.param("logits", np.float32, 1e-6, marks=pytest.mark.slow),
    ],
)
def test_a_million_rows(classes, kind, dtype, tolerance):
    state = EvaluationState(["ece", "classwise_ece", "mce", "brier", "nll"], input=kind)
    top, each = np.zeros((15, 3)), np.zeros((15 * classes, 2))
    brier = nll = 0.0
    for given, labels, probs, losses in chunks(classes, kind, dtype):
        state.update(torch.from_numpy(given), torch.from_numpy(labels))
        rows = np.arange(len(labels))
        hit = probs.argmax(1) == labels
        confidence = probs.max(1)
        for column, weights in enumerate((None, confidence, hit)):
            top[:, column] += np.bincount(bins_of(confidence), weights, 15)
        place = bins_of(probs) + 15 * np.arange(classes)
        each[:, 0] += np.bincount(place.ravel(), probs.ravel(), 15 * classes)
        each[:, 1] += np.bincount(place[rows, labels], minlength=15 * classes)
        brier += (probs**2).sum() - 2 * probs[rows, labels].sum() + len(rows)
        nll += losses.sum()
    filled = top[top[:, 0] > 0]
    expected = {
        "ece": np.abs(top[:, 1] - top[:, 2]).sum() / 10**6,
        "classwise_ece": np.abs(each[:, 0] - each[:, 1]).sum() / 10**6 / classes,
        "mce": (np.abs(filled[:, 1] - filled[:, 2]) / filled[:, 0]).max(),
        "brier": brier / 10**6,
        "nll": nll / 10**6,
    }
    assert int(state.count) == 10**6
    assert read(state) == pytest.approx(expected, abs=tolerance, rel=0)


# --- ties


@pytest.mark.parametrize("convention", ["split", "official"])
@pytest.mark.parametrize(("n", "digits"), [(7, 1), (15, 3), (101, 1), (101, 2), (500, 2)])
def test_adaptive_error_of_tied_rows_in_any_order(convention, n, digits):
    generator = torch.Generator().manual_seed(n)
    confidence = (0.5 + 0.5 * torch.rand(n, generator=generator, dtype=torch.float64)).round(decimals=digits)
    correct = torch.rand(n, generator=generator) < confidence
    logits = torch.tensor([[1.0, 0.0]]).expand(n, 2)
    # The log-odds carry the ties and the confidence comes back from them to a few parts in 1e16.
    expected = REFERENCES[f"aece_{convention}"](confidence.numpy(), correct.numpy().astype(float), 15)
    found = set()
    for _ in range(4):
        order = torch.randperm(n, generator=generator)
        metric = metrics.AdaptiveCalibrationError(convention=convention)
        for part in order.split(6):
            metric.update(logits[part], 1 - correct[part].long(), confidence[part])
        found.add(metric.compute().item())
    assert len(found) == 1
    assert found.pop() == pytest.approx(expected, abs=1e-9)


TIES = {"all tied": lambda s: s * 0, "half tied": lambda s: np.where(np.arange(len(s)) % 2, s, 0.5), "random": np.copy}


@pytest.mark.parametrize("ties", TIES)
def test_areas_of_tied_scores(ties):
    generator = np.random.default_rng(3)
    confidence = TIES[ties](generator.random(800))
    correct = generator.random(800) < 0.2 + 0.6 * confidence
    expected = pair_auroc(confidence, correct)
    assert roc_auc_score(correct, confidence) == pytest.approx(expected, abs=1e-12)
    assert ties != "all tied" or expected == 0.5
    own, outside = metrics.CorrectnessAUROC(), metrics.OODAUROC()
    scores, hit = torch.from_numpy(confidence), torch.from_numpy(correct)
    for part in torch.randperm(800).split(90):
        own.update(torch.tensor([[1.0, 0.0]]).expand(len(part), 2), 1 - hit[part].long(), scores[part])
        outside.update(scores[part], hit[part])
    assert own.compute().item() == pytest.approx(expected, abs=1e-12)
    assert outside.compute().item() == pytest.approx(expected, abs=1e-12)


# --- the histogram of log-odds, and over-confident logits


def shaped(shape, n=40000):
    """Logits whose confidence has a given shape, and labels that are right more often where it is high."""
    logits, _ = random_set(n, 10, scale=1.0, seed=5)
    generator = torch.Generator().manual_seed(6)
    right = torch.rand(n, generator=generator) < 0.2 + 0.7 * logits.softmax(1).amax(1)
    labels = torch.where(right, logits.argmax(1), (logits.argmax(1) + 1) % 10)
    match shape:
        case "plain":
            return logits, labels
        case "logits x8":
            return 8 * logits, labels
        case "logits x50":
            return 50 * logits, labels
        case "tied":
            return (2 * logits).round(), labels
        case "two groups":
            return torch.where(torch.arange(n)[:, None] % 2 == 0, logits, 20 * logits), labels
        case "two classes":
            return logits[:, :2] * 3, (logits[:, 0] < logits[:, 1] * (0.5 + right)).long()
    raise ValueError(shape)


HISTOGRAM_BOUNDS = {
    **dict.fromkeys(("correctness_auroc", "aurc", "e_aurc", "augrc"), 1e-5),
    **dict.fromkeys(("ks", "smece", "aece_split", "debiased_l2", "corp_miscalibration", "corp_discrimination"), 1e-4),
    **dict.fromkeys(("aupr_success", "aupr_error", "fpr95"), 1e-3),
}


@pytest.mark.parametrize("shape", ["plain", "logits x8", "logits x50", "tied", "two groups", "two classes"])
def test_a_histogram_is_almost_exact(shape):
    logits, labels = shaped(shape)
    exact = read(fed(EvaluationState(list(HISTOGRAM_BOUNDS)), logits, labels))
    rough = read(fed(EvaluationState(list(HISTOGRAM_BOUNDS), rank_bins=16384), logits, labels))
    assert 0.5 < exact["correctness_auroc"] < 1
    for key, bound in HISTOGRAM_BOUNDS.items():
        assert rough[key] == pytest.approx(exact[key], abs=bound), key


@pytest.mark.parametrize("factor", [1, 8, 50])
def test_overconfident_logits_keep_their_ranking(factor):
    logits, labels = random_set(5000, 10, scale=2.0, seed=4)
    logits = logits.float() * factor
    narrow = read(fed(EvaluationState(ORDERED), logits, labels, 700))
    z = logits.double().numpy()
    top = z.argmax(axis=1)
    rest = np.where(np.arange(10) == top[:, None], -np.inf, z)
    margin, correct = z.max(axis=1) - logsumexp(rest, axis=1), top == labels.numpy()
    assert narrow["correctness_auroc"] == pytest.approx(roc_auc_score(correct, margin), abs=1e-6)
    wide = read(fed(EvaluationState(ORDERED), logits.double(), labels))
    assert narrow == pytest.approx(wide, abs=1e-6)
    if factor == 50:  # what a float32 softmax makes of them is another ranking
        assert abs(roc_auc_score(correct, logits.softmax(1).amax(1)) - narrow["correctness_auroc"]) > 1e-3


# --- half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype):
    logits, labels = random_set(20000, 10, scale=3.0)
    half = logits.to(dtype)
    found = read(fed(EvaluationState(FULL), half, labels, 3000))
    assert found == read(fed(EvaluationState(FULL), half.float(), labels, 3000))
    expected = reference(half.float(), labels)
    assert found["ece"] == pytest.approx(expected["ece"], abs=2e-4)
    assert found["correctness_auroc"] == pytest.approx(expected["correctness_auroc"], abs=1e-3)


class Exponentials(TorchDispatchMode):
    """Notes the dtypes of everything that exponentials and sums of them are taken of."""

    NAMES = ("softmax", "log_softmax", "logsumexp", "nll_loss", "exp")

    def __init__(self):
        super().__init__()
        self.seen: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").lstrip("_")
        if name.startswith(self.NAMES) and not name.startswith("expand"):
            self.seen |= {(name, a.dtype) for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()}
        return func(*args, **(kwargs or {}))


def test_a_mixed_precision_run_has_no_softmax_in_half_precision(tmp_path):
    class Small(ClassificationModule):
        def __init__(self):
            super().__init__(5, encoder="digits_cnn", optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
            self.net = torch.nn.Linear(8, 5)
            self.kept = []

        def forward(self, image):
            logits = self.net(image)
            self.kept.append(logits.detach())
            return logits

    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(60, 8, generator=generator), torch.randint(5, (60,), generator=generator)
    loader = DataLoader(TensorDataset(images, labels, torch.arange(60)), batch_size=20)
    options = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options |= {"accelerator": "cpu", "precision": "bf16-mixed", "max_epochs": 1, "default_root_dir": tmp_path}
    trainer = Trainer(use_distributed_sampler=False, **options)
    torch.manual_seed(0)
    module = Small()
    with Exponentials() as exponentials, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader)
        module.kept.clear()
        trainer.test(module, loader, verbose=False)
    logits = torch.cat(module.kept)
    assert logits.dtype == torch.bfloat16
    assert {name for name, _ in exponentials.seen} >= {"log_softmax"}
    assert any(name.startswith("exp") for name, _ in exponentials.seen)
    assert {dtype for _, dtype in exponentials.seen} <= {torch.float32, torch.float64}, exponentials.seen
    expected = read(fed(EvaluationState((*REPORT, "ovo_auroc")), logits.float(), labels, 20))
    assert read(module.test_states[0]) == pytest.approx(expected, abs=1e-12, nan_ok=True)


# --- conventions


def test_conventions_are_named_and_differ():
    logits = torch.tensor([[1.0, 0.0]]).expand(12, 2)
    batch = logits, 1 - torch.tensor(EDGE_CORRECT), torch.tensor(EDGE_CONFIDENCE, dtype=torch.float64)
    by_hand = {
        metrics.ExpectedCalibrationError(n_bins=5): 0.1375,
        metrics.MaximumCalibrationError(n_bins=5): 0.275,
        metrics.AdaptiveCalibrationError(n_bins=5, convention="split"): None,
        metrics.AdaptiveCalibrationError(n_bins=5, convention="official"): None,
    }
    found = []
    for metric, expected in by_hand.items():
        metric.update(*batch)
        found.append(metric.compute().item())
        assert expected is None or found[-1] == pytest.approx(expected, abs=1e-12)
    assert found[2] != pytest.approx(found[3], abs=1e-3)
    assert next(iter(by_hand)).settings["bins"] == "(lo, hi]"
    with pytest.raises(ValueError, match="convention is 'other'"):
        metrics.AdaptiveCalibrationError(convention="other")


# --- what must not pass


BROKEN = [(name, value) for name in MAKERS for value in (math.nan, math.inf, -math.inf)]


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize(("name", "value"), [case for case in BROKEN if case[0] not in OOD or math.isnan(case[1])])
def test_one_broken_row_of_ten_thousand_is_told(name, value, deferred, monkeypatch):
    maker, view = MAKERS[name]
    if deferred:
        monkeypatch.setattr(devices, "checks_at_once", lambda device: False)
    logits, labels = random_set(10000, 4)
    for broken in (1, 4, 10):
        metric = maker()
        who = type(metric).__name__
        for batch in range(1, 11):
            part = slice(1000 * batch - 1000, 1000 * batch)
            scores = logits[part].clone()
            if batch == broken:
                scores[17, 2] = value
            rows = view((scores, labels[part]))
            if batch == broken and not deferred:
                with pytest.raises(ValueError, match=rf"{who}, batch {batch}: 1 of 1000 .*row 17"):
                    metric.update(*rows)
                break
            metric.update(*rows)
        if deferred:
            kind = "scores" if name in OOD else "logits"
            with pytest.raises(
                ValueError, match=rf"{who}: 1 with invalid {kind} among 10000 rows, the first in batch {broken} "
            ):
                metric.compute()


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in OOD])
def test_what_the_scores_are_is_said_not_guessed(name):
    maker, _ = MAKERS[name]
    logits, labels = random_set(1000, 5, scale=3.0)
    looks_like_probs = logits.softmax(1)
    as_logits = read(fed(maker(), looks_like_probs, labels), name)
    expected = read(fed(maker(input="probs"), looks_like_probs.softmax(1), labels), name)
    assert as_logits == pytest.approx(expected, abs=1e-9, nan_ok=True)
    if not as_logits.keys() <= COUNTED:
        as_probs = read(fed(maker(input="probs"), looks_like_probs, labels), name)
        assert as_logits != pytest.approx(as_probs, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in OOD])
@pytest.mark.parametrize("total", [0.998, 1.002])
def test_rows_that_do_not_sum_to_one_are_named(name, total):
    maker, _ = MAKERS[name]
    probs = random_set(50, 5)[0].softmax(1)
    metric = maker(input="probs")
    metric.update(probs * (1 + 0.5 * (total - 1) * torch.rand(50, 1)), torch.arange(50) % 5)
    probs[[31, 40]] *= total
    with pytest.raises(ValueError, match=rf"{name_of(maker)}, batch 2: 2 of 50 rows have invalid probs; row 31 .*sums"):
        metric.update(probs, torch.arange(50) % 5)


# --- sets on which little is defined


def degenerate():
    """Rows, the keys that are nan, the keys that are zero, and some other values."""
    logits, _ = random_set(40, 4)
    turn = torch.arange(40) % 4
    one = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    c = one.softmax(1).max().item()
    mean = logits.softmax(1).amax(1).mean().item()
    half = torch.where(torch.arange(40) < 20, 0, 1 + torch.arange(40) % 3)
    right = {"aupr_success": 1, "coverage_at_risk_0.05": 1, "accuracy": 1, "dark_side_gamma": 0.5}
    wrong = {"aupr_error": 1, "aurc": 1, "risk_at_coverage_0.8": 1, "dark_side_gamma": 0.5}
    calibrated = dict.fromkeys(("ece", "ks", "aece_split"), 1 - c)
    return {
        "no rows": (logits[:0], turn[:0], set(ALL), set(), {}),
        "one right row": (
            *(one, torch.tensor([0]), ONE_SIDED | {"aupr_error"} | ONE_LABEL, NO_SPREAD | NO_ERRORS | ONE_ROW),
            right | calibrated | {"mce": 1 - c, "signed_gap": c - 1},
        ),
        "one wrong row": (
            *(one, torch.tensor([1]), ONE_SIDED | {"aupr_success", "coverage_at_risk_0.05"} | ONE_LABEL),
            *(NO_SPREAD | NEVER_RIGHT | ONE_ROW, wrong | {"ece": c, "mce": c, "signed_gap": c, "augrc": 1}),
        ),
        "one label": (logits, turn * 0, ONE_LABEL | {"coverage_at_risk_0.05"}, set(), {"signed_gap": mean - 0.325}),
        "all right": (
            *(logits, logits.argmax(1), ONE_SIDED | {"aupr_error"}, NO_SPREAD | NO_ERRORS),
            right | {"ece": 1 - mean, "under_ece": 1 - mean, "ks": 1 - mean, "ovo_auroc": None},
        ),
        "all wrong": (
            *(logits, logits.argmin(1), ONE_SIDED | {"aupr_success", "coverage_at_risk_0.05"}),
            *(NO_SPREAD | NEVER_RIGHT, wrong | {"ece": mean, "over_ece": mean, "ks": mean, "augrc": 41 / 80}),
        ),
        "one class": (
            *(
                logits[:, :1],
                turn * 0,
                ONE_SIDED | {"aupr_error"} | ONE_LABEL,
                (NO_SPREAD | NO_ERRORS | ONE_ROW | ALL_ZERO) - {"dark_side_assumption"},  # its confidence is 1
            ),
            right | {"dark_side_alpha": 1, "calibration_nll": None, "refinement_nll": None},
        ),
        "constant logits": (
            *(torch.full((40, 4), 7.5, dtype=torch.float64), half, {"coverage_at_risk_0.05"}),
            {"over_ece", "overconfidence_error", "murphy_resolution", "corp_discrimination", "calibration_nll"}
            | {"dark_side_assumption"}
            | ONE_ROW,
            dict.fromkeys(("correctness_auroc", "ovo_auroc", "aupr_error", "risk_at_coverage_0.8", "aurc"), 0.5)
            | dict.fromkeys(("ece", "mce", "rmsce", "under_ece", "aece_split", "ks"), 0.25)
            | {"fpr95": 1, "brier": 0.75, "nll": math.log(4), "entropy": math.log(4)},
        ),
    }


def noted(function, *args, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = function(*args, **kwargs)
    return value, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("case", degenerate())
def test_degenerate_sets(case):
    logits, labels, undefined, zero, values = degenerate()[case]
    found = {}
    for name, (maker, _) in MAKERS.items():
        if name in STATES or name in OOD or name == "skce":  # tests/metrics/test_kernel.py has it
            continue
        metric = maker()
        metric.update(logits, labels)
        of_class, messages = noted(read, metric, name)
        assert len(messages) == any(map(math.isnan, of_class.values())), (name, messages)
        assert all(message.startswith(type(metric).__name__) for message in messages)
        for key, value in of_class.items():
            of_function, messages = noted(value_of, key, logits, labels)
            assert of_function.item() == pytest.approx(value, abs=1e-12, nan_ok=True), key
            assert len(messages) == any(map(math.isnan, of_class.values())), (key, messages)
        found |= of_class
    assert {key for key, value in found.items() if math.isnan(value)} == undefined
    assert {key for key, value in found.items() if value == 0} == zero
    for key, value in values.items():
        assert value is None or found[key] == pytest.approx(value, abs=1e-9), key
    whole = EvaluationState(FULL)
    whole.update(logits, labels)
    of_state, messages = noted(read, whole)
    assert of_state == pytest.approx(found, abs=1e-12, nan_ok=True)
    assert len(messages) == 1, messages


@pytest.mark.parametrize("name", OOD)
@pytest.mark.parametrize("case", ["no rows", "one row", "all inside", "all outside"])
def test_degenerate_sets_of_one_kind(name, case):
    rows = {"no rows": 0, "one row": 1}.get(case, 30)
    scores, inside = torch.linspace(0, 1, rows), torch.full((rows,), case != "all outside")
    metric = OOD[name]()
    metric.update(scores, inside)
    for function, args in ((metric.compute, ()), (getattr(metrics.functional, name), (scores, inside))):
        value, messages = noted(function, *args)
        assert math.isnan(value)
        assert len(messages) == 1, messages
    constant = OOD[name]()
    constant.update(torch.zeros(40), torch.arange(40) < 10)
    assert (
        constant.compute().item() == {"ood_auroc": 0.5, "ood_aupr": 0.25, "ood_aupr_out": 0.75, "ood_fpr95": 1.0}[name]
    )
