"""From a training to a shipped classifier, as a user writes it."""

import torch
from lightning.pytorch import Trainer
from torch.optim import Adam

from calib_lightning.data import DigitsDataModule
from calib_lightning.deploy import (
    CalibratedClassifier,
    Preprocessing,
    export_onnx,
    load_classifier,
    load_exported,
    save_classifier,
)
from calib_lightning.methods import CrossEntropy
from calib_lightning.metrics.functional import nll
from calib_lightning.posthoc.temperature import Temperature


def test_from_a_training_to_a_file(tmp_path):
    torch.manual_seed(0)
    data = DigitsDataModule()
    network = CrossEntropy(10, encoder="digits_cnn", optimizer=lambda params: Adam(params, lr=3e-3))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    Trainer(max_epochs=3, default_root_dir=tmp_path, enable_model_summary=False, **quiet).fit(network, data)

    classifier = CalibratedClassifier(network, Temperature(), preprocessing=Preprocessing.from_data(data))
    classifier.fit(data.calibration_dataloader())
    point = classifier.set_threshold(data.val_dataloader(), risk=0.01)
    save_classifier(classifier, tmp_path / "digits.pt")
    export_onnx(classifier, tmp_path / "digits.onnx")

    batches = list(data.evaluation_loader("test"))
    image, label = torch.cat([batch.image for batch in batches]), torch.cat([batch.label for batch in batches])
    with torch.no_grad():
        before, after = nll(network(image), label), nll(classifier(image), label)
    assert after < before
    assert 0.5 < point.coverage <= 1.0
    expected = classifier.predict(image)
    accepted = ~expected.abstain
    assert (expected.label != label)[accepted].double().mean() < (expected.label != label).double().mean() + 1e-9
    for found in (load_classifier(tmp_path / "digits.pt"), load_exported(tmp_path / "digits.onnx")):
        decision = found.predict(image)
        assert torch.equal(decision.label, expected.label)
        assert torch.equal(decision.abstain, expected.abstain)
        torch.testing.assert_close(decision.confidence, expected.confidence, rtol=0, atol=1e-5)
