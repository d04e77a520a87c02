import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from calib_lightning.posthoc import Calibrator, FixedTemperature, calibrator_of, calibrator_record, parse
from calib_lightning.posthoc.base import Optimum
from calib_lightning.posthoc.beta import Beta
from calib_lightning.posthoc.clamping_descent import ClampDescent
from calib_lightning.posthoc.isotonic import Isotonic
from calib_lightning.posthoc.neural_clamping import NeuralClamping
from calib_lightning.posthoc.platt import Platt
from calib_lightning.posthoc.sequential import Sequential
from calib_lightning.posthoc.wrappers import OneVsRest, TopLabel
from tests.metrics.golden import golden_set, random_set


class FeatureShift(Calibrator):
    """Adds the first K features; says something that can be looked for."""

    preserves_argmax = False
    needs = ("logits", "features")

    def __init__(self) -> None:
        super().__init__()
        self.seen = None

    def fit_rows(self, logits, labels, features):
        self.seen = (logits, features)
        return Optimum(converged=False, passes=7, gradient_norm=0.5, at_bound=True, notes=("a word",))

    def transform(self, logits, features):
        return torch.log_softmax(logits + features[:, : logits.shape[1]], dim=-1)


def test_fits_each_to_the_output_of_those_before():
    logits, labels = golden_set()
    both = Sequential(FixedTemperature(2.0), OneVsRest(Platt())).fit(logits, labels)
    first = FixedTemperature(2.0).fit(logits, labels)(logits)
    second = OneVsRest(Platt()).fit(first, labels)
    torch.testing.assert_close(both(logits), second(first))
    # Fitted to other rows, the second would be another.
    assert not torch.allclose(OneVsRest(Platt()).fit(logits, labels)(first), both(logits))


def test_temperatures_multiply():
    logits, labels = golden_set()
    both = Sequential(FixedTemperature(2.0), FixedTemperature(1.5)).fit(logits, labels)
    torch.testing.assert_close(both(logits), torch.log_softmax(logits / 3.0, dim=1))


def test_features_are_passed_on():
    logits, labels = golden_set()
    features = torch.arange(2500.0, dtype=torch.float64).reshape(500, 5) / 2500
    shift = FeatureShift()
    both = Sequential(FixedTemperature(2.0), shift)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both.fit(logits, labels, features)
    torch.testing.assert_close(shift.seen[0], torch.log_softmax(logits / 2, dim=1))
    torch.testing.assert_close(shift.seen[1], features)
    torch.testing.assert_close(both(logits, features), torch.log_softmax(logits / 2 + features, dim=1))
    with pytest.raises(ValueError, match=r"Sequential\.fit needs features=\(N, d\)"):
        Sequential(FeatureShift()).fit(logits, labels)


def test_reports_are_joined_and_told_once():
    logits, labels = golden_set()
    features = torch.zeros(500, 5, dtype=torch.float64)
    both = Sequential(FeatureShift(), FixedTemperature(2.0), FeatureShift())
    with pytest.warns(UserWarning, match="a word") as told:
        both.fit(logits, labels, features)
    report = both.report
    assert (report.converged, report.passes, report.at_bound, report.gradient_norm) == (False, 15, True, 0.5)
    assert report.notes == ("FeatureShift: a word", "FeatureShift: a word")
    assert all(str(warning.message).startswith("Sequential.fit: ") for warning in told)
    assert both.calibrators[1].report.nll_before == pytest.approx(both.calibrators[0].report.nll_after)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ((FixedTemperature(2.0),), (True, True, ("logits",), False)),
        ((FixedTemperature(2.0), TopLabel(Beta())), (True, False, ("logits",), False)),
        ((OneVsRest(Beta()), FixedTemperature(2.0)), (False, True, ("logits",), True)),
        ((FixedTemperature(2.0), FeatureShift()), (False, True, ("logits", "features"), False)),
        ((NeuralClamping(), FixedTemperature(2.0)), (False, True, ("network",), False)),
        ((NeuralClamping(), FeatureShift()), (False, True, ("network", "features"), False)),
        ((Sequential(NeuralClamping()), FeatureShift()), (False, True, ("network", "features"), False)),
    ],
)
def test_what_it_is_follows_from_the_members(members, expected):
    both = Sequential(*members)
    assert (both.preserves_argmax, both.full_distribution, both.needs, both.per_class) == expected


def test_the_last_member_gives_the_confidence():
    logits, labels = golden_set()
    both = Sequential(FixedTemperature(2.0), TopLabel(Isotonic())).fit(logits, labels)
    first = FixedTemperature(2.0).fit(logits, labels)(logits)
    alone = TopLabel(Isotonic()).fit(first, labels).predict(first)
    torch.testing.assert_close(both.predict(logits).confidence, alone.confidence)
    torch.testing.assert_close(both.predict(logits).logits, alone.logits)
    assert Sequential(FixedTemperature(2.0)).fit(logits, labels).predict(logits).confidence is None


def test_travels():
    logits, labels = random_set(150, 4)
    both = Sequential(FixedTemperature(2.0), OneVsRest(Platt()), TopLabel(Beta("am"))).fit(logits, labels)
    assert parse(both.name, Calibrator).spec == both.spec
    loaded = calibrator_of(calibrator_record(both))
    assert torch.equal(loaded(logits), both(logits))
    assert torch.equal(loaded.predict(logits).confidence, both.predict(logits).confidence)


# --- behind the network ----------------------------------------------------------------------------------------------


def image_set():
    """A network with batch normalisation and dropout, images and labels."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 4))
    images = torch.randn(80, 3, 2, 2, dtype=torch.float64)
    return network.double(), images, torch.arange(80) % 4


def clamping():
    return NeuralClamping(descent=ClampDescent(epochs=5, lr=0.1))


@pytest.mark.filterwarnings("ignore:Sequential.fit", "ignore:NeuralClamping.fit")
def test_a_clamped_network_and_what_follows_are_fitted_in_order():
    network, images, labels = image_set()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    both = Sequential(clamping(), OneVsRest(Platt())).fit(network=network.train(), images=images, labels=labels)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training, "it must be left as it was"
    network.eval()
    first = clamping().fit(network=network, images=images, labels=labels, progress=False)
    log_probs = first(network=network, images=images)
    second = OneVsRest(Platt()).fit(log_probs, labels)
    torch.testing.assert_close(both(network=network, images=images), second(log_probs))
    assert both.report.nll_before == pytest.approx(nn.functional.cross_entropy(network(images), labels).item())
    assert both.report.nll_after == pytest.approx(second.report.nll_after)
    assert both.members[1].report.nll_before == pytest.approx(first.report.nll_after)
    # The features of the rows pass by the network.
    features = torch.arange(320.0, dtype=torch.float64).view(80, 4) / 320
    shifted = Sequential(clamping(), FeatureShift()).fit(None, labels, features, network, images)
    torch.testing.assert_close(
        shifted(features=features, network=network, images=images), (log_probs + features).log_softmax(1)
    )


@pytest.mark.filterwarnings("ignore:Sequential.fit", "ignore:NeuralClamping.fit")
def test_batches_of_images_are_those_of_the_labels():
    network, images, labels = image_set()
    network.eval()
    loader = DataLoader(TensorDataset(images, labels), batch_size=30)
    batched = Sequential(clamping(), FixedTemperature(2.0)).fit(network=network, images=loader, labels=labels)
    first = clamping().fit(network=network, images=loader, progress=False)
    found = batched(network=network, images=loader)
    torch.testing.assert_close(found, (first(network=network, images=images) / 2).log_softmax(1))
    assert batched.report.rows == 80
    with pytest.raises(ValueError, match=r"rows 0\.\.29; it must be in their order.*does not shuffle"):
        Sequential(clamping()).fit(network=network, images=loader, labels=labels.flip(0))
    with pytest.raises(ValueError, match="labels has 80 rows; it must have 60"):
        clamping().fit(network=network, images=list(loader)[:2], labels=labels)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        Sequential()
    with pytest.raises(TypeError, match="OneVsRest or TopLabel"):
        Sequential(Beta())
    with pytest.raises(ValueError, match="put it first"):
        Sequential(TopLabel(Beta()), FixedTemperature(2.0))
    with pytest.raises(ValueError, match="put it first"):
        Sequential(Sequential(TopLabel(Beta())), Sequential(FixedTemperature(2.0)))
    with pytest.raises(ValueError, match=r"NeuralClamping changes the images .* put it first"):
        Sequential(FixedTemperature(2.0), NeuralClamping())
    with pytest.raises(ValueError, match=r"changes the images .* put it first"):
        Sequential(NeuralClamping(), Sequential(NeuralClamping()))
    twice = FixedTemperature(2.0)
    with pytest.raises(ValueError, match="same object"):
        Sequential(twice, twice)
