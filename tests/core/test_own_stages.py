"""Stages of a module of somebody else's: what goes wrong in silence is told, and what is wrong is named."""

import warnings
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from calib_lightning.callbacks.checkpoints import RunCheckpoint
from calib_lightning.core import CosineToEnd, LinearHead, StageSwitch, StageTraining, load_stages
from calib_lightning.core.module_record import load_checkpoint
from calib_lightning.data import ResizedCropFlip, ViewedDataset
from calib_lightning.methods import AdaptiveSparsity, MaskedClassifier
from tests.core.test_stages import Foreign, loaders
from tests.ddp.cases import trainer


class Score(Callback):
    """Logs a score that gets worse in the stage."""

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("score", float(trainer.current_epoch))


def switch(at_epoch, **options):
    return StageSwitch(at_epoch, encoder="net", head="net.fc", **options)


def run(folder, own, switches, epochs=2, callbacks=(), **options):
    seed_everything(1)
    train, val, _ = loaders()
    made = trainer(folder, 1, [*switches, *callbacks], max_epochs=epochs)
    made.fit(own, train, val, weights_only=True, **options)
    return made


def test_a_checkpoint_from_before_the_stage_is_told_of(tmp_path):
    best = ModelCheckpoint(tmp_path, "best", monitor="score", enable_version_counter=False)
    with pytest.warns(UserWarning, match=r"best\.ckpt is from before the stage of StageSwitch.* score was better then"):
        run(tmp_path, Foreign(), [switch(-1)], callbacks=[Score(), best])
    with pytest.warns(UserWarning, match=r"best\.ckpt is from before the first switch"):
        load_stages(Foreign(), tmp_path / "best.ckpt")


def test_a_checkpoint_of_the_stage_is_not_told_of(tmp_path):
    last = ModelCheckpoint(tmp_path, "last", monitor="score", mode="max", enable_version_counter=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is from before")
        run(tmp_path, Foreign(), [switch(-1)], callbacks=[Score(), last])
        load_stages(Foreign(), tmp_path / "last.ckpt")


def test_a_run_checkpoint_keeps_the_stage_before(tmp_path):
    run(tmp_path, Foreign(), [switch(-1)], callbacks=[Score(), RunCheckpoint(tmp_path, "best", monitor="score")])
    parts = {name: set(load_checkpoint(tmp_path / name)["state_dict"]) for name in ("stage-1-best.ckpt", "best.ckpt")}
    assert "net.fc.weight" in parts["stage-1-best.ckpt"]
    assert "net.fc.linear.weight" in parts["best.ckpt"]


def test_an_optimiser_that_was_put_at_the_module_trains_the_first_stage(tmp_path):
    """As LightningCLI does."""
    own, seen = Foreign(), []

    def put(self):
        seen.append(self.trainer.max_epochs)
        return torch.optim.SGD(self.parameters(), lr=0.05)

    before, hook = own.net.conv.weight.detach().clone(), MethodType(put, own)
    own.configure_optimizers = hook
    run(tmp_path, own, [switch(-1)])
    assert not torch.equal(own.net.conv.weight, before)
    assert seen == [2]
    assert own.configure_optimizers is hook


def test_a_layer_after_an_encoder_without_parameters_is_a_head(tmp_path):
    class Flat(Foreign):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential()
            self.net.add_module("flat", nn.Flatten())
            self.net.add_module("fc", nn.Linear(64, 3))

    run(tmp_path, Flat(), [switch(1)])


def test_random_views_of_a_wrapped_data_set_differ_between_epochs(tmp_path):
    data = ViewedDataset(TensorDataset(torch.randint(256, (8, 1, 16, 16)).byte(), torch.arange(8) % 3))
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(batch[0].clone())

    views = StageTraining(views=ResizedCropFlip())
    made = trainer(tmp_path, 1, [switch(1, training=views), Look()], max_epochs=4)
    made.fit(Foreign(), DataLoader(data, 8))
    assert not torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[2], seen[3])


@pytest.mark.parametrize("at_epoch", [-4, 3])
def test_the_schedule_of_the_first_stage_ends_with_it(tmp_path, at_epoch):
    seen = []

    class Cosine(Foreign):
        def configure_optimizers(self):
            seen.append((self.trainer.max_epochs, self.trainer.estimated_stepping_batches))
            return super().configure_optimizers()

    epochs = 3 if at_epoch < 0 else 7
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    made = run(tmp_path, Cosine(), [switch(at_epoch)], epochs, callbacks=[keep])
    assert made.current_epoch == 7
    run(tmp_path, Cosine(), [switch(at_epoch)], epochs, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert seen == [(3, 15)] * 2


def test_more_epochs_than_planned_are_told_of_on_a_resume(tmp_path):
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    run(tmp_path, Foreign(), [switch(-3)], 2, callbacks=[keep])
    with pytest.warns(UserWarning, match="goes on to epoch 8. To finish .* with max_epochs=2"):
        assert run(tmp_path, Foreign(), [switch(-3)], 5, ckpt_path=tmp_path / "epoch=2.ckpt").current_epoch == 8
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*as it was planned")
        assert run(tmp_path, Foreign(), [switch(-3)], 2, ckpt_path=tmp_path / "epoch=2.ckpt").current_epoch == 5


def test_names_of_parts_are_helped_with(tmp_path):
    for head, message in (
        ("fc", "it must be the name of a submodule of Foreign.*its linear layers are 'net.fc'"),
        ("net", "holds all parameters of Foreign.*Name that layer: its linear layers are 'net.fc'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path, Foreign(), [StageSwitch(1, encoder="net", head=head)])


def test_advice_on_few_steps_can_be_followed(tmp_path):
    with pytest.warns(UserWarning, match=r"smaller batches \(of your loader\)"):
        run(tmp_path, Foreign(), [switch(1)])


def test_a_layer_that_is_not_the_last_is_refused(tmp_path):
    class Deep(Foreign):
        def __init__(self):
            super().__init__()
            self.net.fc = nn.Linear(32, 8)
            self.net.add_module("last", nn.Linear(8, 3))

    class Unlike(Deep):
        def forward(self, x, y):
            return super().forward(x)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(*batch), batch[1])

        validation_step = None

    with pytest.raises(ValueError, match=r"head is 'net\.fc', which returns 8 values .* the 3 logits.*'net\.last'"):
        run(tmp_path, Deep(), [switch(1)])
    run(tmp_path, Deep(), [StageSwitch(1, encoder="net", head="net.last")])
    run(tmp_path, Unlike(), [switch(1)])  # it cannot be called on images alone


def test_looking_at_the_first_batch_changes_no_random_number(tmp_path):
    class Drawn(Foreign):
        def forward(self, x):
            return super().forward(x) + 0 * torch.rand(())  # also in evaluation

    class Numbers(Callback):
        def on_train_batch_end(self, trainer, *arguments):
            found.append(torch.rand(()).item())

    kinds = []
    for switches in ([], [switch(1)]):
        found = []
        made = run(tmp_path, Drawn(), switches, 1 if not switches else 2, callbacks=[Numbers()])
        kinds.append(found[: made.num_training_batches])
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("held_out", [True, False])
def test_calibration_images_may_come_from_a_plain_loader(tmp_path, held_out):
    _, val, _ = loaders()
    if not held_out:
        with pytest.raises(ValueError, match="loader is given, but held_out of the sparsity is False"):
            MaskedClassifier(1, sparsity=AdaptiveSparsity(held_out=False), loader=val)
        return
    own, masked = Foreign(), MaskedClassifier(1, loader=val, encoder="net", head="net.fc")
    made = run(tmp_path, own, [masked], 3)
    with torch.no_grad():
        logits = torch.cat([own.eval()(image) for image, _ in val])
    labels = torch.cat([label for _, label in val])
    accuracy = (logits.argmax(1) == labels).float().mean()
    assert float(made.callback_metrics["mac_cal/accuracy"]) == pytest.approx(float(accuracy))
    confidence = logits.softmax(1).amax(1).mean()
    assert float(made.callback_metrics["mac_cal/confidence"]) == pytest.approx(float(confidence), abs=1e-6)


def test_a_stage_that_is_stopped_before_the_end_of_its_schedule_is_told_of(tmp_path):
    def stopped(training):
        stop = EarlyStopping("score", patience=2)
        return run(tmp_path, Foreign(), [switch(-6, training=training)], callbacks=[Score(), stop])

    with pytest.warns(UserWarning, match="stopped after 3 of 6 epochs, before the end of its schedule"):
        stopped(StageTraining(scheduler=CosineToEnd))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*before the end of its schedule")
        assert stopped(StageTraining()).current_epoch < 8


def test_a_switch_may_be_used_again(tmp_path):
    used, networks = switch(-1), [Foreign(), Foreign()]
    for own in networks:
        run(tmp_path, own, [used])
        assert isinstance(own.net.fc, LinearHead)
    used.init_from = str(next(tmp_path.rglob("*.ckpt"), ""))
    with pytest.warns(UserWarning, match="has taken place in this module.*build the module anew"):
        run(tmp_path, networks[-1], [used])


def test_a_class_is_not_a_module(tmp_path):
    torch.save({}, tmp_path / "none.ckpt")
    with pytest.raises(TypeError, match=r"module is the class Foreign.*Pass Foreign\(\.\.\.\)"):
        load_stages(Foreign, tmp_path / "none.ckpt")
