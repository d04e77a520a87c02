"""CRL: its equation, and a history that every process shares."""

import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch.utils.data import DataLoader

from calib_lightning import methods
from calib_lightning.core import CorrectnessHistory, load_module
from calib_lightning.data import SplitSpec, ToyDataModule
from calib_lightning.methods import CRL, AdaptiveSparsity, MaskedClassifier

OF_THE_STEPS = AdaptiveSparsity(held_out=False)


def _sgd(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def test_ranking_loss_and_gradient_equal_the_equation():
    rng = np.random.default_rng(0)
    kappa, rate = rng.random(9), rng.integers(0, 3, 9) / 2
    expected, gradient = 0.0, np.zeros(9)
    for i in range(9):
        j = (i + 1) % 9
        if rate[i] != rate[j]:
            t = 1 if rate[i] > rate[j] else -1
            value = -t * (kappa[i] - kappa[j]) + abs(rate[i] - rate[j])
            if value > 0:
                expected += value / 9
                gradient[i] -= t / 9
                gradient[j] += t / 9
    confidence = torch.tensor(kappa, requires_grad=True)
    loss = methods.correctness_ranking_loss(confidence, torch.tensor(rate))
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(confidence.grad.numpy(), gradient, atol=1e-15)


def test_a_pair_in_the_wrong_order_is_pulled_apart():
    # the first sample was right more often but is less confident
    confidence = torch.tensor([0.4, 0.6], requires_grad=True)
    methods.correctness_ranking_loss(confidence, torch.tensor([1.0, 0.5])).backward()
    assert confidence.grad[0] < 0 < confidence.grad[1]


def test_no_loss_without_history_and_for_a_single_row():
    assert methods.correctness_ranking_loss(torch.rand(5), torch.zeros(5)) == 0
    assert methods.correctness_ranking_loss(torch.rand(1), torch.ones(1)) == 0
    # every sample was right in every epoch: 0 / 0 in the formula
    assert methods.correctness_rate(torch.tensor([2, 2]), torch.tensor([0, 1]), 2).tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["softmax", "margin", "entropy"])
def test_confidences(kind):
    z = np.random.default_rng(1).normal(size=(4, 5))
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    top = np.sort(p, axis=1)
    expected = {
        "softmax": top[:, -1],
        "margin": top[:, -1] - top[:, -2],
        "entropy": 1 + (p * np.log(p)).sum(axis=1) / np.log(5),
    }
    np.testing.assert_allclose(methods.ranking_confidence(torch.tensor(z), kind).numpy(), expected[kind], rtol=1e-12)
    extreme = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    methods.ranking_confidence(extreme, kind).sum().backward()
    assert extreme.grad.isfinite().all()


class Record(Callback):
    """Keeps every batch, its outputs and the loss."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        index, right = pl_module.criterion._seen
        self.steps.append((trainer.current_epoch, index.numpy().copy(), right.numpy().copy(), outputs["loss"].item()))


class Watched(CRL):
    """CRL that keeps the logits of its steps."""

    def loss(self, batch):
        loss, logits = super().loss(batch)
        self.kept.append((logits.detach().numpy().astype(np.float64), batch.label.numpy()))
        return loss, logits


def test_four_epochs_equal_a_replay_of_the_authors_rules(fit):
    data = ToyDataModule(SplitSpec(), batch_size=16, train_size=90)
    module = Watched(3, encoder="digits_cnn", optimizer=_sgd)
    module.kept, record = [], Record()
    fit(module, data, epochs=4, callbacks=[record])
    count, seen_pairs = np.zeros(90), 0
    for (epoch, index, right, loss), (z, labels) in zip(record.steps, module.kept, strict=True):
        log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        kappa = np.exp(log_p).max(axis=1)
        epochs = max(1, epoch)
        span = epochs - count.min()
        rate = (count[index] - count.min()) / span if span else np.zeros(len(index))
        expected = -log_p[np.arange(len(index)), labels].mean()
        for i in range(len(index)):
            j = (i + 1) % len(index)
            if rate[i] != rate[j]:
                seen_pairs += 1
                gap = np.sign(rate[i] - rate[j]) * (kappa[i] - kappa[j])
                expected += max(0.0, abs(rate[i] - rate[j]) - gap) / len(index)
        assert loss == pytest.approx(expected, rel=1e-4)
        count[index] += right
    assert seen_pairs > 50
    assert module.history.count.tolist() == count.tolist()
    assert 0 < count.sum() < 4 * 90


def test_history_goes_on_where_a_checkpoint_left_it():
    whole, part = CorrectnessHistory(4), CorrectnessHistory(4)
    index, right = torch.tensor([3, 1]), torch.tensor([True, False])
    for history in (whole, part):
        history.update(torch.tensor([0, 3]), torch.tensor([True, True]))
        history.settle()
        history.update(index, right)
    resumed = CorrectnessHistory(4)
    resumed.restore(part.rows())  # rows arrive before the settled counts
    resumed.load_state_dict(part.state_dict())
    assert resumed.counts.tolist() == whole.counts.tolist() == [1, 0, 0, 2]
    resumed.settle()
    resumed.settle()
    whole.settle()
    assert resumed.count.tolist() == whole.count.tolist() == [1, 0, 0, 2]


def test_rows_of_a_checkpoint_follow_to_the_device(monkeypatch):
    original = torch.cat

    def cat(parts, *options):
        # what a GPU refuses; the device "meta" would let it pass
        assert {part.device.type for part in parts} == {"meta"}
        return original(parts, *options)

    monkeypatch.setattr(torch, "cat", cat)
    for rows in (torch.zeros((0, 2), dtype=torch.int64), torch.zeros((3, 2), dtype=torch.int64)):
        history = CorrectnessHistory(4).to("meta")
        history.restore(rows)
        history.update(torch.zeros(2, dtype=torch.int64, device="meta"), torch.ones(2, device="meta"))
        assert history.rows().shape == (len(rows) + 2, 2)
        history.settle()


def test_a_new_fit_of_a_trained_module_starts_a_new_history(fit, tmp_path):
    data = ToyDataModule(batch_size=16, train_size=60)
    module = CRL(3, encoder="digits_cnn", optimizer=_sgd)
    trainer = fit(module, data, epochs=3)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    assert int(module.history.count.max()) > 1
    loaded = load_module(tmp_path / "model.ckpt").train()
    assert torch.equal(loaded.history.count, module.history.count)
    loaded.optimizer = _sgd
    fit(loaded, data)
    assert int(loaded.history.count.max()) == 1
    # more epochs with the same trainer go on
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, datamodule=data)
    assert int(module.history.count.max()) == 4


def test_a_checkpoint_from_before_the_criterion_had_the_history_is_read(fit, tmp_path):
    module = CRL(3, encoder="digits_cnn", optimizer=_sgd)
    trainer = fit(module, ToyDataModule(batch_size=16, train_size=60), epochs=3)
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    old = torch.load(tmp_path / "new.ckpt", weights_only=True)
    old["state_dict"]["history.count"] = old["state_dict"].pop("criterion.history.count")
    rows = old["calib_lightning"]["epoch_rows"]
    rows["history"] = rows.pop("criterion/0/history")
    old.pop("checksums", None)
    torch.save(old, tmp_path / "old.ckpt")
    assert torch.equal(load_module(tmp_path / "old.ckpt").history.count, module.history.count)
    assert int(module.history.count.max()) > 1
    rows["history"] = [torch.tensor([[2, 1], [5, 1]])]
    torch.save(old, tmp_path / "old.ckpt")
    assert load_module(tmp_path / "old.ckpt").history.counts.sum() == module.history.count.sum() + 2


def test_a_checkpoint_of_a_later_stage_from_before_the_criterion_had_the_history_is_resumed(fit, tmp_path):
    def run(epochs, **options):
        module = CRL(3, encoder="digits_cnn", optimizer=_sgd)
        data, switch = ToyDataModule(batch_size=16, train_size=60), MaskedClassifier(2, sparsity=OF_THE_STEPS)
        return fit(module, data, epochs, callbacks=[switch], **options), module

    trainer, module = run(4)
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    old = torch.load(tmp_path / "new.ckpt", weights_only=True)
    old["state_dict"]["history.count"] = torch.ones(60, dtype=torch.int64)
    old["calib_lightning"]["epoch_rows"] = {"history": [torch.zeros((0, 2), dtype=torch.int64)]}
    old.pop("checksums", None)
    torch.save(old, tmp_path / "old.ckpt")
    ends = [run(6, ckpt_path=tmp_path / name)[1].state_dict() for name in ("new.ckpt", "old.ckpt")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert not torch.equal(ends[0]["head.linear.weight"], module.head.linear.weight)
    assert load_module(tmp_path / "old.ckpt").history.count.sum() == 60
    with pytest.raises(RuntimeError, match="criterion of this stage is a CrossEntropyLoss, which keeps no history"):
        _ = module.history


def test_repeated_rows_keep_the_rate_in_its_range():
    # a count above the number of epochs
    rate = methods.correctness_rate(torch.tensor([4, 0, 1]), torch.tensor([0, 1, 2]), 2)
    assert rate.tolist() == [1, 0, 0.5]


class Indexed(torch.utils.data.Dataset):
    def __init__(self, index):
        self.index = index

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return torch.rand(1, 8, 8), i % 3, self.index(i)


@pytest.mark.parametrize(
    ("index", "named"),
    [
        (lambda i: 0, "Sample 11 of the training set has the index 0"),
        (lambda i: i + 1, "Sample 0 .* has the index 1"),
        (lambda i: i if i in (0, 11) else i + 7, "holds 17; it must be in 0..11"),
        (lambda i: i if i in (0, 11) else -1, "holds -1; it must"),
    ],
)
@pytest.mark.filterwarnings("ignore:The training data is not shuffled")
def test_data_that_says_other_positions_is_refused(tmp_path, index, named):
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    module = CRL(3, encoder="digits_cnn", optimizer=_sgd)
    with pytest.raises(ValueError, match=named):
        trainer.fit(module, DataLoader(Indexed(index), batch_size=12))
    assert trainer.global_step == 0


@pytest.mark.parametrize("index", [float, "{}.png".format])
def test_a_third_part_that_is_no_position_is_not_taken_for_one(fit, index):
    class Loaders(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(Indexed(index), batch_size=4, shuffle=True)

    record = Record()
    module = CRL(3, encoder="digits_cnn", optimizer=_sgd)
    fit(module, Loaders(), epochs=2, callbacks=[record])
    seen = [sorted(i for e, step, *_ in record.steps if e == epoch for i in step) for epoch in (0, 1)]
    assert seen == [[*range(12)]] * 2


def test_data_in_order_is_warned_of(fit):
    data = ToyDataModule(batch_size=16, train_size=60)
    data.setup()
    for loader, warned in ((data.evaluation_loader("train"), True), (data.train_dataloader(), False)):
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.fit(CRL(3, encoder="digits_cnn", optimizer=_sgd), loader)
        assert any("not shuffled" in str(warning.message) for warning in said) == warned


def test_bad_settings_are_named(fit):
    with pytest.raises(ValueError, match="-1"):
        CRL(3, strength=-1.0)
    with pytest.raises(ValueError, match="'logit'"):
        CRL(3, ranked="logit")
    with pytest.raises(ValueError, match=r"batch_transform \(MixupTransform\)"):
        CRL(3, encoder="digits_cnn", batch_transform=methods.MixupTransform())
    with pytest.raises(ValueError, match="num_classes is 1"):
        CRL(1, encoder="digits_cnn")
    CRL(3, encoder="digits_cnn", batch_transform=None)
    trainer = fit(CRL(3, encoder="digits_cnn", optimizer=_sgd), ToyDataModule(train_size=60))
    trainer.fit_loop.max_epochs = 2
    with pytest.raises(ValueError, match="60 training samples, but the training set has 90"):
        trainer.fit(trainer.lightning_module, datamodule=ToyDataModule(train_size=90))
