"""The module under every method: what it accepts, refuses, logs and saves."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

from calib_lightning.callbacks import SavePredictions
from calib_lightning.core import ClassificationModule, DivergedError, Head, LinearHead, load_module
from calib_lightning.data import SplitSpec, ToyDataModule
from calib_lightning.methods import CRL, MDCA, AdaFocal, CrossEntropy, CrossEntropyLoss, Focal, LabelSmoothingLoss
from calib_lightning.metrics import EvaluationState, waiting
from calib_lightning.posthoc import FixedTemperature
from calib_lightning.types import Prediction
from tests.ddp.cases import sgd, trainer


class Remembering(ClassificationModule):
    """Keeps what it was trained on, to compute the figures of the epoch in another way."""

    def loss(self, batch):
        loss, logits = super().loss(batch)
        self.seen.append((logits.detach(), batch.label))
        return loss, logits


class Sure(ClassificationModule):
    """A method with a confidence of its own."""

    def outputs(self, image):
        return Prediction(self(image), torch.full((len(image),), 0.75))


class CosineHead(Head):
    def __init__(self, in_features: int, num_classes: int, scale: float = 10.0) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(in_features, num_classes, bias=False)
        self.scale = scale

    def forward(self, features):
        weight = torch.nn.functional.normalize(self.linear.weight)
        return self.scale * torch.nn.functional.linear(torch.nn.functional.normalize(features), weight)


def _tuples(images=8, parts=3, label=0):
    columns = [torch.zeros(images, 1, 8, 8), torch.full((images,), label), torch.arange(images)][:parts]
    return DataLoader(TensorDataset(*columns), batch_size=4)


def test_training_figures_of_an_epoch_cover_every_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(waiting, "AT_ONCE", 3 * 2 * 40)
    module = Remembering(3, encoder="digits_cnn", optimizer=sgd)
    module.seen = []
    data = ToyDataModule(batch_size=2)  # 150 batches: more than wait at once, and not a multiple
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, datamodule=data)
    state = EvaluationState(["accuracy", "nll", "brier", "ece", "signed_gap"])
    for logits, labels in module.seen:
        state.update(logits, labels)
    expected = {f"train/{name}": float(value) for name, value in state.compute().items()}
    logged = {key: float(value) for key, value in run.callback_metrics.items() if key in expected}
    assert int(state.count) == 300
    assert logged == pytest.approx(expected, rel=1e-6)


def test_plain_tuples_are_batches(tmp_path):
    module = ClassificationModule(3, encoder="digits_cnn", optimizer=sgd)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, train_dataloaders=_tuples(), val_dataloaders=_tuples())
    run.test(module, dataloaders=_tuples(), verbose=False)
    assert int(run.callback_metrics["test/n"]) == 8


def test_a_batch_without_labels_is_explained(tmp_path):
    module = ClassificationModule(3, encoder="digits_cnn", optimizer=sgd)
    with pytest.raises(TypeError, match=r"image, label, index.*list of 1 parts \(Tensor\): label is missing"):
        trainer(tmp_path, max_epochs=1).fit(module, train_dataloaders=_tuples(parts=1))


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_outside_the_classes_is_named(tmp_path, label):
    module = ClassificationModule(3, encoder="digits_cnn", optimizer=sgd)
    with pytest.raises(ValueError, match=rf"{label}.*0\.\.2"):
        trainer(tmp_path).test(module, dataloaders=_tuples(label=label), verbose=False)
    with pytest.raises(ValueError, match=rf"{label}.*0\.\.2"):
        trainer(tmp_path, max_epochs=1).fit(module, train_dataloaders=_tuples(label=label))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(tmp_path, value):
    module = ClassificationModule(3, encoder="digits_cnn")
    with torch.no_grad():
        module.head.linear.bias[1] = value
    with pytest.raises(ValueError, match="finite"):
        trainer(tmp_path).test(module, dataloaders=_tuples(), verbose=False)


def test_training_that_breaks_down_is_told_at_its_step(tmp_path):
    class Breaking(ClassificationModule):
        def loss(self, batch):
            loss, logits = super().loss(batch)
            return loss, logits + (torch.nan if self.global_step == 3 else 0.0)

    module = Breaking(3, encoder="digits_cnn", optimizer=sgd)
    with pytest.raises(DivergedError, match=r"diverged in epoch 1, at step 3: the logits are not finite\. Start again"):
        trainer(tmp_path, max_epochs=2).fit(module, train_dataloaders=_tuples(), val_dataloaders=_tuples())


def test_confidence_of_a_method_replaces_the_largest_probability(tmp_path):
    data = ToyDataModule(SplitSpec(val=30))
    module = Sure(3, encoder="digits_cnn")
    run = trainer(tmp_path)
    run.test(module, datamodule=data, verbose=False)
    values = {key: float(value) for key, value in run.callback_metrics.items()}
    assert values["test/signed_gap"] == pytest.approx(0.75 - values["test/accuracy"], abs=1e-6)
    assert values["test/correctness_auroc"] == 0.5  # all tied
    assert torch.equal(module.confidence(torch.zeros(2, 1, 8, 8)), torch.tensor([0.75, 0.75]))


def test_checkpoint_brings_its_own_head_and_stage(tmp_path):
    module = ClassificationModule(3, encoder="digits_cnn", optimizer=sgd)
    module.head, module.stage = CosineHead(module.encoder.num_features, 3, scale=7.0), 1
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, datamodule=ToyDataModule())
    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = load_module(tmp_path / "model.ckpt")
    assert isinstance(loaded.head, CosineHead)
    assert loaded.head.scale == 7.0
    assert loaded.stage == 1
    image = torch.randn(4, 1, 8, 8)
    assert torch.equal(loaded(image), module.eval()(image))
    # through the trainer too: the head is rebuilt before the weights arrive
    fresh = ClassificationModule(3, encoder="digits_cnn")
    assert isinstance(fresh.head, LinearHead)
    trainer(tmp_path).test(fresh, datamodule=ToyDataModule(), ckpt_path=tmp_path / "model.ckpt", verbose=False)
    assert isinstance(fresh.head, CosineHead)


def test_checkpoint_of_another_class_count_is_refused(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    run.fit(ClassificationModule(3, encoder="digits_cnn", optimizer=sgd), datamodule=ToyDataModule())
    run.save_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"3 classes.*has 4"):
        trainer(tmp_path).test(
            ClassificationModule(4, encoder="digits_cnn"),
            datamodule=ToyDataModule(num_classes=4),
            ckpt_path=tmp_path / "model.ckpt",
        )


def test_checkpoint_of_a_foreign_module_is_explained(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="ClassificationModule"):
        load_module(tmp_path / "foreign.ckpt")


@pytest.fixture
def downloads(monkeypatch):
    """The pretrained models that were asked for; made without a download, with the same weights under each name."""
    import timm

    asked, create = [], timm.create_model

    def pretend(*args, pretrained=False, **options):
        if not pretrained:
            return create(*args, **options)
        model = create(*args, **options)
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        asked.append(model)
        return model

    monkeypatch.setattr(timm, "create_model", pretend)
    return asked


PRETRAINED = {"name": "test_resnet", "in_channels": 1, "pretrained": True}


def test_pretrained_weights_are_not_asked_for_again(tmp_path, downloads):
    module = ClassificationModule(3, encoder=PRETRAINED, optimizer=sgd)
    run = trainer(tmp_path, max_steps=1)
    run.fit(
        module,
        train_dataloaders=DataLoader(
            TensorDataset(torch.zeros(4, 1, 32, 32), torch.zeros(4).long(), torch.arange(4)), batch_size=4
        ),
    )
    run.save_checkpoint(tmp_path / "model.ckpt")
    assert downloads
    downloads.clear()
    load_module(tmp_path / "model.ckpt")
    assert downloads == []


def test_a_pretrained_model_with_as_many_classes_brings_its_classifier(tmp_path, downloads):
    module = ClassificationModule(1000, encoder=PRETRAINED)
    whole = next(model for model in downloads if model.num_classes == 1000)
    for name, value in whole.get_classifier().state_dict().items():
        assert torch.equal(module.head.linear.state_dict()[name], value), name
    # no trace of it beside the head, and the network is timm's as a whole
    plain = ClassificationModule(1000, encoder={**PRETRAINED, "pretrained": False})
    assert list(module.state_dict()) == list(plain.state_dict())
    assert len(list(module.parameters())) == len(list(whole.parameters()))
    image = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = whole.eval()(image)
        torch.testing.assert_close(module.eval()(image), expected, rtol=1e-6, atol=1e-6)

    trainer(tmp_path, max_epochs=0).fit(module, train_dataloaders=_tuples())
    module.trainer.save_checkpoint(tmp_path / "model.ckpt")
    downloads.clear()
    loaded = load_module(tmp_path / "model.ckpt")
    assert downloads == []
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_pretrained_model_with_other_classes_gets_a_new_head(downloads):
    module = ClassificationModule(10, encoder=PRETRAINED)
    whole = next(model for model in downloads if model.num_classes == 1000)
    assert torch.equal(module.encoder.network.conv1[0].weight, whole.conv1[0].weight)
    assert module.head.linear.weight.shape == (10, whole.num_features)
    assert not (module.head.linear.weight[:, None] == whole.get_classifier().weight).all(dim=-1).any()


def test_only_trainable_parameters_are_optimised_and_a_plateau_watches_validation():
    module = ClassificationModule(
        3, encoder="digits_cnn", optimizer=sgd, scheduler=lambda optimizer: ReduceLROnPlateau(optimizer)
    )
    module.encoder.requires_grad_(False)
    configured = module.configure_optimizers()
    parameters = configured["optimizer"].param_groups[0]["params"]
    assert {id(p) for p in parameters} == {id(p) for p in module.head.parameters()}
    assert configured["lr_scheduler"]["monitor"] == "val/nll"


def test_a_criterion_with_weights_of_its_own_does_not_keep_a_checkpoint_from_loading(tmp_path):
    criterion = torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    module = ClassificationModule(3, encoder="digits_cnn", criterion=criterion)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, datamodule=ToyDataModule(train_size=60))
    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = load_module(tmp_path / "model.ckpt")
    image = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded(image), module.eval()(image))


def test_the_network_of_one_method_is_trained_on_by_another(tmp_path):
    data, made = ToyDataModule(SplitSpec(val=20), train_size=80), None
    for epoch, method in enumerate([CrossEntropy, CRL, AdaFocal, CRL, Focal], start=1):
        module = method(3, encoder="digits_cnn", optimizer=sgd)
        run = trainer(tmp_path, max_epochs=epoch)
        if made is not None:
            checkpoint = torch.load(made, weights_only=True)
            module.on_load_checkpoint(checkpoint)
            module.load_state_dict(checkpoint["state_dict"])
            assert torch.equal(module.head.linear.weight, checkpoint["state_dict"]["head.linear.weight"])
        run.fit(module, datamodule=data, ckpt_path=made, weights_only=True)
        assert run.current_epoch == epoch
        made = tmp_path / f"{epoch}.ckpt"
        run.save_checkpoint(made)
        assert type(load_module(made)) is method


def test_no_classes_is_refused():
    with pytest.raises(ValueError, match="num_classes is 0"):
        ClassificationModule(0)


def test_it_is_a_lightning_module_that_saves_plain_data():
    module = ClassificationModule(3, encoder="digits_cnn")
    assert isinstance(module, LightningModule)
    nothing = {"criterion": None, "scheduler": None, "batch_transform": None}
    assert dict(module.hparams) == {"num_classes": 3, "encoder": "digits_cnn", **nothing}


def test_a_criterion_that_remembers_how_it_was_built_comes_back(tmp_path):
    module = MDCA(3, criterion=LabelSmoothingLoss(0.2), strength=0.5, encoder="digits_cnn", optimizer=sgd)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, datamodule=ToyDataModule(SplitSpec(val=30, calibration=30)))
    run.save_checkpoint(tmp_path / "mdca.ckpt")
    loaded = load_module(tmp_path / "mdca.ckpt")
    assert loaded.criterion.spec == module.criterion.spec
    assert loaded.criterion.spec["init_args"]["criterion"]["init_args"] == {"smoothing": 0.2}
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    assert loaded.criterion(logits, labels) == module.criterion(logits, labels)


def test_a_criterion_without_a_constructor_has_no_arguments():
    module = MDCA(3, criterion=CrossEntropyLoss(), encoder="digits_cnn")
    assert module.hparams["criterion"]["init_args"] == {}
    assert CrossEntropyLoss().name == "CrossEntropyLoss"


class Tagged(CrossEntropy):
    def __init__(self, num_classes: int, tags=None, parts=(), **options) -> None:
        super().__init__(num_classes, **options)
        self.tags, self.parts = tags, parts


def test_data_of_any_kind_and_parts_in_lists_come_back(tmp_path):
    parts = [FixedTemperature(2.0), {"head": FixedTemperature(3.0)}]
    module = Tagged(3, {1: {2, 3}}, parts, encoder="digits_cnn", optimizer=sgd)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, datamodule=ToyDataModule(SplitSpec(val=30, calibration=30)))
    run.save_checkpoint(tmp_path / "tagged.ckpt")
    loaded = load_module(tmp_path / "tagged.ckpt")
    assert loaded.tags == {1: {2, 3}}
    assert loaded.parts[0].spec == parts[0].spec
    assert loaded.parts[1]["head"].spec == parts[1]["head"].spec


def test_other_loaders_after_a_fit_are_not_named_after_its_data(tmp_path):
    data = ToyDataModule(SplitSpec(val=30, calibration=30))
    module = ClassificationModule(3, encoder="digits_cnn", optimizer=sgd)
    run = trainer(tmp_path, callbacks=[SavePredictions(tmp_path)], max_epochs=1)
    run.fit(module, datamodule=data)
    run.test(module, dataloaders=[_tuples(images=8), _tuples(images=12)], verbose=False)
    assert [int(run.callback_metrics[f"test/{name}/n"]) for name in ("0", "1")] == [8, 12]
    assert {path.name for path in (tmp_path / "test").glob("*.npz")} == {"0.npz", "1.npz"}
    run.test(module, datamodule=data, verbose=False)
    assert (tmp_path / "calibration.npz").is_file()


def test_a_checkpoint_with_training_metrics_of_another_version_loads(tmp_path):
    module = ClassificationModule(3, encoder="digits_cnn", optimizer=sgd)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, datamodule=ToyDataModule(SplitSpec(val=30, calibration=30)))
    run.save_checkpoint(tmp_path / "old.ckpt")
    checkpoint = torch.load(tmp_path / "old.ckpt", weights_only=True)
    del checkpoint["calib_lightning"]["train_state"]["num_classes"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.warns(UserWarning, match="training metrics in another version's format"):
        loaded = load_module(tmp_path / "old.ckpt")
    for name, value in module.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
