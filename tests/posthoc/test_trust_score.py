"""TrustScore against neighbours of scipy and scikit-learn, written out."""

import numpy as np
import pytest
import torch
from scipy.spatial import KDTree
from sklearn.neighbors import NearestNeighbors

from calib_lightning.metrics.functional import auroc, correctness_auroc, ece
from calib_lightning.posthoc.saving import calibrator_of, calibrator_record
from calib_lightning.posthoc.trust_score import TrustScore


def clusters(n=300, dim=5, classes=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    centres = 2 * torch.randn(classes, dim, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return (centres[labels] + torch.randn(n, dim, generator=generator, dtype=torch.float64)).to(dtype), labels


def fitted(features, labels, *arguments, classes=4, **named):
    """Fitted to rows whose logits do not matter."""
    return TrustScore(*arguments, **named).fit(torch.zeros(len(labels), classes), labels, features)


def by_centres(features, labels):
    """Logits by the distance to the mean of each class, so that some predictions are wrong."""
    centres = torch.stack([features[labels == k].mean(0) for k in range(4)])
    return lambda rows: -torch.cdist(rows, centres)


def reference(train, labels, features, predicted, classes=4, own=False):
    """Distances by trees; a row of the fit leaves out the nearest of its class, which is itself."""
    distance = np.empty((len(features), classes))
    for k in range(classes):
        tree = KDTree(train[labels == k])
        distance[:, k] = tree.query(features)[0]
        if own:
            distance[labels == k, k] = tree.query(features[labels == k], 2)[0][:, 1]
    rows = np.arange(len(features))
    of_predicted = distance[rows, predicted]
    distance[rows, predicted] = np.inf
    return np.log(distance.min(1) + 1e-12) - np.log(of_predicted + 1e-12)


@pytest.mark.parametrize(("dtype", "offset", "tolerance"), [(torch.float64, 0, 1e-9), (torch.float32, 1000, 2e-3)])
def test_ratio_of_distances_to_the_nearest_classes(dtype, offset, tolerance):
    train, labels = clusters(dtype=dtype)
    test, _ = clusters(100, seed=1, dtype=dtype)
    predicted = torch.arange(100) % 4
    ours = fitted(train + offset, labels).score(test + offset, predicted)
    assert ours.dtype == torch.float64
    expected = reference(*(x.double().numpy() for x in (train, labels, test)), predicted.numpy())
    np.testing.assert_allclose(ours, expected, atol=tolerance)


def test_equal_distances_do_not_hide_the_other_class():
    train = torch.tensor([[-1.0], [1.0], [5.0]])
    trust = fitted(train, torch.tensor([0, 1, 2]))
    assert trust.score(torch.tensor([[0.0]]), torch.tensor([0])).item() == 0.0


def test_a_row_on_a_training_row_is_finite():
    train, labels = clusters()
    score = fitted(train, labels).score(train[:5], labels[:5])
    assert bool(score.isfinite().all())
    assert bool((score > 20).all())
    assert bool((fitted(train, labels).score(train[:5], (labels[:5] + 1) % 4) < -20).all())


def test_density_filter_leaves_out_the_thin_rows_of_each_class():
    train, labels = clusters()
    trust = fitted(train, labels, neighbours=7, alpha=0.2)
    kept = []
    for k in range(4):
        own = train[labels == k].numpy()
        radius = NearestNeighbors(n_neighbors=7).fit(own).kneighbors(own)[0][:, -1]
        kept.append(own[radius <= np.percentile(radius, 80)])
    np.testing.assert_array_equal(trust.reference, np.concatenate(kept))
    np.testing.assert_array_equal(trust.classes, np.repeat(np.arange(4), [len(own) for own in kept]))
    assert len(trust.reference) < 0.82 * 300
    assert torch.equal(train[trust.places], trust.reference)


def test_classes_without_rows():
    train, labels = clusters()
    trust = fitted(train[labels != 2], labels[labels != 2])
    assert trust.score(train[:2], torch.tensor([2, 9])).tolist() == [-np.inf, -np.inf]
    alone = fitted(train[:1], torch.tensor([3]), alpha=0.5)
    assert alone.score(train[:1], torch.tensor([3])).item() == np.inf
    # The only row of a fit has neither its own class nor another to be near to.
    assert alone.of_fitted_rows(torch.zeros(1, 4), train[:1], torch.tensor([0])).confidence.tolist() == [0.5]


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_rows_of_the_fit_leave_themselves_out(alpha):
    train, labels = clusters()
    logits = by_centres(train, labels)(train)
    trust = TrustScore(alpha=alpha).fit(logits, labels, train)
    confidence = trust.of_fitted_rows(logits, train, torch.arange(300)).confidence
    kept = trust.places.sort().values
    score = reference(*(x.numpy() for x in (train[kept], labels[kept], train[kept], logits[kept].argmax(1))), own=True)
    np.testing.assert_allclose(confidence[kept].logit(), score, atol=1e-9)
    if alpha:  # what was left out has nothing to leave out
        left = torch.ones(300, dtype=torch.bool).index_fill(0, kept, False)
        assert bool(left.any())
        assert torch.equal(confidence[left], trust.predict(logits[left], train[left]).confidence)
    # Nearest neighbours of another library, for the rows that are predicted as what they are.
    right = (logits.argmax(1) == labels)[kept]
    near = NearestNeighbors(n_neighbors=2)
    for k in range(4):
        own = train[kept][labels[kept] == k].numpy()
        some = (right & (labels[kept] == k)).numpy()
        found = near.fit(own).kneighbors(train[kept][torch.from_numpy(some)].numpy())[0][:, 1]
        other = KDTree(train[kept][labels[kept] != k].numpy()).query(train[kept][torch.from_numpy(some)].numpy())[0]
        np.testing.assert_allclose(confidence[kept].numpy()[some], other / (other + found), atol=1e-9)
    # They would else all be sure: the report must be that of new rows.
    found = trust.predict(logits, train).confidence[kept][right]
    assert float(found.min()) > 0.999
    assert trust.report.ece_after == pytest.approx(float(ece(logits, labels, confidence=confidence)), abs=1e-12)


def test_confidence_ranks_as_the_score_and_probabilities_stay():
    train, labels = clusters()
    test, _ = clusters(200, seed=1)
    logits_of = by_centres(train, labels)
    trust = TrustScore().fit(logits_of(train), labels, train)
    logits = logits_of(test)
    log_probs, confidence = trust.predict(logits, test)
    score = trust.score(test, logits.argmax(1))
    torch.testing.assert_close(confidence, score.sigmoid(), rtol=1e-14, atol=0)
    assert confidence.dtype == torch.float64
    assert torch.equal(confidence.argsort(stable=True), score.argsort(stable=True))
    assert torch.equal(log_probs, logits.log_softmax(1))
    assert torch.equal(trust(logits, test), logits.log_softmax(1))
    assert not torch.equal(confidence.argsort(), logits.softmax(1).amax(1).argsort())
    assert trust.report.nll_after == pytest.approx(trust.report.nll_before, rel=1e-12)
    assert trust.report.accuracy_change == 0.0


def test_ranks_right_above_wrong_predictions():
    train, labels = clusters(1000)
    test, truth = clusters(400, seed=1)
    logits = by_centres(train, labels)(test)
    predicted = logits.argmax(1)
    trust = fitted(train, labels, alpha=0.1)
    area = auroc(trust.score(test, predicted), predicted == truth)
    assert area > 0.6
    confidence = trust.predict(logits, test).confidence
    assert correctness_auroc(logits, truth, confidence=confidence) == pytest.approx(area)


def test_blocks_give_what_all_rows_give(monkeypatch):
    from calib_lightning.posthoc import trust_score

    train, labels = clusters()
    whole = fitted(train, labels, alpha=0.1)
    monkeypatch.setattr(trust_score, "_BLOCK", 2000)
    blocks = fitted(train, labels, alpha=0.1)
    assert torch.equal(blocks.reference, whole.reference)
    torch.testing.assert_close(blocks.score(train + 0.1, labels), whole.score(train + 0.1, labels))
    of_fit = [trust.of_fitted_rows(torch.zeros(300, 4), train, torch.arange(300)) for trust in (blocks, whole)]
    torch.testing.assert_close(of_fit[0].confidence, of_fit[1].confidence)


def test_travels_as_spec_and_state():
    train, labels = clusters(dtype=torch.float32)
    trust = fitted(train, labels, 3, 0.1)
    again = calibrator_of(calibrator_record(trust))
    assert again.name == "TrustScore(neighbours=3, alpha=0.1)"
    assert torch.equal(again.score(train + 1, labels), trust.score(train + 1, labels))
    own = [each.of_fitted_rows(torch.zeros(300, 4), train, torch.arange(300)).confidence for each in (again, trust)]
    assert torch.equal(*own), "a loaded one knows the rows of its fit"


def test_refuses():
    train, labels = clusters(20)
    trust = fitted(train, labels)
    for arguments in ({"neighbours": 0}, {"neighbours": True}, {"alpha": 1.0}, {"alpha": -0.1}):
        with pytest.raises(ValueError, match="it must be"):
            TrustScore(**arguments)
    with pytest.raises(RuntimeError, match="not fitted"):
        TrustScore().score(train, labels)
    with pytest.raises(ValueError, match="no rows"):
        fitted(train[:0], labels[:0])
    with pytest.raises(ValueError, match=r"TrustScore\.fit needs features="):
        TrustScore().fit(torch.zeros(20, 4), labels)
    with pytest.raises(ValueError, match=r"fitted to 5 features.*\(20, 4\)"):
        trust.score(train[:, :4], labels)
    with pytest.raises(ValueError, match="not finite; the first is row 3"):
        trust.score(train.index_fill(0, torch.tensor([3]), torch.inf), labels)
    with pytest.raises(TypeError, match="integer"):
        trust.score(train, labels.double())
    with pytest.raises(ValueError, match="floating point"):
        trust.score(train.long(), labels)
    with pytest.raises(ValueError, match=r"shape \(3, d\)"):
        trust.score(train, labels[:3])
    with pytest.raises(ValueError, match=r"predicted has shape \(20, 1\); it must be \(N,\)"):
        trust.score(train, labels.unsqueeze(1))
