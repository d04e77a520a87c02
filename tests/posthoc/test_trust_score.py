"""TrustScore against neighbours of scipy, written out."""

import numpy as np
import pytest
import torch
from scipy.spatial import KDTree
from sklearn.neighbors import NearestNeighbors

from calib_lightning.metrics.functional import auroc, correctness_auroc
from calib_lightning.posthoc.trust_score import TrustScore
from calib_lightning.utils.described import build


def clusters(n=300, dim=5, classes=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    centres = 2 * torch.randn(classes, dim, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return (centres[labels] + torch.randn(n, dim, generator=generator, dtype=torch.float64)).to(dtype), labels


def reference(train, labels, features, predicted, classes=4):
    distance = np.stack([KDTree(train[labels == k]).query(features)[0] for k in range(classes)], 1)
    rows = np.arange(len(features))
    own = distance[rows, predicted]
    distance[rows, predicted] = np.inf
    return np.log(distance.min(1) / own)


@pytest.mark.parametrize(("dtype", "offset", "tolerance"), [(torch.float64, 0, 1e-9), (torch.float32, 1000, 2e-3)])
def test_ratio_of_distances_to_the_nearest_classes(dtype, offset, tolerance):
    train, labels = clusters(dtype=dtype)
    test, _ = clusters(100, seed=1, dtype=dtype)
    predicted = torch.arange(100) % 4
    ours = TrustScore().fit(train + offset, labels).score(test + offset, predicted)
    assert ours.dtype == dtype
    expected = reference(*(x.double().numpy() for x in (train, labels, test)), predicted.numpy())
    np.testing.assert_allclose(ours, expected, atol=tolerance)


def test_equal_distances_do_not_hide_the_other_class():
    train = torch.tensor([[-1.0], [1.0], [5.0]])
    trust = TrustScore().fit(train, torch.tensor([0, 1, 2]))
    assert trust.score(torch.tensor([[0.0]]), torch.tensor([0])).item() == 0.0


def test_a_row_on_a_training_row_is_finite():
    train, labels = clusters()
    score = TrustScore().fit(train, labels).score(train[:5], labels[:5])
    assert bool(score.isfinite().all())
    assert bool((score > 20).all())
    assert bool((TrustScore().fit(train, labels).score(train[:5], (labels[:5] + 1) % 4) < -20).all())


def test_density_filter_leaves_out_the_thin_rows_of_each_class():
    train, labels = clusters()
    trust = TrustScore(neighbours=7, alpha=0.2).fit(train, labels)
    kept = []
    for k in range(4):
        own = train[labels == k].numpy()
        radius = NearestNeighbors(n_neighbors=7).fit(own).kneighbors(own)[0][:, -1]
        kept.append(own[radius <= np.percentile(radius, 80)])
    np.testing.assert_array_equal(trust.reference, np.concatenate(kept))
    np.testing.assert_array_equal(trust.classes, np.repeat(np.arange(4), [len(own) for own in kept]))
    assert len(trust.reference) < 0.82 * 300


def test_classes_without_rows():
    train, labels = clusters()
    trust = TrustScore().fit(train[labels != 2], labels[labels != 2])
    assert trust.score(train[:2], torch.tensor([2, 9])).tolist() == [-np.inf, -np.inf]
    alone = TrustScore(alpha=0.5).fit(train[:1], torch.tensor([3]))
    assert alone.score(train[:1], torch.tensor([3])).item() == np.inf


def test_ranks_right_above_wrong_predictions():
    train, labels = clusters(1000)
    test, truth = clusters(400, seed=1)
    centres = torch.stack([train[labels == k].mean(0) for k in range(4)])
    logits = -torch.cdist(test, centres)
    predicted = logits.argmax(1)
    score = TrustScore(alpha=0.1).fit(train, labels).score(test, predicted)
    area = auroc(score, predicted == truth)
    assert area > 0.6
    assert correctness_auroc(logits, truth, confidence=score.double().sigmoid()) == pytest.approx(area)


def test_blocks_give_what_all_rows_give(monkeypatch):
    from calib_lightning.posthoc import trust_score

    train, labels = clusters()
    whole = TrustScore(alpha=0.1).fit(train, labels)
    monkeypatch.setattr(trust_score, "_BLOCK", 2000)
    blocks = TrustScore(alpha=0.1).fit(train, labels)
    assert torch.equal(blocks.reference, whole.reference)
    torch.testing.assert_close(blocks.score(train + 0.1, labels), whole.score(train + 0.1, labels))


def test_travels_as_spec_and_state():
    train, labels = clusters(dtype=torch.float32)
    trust = TrustScore(3, 0.1).fit(train, labels)
    again = build(trust.spec, TrustScore)
    again.load_state_dict(trust.state_dict())
    assert again.name == "TrustScore(neighbours=3, alpha=0.1)"
    assert torch.equal(again.score(train + 1, labels), trust.score(train + 1, labels))


def test_refuses():
    train, labels = clusters(20)
    trust = TrustScore().fit(train, labels)
    for arguments in ({"neighbours": 0}, {"alpha": 1.0}, {"alpha": -0.1}):
        with pytest.raises(ValueError, match="it must be"):
            TrustScore(**arguments)
    with pytest.raises(RuntimeError, match="not fitted"):
        TrustScore().score(train, labels)
    with pytest.raises(ValueError, match="no rows"):
        TrustScore().fit(train[:0], labels[:0])
    with pytest.raises(ValueError, match="fitted to 5 features, got 4"):
        trust.score(train[:, :4], labels)
    with pytest.raises(ValueError, match="row 3 of the features is not finite"):
        trust.score(train.index_fill(0, torch.tensor([3]), torch.inf), labels)
    with pytest.raises(ValueError, match="got -1 in row 2"):
        trust.score(train, labels.index_fill(0, torch.tensor([2]), -1))
    with pytest.raises(TypeError, match="integer"):
        trust.score(train, labels.double())
    with pytest.raises(TypeError, match="floating point"):
        trust.score(train.long(), labels)
    with pytest.raises(ValueError, match="predicted must have shape"):
        trust.score(train, labels[:3])
