"""Probabilities in place of logits: those of forests, with zeros; arrays and frames; a forgotten `as_logits`."""

import warnings

import numpy as np
import pandas
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import RandomForestClassifier

from calib_lightning import calibrate
from calib_lightning.posthoc import IRM, FixedTemperature, Temperature, as_logits

from ..metrics.golden import golden_set

LOGITS, LABELS = golden_set()
PROBS = LOGITS.softmax(dim=1)


@pytest.fixture(scope="module")
def forest():
    """A forest gives one label of the calibration rows the probability 0."""
    X, y = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    X, y = X[order], y[order]
    model = RandomForestClassifier(100, random_state=0).fit(X[:170], y[:170])
    probs = model.predict_proba(X)
    y[171] = 1 - int(probs[171].argmax())
    probs[171] = np.eye(2)[1 - y[171]]
    return (probs[170:370], y[170:370]), (probs[370:], y[370:])


def test_one_zero_does_not_decide_a_temperature(forest):
    report = calibrate(*forest, ["Temperature", "IRM"], input="probs", intervals=None, metrics="nll,ece")
    assert report.calibrators["Temperature"].temperature < 3  # 150 for a zero of -708
    ece = {name: row.values.values["ece"] for name, row in report.rows["set"].items()}
    assert ece["Temperature"] < 0.12
    assert ece["IRM"] < 0.06
    said = [note for note in report.notes if note.startswith("calibration: ")]
    assert "of 200 rows give their label the probability 0, taken for 2.2e-16" in said[0]
    assert "Compare IRM and EnsembleTemperature" in said[0]


def test_without_such_rows_there_is_no_note(forest):
    (probs, labels), test = forest
    kept = probs[np.arange(200), labels] > 0
    report = calibrate((probs[kept], labels[kept]), test, input="probs", intervals=None, metrics="nll")
    assert not any("probability 0, taken" in note for note in report.notes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_networks_fit_as_with_their_logits(dtype):
    from_probs = Temperature().fit(as_logits(PROBS.to(dtype)), LABELS).temperature
    assert from_probs == pytest.approx(Temperature().fit(LOGITS, LABELS).temperature, rel=1e-6)
    zero = as_logits(torch.tensor([[1.0, 0.0]], dtype=dtype))
    assert zero.tolist()[0] == pytest.approx([0.0, -36.0437], abs=1e-4)


def test_arrays_frames_and_one_column_are_converted():
    expected = as_logits(PROBS)
    for probs in (PROBS.numpy(), pandas.DataFrame(PROBS.numpy(), columns=list("abcde")), PROBS.tolist()):
        assert torch.equal(as_logits(probs), expected)
    p = np.array([0.9, 0.2])
    for column in (p, p[:, None]):
        assert as_logits(column).exp().numpy() == pytest.approx(np.stack([1 - p, p], axis=1))


@pytest.mark.parametrize(
    ("probs", "error", "words"),
    [
        (torch.ones(2, 2, 2), ValueError, r"probs has shape \(2, 2, 2\).*\(N, K\)"),
        (np.array([1, 0]), TypeError, "probs is torch.int64.*floating"),
        (torch.tensor([[0.5, 0.49]]), ValueError, "row 0.*sums to 0.99.*Divide rounded rows by their sum"),
        (torch.tensor([[2.0, -1.0]]), ValueError, "row 0 has -1.0 for class 1.*If these are logits"),
    ],
)
def test_what_are_no_probabilities_is_named_as_such(probs, error, words):
    with pytest.raises(error, match=words) as raised:
        as_logits(probs)
    assert "input=" not in str(raised.value)


@pytest.mark.parametrize("use", ["forward", "predict"])
def test_a_calibrator_warns_of_probabilities_that_it_takes_for_logits(use):
    calibrator = IRM().fit(LOGITS, LABELS)
    apply = calibrator if use == "forward" else calibrator.predict
    with pytest.warns(UserWarning, match="pass as_logits"):
        apply(PROBS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply(LOGITS)
        apply(as_logits(PROBS))


def test_a_graph_does_not_look_at_values():
    calibrator = FixedTemperature(2.0).fit(LOGITS, LABELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exported = torch.export.export(calibrator, (PROBS,))
    assert exported.module()(PROBS) == pytest.approx((PROBS / 2).log_softmax(1))
