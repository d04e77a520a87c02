"""Binary networks with one logit z, wherever a network or a file of scores comes in: z is read as (0, z)."""

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from scipy.optimize import minimize_scalar
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from calib_lightning import CalibratedClassifier, Temperature, load_classifier, save_classifier, score
from calib_lightning.callbacks import CalibrationMonitor, PostHocCalibrate
from calib_lightning.core import StageTraining
from calib_lightning.deploy import export_onnx
from calib_lightning.functional import binary_labels, two_columns
from calib_lightning.methods import AdaptiveSparsity, MaskedClassifier
from calib_lightning.metrics import EvaluationState
from calib_lightning.posthoc import NeuralClamping
from calib_lightning.posthoc.clamping_descent import ClampDescent
from calib_lightning.predictions import read_predictions

SHAPES = ["column", "flat", "squeezed"]
TARGETS = {
    "float": lambda y: y.float(),
    "float column": lambda y: y.float().unsqueeze(1),
    "bool": lambda y: y.bool(),
    "integer column": lambda y: y.unsqueeze(1),
}


class Binary(LightningModule):
    """Somebody's module: BCE on one logit."""

    def __init__(self, shape="column"):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.backbone, self.fc = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 1)
        self.shape, self.num_classes = shape, 2

    def forward(self, x):
        z = self.fc(self.backbone(x))
        return {"column": z, "flat": z.squeeze(1), "squeezed": z.squeeze()}[self.shape]  # a scalar for one image

    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self(batch[0]).flatten(), batch[1].float().flatten())

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3)


def rows(n=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (n,), generator=generator)
    return torch.randn(n, 6, generator=generator) + 0.7 * y.unsqueeze(1), y


def loader(n=96, seed=0, target="float"):
    x, y = rows(n, seed)
    return DataLoader(TensorDataset(x, TARGETS[target](y)), batch_size=16)


def trainer(*callbacks, epochs=1):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", max_epochs=epochs, callbacks=list(callbacks), enable_checkpointing=False, **quiet)


def logit(module, x):
    with torch.no_grad():
        return module.eval()(x).flatten()


def best_temperature(z, y):
    """By scipy, from the binary cross-entropy itself."""
    z, y = z.double().numpy(), y.double().numpy()
    found = minimize_scalar(lambda log_t: np.mean(np.logaddexp(0, z / np.exp(log_t)) - y * z / np.exp(log_t)))
    return float(np.exp(found.x))


def test_two_columns_have_the_probabilities_of_the_sigmoid():
    z = torch.randn(50, dtype=torch.float64)
    for given in (z, z.unsqueeze(1)):
        torch.testing.assert_close(two_columns(given).softmax(dim=1)[:, 1], torch.sigmoid(z), rtol=1e-14, atol=0)
    wide = torch.randn(5, 3)
    assert two_columns(wide) is wide


@pytest.mark.parametrize("kind", TARGETS)
def test_targets_of_the_binary_cross_entropy_are_labels(kind):
    y = torch.tensor([0, 1, 1, 0])
    assert torch.equal(binary_labels(TARGETS[kind](y)), y)


@pytest.mark.parametrize("labels", [torch.tensor([0.3, 1.0]), torch.tensor([2.0, 1.0]), torch.rand(4, 3)])
def test_other_targets_are_left_to_the_checks(labels):
    assert binary_labels(labels) is labels


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_monitor_measures_it(shape, target):
    module, monitor = Binary(shape), CalibrationMonitor(figures_every=0)
    fitted = trainer(monitor)
    fitted.fit(module, loader(), loader(65, seed=1, target=target))
    x, y = rows(65, seed=1)
    p = torch.sigmoid(logit(module, x).double())
    found = fitted.callback_metrics
    assert float(found["monitor/accuracy"]) == pytest.approx(float(((p > 0.5).long() == y).double().mean()), abs=1e-6)
    assert float(found["monitor/nll"]) == pytest.approx(float(F.binary_cross_entropy(p, y.double())), abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_post_hoc_calibration_after_training(shape):
    module, callback = Binary(shape), PostHocCalibrate(Temperature(), loader(81, seed=2))
    trainer(callback, epochs=2).fit(module, loader())
    x, y = rows(81, seed=2)
    assert callback.calibrator.temperature == pytest.approx(best_temperature(logit(module, x), y), rel=1e-5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_calibrated_classifier_of_it(shape, target, tmp_path):
    network = Binary(shape)
    x, y = rows(193, seed=5)
    made = CalibratedClassifier(network, Temperature(), classes=("healthy", "ill")).fit(loader(193, 5, target))
    z = logit(network, x)
    t = best_temperature(z, y)
    p = torch.sigmoid(z / t)
    answer = made.predict(x)
    assert torch.equal(answer.label, (z > 0).long())
    torch.testing.assert_close(answer.confidence, torch.maximum(p, 1 - p), rtol=1e-5, atol=1e-6)
    by_images, by_logits = made.set_threshold(loader(193, 5, target)), made.set_threshold(z.unsqueeze(1), y)
    assert by_images == by_logits
    save_classifier(made, tmp_path / "classifier.pt")
    again = load_classifier(tmp_path / "classifier.pt", network=Binary(shape))
    assert torch.equal(again(x), made(x))


@pytest.mark.parametrize("shape", SHAPES[:2])  # the scalar of one image is another graph
def test_it_is_exported(shape, tmp_path):
    made = CalibratedClassifier(Binary(shape), Temperature()).fit(loader(193, 5))
    x, _ = rows(9, seed=6)
    export_onnx(made, tmp_path / "classifier.onnx", x)
    session = onnxruntime.InferenceSession(tmp_path / "classifier.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"image": x.numpy()})
    np.testing.assert_allclose(found, made(x).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_neural_clamping_asks_it(shape):
    network = Binary(shape)
    x, y = rows(193, seed=5)
    clamping = NeuralClamping(descent=ClampDescent(epochs=1)).fit(labels=y, network=network, images=x)
    assert clamping.num_classes == 2
    z = logit(network, clamping.perturb(x))
    found = clamping.predict(network=network, images=x).logits
    t = torch.exp(clamping.log_temperature)
    torch.testing.assert_close(found[:, 1].exp(), torch.sigmoid(z / t).to(found.dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_masked_classifier_follows_its_confidence_and_accuracy(shape, held_out):
    from lightning.pytorch import LightningDataModule

    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader(64, 0, "float column")

        def calibration_dataloader(self):
            return loader(48, 4, "float")

    module, sparsity = Binary(shape), AdaptiveSparsity(held_out=held_out)
    training = StageTraining(optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    switch = MaskedClassifier(-1, sparsity=sparsity, training=training, encoder="backbone", head="fc")
    drawn = trainer(switch, epochs=1)
    drawn.fit(module, datamodule=Data())
    found = drawn.callback_metrics
    assert module.fc.linear.weight.shape == (1, 8)
    if held_out:  # otherwise with the masks of each step
        x, y = rows(48, seed=4)
        p = torch.sigmoid(logit(module, x).double())
        assert float(found["mac_cal/accuracy"]) == pytest.approx(float(((p > 0.5).long() == y).double().mean()))
        assert float(found["mac_cal/confidence"]) == pytest.approx(float(torch.maximum(p, 1 - p).mean()), abs=1e-6)
    assert 0.5 < float(found["mac_cal/confidence"]) < 0.99  # of one column, the softmax is 1
    assert 0.2 < float(found["mac_cal/accuracy"]) <= 1.0


@pytest.mark.parametrize("labels", ["float64", "bool", "int64"])
@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_files_of_logits(suffix, shape, labels, tmp_path):
    x, y = rows(80, seed=2)
    z, path = logit(Binary(), x), tmp_path / f"test{suffix}"
    content = {"logits": z.reshape(shape), "labels": y.to(getattr(torch, labels))}
    if suffix == ".npz":
        np.savez(path, **{name: value.numpy() for name, value in content.items()})
    else:
        torch.save(content, path)
    read = read_predictions(path)
    assert torch.equal(read.scores, torch.stack([torch.zeros_like(z), z], dim=1))
    assert torch.equal(read.labels, y)
    state = EvaluationState()
    state.update(read.scores, y)
    values = next(iter(score(path, metrics="core").sets.values())).values.values
    assert values["nll"] == pytest.approx(float(F.binary_cross_entropy_with_logits(z.double(), y.double())), rel=1e-6)
    assert values["ece"] == pytest.approx(float(state.compute()["ece"]), abs=1e-9)


@pytest.mark.parametrize("header", ["z,label\n", ""])
def test_csv_files_of_logits(header, tmp_path):
    path = tmp_path / "test.csv"
    path.write_text(header + "-1.5,0\n2.5,1\n0.25,0\n")
    read = read_predictions(path)
    assert read.scores.tolist() == [[0.0, -1.5], [0.0, 2.5], [0.0, 0.25]]
    assert read.labels.tolist() == [0, 1, 0]


def test_one_column_in_a_metric_is_told_from_wrong_labels():
    with pytest.raises(ValueError, match=r"has label 1; it must be in 0\.\.0\. There is one column.*two_columns\(z\)"):
        EvaluationState().update(torch.randn(4, 1), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match=r"There is one column.*two_columns\(z\)"):
        Temperature().fit(torch.randn(4, 1), torch.tensor([0, 1, 0, 1]))


def test_logits_of_one_image_without_its_dimension_are_no_binary_rows():
    class Squeezed(nn.Module):
        def forward(self, x):
            return x[:, :3].squeeze()

    x, y = rows(33)
    made = CalibratedClassifier(Squeezed(), Temperature()).fit([(x, y)])
    with pytest.raises(ValueError, match=r"shape \(3,\) for 1 images; it must be logits \(1, K\).*Do not squeeze"):
        made.predict(x[:1])
    with pytest.raises(ValueError, match=r"shape \(3,\) for 1 images"):
        CalibratedClassifier(Squeezed(), Temperature()).fit(DataLoader(TensorDataset(x, y), batch_size=16))
