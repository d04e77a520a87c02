import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression

from calib_lightning.posthoc import calibrator_of, calibrator_record
from calib_lightning.posthoc.irm import IRM
from tests.metrics.golden import golden_set, random_set


def test_agrees_with_scikit_learn():
    logits, labels = golden_set()
    probs = logits.softmax(dim=1).numpy()
    peer = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip")
    peer.fit(probs.ravel(), np.eye(5)[labels.numpy()].ravel())
    irm = IRM().fit(logits, labels)
    other, _ = random_set(200, 5)
    for some in (logits, other):
        p = some.softmax(dim=1).numpy()
        expected = np.maximum(peer.predict(p.ravel()).reshape(p.shape), 1e-9) + 1e-9 * p
        expected /= expected.sum(axis=1, keepdims=True)
        assert irm(some).exp().numpy() == pytest.approx(expected, abs=1e-7)
    assert irm.report.nll_after < irm.report.nll_before
    assert irm.report.accuracy_change == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 3, 100])
def test_the_predicted_class_stays_on_a_step(dtype, classes):
    # Labels by chance make one long step, on which only the second term tells classes apart.
    logits, _ = random_set(500, classes, scale=0.1)
    labels = torch.randint(classes, (500,), generator=torch.Generator().manual_seed(0))
    irm = IRM().fit(logits.to(dtype), labels)
    found = irm(logits.to(dtype))
    assert found.dtype == dtype
    assert torch.equal(found.argmax(dim=1), logits.to(dtype).argmax(dim=1))


@pytest.mark.parametrize("n", [1, 10])
@pytest.mark.parametrize("right", [True, False])
def test_few_rows_of_one_outcome(n, right):
    logits, _ = random_set(n, 4)
    labels = logits.argmax(dim=1) if right else logits.argmin(dim=1)
    irm = IRM().fit(logits, labels)
    assert irm(torch.cat([logits, 1e4 * logits])).isfinite().all()
    assert irm.report.converged
    assert irm.report.accuracy_change == 0.0


def test_travels():
    logits, labels = random_set(100, 3)
    irm = IRM().fit(logits, labels)
    assert torch.equal(calibrator_of(calibrator_record(irm))(logits), irm(logits))
