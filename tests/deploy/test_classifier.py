"""The classifier against its parts done by hand."""

import weakref

import pytest
import torch
from torch import nn

from calib_lightning.deploy import CalibratedClassifier
from calib_lightning.methods import CrossEntropy
from calib_lightning.posthoc import Calibrator, FixedTemperature, Optimum, parse
from calib_lightning.posthoc.clamping_descent import ClampDescent
from calib_lightning.posthoc.isotonic import Isotonic
from calib_lightning.posthoc.neural_clamping import NeuralClamping
from calib_lightning.posthoc.sequential import Sequential
from calib_lightning.posthoc.temperature import Temperature
from calib_lightning.posthoc.wrappers import TopLabel

from .networks import CLASSES, PREPROCESSING, SmallNet, batches, classifier, images, labelled


class ByFeatures(Calibrator):
    """Divides the logits by a temperature that grows with the mean feature."""

    preserves_argmax = True
    needs = ("logits", "features")

    def fit_rows(self, logits, labels, features):
        assert len(features) == len(logits)
        return Optimum()

    def transform(self, logits, features):
        return torch.log_softmax(logits / (1.5 + features.mean(dim=1, keepdim=True)), dim=-1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def logits_of(image, network=None):
    with torch.no_grad():
        return (network or SmallNet()).eval()(image)


def test_it_is_calibrator_after_network():
    image, label = labelled()
    by_hand = Temperature().fit(logits_of(image), label)
    made = classifier()
    assert made.calibrator.temperature == by_hand.temperature
    assert torch.equal(made(images(9)), by_hand(logits_of(images(9))))
    assert made.calibrator.temperature != pytest.approx(1.0, abs=0.05)


def test_predict_gives_label_confidence_and_abstention():
    made = classifier()
    image, label = labelled(seed=5)
    assert not made.predict(image).abstain.any()
    point = made.set_threshold([(image, label)], risk=0.2)
    found = made.predict(image)
    probs = torch.softmax(logits_of(image) / made.calibrator.temperature, dim=1)
    assert torch.equal(found.label, probs.argmax(dim=1))
    torch.testing.assert_close(found.confidence, probs.amax(dim=1))
    kept = ~found.abstain
    assert kept.double().mean().item() == point.coverage
    assert 0.2 < point.coverage < 1.0
    assert (found.label != label)[kept].double().mean().item() == pytest.approx(point.risk)
    assert point.risk <= 0.2
    assert made.predict(image, threshold=0.0).abstain.sum() == 0
    assert not found.confidence.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_predict_casts_images_to_the_dtype_of_the_network(dtype):
    made = classifier()
    expected = made.predict(images(9))
    made.network.to(dtype)
    torch.testing.assert_close(made.predict(images(9)).confidence.float(), expected.confidence, atol=0.1, rtol=0)


def test_the_threshold_from_logits_is_that_from_images():
    image, label = labelled(seed=5)
    first, second = classifier(), classifier()
    assert first.set_threshold([(image, label)], risk=0.2) == second.set_threshold(logits_of(image), label, risk=0.2)


def test_a_calibrator_with_its_own_confidence_is_asked_for_it():
    made = classifier(TopLabel(Isotonic()))
    image = images(50, seed=7)
    prediction = made.calibrator.predict(logits_of(image))
    assert prediction.confidence is not None
    found = made.predict(image)
    assert torch.equal(found.confidence, prediction.confidence)
    assert not torch.allclose(found.confidence.float(), prediction.logits.exp().amax(dim=1), atol=1e-3)


def test_it_stays_in_evaluation_mode():
    made = classifier()
    image = images(9)
    expected = made(image)
    assert torch.equal(made.train()(image), expected)
    made.network.train()
    assert torch.equal(made.predict(image).confidence, expected.exp().amax(dim=1))


def test_training_mode_does_not_reach_the_fit():
    network = SmallNet().train()
    made = CalibratedClassifier(network, Temperature())
    network.train()
    assert made.fit(batches()).calibrator.temperature == classifier().calibrator.temperature


def test_a_fit_to_logits_keeps_no_images():
    alive = []

    def loader():
        for _ in range(4):
            image, label = labelled(20)
            yield image, label
            alive.append(weakref.ref(image))
            del image
            assert sum(reference() is not None for reference in alive) <= 1

    classifier().fit(loader())
    assert len(alive) == 4


@pytest.mark.filterwarnings("ignore:NeuralClamping")
def test_clamping_comes_first_with_its_temperature():
    image, label = labelled()
    clamping = NeuralClamping(descent=ClampDescent(epochs=3, lr=0.1))
    made = classifier(Sequential(clamping, FixedTemperature(2.0)))
    assert clamping.delta.abs().max() > 1e-3
    expected = logits_of(image + clamping.delta) / clamping.temperature / 2.0
    torch.testing.assert_close(made(image), expected.log_softmax(dim=1))
    assert made.metadata["temperature"] == pytest.approx(2.0 * clamping.temperature)
    with pytest.raises(ValueError, match=r"changes the images.*Pass batches"):  # logits without it are others
        made.set_threshold(logits_of(image), label)
    assert made.set_threshold([(image, label)], risk=0.3).rows == len(label)


def test_features_are_those_of_the_submodule():
    made = classifier(ByFeatures(), features="pool")
    image, network = images(9), SmallNet().eval()
    with torch.no_grad():
        features = network.pool(image)
        expected = torch.log_softmax(network.fc(features) / (1.5 + features.mean(dim=1, keepdim=True)), dim=1)
        torch.testing.assert_close(made(image), expected)
    assert not made.network.pool._forward_hooks


def test_modules_of_the_package_are_networks():
    network = CrossEntropy(len(CLASSES), encoder="digits_cnn")
    made = CalibratedClassifier(network, Temperature()).fit(batches())
    image = images(9)
    torch.testing.assert_close(made(image), (logits_of(image, network) / made.calibrator.temperature).log_softmax(1))


def test_metadata_are_plain_facts():
    made = classifier(preprocessing=PREPROCESSING, classes=CLASSES)
    point = made.set_threshold(batches(seed=5), risk=0.2)
    found = made.metadata
    assert found["temperature"] == made.calibrator.temperature
    assert (found["calibrator"], found["num_classes"], found["classes"]) == ("Temperature", 5, list(CLASSES))
    assert found["operating_point"] == point._asdict()
    assert found["preprocessing"]["size"] == [8, 8]
    assert parse(found["calibrator"], Calibrator).spec == found["calibrator_spec"]
    assert classifier(TopLabel(Isotonic())).metadata["temperature"] is None


def test_a_new_fit_drops_the_threshold():
    made = classifier()
    made.set_threshold(batches(seed=5))
    assert made.fit(batches()).operating_point is None


class Pair(nn.Module):
    def forward(self, image):
        return image.flatten(1), image


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CalibratedClassifier(lambda x: x, Temperature()), TypeError, "network is .*torch.nn.Module"),
        (lambda: CalibratedClassifier(SmallNet(), "Temperature"), TypeError, "calibrator is 'Temperature'"),
        (lambda: CalibratedClassifier(SmallNet(), ByFeatures()), ValueError, "ByFeatures needs features"),
        (
            lambda: CalibratedClassifier(SmallNet(), ByFeatures(), features="body"),
            ValueError,
            "features is 'body'; it must be a submodule of SmallNet, which has pool, fc",
        ),
        (lambda: classifier(classes=["a", "b"]), ValueError, "classes has 2 names; it must have 5"),
        (lambda: CalibratedClassifier(SmallNet(), Temperature())(images(2)), RuntimeError, "not fitted"),
        (lambda: CalibratedClassifier(Pair(), Temperature()).fit(batches()), TypeError, "network returned tuple"),
        (lambda: CalibratedClassifier(SmallNet(), Temperature()).fit([]), ValueError, "no batches"),
        (
            lambda: CalibratedClassifier(SmallNet(), Temperature()).fit([images(2)]),
            TypeError,
            "the batch is a Tensor",
        ),
        (
            lambda: CalibratedClassifier(SmallNet(), Temperature()).fit([{"image": 1}]),
            TypeError,
            "batch is a dict with the keys 'image'",
        ),
        (lambda: classifier().set_threshold(torch.zeros(2, 5)), TypeError, "without labels"),
        (lambda: classifier().set_threshold(batches(), risk=2), ValueError, "risk is 2"),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
