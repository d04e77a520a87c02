"""PostHocCalibrate on modules that are not ours."""

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from calib_lightning.callbacks import PostHocCalibrate
from calib_lightning.data import SplitSpec, ToyDataModule
from calib_lightning.methods import CrossEntropy
from calib_lightning.metrics.functional.temperature import optimal_inverse_temperature
from calib_lightning.posthoc import FixedTemperature, load_calibrator
from calib_lightning.posthoc.saving import FILE_KEY
from calib_lightning.posthoc.temperature import Temperature
from tests.callbacks.modules import Foreign, loader, rows


def trainer_with(*callbacks, epochs=3):
    return Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, callbacks=list(callbacks), enable_progress_bar=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_model_summary=False,
    )  # fmt: skip


def beta_of(net, n=50, seed=7):
    x, label = rows(n, seed)
    with torch.no_grad():
        # in the loader's batches: another size may round otherwise
        return optimal_inverse_temperature(torch.cat([net(part) for part in x.split(8)]), label).beta


def test_fits_to_the_final_weights():
    module, callback = Foreign(), PostHocCalibrate(Temperature(), loader(50, seed=7))
    trainer_with(callback).fit(module, loader(40))
    assert float(callback.calibrator.beta) == pytest.approx(beta_of(module.net), rel=1e-9)
    assert callback.calibrator.report.rows == 50
    assert module.training is False or module.net.training == module.training  # modes are put back


def test_every_kept_file_has_the_calibrator_of_its_own_weights(tmp_path):
    module, callback = Foreign(lr=0.02), PostHocCalibrate(Temperature(), loader(50, seed=7))
    keeper = ModelCheckpoint(tmp_path, filename="best", monitor="foreign_loss", mode="max")
    newest = ModelCheckpoint(tmp_path, filename="newest")
    trainer_with(callback, keeper, newest, epochs=4).fit(module, loader(40), loader(37, seed=1))
    final = {name: value.clone() for name, value in module.state_dict().items()}
    found = {}
    for name in ("best", "newest"):
        path = tmp_path / f"{name}.ckpt"
        saved = Foreign.load_from_checkpoint(path)
        found[name] = float(load_calibrator(path).beta)
        assert found[name] == pytest.approx(beta_of(saved.net), rel=1e-9), name
    assert found["best"] != found["newest"] == pytest.approx(float(callback.calibrator.beta))
    assert all(torch.equal(value, final[name]) for name, value in module.state_dict().items())
    # a resumed training and a later test take it from the checkpoint
    again = PostHocCalibrate(Temperature(), loader(50, seed=7))
    trainer_with(again, epochs=4).validate(Foreign(), loader(8), ckpt_path=tmp_path / "best.ckpt", weights_only=True)
    assert float(again.calibrator.beta) == pytest.approx(found["best"])


def test_a_later_save_has_it(tmp_path):
    trainer = trainer_with(callback := PostHocCalibrate(Temperature(), loader(50, seed=7)))
    trainer.fit(Foreign(), loader(40))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    assert torch.equal(load_calibrator(tmp_path / "saved.ckpt").beta, callback.calibrator.beta)


def test_the_data_module_of_a_benchmark_gives_the_split():
    data = ToyDataModule(SplitSpec(val=40, calibration=60), batch_size=16)
    module = CrossEntropy(data.num_classes, encoder="digits_cnn")
    callback = PostHocCalibrate(Temperature())
    trainer_with(callback, epochs=1).fit(module, datamodule=data)
    batches = list(data.calibration_dataloader())
    module.eval()
    with torch.no_grad():
        logits = torch.cat([module(batch.image) for batch in batches])
    wanted = optimal_inverse_temperature(logits, torch.cat([batch.label for batch in batches])).beta
    assert float(callback.calibrator.beta) == pytest.approx(wanted, rel=1e-6)


class _WithoutCalibration(LightningDataModule):
    def train_dataloader(self):
        return loader(8)


@pytest.mark.parametrize("data", [{"train_dataloaders": loader(8)}, {"datamodule": _WithoutCalibration()}])
def test_refuses_before_training_where_there_is_no_calibration_split(data):
    module = Foreign()
    before = module.net.weight.detach().clone()
    with pytest.raises(ValueError, match=r"no calibration split.*loader"):
        trainer_with(PostHocCalibrate(Temperature())).fit(module, **data)
    assert torch.equal(module.net.weight, before)


def test_refuses_an_empty_split_before_training():
    data = ToyDataModule(SplitSpec(val=40), batch_size=16)
    with pytest.raises(ValueError, match="is empty"):
        trainer_with(PostHocCalibrate(Temperature())).fit(CrossEntropy(3, encoder="digits_cnn"), datamodule=data)


def test_a_fit_that_fails_does_not_cost_the_training(tmp_path):
    bad = [(torch.full((4, 4), torch.nan), torch.zeros(4, dtype=torch.int64))]
    callback, keeper = PostHocCalibrate(Temperature(), bad), ModelCheckpoint(tmp_path, filename="kept")
    with pytest.warns(UserWarning, match="was not fitted.*invalid logits"):
        trainer_with(callback, keeper).fit(module := Foreign(), loader(40))
    assert not callback.calibrator.fitted
    assert callback.calibrator.report is None
    assert callback.state_dict() == {}
    for use in (lambda: callback.calibrator.temperature, lambda: callback.calibrator(torch.zeros(2, 3))):
        with pytest.raises(RuntimeError, match=r"Temperature is not fitted\. Call fit"):
            use()
    with pytest.raises(ValueError, match=r"holds no calibrator.*warns where it cannot fit"):
        load_calibrator(keeper.best_model_path)
    assert torch.equal(Foreign.load_from_checkpoint(keeper.best_model_path).net.weight, module.net.weight)


@pytest.mark.parametrize("error", [OSError("disk"), KeyError("id"), IndexError("row"), AssertionError("check")])
def test_a_loader_that_fails_does_not_cost_the_training(error):
    class Failing:
        def __iter__(self):
            yield rows(4, 0)
            raise error

    callback = PostHocCalibrate(Temperature(), Failing())
    with pytest.warns(UserWarning, match=f"was not fitted: {type(error).__name__}"):
        trainer_with(callback).fit(module := Foreign(), loader(40))
    assert module.trainer.state.finished
    assert not callback.calibrator.fitted


class PartlySaved(Foreign):
    """Keeps a frozen part out of its checkpoints, as Lightning's strict_loading allows."""

    def __init__(self):
        super().__init__(lr=0.1)
        self.strict_loading = False
        self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)
        self.frozen.weight.data *= 0.1

    def forward(self, x):
        return self.net(x + self.frozen(x))

    def state_dict(self, *args, **kwargs):
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "frozen" not in name}


def test_modules_that_save_a_part_of_their_weights(tmp_path):
    keeper = ModelCheckpoint(tmp_path, filename="first", monitor="foreign_loss", mode="max")
    callback = PostHocCalibrate(Temperature(), loader(50, seed=7))
    torch.manual_seed(0)
    trainer_with(callback, keeper).fit(module := PartlySaved(), loader(40), loader(37, seed=1))
    final = module.net.weight.detach().clone()
    saved = torch.load(keeper.best_model_path, weights_only=True)
    assert not torch.equal(saved["state_dict"]["net.weight"], final)
    module.load_state_dict(saved["state_dict"], strict=False)
    module.eval()
    assert float(load_calibrator(keeper.best_model_path).beta) == pytest.approx(beta_of(module), rel=1e-9)


def test_checkpoints_of_a_resumed_training_do_not_hold_the_calibrator_of_earlier_weights(tmp_path):
    trainer = trainer_with(PostHocCalibrate(Temperature(), loader(50, seed=7)))
    trainer.fit(Foreign(), loader(40))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    again = trainer_with(callback := PostHocCalibrate(Temperature(), loader(50, seed=7)), every, epochs=5)
    again.fit(Foreign(), loader(40), ckpt_path=tmp_path / "saved.ckpt", weights_only=True)
    with pytest.raises(ValueError, match="holds no calibrator"):
        load_calibrator(tmp_path / "epoch=3.ckpt")
    assert torch.equal(load_calibrator(tmp_path / "epoch=4.ckpt").beta, callback.calibrator.beta)


def test_a_damaged_calibrator_in_a_checkpoint_does_not_cost_the_training():
    callback = PostHocCalibrate(Temperature(), loader(50))
    with pytest.warns(UserWarning, match="continues without the calibrator.*damaged"):
        callback.load_state_dict({FILE_KEY: {"spec": {"class_path": "Nothing"}, "state": {}}})
    assert not callback.calibrator.fitted


def test_a_checkpoint_of_another_calibrator_is_left_alone(tmp_path):
    trainer = trainer_with(PostHocCalibrate(Temperature(), loader(50, seed=7)))
    trainer.fit(Foreign(), loader(40))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    other = PostHocCalibrate(FixedTemperature(2.0), loader(50))
    with pytest.warns(UserWarning, match="holds a Temperature; it is ignored"):
        trainer_with(other).validate(Foreign(), loader(8), ckpt_path=tmp_path / "saved.ckpt", weights_only=True)
    assert not other.calibrator.fitted
