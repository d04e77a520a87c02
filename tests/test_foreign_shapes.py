"""Batches and outputs in the shapes of other packages, wherever a module that is not ours is called."""

from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from calib_lightning import CalibratedClassifier, EvaluationState, Temperature
from calib_lightning.callbacks import CalibrationMonitor, PostHocCalibrate
from calib_lightning.core import CachedFeatures, StageSwitch, StageTraining
from calib_lightning.deploy import export_onnx
from calib_lightning.functional import binary_labels, logits_of
from calib_lightning.methods import AdaptiveSparsity, MaskedClassifier
from calib_lightning.methods.parts.mac_cal_figures import confidence_sums
from calib_lightning.posthoc import NeuralClamping
from calib_lightning.posthoc.clamping_descent import ClampDescent

BATCHES = {  # a sample as the data set returns it, what batch=... says of it, and where the module reads it
    "torchgeo": (lambda x, y: {"image": x, "label": y, "bbox": 0}, None, lambda b: (b["image"], b["label"])),
    "transformers": (
        lambda x, y: {"pixel_values": x, "labels": y},
        ("pixel_values", "labels"),
        lambda b: (b["pixel_values"], b["labels"]),
    ),
    "label first": (lambda x, y: (y, "a path", x), (2, 0), lambda b: (b[2], b[0])),
    "nested": (
        lambda x, y: {"data": {"x": x}, "target": [y]},
        lambda b: (b["data"]["x"], b["target"][0]),
        lambda b: (b["data"]["x"], b["target"][0]),
    ),
}


class ModelOutput(OrderedDict):
    """As in transformers: a dict with attributes."""

    def __getattr__(self, name):
        return self[name]


OUTPUTS = {
    "tensor": lambda z: z,
    "dict": lambda z: {"logits": z},
    "ModelOutput": lambda z: ModelOutput(loss=None, logits=z),
    "object": lambda z: SimpleNamespace(logits=z, features=None),
}


def rows(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (n,), generator=generator)
    return torch.randn(n, 6, generator=generator) + 0.7 * y.unsqueeze(1), y


def loader(shape, n, seed):
    x, y = rows(n, seed)
    return DataLoader([BATCHES[shape][0](*row) for row in zip(x, y.tolist(), strict=True)], batch_size=16)


class Foreign(LightningModule):
    def __init__(self, shape="torchgeo", output="tensor", outputs=2):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.backbone, self.fc = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, outputs)
        self.shape, self.output = shape, output

    def forward(self, x):
        return OUTPUTS[self.output](self.fc(self.backbone(x)))

    def training_step(self, batch, batch_idx):
        x, y = BATCHES[self.shape][2](batch)
        z = self.fc(self.backbone(x))
        if z.shape[1] == 1:
            return F.binary_cross_entropy_with_logits(z.flatten(), y.float())
        return F.cross_entropy(z, y)

    def validation_step(self, batch, batch_idx):
        self(BATCHES[self.shape][2](batch)[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3)


class Data(LightningDataModule):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def train_dataloader(self):
        return loader(self.shape, 64, 0)

    def val_dataloader(self):
        return loader(self.shape, 65, 1)

    def calibration_dataloader(self):
        return loader(self.shape, 81, 2)


def fitted(module, *callbacks):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = Trainer(accelerator="cpu", max_epochs=2, callbacks=list(callbacks), enable_checkpointing=False, **quiet)
    run.fit(module, datamodule=Data(module.shape))
    return {key: float(value) for key, value in run.callback_metrics.items()}


def logits(module, x):
    with torch.no_grad():
        return logits_of(module.eval()(x))


def expected(module):
    """What is measured and fitted, in a loop of one's own."""
    state, (x, y) = EvaluationState(), rows(65, 1)
    state.update(logits(module, x), y)
    x, y = rows(81, 2)
    return state.compute(), Temperature().fit(logits(module, x), y).temperature


@pytest.mark.parametrize("outputs", [2, 1])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("shape", BATCHES)
def test_callbacks(shape, output, outputs):
    module, where = Foreign(shape, output, outputs), BATCHES[shape][1]
    calibrate = PostHocCalibrate(Temperature(), batch=where)
    found = fitted(module, CalibrationMonitor(figures_every=0, batch=where), calibrate)
    metrics, temperature = expected(module)
    for name in ("accuracy", "nll", "ece"):
        assert found[f"monitor/{name}"] == pytest.approx(float(metrics[name]), rel=1e-6), name
    assert calibrate.calibrator.temperature == pytest.approx(temperature, rel=1e-6)


@pytest.mark.parametrize("outputs", [2, 1])
@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.parametrize("shape", BATCHES)
def test_a_masked_classifier(shape, held_out, outputs):
    module = Foreign(shape, "ModelOutput", outputs)
    training = StageTraining(optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    options = {"training": training, "encoder": "backbone", "head": "fc", "batch": BATCHES[shape][1]}
    found = fitted(module, MaskedClassifier(-1, sparsity=AdaptiveSparsity(held_out=held_out), **options))
    assert module.fc.linear.weight.shape == (outputs, 8)
    if held_out:  # else with the masks of each step
        x, y = rows(81, 2)
        p, predicted = logits(module, x).double().softmax(dim=1).max(dim=1)
        assert found["mac_cal/accuracy"] == pytest.approx(float((predicted == y).double().mean()))
        assert found["mac_cal/confidence"] == pytest.approx(float(p.mean()), abs=1e-6)
    assert 0.5 < found["mac_cal/confidence"] < 0.99


@pytest.mark.parametrize("outputs", [2, 1])
def test_a_stage_with_a_head_of_as_many_logits(outputs):
    module = Foreign("transformers", "ModelOutput", outputs)
    before = module.backbone[0].weight.detach().clone()
    fitted(module, switch := StageSwitch(-1, encoder="backbone", head="fc"))
    assert switch.active
    assert module.fc.linear.weight.shape == (outputs, 8)
    assert not torch.equal(module.backbone[0].weight, before)  # in the first stage
    assert [name for name, part in module.named_parameters() if part.requires_grad] == [
        "fc.linear.weight",
        "fc.linear.bias",
    ]


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("shape", BATCHES)
def test_a_calibrated_classifier(shape, output):
    network, where = Foreign(shape, output), BATCHES[shape][1]
    made = CalibratedClassifier(network, Temperature()).fit(loader(shape, 81, 2), batch=where)
    x, y = rows(81, 2)
    assert made.calibrator.temperature == pytest.approx(Temperature().fit(logits(network, x), y).temperature, rel=1e-6)
    point = made.set_threshold(loader(shape, 81, 2), batch=where, risk=1.0)
    assert point == made.set_threshold(logits(network, x), y, risk=1.0)


@pytest.mark.parametrize("output", ["ModelOutput", "object"])
def test_it_is_exported(output, tmp_path):
    x, y = rows(81, 2)
    made = CalibratedClassifier(Foreign("torchgeo", output), Temperature()).fit([(x, y)])
    export_onnx(made, tmp_path / "classifier.onnx", x)
    session = onnxruntime.InferenceSession(tmp_path / "classifier.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"image": x.numpy()})
    np.testing.assert_allclose(found, made(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_neural_clamping():
    x, y = rows(81, 2)
    temperatures = []
    for output in ("tensor", "ModelOutput"):
        clamping = NeuralClamping(descent=ClampDescent(epochs=1))
        clamping.fit(labels=y, network=Foreign("torchgeo", output), images=x)
        temperatures.append(float(clamping.log_temperature))
        assert clamping.predict(network=Foreign("torchgeo", output), images=x).logits.shape == (81, 2)
    assert temperatures[0] == temperatures[1]


@pytest.mark.parametrize("labels", [lambda y: y.unsqueeze(1), lambda y: y.numpy(), lambda y: y.tolist()])
def test_labels_in_other_forms(labels):
    x, y = rows(81, 2)
    wanted = CalibratedClassifier(Foreign(), Temperature()).fit([(x, y)]).calibrator.temperature
    found = CalibratedClassifier(Foreign(), Temperature()).fit([{"image": x, "label": labels(y)}])
    assert found.calibrator.temperature == wanted


def test_what_an_output_must_be():
    z = torch.randn(3, 4)
    for output in OUTPUTS.values():
        assert logits_of(output(z)) is z
    for output in ((z,), {"scores": z}, {"logits": z.long()}, z.unsqueeze(0), None):
        with pytest.raises(TypeError, match=r"The network returned \w+.*must return logits \(N, K\)"):
            logits_of(output)
    assert torch.equal(binary_labels(torch.tensor([[1.0], [0.0]])), torch.tensor([1, 0]))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (None, r"needs batches \(image, label.*keys 'pixel_values', 'labels'\. Give batch=\("),
        (("pixels", "labels"), r"needs 'pixels' and 'labels' in a batch.*the keys 'pixel_values', 'labels'"),
        ((0, 1), r"needs 0 and 1 in a batch"),
        (lambda batch: batch["labels"], r"batch of CalibratedClassifier gives a Tensor; it must give two parts"),
        (lambda batch: (batch["pixel_values"], "ill"), r"needs labels that are a tensor"),
        ("labels", r"batch of CalibratedClassifier gives a str"),
    ],
)
def test_batches_whose_parts_are_not_found(where, message):
    with pytest.raises(TypeError, match=message):
        CalibratedClassifier(Foreign(), Temperature()).fit(loader("transformers", 16, 0), batch=where)


@pytest.mark.parametrize("parts", [3, ("a",), "xy"])
def test_parts_that_no_batch_has_are_refused_before_a_run(parts):
    for make in (
        lambda: CalibrationMonitor(batch=parts),
        lambda: PostHocCalibrate(Temperature(), [], batch=parts),
        lambda: StageSwitch(1, batch=parts),
    ):
        with pytest.raises(TypeError, match="it must give two parts, the input and the labels"):
            make()


def test_a_metric_says_how_to_pass_an_output():
    z, y = torch.randn(3, 2), torch.tensor([0, 1, 1])
    for logits, labels, message in (
        ({"logits": z}, y, r"logits is dict; it must be a tensor\. .*functional\.logits_of\(output\)"),
        (z, y.float().unsqueeze(1), r"functional\.binary_labels\(labels\)"),
        (z, y.unsqueeze(1), r"labels has shape \(3, 1\).*Pass labels\.squeeze\(1\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            EvaluationState().update(logits, labels)


def test_under_ddp_what_a_step_returns_for_a_dict_is_not_taken_for_logits():
    monitor, module, (x, y) = CalibrationMonitor(), Foreign(), rows(8)
    batch = {"image": x, "label": y}
    # as DDP runs a step: as a call of the module with the batch and its number
    module.forward = lambda batch, batch_idx=0: module.fc(module.backbone(batch["image"])).softmax(dim=1)
    monitor.on_validation_batch_start(None, module, batch, 0)
    module(batch, 0)
    assert monitor._outputs == []
    module(batch)  # a step that calls the module with its whole batch
    assert len(monitor._outputs) == 1
    monitor.on_exception(None, module, RuntimeError())


class Timm(Foreign):
    """A network of timm, in which the head lies."""

    def __init__(self, shape="transformers"):
        super().__init__(shape)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = timm.create_model("test_resnet", num_classes=2, in_chans=1)
        del self.backbone, self.fc

    def forward(self, x):
        return {"logits": self.net(x.repeat_interleave(6, dim=1).view(-1, 1, 6, 6).repeat(1, 1, 6, 6))}

    def training_step(self, batch, batch_idx):
        x, y = BATCHES[self.shape][2](batch)
        return F.cross_entropy(self(x)["logits"], y)


def test_a_network_of_timm():
    module, where = Timm(), BATCHES["transformers"][1]
    switch = MaskedClassifier(-1, encoder="net", head="net.fc", batch=where)
    calibrate = PostHocCalibrate(Temperature(), batch=where)
    found = fitted(module, CalibrationMonitor(figures_every=0, batch=where), switch, calibrate)
    metrics, temperature = expected(module)
    assert found["monitor/nll"] == pytest.approx(float(metrics["nll"]), rel=1e-5)
    assert calibrate.calibrator.temperature == pytest.approx(temperature, rel=1e-4)
    assert type(module.net.fc).__name__ == "MaskedLinearHead"


def test_labels_of_a_masked_classifier_may_be_a_column():
    z, y = torch.eye(3), torch.tensor([0, 1, 0])
    assert torch.equal(confidence_sums(z, y.unsqueeze(1)), confidence_sums(z, y))


def test_stored_features_start_with_the_images():
    training = StageTraining(views=CachedFeatures())
    switch = StageSwitch(-1, training=training, encoder="backbone", head="fc", batch=(1, 0))
    with pytest.raises(ValueError, match=r"batch of StageSwitch is \(1, 0\); it must be None with CachedFeatures"):
        fitted(Foreign(), switch)
