"""A stage switch: what is frozen stays, the new head is trained, and a stop anywhere changes nothing."""

import copy
import os
from contextlib import nullcontext, suppress
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from calib_lightning import core
from calib_lightning.callbacks.checkpoints import RunCheckpoint
from calib_lightning.core import (
    ClassificationModule,
    CosineToEnd,
    LinearHead,
    Preemption,
    StageSwitch,
    StageTraining,
    StepSeed,
    load_module,
    load_stages,
    stages,
)
from calib_lightning.core.heads import head_size
from calib_lightning.core.preemption import Preempted
from calib_lightning.data import CleanViews, ContrastiveViews, ResizedCropFlip, SplitSpec, ToyDataModule
from calib_lightning.methods import (
    AdaptiveSparsity,
    AugMixTransform,
    CrossEntropy,
    CrossEntropyLoss,
    Focal,
    FocalLoss,
    MaskedClassifier,
    Mixup,
    TwoStage,
)
from calib_lightning.types import Views
from tests.ddp.cases import Dropped, Watch, cosine, digest, sgd, trainer
from tests.methods.table import ROWS


def toy(**options):
    return ToyDataModule(SplitSpec(val=31, calibration=30), batch_size=16, train_size=140, **options)


def module(cls=ClassificationModule, **options):
    seed_everything(3)
    return cls(3, encoder="digits_cnn", optimizer=sgd, **options)


def adam(params):
    return torch.optim.Adam(params, lr=0.003)


def fit(folder, module, switches, epochs=4, data=None, callbacks=(), ckpt_path=None, **options):
    run = trainer(folder, 1, [StepSeed(), *switches, *callbacks], max_epochs=epochs, **options)
    try:
        run.fit(module, datamodule=data or toy(), ckpt_path=ckpt_path, weights_only=True)
    finally:
        os.environ.pop("PL_GLOBAL_SEED", None)
    return run


class Note(Callback):
    """Copies the state at the start of each epoch, and what each step saw."""

    def __init__(self):
        self.states, self.sizes, self.lrs, self.modes = {}, {}, {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        epoch = trainer.current_epoch
        if batch_idx == 0:
            self.states[epoch] = copy.deepcopy(pl_module.state_dict())
        self.sizes.setdefault(epoch, []).append(len(batch[0]))
        self.lrs[epoch] = trainer.optimizers[0].param_groups[0]["lr"]
        self.modes[epoch] = {name for name, part in pl_module.named_modules() if part.training}


class Foreign(LightningModule):
    """A module as somebody else has it: plain tuples, names of its own, a network in which the head lies."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential()
        self.net.add_module("conv", nn.Conv2d(1, 8, 3))
        self.net.add_module("bn", nn.BatchNorm2d(8))
        self.net.add_module("pool", nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()))
        self.net.add_module("fc", nn.Linear(32, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def loaders(rows=70):
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(3, (rows,), generator=generator)
    image = torch.randn(rows, 1, 8, 8, generator=generator) + label.view(-1, 1, 1, 1)
    data = TensorDataset(image, label)
    shuffled = DataLoader(data, 16, shuffle=True, generator=torch.Generator().manual_seed(0))
    return shuffled, DataLoader(data, 16), image


# --- what a switch does ----------------------------------------------------------------------------------------------


def test_the_encoder_stays_bit_for_bit_and_the_new_head_learns(tmp_path):
    note, own = Note(), module(scheduler=cosine)
    switch = StageSwitch(2, training=StageTraining(adam, batch_size=8))
    fit(tmp_path, own, [switch], 4, callbacks=[note])
    before, after = note.states[2], own.state_dict()
    encoder = [name for name in before if name.startswith("encoder.")]
    assert any("running_mean" in name for name in encoder)
    assert all(torch.equal(before[name], after[name]) for name in encoder)
    assert not torch.equal(before["head.linear.weight"], after["head.linear.weight"])
    # before the switch both had moved
    assert not any(torch.equal(note.states[0][name], before[name]) for name in encoder if name.endswith("weight"))
    assert [p for p in own.parameters() if p.requires_grad] == list(own.head.parameters())
    assert own.stage == 1
    assert note.sizes[1] == [16] * 4 + [15]
    assert sum(note.sizes[2]) == 79
    assert set(note.sizes[2]) <= {8, 7}
    assert note.lrs[2] == note.lrs[3] == 0.003
    assert note.modes[1] >= {"encoder", "encoder.network", "head"}
    assert note.modes[2] == note.modes[3] == {"", "head", "head.linear"}


def test_frozen_bn_train_lets_the_statistics_go_on(tmp_path):
    note, own = Note(), module()
    fit(tmp_path, own, [StageSwitch(1, training=StageTraining(frozen_bn="train"))], 2, callbacks=[note])
    moved = {name for name, value in own.state_dict().items() if not torch.equal(value, note.states[1][name])}
    assert any("running_mean" in name for name in moved)
    assert not any(name.startswith("encoder.") and name.endswith(("weight", "bias")) for name in moved)


def test_a_call_of_train_does_not_wake_what_is_frozen(tmp_path):
    class Meddle(Note):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.train()

    note, own = Meddle(), module()
    fit(tmp_path, own, [StageSwitch(1)], 3, callbacks=[note])
    assert note.modes[2] == {"", "head", "head.linear"}
    name = next(name for name in note.states[1] if "running_mean" in name)
    assert torch.equal(note.states[1][name], own.state_dict()[name])


def test_a_new_head_depends_on_the_seed_and_the_stage_alone(tmp_path):
    heads = []
    for epoch in (1, 2):
        note, own = Note(), module()
        fit(tmp_path, own, [StageSwitch(epoch)], 3, callbacks=[note])
        heads.append(note.states[epoch]["head.linear.weight"])
    assert torch.equal(*heads)
    note = Note()
    fit(tmp_path, module(), [StageSwitch(1), StageSwitch(2)], 3, callbacks=[note])
    assert torch.equal(note.states[1]["head.linear.weight"], heads[0])
    assert not torch.equal(note.states[2]["head.linear.weight"], heads[0])


def test_negative_epochs_are_added_to_those_of_the_trainer(tmp_path):
    first, second = StageSwitch(-2), StageSwitch(-1)
    seen = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append((first.current, second.current, pl_module.stage))
            lengths.append((first.length(trainer), second.length(trainer), first.stage_epoch(trainer)))

    lengths = []
    run = fit(tmp_path, module(), [first, second], 2, callbacks=[Look()])
    assert run.max_epochs == 2  # another fit adds them once more, not twice
    assert seen == [(False, False, 0), (False, False, 0), (True, False, 1), (True, False, 1), (False, True, 2)]
    assert lengths[2] == (2, 1, 0)
    assert lengths[3] == (2, 1, 1)


def test_a_criterion_takes_the_place_of_loss_and_batch_transform(tmp_path):
    own = module(Mixup)
    fit(tmp_path, own, [StageSwitch(1, training=StageTraining(criterion=FocalLoss(2.0)))], 2)
    assert isinstance(own.criterion, FocalLoss)
    assert own.batch_transform is None
    kept = module(Focal, gamma=3.0)
    fit(tmp_path, kept, [StageSwitch(1)], 2)
    assert kept.criterion.gamma == 3.0
    assert not kept.plain_loss


class Told(ClassificationModule):
    """A method that writes down which of its hooks are called."""

    def __init__(self, num_classes, **options):
        super().__init__(num_classes, **options)
        self.told = []

    def _tell(self, hook):
        self.told.append((self.trainer.current_epoch, hook))

    def logits(self, image):
        self._tell("logits")
        return super().logits(image)

    def begin_fit(self):
        self._tell("begin_fit")

    def begin_step(self, batch):
        self._tell("begin_step")

    def loss(self, batch):
        self._tell("loss")
        return super().loss(batch)

    def end_step(self):
        self._tell("end_step")

    def end_validation(self):
        self._tell("end_validation")


def test_hooks_of_a_method_stand_back_once_a_criterion_has_replaced_it(tmp_path):
    step = ["begin_step", "loss", "logits", "end_step"]
    for criterion, epochs in ((None, {0, 1}), (FocalLoss(2.0), {0})):
        own, switch = module(Told), StageSwitch(1, training=StageTraining(criterion=criterion))
        run = trainer(tmp_path, 1, [StepSeed(), switch], max_epochs=2)
        run.num_sanity_val_steps = 1
        run.fit(own, datamodule=toy())
        assert own.told[:2] == [(0, "begin_fit"), (0, "logits")]  # the sanity check is no validation of the method
        assert {epoch for epoch, _ in own.told} == epochs
        first = [hook for epoch, hook in own.told[2:] if epoch == 0]
        assert first == [*step * 5, *["logits"] * 2, "end_validation"]
        own.told.clear()
        fit(tmp_path, own, [switch], 1)  # another fit goes on in the stage
        assert bool(own.told) == (criterion is None)


def test_views_of_the_stage_take_the_place_of_the_augmentation(tmp_path):
    data = toy()
    data.augment = True
    own = module()
    clean = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            order = data.ordered_train_loader(augmented=False)
            image = torch.cat([part.image for part in order])
            clean.append((trainer.current_epoch, torch.equal(batch.image, image[batch.index])))

    fit(tmp_path, own, [StageSwitch(1, training=StageTraining(views=CleanViews()))], 2, data, [Look()])
    assert {same for epoch, same in clean if epoch == 0} == {False}
    assert {same for epoch, same in clean if epoch == 1} == {True}
    assert data.stage_views is None  # outside of the fit the data module is as it was


@pytest.mark.parametrize("row", [row for row in ROWS if row.switch is None], ids=lambda row: row.file)
def test_a_plain_stage_follows_every_method_of_one_stage(row, tmp_path):
    note, own = Note(), module(row.module, **row.options)
    training = StageTraining(criterion=CrossEntropyLoss(), views=CleanViews())
    run = fit(tmp_path, own, [StageSwitch(1, training=training)], 3, callbacks=[note])
    moved = {name for name, value in own.state_dict().items() if not torch.equal(value, note.states[1][name])}
    assert moved == {"head.linear.weight", "head.linear.bias"}
    # the plain classifier that is left
    image = torch.randn(5, 1, 8, 8)
    own.eval()
    assert torch.equal(own(image), own.head(own.encoder(image)))
    run.save_checkpoint(tmp_path / "model.ckpt")
    assert torch.equal(load_module(tmp_path / "model.ckpt")(image), own(image))


# --- checkpoints and resuming ----------------------------------------------------------------------------------------


def staged_run(folder, stop_after=None, resume=False, switches=None):
    folder.mkdir(exist_ok=True)
    seed_everything(11)
    data = ToyDataModule(SplitSpec(val=31), batch_size=16, train_size=130)
    data.augment = True
    own = Dropped(3, encoder="digits_cnn", optimizer=sgd, scheduler=cosine)
    preemption = Preemption(folder)
    keep = ModelCheckpoint(folder, filename="best", monitor="val/nll", save_last=True, save_on_train_epoch_end=True)
    if switches is None:
        switches = [StageSwitch(2), StageSwitch(-2, training=StageTraining(adam, cosine, batch_size=8))]
    epochs = 6 + sum(min(switch.at_epoch, 0) for switch in switches)
    callbacks = [StepSeed(), *switches, Watch(preemption, stop_after), preemption, keep]
    run = trainer(folder, 1, callbacks, max_epochs=epochs)
    stopped = None
    try:
        run.fit(own, datamodule=data, ckpt_path=str(folder / "last.ckpt") if resume else None, weights_only=True)
    except Preempted as leaving:
        stopped = leaving.code
    os.environ.pop("PL_GLOBAL_SEED", None)
    return digest(own), stopped, run.global_step


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return staged_run(tmp_path_factory.mktemp("whole"))


# 7 steps an epoch in the first four, 13 in the last two: within stage 1, before its last step, at its end, one step
# after the switch, within stage 2, at its end, one step into stage 3, within it, at an epoch's end of it
@pytest.mark.parametrize("stop_after", [3, 13, 14, 15, 18, 28, 29, 36, 41])
def test_a_stop_anywhere_changes_no_bit(tmp_path, whole, stop_after):
    _, stopped, steps = staged_run(tmp_path, stop_after)
    assert (stopped, steps) == (143, stop_after)
    resumed, _, steps = staged_run(tmp_path, resume=True)
    assert resumed == whole[0]
    assert steps == whole[2] == 54


def test_a_checkpoint_of_other_switches_is_refused(tmp_path):
    class Other(StageSwitch):
        pass

    staged_run(tmp_path, 30)
    with pytest.raises(ValueError, match="Use the switches of the training"):
        staged_run(tmp_path, resume=True, switches=[StageSwitch(2), Other(-2)])


def test_a_checkpoint_knows_its_switch_after_the_class_has_moved(tmp_path):
    own, switch = module(), StageSwitch(1)
    fit(tmp_path, own, [switch], 2).save_checkpoint(tmp_path / "model.ckpt")
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    state = checkpoint["callbacks"]["StageSwitch[0]"]
    assert state["class_path"] == "calib_lightning.core.stages.StageSwitch"
    for path, error in (("calib_lightning.core.StageSwitch", None), ("gone.StageSwitch", "with gone.StageSwitch at")):
        state["class_path"] = path
        torch.save(checkpoint, tmp_path / "moved.ckpt")
        again = trainer(tmp_path, 1, [StageSwitch(1)], max_epochs=2)
        with nullcontext() if error is None else pytest.raises(ValueError, match=error):
            again.validate(own, datamodule=toy(), ckpt_path=tmp_path / "moved.ckpt", verbose=False)


@pytest.mark.parametrize("name", ["StageSwitch", "StageTraining", "load_stages"])
def test_a_path_in_an_older_configuration_still_leads_to_its_class(name):
    assert getattr(stages, name) is getattr(core, name)


def test_evaluation_finds_the_head_of_each_checkpoint(tmp_path):
    class Keep(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    wide = partial(TwoLayers, width=7)
    data, own, switch = toy(), module(), StageSwitch(1, wide)
    run = fit(tmp_path, own, [switch], 2, data, [Keep()])
    after = run.callback_metrics["val/nll"].clone()
    for epoch, head in ((0, LinearHead), (1, TwoLayers), (0, LinearHead)):
        done = run.validate(own, datamodule=data, ckpt_path=tmp_path / f"{epoch}.ckpt", verbose=False)
        assert type(own.head) is head
    again = Trainer(logger=False, callbacks=[StageSwitch(1, wide)], enable_progress_bar=False, accelerator="cpu")
    done = again.validate(module(), datamodule=data, ckpt_path=tmp_path / "1.ckpt", verbose=False)
    assert done[0]["val/nll"] == pytest.approx(float(after))
    assert type(load_module(tmp_path / "1.ckpt").head) is TwoLayers


class TwoLayers(LinearHead):
    def __init__(self, in_features: int, num_classes: int, width: int = 5) -> None:
        super().__init__(width, num_classes)
        self.first = nn.Linear(in_features, width)

    def forward(self, features):
        return super().forward(self.first(features).relu())


def test_a_trained_checkpoint_starts_the_second_stage(tmp_path):
    trained = module()
    fit(tmp_path, trained, [], 2).save_checkpoint(tmp_path / "trained.ckpt")
    note = Note()
    seed_everything(77)
    fresh = ClassificationModule(3, encoder="digits_cnn", optimizer=sgd)
    switch = StageSwitch(0, init_from=str(tmp_path / "trained.ckpt"))
    fit(tmp_path, fresh, [switch], 2, callbacks=[note])
    for name, value in trained.encoder.state_dict().items():
        assert torch.equal(fresh.encoder.state_dict()[name], value), name
    assert switch.head_loaded
    assert not torch.equal(note.states[0]["head.linear.weight"], trained.head.linear.weight)  # put anew by the switch


def test_a_stage_that_starts_from_a_checkpoint_takes_the_place_of_the_epochs_before(tmp_path):
    trained = module()
    fit(tmp_path, trained, [], 2).save_checkpoint(tmp_path / "trained.ckpt")
    fresh = ClassificationModule(3, encoder="digits_cnn", optimizer=sgd)
    run = fit(tmp_path, fresh, [StageSwitch(-3, init_from=str(tmp_path / "trained.ckpt"))], 5)
    assert (run.current_epoch, fresh.stage) == (3, 1)
    for name, value in trained.encoder.state_dict().items():
        assert torch.equal(fresh.encoder.state_dict()[name], value), name


def test_a_stage_that_is_added_comes_after_those_of_the_method(tmp_path):
    own, last = module(TwoStage, switch=StageSwitch(-2)), Last(-1)
    fit(tmp_path, own, [last], 1)
    assert (own.switch.first_epoch, last.first_epoch) == (1, 3)


class Last(StageSwitch):
    pass


class Score(Callback):
    """The first stage is better than the second."""

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("score", [0.1, 0.3, 0.9, 0.8, 0.85][trainer.current_epoch])


def chosen(folder, epochs, ckpt_path=None):
    """The best score of a fit with a second stage from epoch 2, and stage and epoch of its checkpoints."""
    best, last = RunCheckpoint(folder, "best", "score"), RunCheckpoint(folder, "last")
    fit(folder, module(), [StageSwitch(2)], epochs, callbacks=[Score(), best, last], ckpt_path=ckpt_path)
    files = {path.name: torch.load(path, weights_only=True) for path in folder.glob("*.ckpt")}
    seen = {name: (file["calib_lightning"]["stage"], file["epoch"]) for name, file in files.items()}
    return float(best.best_model_score), seen


def test_the_chosen_checkpoint_is_of_the_last_stage(tmp_path):
    score, seen = chosen(tmp_path, 4)
    assert score == pytest.approx(0.8)
    assert seen == {"best.ckpt": (1, 3), "last.ckpt": (1, 3), "stage-1-best.ckpt": (0, 0), "stage-1-last.ckpt": (0, 1)}


def test_a_run_resumed_in_a_later_stage_keeps_the_choice_of_that_stage(tmp_path):
    chosen(tmp_path, 4)
    score, seen = chosen(tmp_path, 5, tmp_path / "last.ckpt")
    assert score == pytest.approx(0.8)
    assert seen == {"best.ckpt": (1, 3), "last.ckpt": (1, 4), "stage-1-best.ckpt": (0, 0), "stage-1-last.ckpt": (0, 1)}


# --- a module that is not ours ---------------------------------------------------------------------------------------


def test_a_module_of_somebody_elses_is_staged(tmp_path):
    seed_everything(1)
    own, note = Foreign(), Note()
    train, val, image = loaders()
    switch = StageSwitch(2, encoder="net", head="net.fc", training=StageTraining(adam))
    run = trainer(tmp_path, 1, [StepSeed(), switch, note], max_epochs=4)
    run.fit(own, train, val)
    moved = {name for name, value in own.state_dict().items() if not torch.equal(value, note.states[2][name])}
    assert moved == {"net.fc.linear.weight", "net.fc.linear.bias"}
    assert note.modes[3] == {"", "net.fc", "net.fc.linear"}
    assert note.lrs[2] == 0.003
    assert "configure_optimizers" not in vars(own)
    run.save_checkpoint(tmp_path / "own.ckpt")
    own.eval()
    assert torch.equal(load_stages(Foreign(), tmp_path / "own.ckpt")(image), own(image))
    other = trainer(tmp_path, 1, [StageSwitch(2, encoder="net", head="net.fc")])
    done = other.validate(Foreign(), val, ckpt_path=tmp_path / "own.ckpt", verbose=False)
    assert done[0]["val_loss"] == pytest.approx(float(run.callback_metrics["val_loss"]))


def test_resuming_a_module_of_somebody_elses_changes_no_bit(tmp_path):
    def go(folder, stop_after=None, resume=False):
        seed_everything(1)
        own, preemption = Foreign(), Preemption(folder)
        train, val, _ = loaders()

        class Stop(Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                if trainer.global_step == stop_after:
                    preemption._leave_wanted = 143

        keep = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
        switch = StageSwitch(2, encoder="net", head="net.fc")
        run = trainer(folder, 1, [StepSeed(), switch, Stop(), preemption, keep], max_epochs=4)
        train = DataLoader(train.dataset, 16)  # torch's loader cannot go on in the middle of a shuffled epoch
        with suppress(Preempted):
            run.fit(own, train, val, ckpt_path=str(folder / "last.ckpt") if resume else None, weights_only=True)
        os.environ.pop("PL_GLOBAL_SEED", None)
        return digest(own)

    whole = go(tmp_path / "whole")
    for stop in (10, 15):  # the end of stage 1 and of an epoch in stage 2
        go(tmp_path / str(stop), stop)
        assert go(tmp_path / str(stop), resume=True) == whole


def test_features_are_what_goes_into_the_head(tmp_path):
    own, switch = Foreign(), StageSwitch(1, encoder="net", head="net.fc")
    train, _, image = loaders()
    caught = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            caught.append(switch.features(pl_module, [image, None]))

    trainer(tmp_path, 1, [StepSeed(), switch, Look()], max_epochs=2).fit(own, train)
    own.eval()
    assert torch.equal(caught[1], own.net.pool(own.net.bn(own.net.conv(image))))
    assert not caught[1].requires_grad


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ([StageSwitch(4)], "must be at most 3 in a run of 4 epochs"),
        ([StageSwitch(2), StageSwitch(2)], "both switch at epoch 2"),
        ([StageSwitch(1, head="classifier")], "head is 'classifier'; it must be the name of a submodule"),
        ([StageSwitch(1, encoder="backbone")], "encoder is 'backbone'; it must be the name of a submodule"),
        ([StageSwitch(1, lambda d, k: LinearHead(d + 1, k))], "does not fit: it cannot process 96 features"),
        ([StageSwitch(1, lambda d, k: LinearHead(d, k + 1))], r"to \(2, 4\), but 3 classes need \(2, 3\)"),
        ([StageSwitch(2, init_from="trained.ckpt")], "Set at_epoch to 0"),
        ([StageSwitch(1), StageSwitch(2, lambda d, k: LinearHead(d, 7))], r"to \(2, 7\)"),
    ],
)
def test_a_switch_that_cannot_be_made_is_refused_before_training(tmp_path, switches, message):
    own = module()
    before = digest(own)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, own, switches)
    assert digest(own) == before
    assert "on_load_checkpoint" not in vars(own)


def test_another_encoders_checkpoint_is_refused(tmp_path):
    other = ClassificationModule(3, encoder={"name": "resnet18_cifar", "in_channels": 1}, optimizer=sgd)
    run = trainer(tmp_path, 1)
    run.strategy.connect(other)
    run.save_checkpoint(tmp_path / "other.ckpt")
    own = module()
    before = digest(own)
    with pytest.raises(ValueError, match="holds another encoder"):
        fit(tmp_path, own, [StageSwitch(0, init_from=str(tmp_path / "other.ckpt"))])
    assert digest(own) == before
    with pytest.raises(FileNotFoundError, match=r"nothing\.ckpt"):
        fit(tmp_path, own, [StageSwitch(0, init_from=str(tmp_path / "nothing.ckpt"))])


def test_what_a_loader_of_somebody_elses_cannot_do_is_refused(tmp_path):
    train, _, _ = loaders()
    for training, message in (
        (StageTraining(batch_size=8), "batch_size of StageSwitch's training is incompatible with plain loaders"),
        (StageTraining(views=ResizedCropFlip()), "views of StageSwitch's training"),
        (StageTraining(criterion=nn.CrossEntropyLoss()), "no attribute 'criterion'"),
    ):
        run = trainer(tmp_path, 1, [StageSwitch(1, encoder="net", head="net.fc", training=training)], max_epochs=2)
        with pytest.raises(ValueError, match=message):
            run.fit(Foreign(), train)
    # clean images are asked for by the configurations of methods: other loaders give what they have
    switch = StageSwitch(1, encoder="net", head="net.fc", training=StageTraining(views=CleanViews()))
    run = trainer(tmp_path, 1, [switch], max_epochs=2)
    with pytest.warns(UserWarning, match="The stage uses the loader's batches"):
        run.fit(Foreign(), train)


def test_other_strategies_are_refused(tmp_path, monkeypatch):
    run = trainer(tmp_path, 1, [StageSwitch(1)], max_epochs=2)
    monkeypatch.setattr("calib_lightning.core.distributed.SingleDeviceStrategy", nn.Linear)
    with pytest.raises(ValueError, match="under which StageSwitch cannot freeze parameters"):
        run.fit(module(), datamodule=toy())


class Brighter(Views):
    """Views as somebody else writes them: the one method that has no default."""

    def transform(self, normalize, augment, seed):
        return lambda image, index, epoch: normalize(image, index, epoch) + 1


def test_views_of_somebody_elses_need_no_more_than_a_transform(tmp_path):
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            order = trainer.datamodule.ordered_train_loader(augmented=False)
            image = torch.cat([part.image for part in order])
            seen.append(torch.equal(batch.image, image[batch.index] + trainer.current_epoch))

    fit(tmp_path, module(), [StageSwitch(1, training=StageTraining(views=Brighter()))], 2, callbacks=[Look()])
    assert len(seen) == 10
    assert all(seen)


def test_bad_settings_of_a_stage_are_refused():
    with pytest.raises(TypeError, match="derived from Views"):
        StageTraining(views=Brighter)
    with pytest.raises(ValueError, match="batch_size is 0"):
        StageTraining(batch_size=0)
    with pytest.raises(TypeError, match="must be a module such as"):
        StageTraining(criterion=F.cross_entropy)
    with pytest.raises(ValueError, match="frozen_bn is 'off'"):
        StageTraining(frozen_bn="off")


def test_size_of_a_head():
    own = module()
    assert head_size(own, own.head) == (96, 3)
    assert head_size(Foreign(), nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))) == (5, 4)
    with pytest.raises(ValueError, match=r"override StageSwitch\.new_head"):
        head_size(Foreign(), nn.Identity())


def test_a_run_without_a_number_of_epochs(tmp_path):
    with pytest.raises(ValueError, match=r"max_epochs of the trainer is -1"):
        trainer(tmp_path, 1, [StageSwitch(-1)], max_epochs=-1, max_steps=4).fit(module(), datamodule=toy())


def test_a_checkpoint_of_an_older_version_is_read(tmp_path):
    own = module()
    fit(tmp_path, own, [], 1).save_checkpoint(tmp_path / "model.ckpt")
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    for name in ("epoch_rows", "plain_loss"):
        del checkpoint["calib_lightning"][name]
    torch.save(checkpoint, tmp_path / "older.ckpt")
    image = torch.zeros(1, 1, 8, 8)
    assert torch.equal(load_module(tmp_path / "older.ckpt")(image), own.eval()(image))
    del checkpoint["calib_lightning"]["head"]
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="does not name its calib_lightning module"):
        load_module(tmp_path / "other.ckpt")


# --- fits that go back, go on, or meet other callbacks ---------------------------------------------------------------


def test_a_score_of_the_stage_before_chooses_nothing(tmp_path):
    best = RunCheckpoint(tmp_path, "best", "val/nll")
    scores, measured = [], {}

    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            scores.append((trainer.current_epoch, best.best_model_score))

        def on_validation_end(self, trainer, pl_module):
            measured[trainer.current_epoch] = float(trainer.callback_metrics["val/nll"])

    fit(tmp_path, module(), [StageSwitch(2)], 6, callbacks=[Look(), best], check_val_every_n_epoch=2)
    assert scores[3][1] is None  # epoch 2 had no validation, and that of epoch 3 is looked at after this callback
    chosen = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert measured.keys() == {1, 3, 5}
    assert measured[chosen["epoch"]] == float(best.best_model_score) == min(measured[3], measured[5])


def test_a_metric_that_is_not_there_is_still_told_of(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"monitor='val/nl'"):
        fit(tmp_path, module(), [], 1, callbacks=[RunCheckpoint(tmp_path, "best", "val/nl")])


@pytest.mark.parametrize("foreign", [False, True])
def test_the_criterion_follows_the_precision(tmp_path, foreign):
    weight = torch.tensor([1.0, 2.0, 3.0])
    training = StageTraining(criterion=nn.CrossEntropyLoss(weight=weight))
    options = {"max_epochs": 2, "precision": "64-true"}
    if not foreign:
        own = module()
        fit(tmp_path, own, [StageSwitch(1, training=training)], 2, precision="64-true")
        assert own.criterion.weight.dtype == torch.float64
        return
    own, (train, _, _) = Foreign(), loaders()
    own.criterion = F.cross_entropy  # a function, which nn.Module keeps elsewhere than a submodule
    own.training_step = lambda batch, batch_idx: own.criterion(own(batch[0].double()), batch[1])
    run = trainer(tmp_path, 1, [StageSwitch(1, encoder="net", head="net.fc", training=training)], **options)
    run.fit(own, train)
    assert own.criterion is training.criterion


def test_a_fit_may_go_back_to_the_first_stage(tmp_path):
    class Keep(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    note, own = Note(), module(scheduler=cosine)
    switch = StageSwitch(2, training=StageTraining(adam, batch_size=8))
    run = fit(tmp_path, own, [switch], 4, callbacks=[Keep(), note])
    whole = digest(own)
    os.environ["PL_GLOBAL_SEED"] = "3"
    run.fit(own, datamodule=toy(), ckpt_path=tmp_path / "0.ckpt", weights_only=True)
    os.environ.pop("PL_GLOBAL_SEED")
    assert set(note.sizes[1]) == {16, 15}
    assert digest(own) == whole


@pytest.mark.parametrize("averaging", [StochasticWeightAveraging(1e-2), EMAWeightAveraging()])
def test_weight_averaging_is_refused(tmp_path, averaging):
    with pytest.raises(ValueError, match="averages the weights of all stages"):
        fit(tmp_path, module(), [StageSwitch(1), averaging], 2)


def test_another_trainer_goes_on_in_the_last_stage(tmp_path):
    own, switches = module(), [StageSwitch(1), StageSwitch(2, training=StageTraining(adam, CosineToEnd, batch_size=8))]
    fit(tmp_path, own, switches, 3)
    head, note = own.head, Note()
    fit(tmp_path, own, switches, 2, callbacks=[note])
    assert own.head is head
    assert own.stage == 2
    assert set(note.sizes[0]) == {8, 7}
    assert note.lrs == {0: 0.003, 1: pytest.approx(0.0015)}
    assert [p for p in own.parameters() if p.requires_grad] == list(head.parameters())


def test_the_order_of_a_list_does_not_matter(tmp_path):
    own, note = module(), Note()
    switches = [StageSwitch(2, training=StageTraining(adam)), StageSwitch(1, training=StageTraining(sgd, batch_size=8))]
    run = fit(tmp_path, own, switches, 3)
    run.fit_loop.max_epochs = 4
    run.callbacks.append(note)
    run.fit(own, datamodule=toy())
    assert note.lrs == {3: 0.003}
    assert set(note.sizes[3]) == {16, 15}


def test_a_switch_beside_a_methods_own_is_not_dropped_in_silence(tmp_path):
    own = module(TwoStage, switch=StageSwitch(1))
    with pytest.raises(ValueError, match="for which Lightning would drop it"):
        fit(tmp_path, own, [StageSwitch(2)], 3)
    run = fit(tmp_path, module(TwoStage, switch=StageSwitch(1)), [], 3)
    # what an earlier method has left in the trainer may go
    run.fit_loop.max_epochs = 5
    run.fit(module(TwoStage, switch=StageSwitch(4)), datamodule=toy())


def test_early_stopping_begins_anew_and_a_switch_that_never_came_is_told_of(tmp_path):
    class Score(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("score", [0.5, 0.1, 0.9, 0.8, 0.7][trainer.current_epoch])

    def stopping(patience):
        return EarlyStopping("score", patience=patience, check_on_train_epoch_end=False)

    run = fit(tmp_path, module(), [StageSwitch(2)], 5, callbacks=[Score(), stopping(2)])
    assert run.current_epoch == 5
    with pytest.warns(UserWarning, match="should have switched at epoch 4, but training ended earlier"):
        fit(tmp_path, module(), [StageSwitch(4)], 5, callbacks=[Score(), stopping(1)])


def test_other_switches_than_those_of_the_checkpoint_are_refused(tmp_path):
    class Other(StageSwitch):
        pass

    staged_run(tmp_path, 7)  # before any switch
    with pytest.raises(ValueError, match="in its place"):
        staged_run(tmp_path, resume=True, switches=[Other(2), StageSwitch(-2)])
    staged_run(tmp_path / "later", 18)
    with pytest.raises(ValueError, match="no such switch"):
        staged_run(tmp_path / "later", resume=True, switches=[])
    with pytest.raises(ValueError, match="at epoch 1 in its place"):
        staged_run(tmp_path / "later", resume=True, switches=[StageSwitch(1), StageSwitch(-2)])


@pytest.mark.parametrize(
    ("options", "training", "message"),
    [
        ({"batch_transform": AugMixTransform()}, StageTraining(views=CleanViews()), "needs its own views"),
        ({}, StageTraining(views=ContrastiveViews()), "makes 2 views of each image"),
    ],
)
def test_views_that_do_not_fit_are_refused_before_training(tmp_path, options, training, message):
    own = module(CrossEntropy, **options)
    before = digest(own)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, own, [StageSwitch(1, training=training)], 2)
    assert digest(own) == before


def test_modules_and_batches_that_cannot_be_staged_are_refused_before_the_first_step(tmp_path):
    class Two(Foreign):
        def configure_optimizers(self):
            return super().configure_optimizers(), super().configure_optimizers()

        automatic_optimization = False

    class Named(Foreign):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    train, _, _ = loaders()
    named = DataLoader([{"x": image, "y": label} for image, label in train.dataset], 16)
    plateau = StageTraining(scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    masked = MaskedClassifier(1, encoder="net", head="net.fc", sparsity=AdaptiveSparsity(held_out=False))
    for own, loader, switch, error, message in (
        (Two(), train, StageSwitch(1, encoder="net", head="net.fc"), ValueError, "has 2 optimisers"),
        (Named(), named, masked, TypeError, r"keys 'x', 'y'\. Give batch="),
        (Foreign(), train, StageSwitch(1, encoder="net", head="net.fc", training=plateau), ValueError, "val/nll"),
    ):
        before = digest(own)
        with pytest.raises(error, match=message):
            trainer(tmp_path, 1, [switch], max_epochs=2).fit(own, loader)
        assert digest(own) == before


def test_a_stage_whose_length_must_be_known(tmp_path):
    for switch in (MaskedClassifier(1), StageSwitch(1, training=StageTraining(scheduler=CosineToEnd))):
        with pytest.raises(ValueError, match=r"needs the length of its stage\. Set trainer\.max_epochs"):
            fit(tmp_path, module(), [switch], -1, max_steps=30)


def test_a_fast_run_tries_the_new_stage(tmp_path):
    own = module(TwoStage)
    fit(tmp_path, own, [], 100, fast_dev_run=True)
    assert own.stage == 1


def test_a_stage_before_which_nothing_is_trained_is_told_of(tmp_path):
    with pytest.warns(UserWarning, match="freezes the module before its first step"):
        fit(tmp_path, module(), [StageSwitch(0)], 1)


def test_a_stage_of_few_steps_is_told_of(tmp_path):
    with pytest.warns(UserWarning, match="has only 10 steps, too few for a new head"):
        fit(tmp_path, module(), [StageSwitch(1)], 3)


def test_heads_that_no_checkpoint_could_build_are_refused_or_told_of(tmp_path):
    with pytest.raises(ValueError, match="so a checkpoint could not rebuild it"):
        fit(tmp_path, module(), [StageSwitch(1, nn.Linear)], 2)
    train, _, _ = loaders()
    with pytest.warns(UserWarning, match="so load_stages cannot rebuild it"):
        trainer(tmp_path, 1, [StageSwitch(1, nn.Linear, encoder="net", head="net.fc")], max_epochs=2).fit(
            Foreign(), train
        )


def test_evaluating_with_the_same_trainer_names_no_callback_that_is_replaced(tmp_path, caplog):
    own = module(TwoStage, switch=StageSwitch(1))
    run = fit(tmp_path, own, [], 2)
    with caplog.at_level("INFO"):
        run.validate(own, datamodule=toy(), verbose=False)
    assert "override existing callbacks" not in caplog.text
    assert sum(isinstance(callback, StageSwitch) for callback in run.callbacks) == 1
