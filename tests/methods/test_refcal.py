"""The contrastive loss against a double loop, on one process and on two; both stages of RefCal together."""

from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import normalize
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from calib_lightning.core import LinearHead, StepSeed, load_module
from calib_lightning.core.stages import StageSwitch, StageTraining
from calib_lightning.data import DigitsDataModule, SplitSpec, ToyDataModule
from calib_lightning.data.views import ContrastiveViews, ResizedCropFlip
from calib_lightning.methods.focal import FocalLoss
from calib_lightning.methods.mdca import MDCALoss
from calib_lightning.methods.mixup import MixupTransform
from calib_lightning.methods.parts.refcal_loss import SimCLRLoss, SupConLoss, supcon_loss
from calib_lightning.methods.refcal import ProjectionHead, RefCal
from calib_lightning.types import Batch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*could not find the monitored key"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),
]

LABELS = torch.tensor([2, 0, 2, 1, 0])


def unit(*shape, seed=0):
    return normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


def loop(embeddings, labels, temperature=0.1, base=0.07):
    """The equation, one anchor after the other, in float64."""
    count, views, _ = embeddings.shape
    z = np.asarray(embeddings, dtype=np.float64).reshape(count * views, -1)
    group = [row if labels is None else int(labels[row]) for row in range(count) for _ in range(views)]
    total = 0.0
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [a for a in others if group[a] == group[i]]
        log_sum = np.log(sum(np.exp(z[i] @ z[a] / temperature) for a in others))
        if positives:
            total -= sum(z[i] @ z[p] / temperature - log_sum for p in positives) / len(positives)
    return temperature / base * total / len(z)


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize(("temperature", "base"), [(0.1, 0.07), (0.07, 0.07), (1.0, 0.5)])
def test_supcon_equals_a_double_loop(views, temperature, base):
    # with one view the row of class 1 has no positive: it contributes 0 and counts
    z = unit(5, views, 7)
    found = supcon_loss(z, LABELS, temperature=temperature, base_temperature=base)
    assert found.item() == pytest.approx(loop(z, LABELS, temperature, base), rel=1e-12)


@pytest.mark.parametrize("views", [2, 3])
def test_without_labels_each_row_is_its_own_class(views):
    z = unit(5, views, 7)
    found = supcon_loss(z, None).item()
    assert found == pytest.approx(loop(z, None), rel=1e-12)
    assert found == pytest.approx(supcon_loss(z, torch.tensor([8, 3, 0, 2, 11])).item(), rel=1e-12)


def test_two_rows_of_one_class():
    z = unit(2, 2, 5)
    labels = torch.tensor([4, 4])
    assert supcon_loss(z, labels).item() == pytest.approx(loop(z, labels), rel=1e-12)
    # all the others are positives: the mean of -log softmax
    alike = torch.ones(2, 2, 1, dtype=torch.float64)
    assert supcon_loss(alike, labels, base_temperature=0.1).item() == pytest.approx(np.log(3))


@pytest.mark.parametrize("labels", [LABELS, None])
def test_gradient_is_that_of_the_value(labels):
    z = unit(5, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(partial(supcon_loss, labels=labels), (z,))


def test_neither_order_nor_orientation_counts():
    z = unit(5, 2, 7)
    expected = supcon_loss(z, LABELS)
    order = torch.tensor([3, 0, 4, 1, 2])
    turn = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    for same in (supcon_loss(z[order], LABELS[order]), supcon_loss(z.flip(1), LABELS), supcon_loss(z @ turn, LABELS)):
        torch.testing.assert_close(same, expected, rtol=1e-12, atol=0)
    # of a single row too
    swapped = z.clone()
    swapped[2] = z[2].flip(0)
    torch.testing.assert_close(supcon_loss(swapped, LABELS), expected, rtol=1e-12, atol=0)
    assert abs(supcon_loss(z, LABELS.roll(1)) - expected) > 0.01


def test_nothing_to_draw_together_is_no_loss():
    z = unit(4, 1, 3).requires_grad_()
    loss = supcon_loss(z, torch.arange(4))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
def test_value_and_gradient_are_finite(size):
    for z in (torch.full((3, 2, 4), size / 2), size * unit(3, 2, 4).float()):
        z.requires_grad_()
        loss = supcon_loss(z, torch.tensor([0, 1, 0]), temperature=0.01)
        loss.backward()
        assert loss.isfinite()
        assert z.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_first(dtype):
    z = unit(5, 2, 64).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = supcon_loss(z, LABELS)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(loop(z.detach().double(), LABELS), rel=1e-5)
    loss.backward()
    assert z.grad.isfinite().all()


def test_autocast_changes_nothing():
    z = unit(5, 2, 64).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = supcon_loss(z, LABELS)
    assert torch.equal(inside, supcon_loss(z, LABELS))


@pytest.mark.parametrize(
    ("embeddings", "labels", "error", "message"),
    [
        (torch.ones(2, 2, 3).long(), torch.zeros(2), TypeError, "embeddings have dtype torch.int64"),
        (torch.ones(4, 3), torch.zeros(4).long(), ValueError, r"shape \(4, 3\); it must be \(N, V, D\)"),
        (torch.ones(0, 2, 3), torch.zeros(0).long(), ValueError, r"shape \(0, 2, 3\)"),
        (torch.ones(4, 1, 3), None, ValueError, "one view per row and there are no labels"),
        (torch.ones(1, 1, 3), torch.zeros(1).long(), ValueError, "1 row with 1 view"),
        (torch.ones(4, 2, 3), torch.ones(4, 2), ValueError, r"labels have shape \(4, 2\).* soft targets"),
        (
            torch.ones(4, 2, 3),
            torch.zeros(8).long(),
            ValueError,
            r"labels have shape \(8,\), the embeddings \(4, 2, 3\)",
        ),
        (torch.ones(4, 2, 3), torch.zeros(4), TypeError, "labels have dtype torch.float32"),
    ],
)
def test_bad_input_is_named(embeddings, labels, error, message):
    with pytest.raises(error, match=message):
        supcon_loss(embeddings, labels)


@pytest.mark.parametrize("name", ["temperature", "base_temperature"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_temperatures_are_named(name, value):
    for build in (SupConLoss, SimCLRLoss, partial(supcon_loss, unit(2, 2, 3), None)):
        with pytest.raises(ValueError, match=f"^{name} is {value}; it must be above 0"):
            build(**{name: value})


def test_the_modules_are_the_function():
    z = unit(5, 2, 7)
    options = {"temperature": 0.3, "base_temperature": 0.2}
    assert torch.equal(SupConLoss(**options)(z, LABELS), supcon_loss(z, LABELS, **options))
    assert torch.equal(SimCLRLoss(**options)(z, LABELS), supcon_loss(z, None, **options))
    assert torch.equal(SupConLoss()(z, LABELS), supcon_loss(z, LABELS, temperature=0.1, base_temperature=0.07))


def _case(seed=0):
    """Inputs (5, 2, 6) and a weight (6, 4)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 2, 6, generator=generator), torch.randn(6, 4, generator=generator)


def loss_of_rows(rank, world, rows, criterion):
    """Loss of this process's rows, and the gradients of weight and embeddings, the first as DDP would have it."""
    x, weight = _case()
    weight.requires_grad_()
    z = normalize(x[rows[rank]] @ weight, dim=-1)
    z.retain_grad()
    loss = criterion(z, LABELS[rows[rank]])
    loss.backward()
    if world > 1:
        torch.distributed.all_reduce(weight.grad)
    return loss.item(), (weight.grad / world).numpy(), z.grad.numpy()


@pytest.mark.parametrize("criterion", [SupConLoss(), SimCLRLoss()], ids=lambda criterion: type(criterion).__name__)
@pytest.mark.parametrize("rows", [[[0, 1, 2], [3, 4]], [[4], [0, 1, 2, 3]], [[0, 2], [1, 3]]])
def test_two_processes_have_the_loss_and_gradient_of_one(pool2, criterion, rows):
    both = rows[0] + rows[1]
    value, weight, embeddings = loss_of_rows(0, 1, [both], criterion)
    first, second = pool2.run(loss_of_rows, rows, criterion)
    assert (first[0] + second[0]) / 2 == pytest.approx(value, rel=1e-6)
    for part in (first, second):
        np.testing.assert_allclose(part[1], weight, rtol=0, atol=1e-6)
    # of twice the mean over processes
    np.testing.assert_allclose(np.concatenate([first[2], second[2]]) / 2, embeddings, rtol=0, atol=1e-6)
    if len(both) < 5:  # what the other process has makes a difference
        alone = loss_of_rows(0, 1, [rows[0]], criterion)
        assert abs(alone[0] - value) > 1e-2


# --- the head --------------------------------------------------------------------------------------------------------


def test_embeddings_have_length_one_in_single_precision():
    head = ProjectionHead(6, width=4)
    assert [tuple(p.shape) for p in head.parameters()] == [(6, 6), (6,), (4, 6), (4,)]
    features = torch.randn(5, 6)
    first, _, second = head.layers
    expected = second(first(features).relu())
    torch.testing.assert_close(head(features), expected / expected.norm(dim=1, keepdim=True))
    with torch.autocast("cpu", torch.bfloat16):
        low = head(features)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.norm(dim=1), torch.ones(5))
    with pytest.raises(ValueError, match="width of the projection is 0; it must be at least 1"):
        ProjectionHead(6, 0)


# --- the method ------------------------------------------------------------------------------------------------------


CROPS = ResizedCropFlip((0.5, 1.0), flip=False)


def switch(at_epoch=-4, views=CROPS):
    sgd = partial(SGD, lr=0.5, momentum=0.9)
    return StageSwitch(at_epoch, LinearHead, StageTraining(sgd, criterion=MDCALoss(FocalLoss(2.0), 1.0), views=views))


def module(num_classes=3, at_epoch=-2, **options):
    torch.manual_seed(0)
    options = {"views": ContrastiveViews((0.5, 1.0), flip=False), "switch": switch(at_epoch)} | options
    return RefCal(num_classes, encoder="digits_cnn", optimizer=partial(SGD, lr=0.1, momentum=0.9), **options)


def toy(**options):
    return ToyDataModule(SplitSpec(val=31, calibration=30), batch_size=16, train_size=130, **options)


class Watch(Callback):
    """Notes the encoder at the switch, the metrics of every epoch, and the shapes of images."""

    def __init__(self):
        self.frozen, self.metrics, self.shapes, self.validated = None, [], {}, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.shapes.setdefault(trainer.current_epoch, set()).add(tuple(batch[0].shape[1:]))
        if pl_module.stage == 1 and self.frozen is None:
            self.frozen = {name: value.clone() for name, value in pl_module.encoder.state_dict().items()}

    def on_validation_end(self, trainer, pl_module):
        self.validated.append(trainer.current_epoch)

    def on_train_epoch_end(self, trainer, pl_module):
        self.metrics.append({key: float(value) for key, value in trainer.callback_metrics.items()})


@pytest.mark.filterwarnings("error:.*nan.*")
def test_both_stages_learn_digits(fit):
    watch = Watch()
    network = module(10, -4)
    trainer = fit(network, DigitsDataModule(batch_size=64), 12, callbacks=[watch], num_sanity_val_steps=2)
    assert isinstance(network.head, LinearHead)
    assert [set(metrics) for metrics in watch.metrics[:8]] == [{"train/loss"}] * 8
    assert watch.metrics[7]["train/loss"] < 0.9 * watch.metrics[0]["train/loss"]
    assert watch.validated == [8, 9, 10, 11]
    assert {"train/loss", "train/accuracy", "val/nll", "val/correctness_auroc"} <= set(watch.metrics[-1])
    assert watch.metrics[-1]["val/accuracy"] > 0.9
    # the encoder is that of the switch, bit for bit: parameters and statistics
    assert watch.frozen.keys() == network.encoder.state_dict().keys()
    assert all(torch.equal(value, watch.frozen[name]) for name, value in network.encoder.state_dict().items())
    assert all(watch.shapes[epoch] == {(2, 1, 8, 8)} for epoch in range(8))
    assert all(watch.shapes[epoch] == {(1, 8, 8)} for epoch in range(8, 12))
    assert trainer.limit_val_batches == 1.0


def test_the_first_stage_minimises_the_given_loss(fit):
    class Spread(torch.nn.Module):
        """Draws all embeddings to one half-space."""

        def forward(self, embeddings, labels):
            assert embeddings.shape[1:] == (2, 8)
            assert embeddings.shape[:1] == labels.shape
            return (1 - embeddings[..., 0]).mean()

    watch = Watch()
    fit(module(projection=8, refinement_loss=Spread()), toy(), 4, callbacks=[watch])
    assert watch.metrics[1]["train/loss"] < 0.1


def test_both_views_go_through_the_network_together():
    network = module()
    image = torch.randn(4, 2, 1, 8, 8)
    labels = torch.tensor([0, 1, 1, 2])
    loss, embeddings = network.loss(Batch(image, labels, torch.arange(4)))
    again = module()
    z = torch.stack(again.head(again.encoder(torch.cat(list(image.unbind(1))))).chunk(2), dim=1)
    torch.testing.assert_close(embeddings, z)
    torch.testing.assert_close(loss, supcon_loss(z, labels))
    # one pass: the statistics of BatchNorm are of all eight
    for (name, mine), theirs in zip(network.encoder.named_buffers(), again.encoder.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)


class Plain(LightningDataModule):
    """Somebody else's data module, with any shape of images."""

    def __init__(self, *shape, rows=4):
        super().__init__()
        self.shape, self.rows = shape, rows

    def train_dataloader(self):
        image = torch.randn(12, *self.shape, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(image, torch.arange(12) % 3, torch.arange(12)), self.rows)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 1, 8, 8)])
def test_one_view_is_refused_before_any_update(fit, shape):
    network = module(switch=switch(-1, views=None))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    told = r"images have shape \(4, 1.* first stage of RefCal needs two views.*divide, wrap each part, not the whole"
    with pytest.raises(ValueError, match=told):
        fit(network, Plain(*shape), 2)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.filterwarnings("ignore:StageSwitch should have switched at epoch")
def test_a_batch_of_one_row_is_refused_and_a_foreign_data_module_may_give_views(fit):
    with pytest.raises(ValueError, match="training batch has 1 image"):
        fit(module(switch=switch(-1, views=None)), Plain(2, 1, 8, 8, rows=1), 2)
    watch = Watch()
    fit(module(switch=switch(-1, views=None)), Plain(2, 1, 8, 8), 2, callbacks=[watch, Stop(0)])
    assert watch.shapes == {0: {(2, 1, 8, 8)}}
    assert watch.metrics[0]["train/loss"] > 0


@pytest.mark.filterwarnings("ignore:StageSwitch should have switched at epoch")
def test_what_has_no_classifier_is_not_evaluated(fit, tmp_path):
    network = module()
    trainer = fit(network, toy(), 3, callbacks=[Stop(0)])
    assert network.stage == 0
    for evaluate in (trainer.validate, trainer.test, trainer.predict):
        with pytest.raises(RuntimeError, match="no classifier yet"):
            evaluate(network, datamodule=toy())
    trainer.strategy.connect(network)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    loaded = load_module(tmp_path / "first.ckpt")
    assert isinstance(loaded.head, ProjectionHead)
    image = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(loaded.features(image), network.eval().features(image))
    torch.testing.assert_close(loaded.head(loaded.features(image)), network.head(network.features(image)))
    with pytest.raises(RuntimeError, match="no classifier yet"):
        loaded(image)


class Stop(Callback):
    """Ends the fit after an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch == self.epoch


def train(folder, ckpt_path=None, world=1):
    seed_everything(5)
    keep = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    best = ModelCheckpoint(folder / "best", "best", monitor="val/nll", enable_version_counter=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        max_epochs=3,
        callbacks=[StepSeed(), keep, best],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    network = module(projection=16)
    trainer.fit(network, datamodule=toy(), ckpt_path=ckpt_path)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return {name: value.clone() for name, value in network.state_dict().items()}, metrics, best.best_model_path


def test_a_fit_resumed_in_either_stage_ends_in_the_same_bits(tmp_path):
    state, metrics, _ = train(tmp_path / "whole")
    for epoch in range(4):
        again, found, _ = train(tmp_path / "again", ckpt_path=tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert again.keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in again.items())
        assert found == pytest.approx(metrics, nan_ok=True)


def test_checkpoints_of_the_second_stage_come_back(tmp_path):
    _, _, best = train(tmp_path)
    for path in (best, tmp_path / "epoch=4.ckpt"):
        loaded = load_module(path)
        assert isinstance(loaded, RefCal)
        assert isinstance(loaded.head, LinearHead)
        given = {name: value for name, value in loaded.hparams.items() if value is not None}
        assert given == {"num_classes": 3, "projection": 16, "encoder": "digits_cnn"}
        assert loaded(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    early = load_module(tmp_path / "epoch=1.ckpt")
    assert early.head.spec == ProjectionHead(96, 16).spec


def fit_in_pool(rank, world, folder):
    state, metrics, _ = train(folder, world=world)
    return {name: value.numpy() for name, value in state.items()}, metrics


def test_two_processes_end_with_equal_weights(pool2, tmp_path):
    (one, metrics), (two, others) = pool2.run(fit_in_pool, tmp_path)
    own = ("train_state.", "val_state.")  # each process's rows
    names = [name for name in one if not name.startswith(own)]
    assert any(name.startswith("head.") for name in names)
    for name in names:
        if "running" not in name and "num_batches" not in name:  # BatchNorm is each process's own in the first stage
            np.testing.assert_array_equal(one[name], two[name])
    assert metrics["val/accuracy"] > 0.3
    assert {key: value for key, value in metrics.items() if key.startswith("val/")}.keys() <= others.keys()


def test_it_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match=r"RefCal has a batch_transform \(MixupTransform\).*no criterion"):
        module(batch_transform=MixupTransform(), switch=StageSwitch(-1))
    with pytest.raises(ValueError, match=r"joint is 1\.0 and batch_transform is a MixupTransform"):
        module(batch_transform=MixupTransform(), joint=1.0)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"^joint is {weight}; it must be above 0"):
            module(joint=weight)
    for name, example in (("switch", "StageSwitch"), ("views", "ContrastiveViews"), ("refinement_loss", "SupConLoss")):
        with pytest.raises(TypeError, match=rf"^{name} of RefCal is 3; it must be an object such as {example}"):
            module(**{name: 3})
    network = module()
    network.log = lambda *args, **kwargs: None
    batch = Batch(torch.randn(4, 2, 1, 8, 8), torch.full((4, 3), 1 / 3), torch.arange(4))
    with pytest.raises(ValueError, match="soft targets"):
        network.training_step(batch, 0)
    with pytest.raises(ValueError, match=r"label 3; labels must be in 0\.\.2"):
        network.training_step(batch._replace(label=torch.tensor([0, 1, 2, 3])), 0)


def test_the_default_second_stage_is_the_authors_example():
    stage = RefCal(10, encoder="digits_cnn").switch.training
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = stage.optimizer([parameter])
    scheduler = stage.scheduler(optimizer)
    group = optimizer.param_groups[0]
    assert (group["momentum"], group["weight_decay"], stage.batch_size) == (0.9, 0, 512)
    rates = []
    for _ in range(100):
        rates.append(group["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([5.0] * 60 + [1.0] * 15 + [0.2] * 15 + [0.04] * 10)
    assert (stage.criterion.criterion.gamma, stage.criterion.strength) == (2.0, 10.0)
