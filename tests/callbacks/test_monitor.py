"""CalibrationMonitor on modules that are not ours."""

import warnings

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger

from calib_lightning.callbacks import CalibrationMonitor, LogFigures
from calib_lightning.callbacks import figures as figures_module
from calib_lightning.callbacks import monitor as monitor_module
from calib_lightning.data import ToyDataModule
from calib_lightning.methods import CrossEntropy
from calib_lightning.metrics import REPORT, EvaluationState
from tests.callbacks.modules import Foreign, loader, rows


def trainer_with(monitor, tmp_path, epochs=1, **kwargs):
    return Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=CSVLogger(tmp_path, name="", version=""),
        callbacks=[monitor, *kwargs.pop("callbacks", [])],
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


def expected(module, n=37, seed=1):
    x, label = rows(n, seed)
    state = EvaluationState(REPORT)
    with torch.no_grad():
        state.update(module.net(x), label)
    return {key: float(value) for key, value in state.compute().items()}


@pytest.mark.parametrize("calls_itself", [True, False])
def test_logs_the_metrics_of_the_whole_set(tmp_path, calls_itself):
    module = Foreign(calls_itself)
    trainer = trainer_with(CalibrationMonitor(figures_every=0), tmp_path, num_sanity_val_steps=2)
    trainer.fit(module, loader(40), loader(37, seed=1))
    found = {key: float(value) for key, value in trainer.callback_metrics.items()}
    for key, value in expected(module).items():
        assert found[f"monitor/{key}"] == pytest.approx(value, rel=1e-6, abs=1e-7), key
    # 2 sanity batches, then 5: the network is not called a second time where the step has called it
    assert module.calls == (7 if calls_itself else 5)
    assert not module._forward_hooks


def test_a_checkpoint_can_be_chosen_by_what_is_logged(tmp_path):
    keeper = ModelCheckpoint(tmp_path / "kept", monitor="monitor/ece", mode="min")
    trainer = trainer_with(CalibrationMonitor(figures_every=0), tmp_path, epochs=3, callbacks=[keeper])
    trainer.fit(Foreign(), loader(40), loader(37, seed=1))
    assert keeper.best_model_score is not None


def drawn_in(folder):
    return sorted(path.name for path in folder.rglob("*reliability*.png"))


@pytest.mark.parametrize(
    ("every", "epochs"), [({}, []), ({"figures_every": 2}, [0, 2]), ({"figures_every": 0}, None)], ids=str
)
def test_the_last_figures_and_those_of_an_interval_reach_the_logger(every, epochs, tmp_path):
    trainer = trainer_with(CalibrationMonitor(**every), tmp_path, epochs=4)
    trainer.fit(Foreign(), loader(40), loader(37, seed=1))
    last = [] if epochs is None else ["monitor_reliability.png"]
    assert drawn_in(tmp_path) == last + [f"monitor_reliability_epoch000{epoch}.png" for epoch in epochs or ()]


def test_a_stopped_fit_and_a_validation_have_their_last_figures(tmp_path, monkeypatch):
    numbers = []
    monkeypatch.setattr(monitor_module, "figures", lambda state, title: numbers.append(int(state.count)) or {})
    monitor, module = CalibrationMonitor(), Foreign()
    stop = EarlyStopping("monitor/accuracy", patience=0, mode="min", stopping_threshold=2.0)  # after the first epoch
    trainer = trainer_with(monitor, tmp_path, epochs=4, callbacks=[stop])
    trainer.fit(module, loader(40), loader(37, seed=1))
    assert trainer.current_epoch == 1
    assert numbers == [37]
    trainer.validate(module, loader(20, seed=1), verbose=False)
    assert numbers == [37, 20]
    trainer_with(monitor, tmp_path).fit(module, loader(40))  # no validation: those of the one before are drawn already
    assert numbers == [37, 20]


class HomeMade(Logger):
    """Takes numbers alone."""

    name = version = "own"

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass


@pytest.mark.parametrize(
    "options", [{"logger": False}, {"logger": HomeMade()}, {"fast_dev_run": True}], ids=["none", "own", "fast"]
)
def test_nothing_is_drawn_where_nobody_would_see_it(options, tmp_path, monkeypatch):
    def drawn(*args, **kwargs):
        raise AssertionError("drawn")

    monkeypatch.setattr(monitor_module, "figures", drawn)
    monkeypatch.setattr(figures_module, "figures", drawn)
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[CalibrationMonitor(figures_every=1), LogFigures()], **options,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no figures")
        trainer.fit(Foreign(), loader(40), loader(37, seed=1))
        trainer.validate(Foreign(), loader(37, seed=1), verbose=False)
        trainer.test(CrossEntropy(3, encoder="digits_cnn"), ToyDataModule(batch_size=64), verbose=False)


def test_several_loaders_have_keys_of_their_own(tmp_path):
    module = Foreign()
    trainer = trainer_with(CalibrationMonitor(("accuracy",), figures_every=0), tmp_path)
    trainer.fit(module, loader(40), [loader(37, seed=1), loader(20, seed=2)])
    found = trainer.callback_metrics
    assert float(found["monitor/0/accuracy"]) == pytest.approx(expected(module)["accuracy"])
    assert float(found["monitor/1/accuracy"]) == pytest.approx(expected(module, 20, 2)["accuracy"])


def test_output_with_logits(tmp_path):
    class WithDict(Foreign):
        def forward(self, x):
            out = super().forward(x)
            return out if self.training else {"logits": out}

        def validation_step(self, batch, batch_idx):
            self(batch[0])

    module = WithDict()
    trainer = trainer_with(CalibrationMonitor(figures_every=0), tmp_path)
    trainer.fit(module, loader(40), loader(37, seed=1))
    assert float(trainer.callback_metrics["monitor/ece"]) == pytest.approx(expected(module)["ece"], abs=1e-7)


class Broken(Foreign):
    def validation_step(self, batch, batch_idx):
        if self.trainer.sanity_checking:
            return
        logits = self(batch[0])
        assert logits is not None

    def forward(self, x):
        out = super().forward(x)
        return out if self.training else out * torch.nan


def test_what_is_wrong_with_the_figures_does_not_end_the_training(tmp_path):
    trainer = trainer_with(CalibrationMonitor(), tmp_path, epochs=2)
    with pytest.warns(UserWarning, match="logs nothing for epoch 0.*invalid logits"):
        trainer.fit(Broken(), loader(40), loader(37, seed=1))
    assert trainer.current_epoch == 2
    assert not any(key.startswith("monitor/") for key in trainer.callback_metrics)


@pytest.mark.parametrize("error", [RuntimeError("no kernel"), KeyError("mask"), NotImplementedError("no forward")])
def test_a_forward_that_fails_does_not_end_the_training(error, tmp_path):
    class Failing(Foreign):
        def forward(self, x):
            if self.training:
                return super().forward(x)
            raise error

        def validation_step(self, batch, batch_idx):
            self.net(batch[0])

    with pytest.warns(UserWarning, match=f"logs nothing for epoch 0: {type(error).__name__}"):
        trainer_with(CalibrationMonitor(), tmp_path, epochs=1).fit(Failing(), loader(16), loader(16, seed=1))


def test_what_a_step_returns_is_not_taken_for_logits():
    monitor, module = CalibrationMonitor(), Foreign()
    batch = rows(8, 0)
    # as DDP runs a step: as a call of the module with the batch
    module.forward = lambda batch, batch_idx: module.net(batch[0]).softmax(dim=1)
    monitor.on_validation_batch_start(None, module, batch, 0)
    module(batch, 0)
    assert monitor._outputs == []
    monitor.on_exception(None, module, RuntimeError())


def test_sequences_as_output_are_named(tmp_path):
    class Wrong(Foreign):
        def forward(self, x):
            return (self.net(x),) if not self.training else self.net(x)

        def validation_step(self, batch, batch_idx):
            self(batch[0])

    with pytest.warns(UserWarning, match="network returned tuple; it must return logits"):
        trainer_with(CalibrationMonitor(), tmp_path).fit(Wrong(), loader(16), loader(16, seed=1))


def test_a_module_that_logs_usual_keys_itself_is_left_alone(tmp_path):
    class Logs(Foreign):
        def on_validation_epoch_end(self):
            self.log("val/accuracy", 0.5)

    trainer = trainer_with(CalibrationMonitor(figures_every=0), tmp_path, epochs=2)
    trainer.fit(Logs(), loader(40), loader(37, seed=1))
    assert float(trainer.callback_metrics["val/accuracy"]) == 0.5
    assert "monitor/accuracy" in trainer.callback_metrics


def test_options_are_checked_before_the_training():
    with pytest.raises(ValueError, match="figures_every is -1"):
        CalibrationMonitor(figures_every=-1)
    with pytest.raises(ValueError, match="eceee"):
        CalibrationMonitor(("eceee",))


def test_the_training_is_the_same_with_it(tmp_path):
    weights = []
    for callbacks in ([], [CalibrationMonitor()]):
        torch.manual_seed(0)
        module = Foreign()
        trainer = Trainer(
            accelerator="cpu", max_epochs=2, logger=False, callbacks=callbacks, enable_progress_bar=False,
            enable_checkpointing=False, enable_model_summary=False,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, loader(40), loader(37, seed=1))
        weights.append(module.net.weight.detach().clone())
    assert torch.equal(*weights)


def test_probabilities_that_are_taken_for_logits_are_told_of(tmp_path):
    class Soft(Foreign):
        def forward(self, x):
            return super().forward(x).softmax(-1)

    for module, told in ((Soft(), True), (Foreign(), False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer_with(CalibrationMonitor(), tmp_path).fit(module, loader(16), loader(16))
        assert any("let forward return logits" in str(warning.message) for warning in caught) == told
