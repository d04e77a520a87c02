"""Density ratios against scipy's kernel estimates and scikit-learn's neighbours."""

import numpy as np
import pytest
import torch
from scipy.spatial import KDTree
from scipy.stats import norm

from calib_lightning.metrics.functional import ece
from calib_lightning.posthoc.density_ratio import DensityRatio
from calib_lightning.posthoc.density_ratio import proximity as real
from calib_lightning.posthoc.sequential import Sequential
from calib_lightning.posthoc.temperature import FixedTemperature, Temperature
from tests.metrics.golden import golden_set


def the_set(n=500, dim=6):
    logits, labels = golden_set()
    generator = torch.Generator().manual_seed(0)
    hard = (logits.argmax(1) != labels).double().unsqueeze(1)
    # Wrong rows lie farther apart, so that proximity tells something.
    features = torch.randn(500, dim, generator=generator, dtype=torch.float64) * (0.4 + hard)
    features[:, 0] += 1.5
    return logits[:n], labels[:n], features[:n]


def near(features, reference, neighbours, power, skip_own):
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    distance, _ = KDTree(unit(reference)).query(unit(features), neighbours + skip_own)
    return np.exp(-(distance[:, int(skip_own) :] ** power)).mean(1)


def density(points, centres):
    width = 1.06 * centres.std(0) * len(centres) ** (-1 / 6)
    return np.array([(norm.pdf(point, centres, width)).prod(1).mean() for point in points])


def confidence_of(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return (e / e.sum(1, keepdims=True)).max(1)


@pytest.mark.parametrize(("neighbours", "power"), [(10, 2.0), (3, 1.0)])
def test_confidence_is_the_ratio_of_the_densities(neighbours, power):
    logits, labels, features = the_set()
    fit, new = slice(0, 350), slice(350, None)
    calibrator = DensityRatio(neighbours, power).fit(logits[fit], labels[fit], features[fit])
    ours = calibrator.predict(logits[new], features[new]).confidence.numpy()
    z, x = logits.numpy(), features.numpy()
    own = np.stack([confidence_of(z[fit]), near(x[fit], x[fit], neighbours, power, True)], 1)
    points = np.stack([confidence_of(z[new]), near(x[new], x[fit], neighbours, power, False)], 1)
    right = z[fit].argmax(1) == labels[fit].numpy()
    f1, f0 = density(points, own[right]), density(points, own[~right])
    expected = f1 / np.maximum(f1 + f0 * (~right).sum() / right.sum(), 1e-10)
    plain = np.minimum(f1, f0) > 1e-4  # elsewhere the floor is felt
    assert plain.mean() > 0.9
    np.testing.assert_allclose(ours[plain], expected[plain], rtol=1e-5)


def test_distribution_has_that_confidence_and_the_same_prediction():
    logits, labels, features = the_set()
    calibrator = DensityRatio().fit(logits, labels, features)
    log_probs, confidence = calibrator.predict(logits, features)
    assert torch.equal(log_probs.argmax(1), logits.argmax(1))
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(500, dtype=torch.float64))
    above = confidence > 0.201
    torch.testing.assert_close(log_probs.exp().amax(1)[above], confidence[above])
    assert calibrator.report.ece_after < calibrator.report.ece_before
    assert calibrator.report.accuracy_change == 0.0
    assert calibrator.needs == ("logits", "features")
    assert not calibrator.full_distribution


def test_proximity_separates_rows_of_equal_confidence():
    logits, labels, features = the_set()
    calibrator = DensityRatio().fit(logits, labels, features)
    crowded = torch.zeros(1, 6, dtype=torch.float64)
    crowded[0, 0] = 1.5
    lonely = -crowded + 0.3
    pair = calibrator.predict(logits[:1].repeat(2, 1), torch.cat([crowded, lonely])).confidence
    assert pair[0] > pair[1]


def test_far_from_all_rows_the_confidence_stays():
    logits, labels, features = the_set()
    sharp = logits + 60 * torch.nn.functional.one_hot(logits.argmax(1), 5)  # every confidence near one
    calibrator = DensityRatio().fit(sharp, labels, features)
    vague = logits[:5] * 0.01
    found = calibrator.predict(vague, features[:5]).confidence
    torch.testing.assert_close(found, vague.softmax(1).amax(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("wrong", [0, 4])
def test_few_errors_change_nothing_and_are_told(wrong):
    logits, _, features = the_set(100)
    labels = logits.argmax(1)
    labels[:wrong] = (labels[:wrong] + 1) % 5
    with pytest.warns(UserWarning, match="too few for densities"):
        calibrator = DensityRatio().fit(logits, labels, features)
    torch.testing.assert_close(calibrator(logits, features), logits.log_softmax(1))
    again = DensityRatio()
    again.load_state_dict(calibrator.state_dict())
    torch.testing.assert_close(again(logits, features), logits.log_softmax(1))


def test_constant_rows_are_finite():
    labels = torch.arange(40) % 2
    calibrator = DensityRatio().fit(torch.zeros(40, 2), labels, torch.ones(40, 3))
    found = calibrator.predict(torch.zeros(3, 2), torch.ones(3, 3)).confidence
    torch.testing.assert_close(found, torch.full((3,), 0.5, dtype=torch.float64))


def test_fewer_rows_than_neighbours():
    logits, labels, features = the_set()
    wrong = (logits.argmax(1) != labels).nonzero().squeeze(1)[:6]
    right = (logits.argmax(1) == labels).nonzero().squeeze(1)[:6]
    rows = torch.cat([right, wrong])
    calibrator = DensityRatio(50).fit(logits[rows], labels[rows], features[rows])
    assert bool(calibrator(logits, features).isfinite().all())


def test_blocks_give_what_all_rows_give(monkeypatch):
    from calib_lightning.posthoc import density_ratio

    logits, labels, features = the_set()
    whole = DensityRatio().fit(logits, labels, features)
    monkeypatch.setattr(density_ratio, "_BLOCK", 500 * 37)
    blocks = DensityRatio().fit(logits, labels, features)
    torch.testing.assert_close(blocks(logits, features), whole(logits, features), rtol=1e-12, atol=1e-12)


def test_half_precision_features_are_widened():
    logits, labels, features = the_set()
    calibrator = DensityRatio().fit(logits, labels, features)
    half = features.bfloat16()
    found, wide = calibrator.predict(logits, half), calibrator.predict(logits, half.float())
    assert torch.equal(found.confidence, wide.confidence)
    assert torch.equal(calibrator(logits, half), calibrator(logits, half.float()))


@pytest.mark.parametrize("first", [[], [FixedTemperature(0.5)]])
def test_in_the_report_no_row_is_a_neighbour_of_itself(first):
    # In many dimensions a row's distance to itself stands out, so that its proximity would be like that of no other.
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(800, 5, generator=generator, dtype=torch.float64) * 3
    labels = torch.multinomial((0.4 * logits).softmax(1), 1, generator=generator).squeeze(1)
    features = torch.randn(800, 64, generator=generator, dtype=torch.float64)
    report = Sequential(*first, DensityRatio(1)).fit(logits, labels, features).report
    sharp = logits / (0.5 if first else 1.0)
    correct = (sharp.argmax(1) == labels).numpy()
    own = np.stack([confidence_of(sharp.numpy()), near(features.numpy(), features.numpy(), 1, 2.0, True)], 1)
    f1, f0 = density(own, own[correct]), density(own, own[~correct])
    confidence = torch.from_numpy(f1 / (f1 + f0 * (~correct).sum() / correct.sum()))
    assert report.ece_after == pytest.approx(float(ece(logits, labels, confidence=confidence)), abs=1e-6)
    assert report.ece_after < 0.2 * report.ece_before


def test_distances_are_worked_out_once(monkeypatch):
    from calib_lightning.posthoc import density_ratio

    logits, labels, features = the_set()
    both = Sequential(Temperature(), DensityRatio()).fit(logits, labels, features)
    rows = []
    monkeypatch.setattr(density_ratio, "proximity", lambda x, *args, **kw: rows.append(len(x)) or real(x, *args, **kw))
    both.predict(logits, features)
    assert rows == [500]
    rows.clear()
    DensityRatio().fit(logits, labels, features)
    assert sum(rows) == 1000  # the fit, and its report


def test_exports_with_any_number_of_rows():
    logits, labels, features = the_set()
    calibrator = DensityRatio().fit(logits, labels, features)
    rows = torch.export.Dim("rows")
    program = torch.export.export(calibrator, (logits[:9], features[:9]), dynamic_shapes=({0: rows}, {0: rows}))
    torch.testing.assert_close(program.module()(logits, features), calibrator(logits, features))


def test_refuses():
    logits, labels, features = the_set()
    for neighbours in (0, 2.5):
        with pytest.raises(ValueError, match=r"neighbours is .* must be an integer >= 1"):
            DensityRatio(neighbours)
    with pytest.raises(ValueError, match=r"fitted to 6 features.*\(500, 2\)"):
        DensityRatio().fit(logits, labels, features)(logits, features[:, :2])
    with pytest.raises(ValueError, match=r"distance_power is 0\.0; it must be finite and > 0"):
        DensityRatio(distance_power=0.0)
    with pytest.raises(ValueError, match=r"DensityRatio\.fit needs features="):
        DensityRatio().fit(logits, labels)
