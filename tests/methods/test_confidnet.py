"""ConfidNet: its target, a branch that leaves the classifier alone, and metrics that use its confidence."""

import os

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from torch.optim import Adam

from calib_lightning.core import (
    CachedFeatures,
    ClassificationModule,
    LinearHead,
    StageSwitch,
    StageTraining,
    StepSeed,
    build_head,
    load_module,
)
from calib_lightning.data import DigitsDataModule, SplitSpec, ToyDataModule
from calib_lightning.methods.confidnet import ConfidenceSwitch, ConfidenceTuning, ConfidNet
from calib_lightning.methods.cross_entropy import CrossEntropy, CrossEntropyLoss
from calib_lightning.methods.mixup import MixupTransform
from calib_lightning.methods.parts.confidnet_branch import ConfidenceHead, tcp_loss
from calib_lightning.methods.tst import TST, TSTHead
from calib_lightning.types import Batch, Prediction
from tests.ddp import cases
from tests.methods.test_two_stage import Stages, adam, check_resumed, equal, images, part, sgd

# --- the target ------------------------------------------------------------------------------------------------------


def _case(n=9, k=4, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(size=n), 3 * rng.normal(size=(n, k)), rng.integers(0, k, size=n)


def _loss(confidence, logits, targets, error_weight):
    """The equation, row by row; targets are one-hot or soft."""
    total = 0.0
    for c, row, t in zip(confidence, logits, targets, strict=True):
        p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        weight = 1.0 if row.argmax() == t.argmax() else error_weight
        total += weight * (c - p @ t) ** 2
    return total / len(confidence)


@pytest.mark.parametrize("error_weight", [1.0, 2.5])
def test_loss_equals_the_equation(error_weight):
    confidence, logits, labels = _case()
    right = logits.argmax(axis=1) == labels
    assert right.any()
    assert not right.all()
    tensors = torch.tensor(confidence), torch.tensor(logits), torch.tensor(labels)
    found = tcp_loss(*tensors, error_weight=error_weight)
    assert found.item() == pytest.approx(_loss(confidence, logits, np.eye(4)[labels], error_weight), rel=1e-12)
    soft = np.random.default_rng(1).dirichlet(np.ones(4), size=9)
    found = tcp_loss(*tensors[:2], torch.tensor(soft), error_weight=error_weight)
    assert found.item() == pytest.approx(_loss(confidence, logits, soft, error_weight), rel=1e-12)


def test_gradient_flows_through_the_confidence_alone():
    confidence, logits, labels = (torch.tensor(part) for part in _case())
    confidence.requires_grad_()
    logits.requires_grad_()
    tcp_loss(confidence, logits, labels).backward()
    assert logits.grad is None
    true = logits.detach().softmax(dim=1)[torch.arange(9), labels]
    torch.testing.assert_close(confidence.grad, 2 * (confidence.detach() - true) / 9)


def test_loss_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"confidence has shape \(2, 1\).*\(2,\)"):
        tcp_loss(torch.zeros(2, 1), torch.zeros(2, 3), torch.zeros(2).long())
    with pytest.raises(ValueError, match="labels hold 3; they must be in"):
        tcp_loss(torch.zeros(2), torch.zeros(2, 3), torch.tensor([0, 3]))


# --- the head --------------------------------------------------------------------------------------------------------


def test_head_equals_the_equation():
    torch.manual_seed(0)
    head, features = ConfidenceHead(6, 3, width=5), torch.randn(8, 6)
    with torch.no_grad():
        for parameter in head.branch.parameters():
            parameter.mul_(2)
    weights = {name: value.detach().double().numpy() for name, value in head.state_dict().items()}
    x = features.double().numpy()
    for layer in (0, 2, 4, 6):
        x = np.maximum(x @ weights[f"branch.{layer}.weight"].T + weights[f"branch.{layer}.bias"], 0)
    x = x @ weights["branch.8.weight"].T + weights["branch.8.bias"]
    np.testing.assert_allclose(head.confidence(features).detach().numpy(), 1 / (1 + np.exp(-x[:, 0])), rtol=1e-5)
    logits = features.double().numpy() @ weights["classifier.linear.weight"].T + weights["classifier.linear.bias"]
    np.testing.assert_allclose(head(features).detach().numpy(), logits, rtol=1e-5, atol=1e-6)


def test_size_of_the_branch():
    branch = ConfidenceHead(512, 10).branch
    assert sum(p.numel() for p in branch.parameters()) == 512 * 400 + 400 + 3 * (400 * 400 + 400) + 400 + 1
    assert len(list(branch.parameters())) == 10


def test_head_is_rebuilt_with_the_classifier_that_it_had():
    head = ConfidenceHead(6, 3, classifier=LinearHead(6, 3, bias=False), width=5)
    again = build_head(head.spec)
    again.load_state_dict(head.state_dict())
    features = torch.randn(2, 6)
    assert torch.equal(again(features), head(features))
    assert torch.equal(again.confidence(features), head.confidence(features))
    assert "classifier.linear.bias" not in head.state_dict()


def test_classifier_has_no_dropout_in_training():
    class Dropping(LinearHead):
        def forward(self, features):
            return torch.nn.functional.dropout(super().forward(features), 0.5, self.training)

    head = ConfidenceHead(6, 3)
    head.classifier = Dropping(6, 3)
    features = torch.randn(20, 6)
    assert torch.equal(head.train()(features), head.eval()(features))


def test_impossible_width_is_named():
    with pytest.raises(ValueError, match="width is 0"):
        ConfidenceHead(6, 3, width=0)
    with pytest.raises(ValueError, match="width is 0"):
        ConfidenceSwitch(-1, width=0)


# --- the method ------------------------------------------------------------------------------------------------------


def _tuning_adam(params):
    return Adam(params, lr=1e-4)


def _module(switch=-2, tuning=None, classes=3, views=None, **options):
    return ConfidNet(
        classes,
        switch=ConfidenceSwitch(switch, width=16, training=StageTraining(adam, views=views)),
        tuning=None if tuning is None else ConfidenceTuning(tuning, training=StageTraining(_tuning_adam)),
        encoder="digits_cnn",
        optimizer=sgd,
        **options,
    )


def _toys():
    return ToyDataModule(SplitSpec(val=31, calibration=30), batch_size=16, train_size=130)


def test_default_is_that_of_the_paper():
    for switch, epoch, rate in (
        (ConfidNet(3, encoder="digits_cnn").switch, -200, 1e-4),
        (ConfidenceTuning(-9), -9, 1e-7),
    ):
        optimizer = switch.training.optimizer([torch.nn.Parameter(torch.zeros(1))])
        assert (switch.at_epoch, switch.training.batch_size, type(optimizer)) == (epoch, 128, Adam)
        assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (rate, 0)
    assert ConfidNet(3, encoder="digits_cnn").configure_callbacks()[0].width == 400


class Moved(Callback):
    """Notes which parameters and buffers each stage has changed."""

    def __init__(self):
        self.moved = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for name, value in pl_module.state_dict().items():
            if not torch.equal(value, self.before[name]):
                self.moved.setdefault(pl_module.stage, set()).add(name)


@pytest.mark.parametrize("views", [None, CachedFeatures()])
def test_each_stage_moves_its_own_part_alone(fit, views):
    module = _module(2, 4, views=views)
    stages, moved = Stages(), Moved()
    fit(module, _toys(), epochs=6, callbacks=[stages, moved])
    names = {name for name, _ in module.named_parameters()}
    branch = {name for name in names if name.startswith("head.branch.")}
    clone = {name for name in names if name.startswith("confidence_encoder.")}
    assert {name.partition(".")[0] for name in moved.moved[0]} == {"encoder", "head"}
    assert moved.moved[1] == branch
    # the affine parameters of BatchNorm move with the copy, its statistics do not
    assert moved.moved[2] == branch | clone
    assert "confidence_encoder.network.stage1.1.weight" in clone
    zero, one, two = (stages.states[stage] for stage in range(3))
    assert equal(part(zero, "encoder."), part(one, "encoder."))
    assert equal(part(zero, "encoder."), part(two, "encoder."))
    assert equal(part(zero, "head."), part(one, "head.classifier."))
    assert equal(part(zero, "head."), part(two, "head.classifier."))
    assert "confidence_encoder.network.stem.0.weight" not in one


def test_third_stage_starts_where_the_second_has_ended(fit):
    torch.manual_seed(0)
    module = _module(1, 2)
    module.tuning.training.optimizer = lambda params: torch.optim.SGD(params, lr=0.0)
    stages = Stages()
    fit(module, _toys(), epochs=3, callbacks=[stages])
    assert equal(part(stages.states[1], "encoder."), part(stages.states[2], "confidence_encoder."))
    assert equal(part(stages.states[1], "head."), part(stages.states[2], "head."))
    assert stages.figures[1]["val/ece"] == stages.figures[2]["val/ece"]


def _outputs(module, loader):
    batches = list(loader)
    with torch.no_grad():
        parts = [module.eval().outputs(batch.image) for batch in batches]
    logits, confidence = (torch.cat(column) for column in zip(*parts, strict=True))
    return Prediction(logits, confidence), torch.cat([batch.label for batch in batches])


def _figures(prediction, labels):
    """ECE over 15 bins and the AUROC of correctness, from the confidence of a prediction; row by row."""
    confidence = prediction.confidence.double().numpy()
    correct = (prediction.logits.argmax(dim=1) == labels).numpy()
    bins = np.minimum(np.ceil(confidence * 15).astype(int) - 1, 14)
    ece = sum(abs(confidence[bins == b].sum() - correct[bins == b].sum()) for b in range(15)) / len(confidence)
    pairs = confidence[correct][:, None] - confidence[~correct]
    return ece, np.mean((pairs > 0) + 0.5 * (pairs == 0))


@pytest.mark.parametrize("tuning", [None, 4])
def test_every_metric_uses_the_confidence_of_the_branch(fit, tuning):
    torch.manual_seed(0)
    module = _module(2, tuning)
    trainer = fit(module, _toys(), epochs=6)
    found = {key: float(value) for key, value in trainer.callback_metrics.items()}
    prediction, labels = _outputs(module, trainer.datamodule.val_dataloader())
    largest = prediction._replace(confidence=prediction.logits.softmax(dim=1).amax(dim=1))
    ece, auroc = _figures(prediction, labels)
    assert (found["val/ece"], found["val/correctness_auroc"]) == pytest.approx((ece, auroc), abs=1e-5)
    assert abs(_figures(largest, labels)[0] - ece) > 0.01
    found = {key: float(value) for key, value in trainer.test(module, datamodule=_toys(), verbose=False)[0].items()}
    for prefix, loader in zip(("test", "calibration"), trainer.datamodule.test_dataloader(), strict=True):
        prediction, labels = _outputs(module, loader)
        ece, auroc = _figures(prediction, labels)
        assert found[f"{prefix}/ece"] == pytest.approx(ece, abs=1e-5)
        assert found[f"{prefix}/correctness_auroc"] == pytest.approx(auroc, abs=1e-5)
    image = images()
    with torch.no_grad():
        confidence = module.outputs(image).confidence
        assert torch.equal(module.confidence(image), confidence)
        # the branch sees its own encoder as soon as it has one
        own = module.encoder if tuning is None else module.confidence_encoder
        assert torch.equal(confidence, module.head.confidence(own(image)))
        assert (tuning is None) == torch.equal(confidence, module.head.confidence(module.encoder(image)))


def test_branch_learns_what_the_classifier_gets_wrong(fit):
    states = []
    for views in (None, CachedFeatures()):
        torch.manual_seed(0)
        module = _module(3, classes=10, views=views, error_weight=2.0)
        stages = Stages()
        trainer = fit(module, DigitsDataModule(batch_size=32), epochs=15, callbacks=[stages])
        states.append(module.state_dict())
    # the same with features that are computed once
    assert equal(*states)
    before, after = stages.figures[0], stages.figures[1]
    assert before["val/accuracy"] == after["val/accuracy"] > 0.9
    assert before["val/nll"] == after["val/nll"]
    prediction, labels = _outputs(module, trainer.datamodule.test_dataloader()[0])
    true = prediction.logits.softmax(dim=1).gather(1, labels[:, None])[:, 0]
    error, constant = ((true - guess).square().mean() for guess in (prediction.confidence, true.mean()))
    assert error < 0.85 * constant


def test_loss_is_cross_entropy_and_later_the_target():
    torch.manual_seed(0)
    module = _module(error_weight=3.0).eval()
    batch = Batch(images(9), torch.arange(9) % 3, torch.arange(9))
    loss, logits = module.loss(batch)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, batch.label))
    module.head = ConfidenceHead(96, 3, width=8)
    module.requires_grad_(False)
    module.head.branch.requires_grad_(True)
    loss, logits = module.loss(batch)
    confidence = module.head.confidence(module.features(batch.image)).detach()
    rows = confidence.double().numpy(), logits.double().numpy(), np.eye(3)[batch.label]
    assert loss.item() == pytest.approx(_loss(*rows, 3.0), rel=1e-5)
    loss.backward()
    assert {name for name, p in module.named_parameters() if p.grad is not None} == {
        name for name, _ in module.named_parameters() if name.startswith("head.branch.")
    }


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_checkpoints_of_all_stages_come_back(fit, tmp_path):
    module = _module(1, 2)
    trainer = fit(module, _toys(), epochs=3, callbacks=[Stages(tmp_path)])
    image = images()
    for stage in (2, 0, 1):
        path = tmp_path / f"stage-{stage}.ckpt"
        loaded = load_module(path)
        assert (type(loaded), loaded.stage) == (ConfidNet, stage)
        assert (loaded.confidence_encoder is None) == (stage < 2)
        # the same file in the module and trainer of the fit, which are in the last stage
        trainer.test(module, datamodule=_toys(), ckpt_path=str(path), verbose=False)
        with torch.no_grad():
            one, two = loaded.outputs(image), module.eval().outputs(image)
        assert torch.equal(one.logits, two.logits)
        assert (one.confidence is None) == (two.confidence is None) == (stage == 0)
        if stage:
            assert torch.equal(one.confidence, two.confidence)
            assert len(one.confidence.unique()) > 5


@pytest.mark.parametrize(("stop_after", "stage"), [(2, 0), (6, 1), (10, 2), (11, 2)])
def test_resumed_run_is_bit_equal(tmp_path, stop_after, stage):
    check_resumed(tmp_path, lambda: _module(1, 2), 4, stop_after, stage)


def test_branch_is_trained_on_a_finished_classifier(fit, tmp_path):
    trained = CrossEntropy(3, encoder="digits_cnn", optimizer=sgd)
    fit(trained, _toys(), epochs=2).save_checkpoint(tmp_path / "trained.ckpt")
    module = _module(0)
    module.switch.init_from = str(tmp_path / "trained.ckpt")
    fit(module, _toys(), epochs=2)
    assert equal(part(trained.state_dict(), "encoder."), part(module.state_dict(), "encoder."))
    assert equal(part(trained.state_dict(), "head."), part(module.state_dict(), "head.classifier."))
    with torch.no_grad():
        assert torch.equal(trained.eval()(images()), module.eval()(images()))


def test_start_from_another_classifier_is_refused(fit, tmp_path):
    switch = StageSwitch(1, TSTHead, StageTraining(adam))
    fit(TST(3, switch, encoder="digits_cnn", optimizer=sgd), _toys(), epochs=2, callbacks=[Stages(tmp_path)])
    module = _module(0)
    module.switch.init_from = str(tmp_path / "stage-1.ckpt")
    with pytest.raises(ValueError, match=r"init_from is .*stage-1\.ckpt.* linear classifier for 3 classes"):
        fit(module, _toys(), epochs=1)


# --- two processes ---------------------------------------------------------------------------------------------------


def fit_on_ranks(rank, world, folder):
    seed_everything(3, workers=True)
    module, stages = _module(1, 2), Stages()
    run = cases.trainer(folder, world, [StepSeed(), stages], max_epochs=3)
    run.fit(module, datamodule=ToyDataModule(SplitSpec(val=31), batch_size=16, train_size=130))
    os.environ.pop("PL_GLOBAL_SEED", None)
    kept = equal(part(stages.states[0], "encoder."), part(stages.states[2], "encoder."))
    went = not equal(part(stages.states[0], "encoder."), part(stages.states[2], "confidence_encoder."))
    return {"digest": cases.digest(module), "kept": kept, "went": went}


def test_two_processes_train_one_branch_and_one_encoder_of_it(pool2, tmp_path):
    one, two = pool2.run(fit_on_ranks, str(tmp_path))
    assert one == two
    assert one["kept"]
    assert one["went"]
    assert one["digest"] != fit_on_ranks(0, 1, str(tmp_path))["digest"]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"error_weight": 0.0}, ValueError, r"error_weight is 0\.0"),
        ({"error_weight": float("nan")}, ValueError, "error_weight is nan"),
        ({"switch": StageSwitch(-2)}, TypeError, "switch of ConfidNet is .*ConfidenceSwitch"),
        ({"switch": ConfidenceTuning(-2)}, TypeError, "switch of ConfidNet is .*ConfidenceSwitch"),
        ({"tuning": ConfidenceSwitch(-2)}, TypeError, "tuning of ConfidNet is .*ConfidenceTuning"),
        ({"batch_transform": MixupTransform()}, ValueError, "not support batch_transform.*init_from"),
        (
            {"switch": ConfidenceSwitch(-2, training=StageTraining(criterion=CrossEntropyLoss()))},
            ValueError,
            "criterion CrossEntropyLoss.*Omit the criterion",
        ),
        (
            {"tuning": ConfidenceTuning(-2, training=StageTraining(frozen_bn="train"))},
            ValueError,
            "frozen_bn of ConfidNet's tuning is 'train'",
        ),
        (
            {"tuning": ConfidenceTuning(-2, training=StageTraining(views=CachedFeatures()))},
            ValueError,
            "tuning of ConfidNet is incompatible with CachedFeatures",
        ),
    ],
)
def test_impossible_settings_are_named(options, error, named):
    with pytest.raises(error, match=named):
        ConfidNet(3, encoder="digits_cnn", **options)


def test_tuning_before_the_branch_is_refused(fit):
    with pytest.raises(ValueError, match="ConfidenceTuning is 1; it must be later"):
        fit(_module(2, 1), _toys(), epochs=3)


@pytest.mark.parametrize("switch", [ConfidenceSwitch(1), ConfidenceTuning(1)])
def test_other_modules_are_refused(fit, switch):
    module = ClassificationModule(3, encoder="digits_cnn")
    with pytest.raises(TypeError, match=rf"ClassificationModule; {type(switch).__name__} only works with ConfidNet"):
        fit(module, _toys(), epochs=2, callbacks=[switch])
