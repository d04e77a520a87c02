import io
import warnings

import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from calib_lightning.posthoc import (
    Calibrator,
    calibrator_of,
    calibrator_record,
    load_calibrator,
    parse,
    save_calibrator,
)
from calib_lightning.posthoc.bbq import BBQ
from calib_lightning.posthoc.beta import Beta
from calib_lightning.posthoc.histogram_binning import HistogramBinning
from calib_lightning.posthoc.isotonic import Isotonic
from calib_lightning.posthoc.platt import Platt
from calib_lightning.posthoc.scaling_binning import ScalingBinning
from calib_lightning.posthoc.spline import Spline
from calib_lightning.posthoc.wrappers import OneVsRest, TopLabel, class_log_odds, row_odds
from tests.metrics.golden import golden_set, random_set
from tests.metrics.test_real_data import load

F64 = torch.float64
BINARY = [BBQ, Beta, HistogramBinning, Isotonic, Platt, ScalingBinning, Spline]


def quietly(calibrator, logits, labels):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return calibrator.fit(logits, labels)


def mean_gap(confidence, correct, bins=15):
    """Expected calibration error by a loop."""
    total = 0.0
    for m in range(bins):
        inside = (confidence > m / bins) & (confidence <= (m + 1) / bins)
        total += abs(float(correct[inside].double().sum() - confidence[inside].double().sum()))
    return total / len(correct)


# --- log-odds --------------------------------------------------------------------------------------------------------


def test_log_odds_of_all_classes_agree_with_long_sums():
    logits, _ = random_set(50, 6, scale=30.0)
    wide = logits.numpy().astype(np.longdouble)
    for k in range(6):
        rest = np.delete(wide, k, axis=1)
        top = rest.max(axis=1)
        expected = wide[:, k] - top - np.log(np.exp(rest - top[:, None]).sum(axis=1))
        found = class_log_odds(logits, k, row_odds(logits))
        assert found.numpy() == pytest.approx(expected.astype(float), rel=1e-12, abs=1e-12)


def test_log_odds_do_not_saturate():
    logits = torch.tensor([[2000.0, 0.0, -300.0], [0.0, 0.0, 0.0]])
    rows = row_odds(logits)
    found = torch.stack([class_log_odds(logits, k, rows) for k in range(3)], dim=1)
    torch.testing.assert_close(found[0], torch.tensor([2000.0, -2000.0, -2300.0], dtype=F64))
    torch.testing.assert_close(found[1], torch.full((3,), -np.log(2.0), dtype=F64))


# --- one against the rest ---------------------------------------------------------------------------------------------


def test_one_vs_rest_agrees_with_scikit_learn():
    logits, labels = golden_set()
    probs = logits.softmax(dim=1).numpy()
    expected = np.empty_like(probs)
    for k in range(5):
        x = np.log(probs[:, k] / (1 - probs[:, k]))
        peer = LogisticRegression(C=1e10, tol=1e-12, max_iter=10_000).fit(x[:, None], labels.numpy() == k)
        expected[:, k] = peer.predict_proba(x[:, None])[:, 1]
    expected /= expected.sum(axis=1, keepdims=True)
    calibrator = OneVsRest(Platt()).fit(logits, labels)
    assert calibrator(logits).exp().numpy() == pytest.approx(expected, abs=1e-6)
    assert calibrator.report.converged
    assert calibrator.report.notes == ()
    assert calibrator.report.nll_after < calibrator.report.nll_before


def test_one_vs_rest_isotonic_agrees_with_scikit_learn():
    logits, labels = golden_set()
    probs = logits.softmax(dim=1).numpy()
    expected = np.stack(
        [IsotonicRegression(out_of_bounds="clip").fit_transform(probs[:, k], labels.numpy() == k) for k in range(5)], 1
    )
    found = OneVsRest(Isotonic()).fit(logits, labels)(logits).exp().numpy()
    assert found == pytest.approx(expected / expected.sum(axis=1, keepdims=True), abs=1e-5)


def test_rows_of_nothing_but_zeros_become_uniform():
    # Both bins of every class that a row of equal logits falls into have no hits at all.
    logits = torch.cat([10.0 * torch.eye(4).repeat(10, 1), torch.zeros(40, 4)])
    labels = torch.arange(4).repeat(20)
    hits = torch.cat([torch.ones(40, dtype=torch.bool), torch.zeros(40, dtype=torch.bool)])
    calibrator = OneVsRest(HistogramBinning(2)).fit(logits[hits], labels[hits])
    for copy in calibrator.copies:
        assert float(torch.sigmoid(copy(torch.tensor([-1.1])))) == pytest.approx(1e-6)
    torch.testing.assert_close(calibrator(torch.zeros(1, 4)).exp(), torch.full((1, 4), 0.25))


def test_rare_classes_keep_their_probabilities():
    logits, labels = random_set(300, 5)
    labels = torch.where(labels == 3, 0, labels)
    labels[:4] = 3
    labels = torch.where(labels == 4, 1, labels)
    with pytest.warns(UserWarning, match="2 of 5 classes have fewer than 10 rows"):
        calibrator = OneVsRest(Platt()).fit(logits, labels)
    assert [copy.fitted for copy in calibrator.copies] == [True, True, True, False, False]
    log_probs = calibrator(logits)
    probs = logits.softmax(dim=1)
    # The quotient of two classes that were both left alone is the old one.
    torch.testing.assert_close((log_probs[:, 3] - log_probs[:, 4]).exp(), probs[:, 3] / probs[:, 4])
    assert "1 of 5 classes have no calibration rows (class 4)" in calibrator.report.notes


@pytest.mark.parametrize(("rows", "enough"), [(9, False), (10, True)])
def test_ten_rows_of_a_class_are_enough(rows, enough):
    logits, labels = random_set(60, 3)
    labels = labels.clamp_max(1)
    labels[:rows] = 2
    assert [copy.fitted for copy in quietly(OneVsRest(Platt()), logits, labels).copies] == [True, True, enough]


def test_a_calibrator_that_was_fitted_before_starts_anew():
    logits, labels = golden_set()
    rare = labels.where(labels != 2, 1).index_fill(0, torch.arange(3), 2)
    used = Platt()
    used.fit(logits[:, 0], labels == 0)
    wanted = quietly(OneVsRest(Platt()), logits, rare)
    found = quietly(OneVsRest(used), logits, rare)
    assert not found.copies[2].fitted
    assert torch.equal(found(logits), wanted(logits))
    assert used.fitted


def test_a_class_of_all_rows_keeps_its_probabilities():
    logits, _ = random_set(20, 2)
    calibrator = quietly(OneVsRest(Platt()), logits, torch.zeros(20, dtype=torch.int64))
    torch.testing.assert_close(calibrator(logits), logits.log_softmax(dim=1))


def test_notes_of_many_classes_are_counted():
    logits, labels = random_set(200, 4)
    calibrator = quietly(OneVsRest(Platt()), -logits, labels)
    assert any(note.startswith("4 of 4 classes: a slope would be negative") for note in calibrator.report.notes)


def test_separated_classes_are_reported():
    logits = 5.0 * torch.eye(3).repeat(10, 1) + torch.linspace(0, 1, 30).unsqueeze(1)
    calibrator = quietly(OneVsRest(Beta()), logits, torch.arange(3).repeat(10))
    assert calibrator.report.at_bound
    assert calibrator(logits).isfinite().all()


@pytest.mark.parametrize("kind", BINARY)
def test_one_vs_rest_travels(kind, tmp_path):
    logits, labels = random_set(150, 4)
    labels[labels == 2] = 1
    calibrator = quietly(OneVsRest(kind()), logits, labels)
    assert parse(calibrator.name, Calibrator).spec == calibrator.spec
    save_calibrator(calibrator, tmp_path / "c.pt")
    loaded = load_calibrator(tmp_path / "c.pt")
    assert torch.equal(loaded(logits), calibrator(logits))
    assert [copy.fitted for copy in loaded.copies] == [True, True, False, True]
    assert loaded.report.notes == calibrator.report.notes


def test_loading_into_a_fitted_one_replaces_the_copies():
    logits, labels = random_set(150, 4)
    one, other = OneVsRest(Platt()).fit(logits, labels), OneVsRest(Platt()).fit(logits[:, :3], labels.clamp_max(2))
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(logits), one(logits))


def test_a_missing_copy_is_found_out():
    record = calibrator_record(OneVsRest(Platt()).fit(*random_set(150, 4)))
    del record["state"]["copies.2.slope"]
    with pytest.raises(ValueError, match=r"copies\.2\.slope"):
        calibrator_of(record)


def test_a_thousand_classes():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2000, 1000, generator=generator)
    labels = torch.where(torch.rand(2000, generator=generator) < 0.7, torch.arange(2000) % 100, logits.argmax(dim=1))
    calibrator = quietly(OneVsRest(HistogramBinning()), logits, labels)
    assert calibrator(logits[:10]).exp().sum(dim=1).numpy() == pytest.approx(1.0, abs=1e-5)
    loaded = calibrator_of(calibrator_record(calibrator))
    assert torch.equal(loaded(logits[:10]), calibrator(logits[:10]))


# --- the predicted class alone ----------------------------------------------------------------------------------------


def test_top_label_rescales_the_others():
    logits, labels = golden_set()
    calibrator = TopLabel(Beta()).fit(logits, labels)
    prediction = calibrator.predict(logits)
    probs, found = logits.softmax(dim=1), prediction.logits.exp()
    top = probs.argmax(dim=1, keepdim=True)
    confidence = probs.gather(1, top)
    a, b, c = calibrator.calibrator.coefficients
    expected = torch.sigmoid(a * confidence.log() - b * torch.log1p(-confidence) + c)
    torch.testing.assert_close(prediction.confidence, expected.squeeze(1))
    whole = (probs * (1 - expected) / (1 - confidence)).scatter(1, top, expected)
    plain = whole.argmax(dim=1, keepdim=True).eq(top).expand_as(whole)
    # Nearly all rows have nothing to be held back.
    assert plain.double().mean() > 0.9
    torch.testing.assert_close(found[plain], whole[plain], rtol=1e-6, atol=1e-6)
    assert calibrator.report.ece_after < calibrator.report.ece_before


@pytest.mark.parametrize("kind", BINARY)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_predicted_class_stays(kind, dtype):
    logits, _ = random_set(300, 5)
    # The surest rows are wrong, so that confidences fall far below 1 / K.
    labels = torch.where(torch.arange(300) % 10 > 0, logits.argmin(dim=1), logits.argmax(dim=1))
    logits = logits.to(dtype)
    calibrator = quietly(TopLabel(kind()), logits, labels)
    prediction = calibrator.predict(logits)
    assert torch.equal(prediction.logits.argmax(dim=1), logits.argmax(dim=1))
    assert prediction.logits.dtype == dtype
    assert prediction.logits.isfinite().all()
    assert prediction.logits.exp().sum(dim=1).numpy() == pytest.approx(1.0, abs=1e-5)
    # The confidence itself is not raised to 1 / K.
    assert float(prediction.confidence.mean()) == pytest.approx(0.1, abs=0.02)
    assert calibrator.report.accuracy_change == 0.0


def test_certain_rows():
    logits, labels = random_set(100, 3)
    calibrator = quietly(TopLabel(Platt()), logits, labels)
    sure = torch.tensor([[2000.0, 5.0, 0.0], [90.0, 0.0, 0.0]], dtype=F64)
    log_probs = calibrator(sure)
    assert log_probs.isfinite().all()
    # The rest is shared as the other logits say, also where it is nothing in floating point.
    torch.testing.assert_close(log_probs[:, 1] - log_probs[:, 2], torch.tensor([5.0, 0.0], dtype=F64))


@pytest.mark.parametrize(("labels", "said"), [("right", "all 40 predictions are correct"), ("wrong", "are wrong")])
def test_one_outcome_is_said(labels, said):
    logits, _ = random_set(40, 3)
    labels = logits.argmax(dim=1) if labels == "right" else logits.argmin(dim=1)
    for kind in BINARY:
        with pytest.warns(UserWarning, match=said):
            calibrator = TopLabel(kind()).fit(logits, labels)
        confidence = calibrator.predict(logits).confidence
        assert ((confidence > 0) & (confidence < 1)).all()
    assert quietly(TopLabel(Platt()), logits, labels).report.at_bound


def test_top_label_travels():
    logits, labels = random_set(150, 4)
    calibrator = quietly(TopLabel(Spline(knots=4)), logits, labels)
    loaded = calibrator_of(calibrator_record(calibrator))
    assert loaded.name == "TopLabel(Spline(knots=4))"
    assert torch.equal(loaded.predict(logits).confidence, calibrator.predict(logits).confidence)


# --- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [OneVsRest, TopLabel])
@pytest.mark.parametrize("bad", ["Beta", Beta, None])
def test_only_calibrators_of_one_probability_are_wrapped(wrapper, bad):
    with pytest.raises(TypeError, match="one probability"):
        wrapper(bad)


@pytest.mark.parametrize(
    "made",
    [
        *(pytest.param(OneVsRest(kind()), marks=pytest.mark.slow) for kind in BINARY),
        *(OneVsRest(HistogramBinning(1)), TopLabel(Beta())),
    ],
    ids=lambda made: made.name,
)
def test_runs_elsewhere(made):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    logits, labels = random_set(200, 3)
    logits = logits.float()
    calibrator = quietly(made, logits, labels).eval()
    shapes = {"logits": {0: torch.export.Dim("rows")}, "features": None}
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(calibrator, (logits[:7], None), dynamic_shapes=shapes)
        torch.onnx.export(program, dynamo=True, verbose=False).save(buffer)
    torch.testing.assert_close(program.module()(logits, None), calibrator(logits))
    session = runtime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    some = torch.cat([logits[:50], torch.tensor([[3000.0, 0.0, -3000.0], [0.0, 0.0, 0.0]])])
    (found,) = session.run(None, {session.get_inputs()[0].name: some.numpy()})
    assert found == pytest.approx(calibrator(some).numpy(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kind", BINARY)
@pytest.mark.parametrize("wrapper", [OneVsRest, TopLabel])
def test_a_real_network(real_data, wrapper, kind):
    folder = real_data / "logits" / "psr-calibration" / "resnet-50_cifar10"
    sets = [
        [torch.from_numpy(np.load(folder / part / f"{what}.npy")) for what in ("predictions", "targets")]
        for part in ("val", "tst")
    ]
    (logits, labels), (unseen, truth) = sets
    calibrator = quietly(wrapper(kind()), logits, labels)
    after = calibrator.predict(unseen)
    # The confidence of unseen rows is nearer to their accuracy.
    raw = unseen.double().softmax(dim=1).amax(dim=1)
    own = after.logits.exp().amax(dim=1) if after.confidence is None else after.confidence
    assert mean_gap(own, after.logits.argmax(dim=1) == truth) < 0.6 * mean_gap(raw, unseen.argmax(dim=1) == truth)


@pytest.mark.parametrize(("rows", "binary"), [(5000, ScalingBinning), (1000, ScalingBinning), (1000, Beta)])
def test_a_hundred_real_classes_keep_their_accuracy_and_likelihood(real_data, rows, binary):
    """One bin for all rows of a class cost half of the accuracy; three parameters for five rows cost the likelihood."""
    logits, labels = load(real_data, "expected_cost/cifar100_resnet-20")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    logits, labels = logits[order], labels[order]
    calibrator = quietly(OneVsRest(binary()), logits[:rows], labels[:rows])
    before, after, labels = logits[5000:], calibrator(logits[5000:]), labels[5000:]
    assert (
        float((after.argmax(1) == labels).double().mean()) > float((before.argmax(1) == labels).double().mean()) - 0.02
    )
    assert torch.nn.functional.cross_entropy(after, labels) < torch.nn.functional.cross_entropy(before, labels)
