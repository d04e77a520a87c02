"""What holds for every method: it is complete, it learns, it comes back from its checkpoint."""

import inspect
import io
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer, seed_everything

from calib_lightning import methods
from calib_lightning.core import ClassificationModule, Preemption, load_module
from calib_lightning.data import DigitsDataModule, SplitSpec, ToyDataModule

from .table import ROWS

REPOSITORY = Path(__file__).resolve().parents[2]
by_method = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.module.__name__)


def _sgd(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def test_files_exports_configs_and_rows_are_the_same_set():
    rows = {row.file for row in ROWS}
    files = {path.stem for path in Path(methods.__file__).parent.glob("*.py")} - {"__init__"}
    configs = {path.stem for path in (REPOSITORY / "configs" / "method").glob("*.yaml")}
    exported = {
        name
        for name in methods.__all__
        if isinstance(getattr(methods, name), type) and issubclass(getattr(methods, name), ClassificationModule)
    }
    assert files == configs == rows
    assert exported == {row.module.__name__ for row in ROWS}
    for row in ROWS:
        config = yaml.safe_load((REPOSITORY / "configs" / "method" / f"{row.file}.yaml").read_text())
        assert config["class_path"] == row.module.__name__
        assert row.module.__module__ == f"calib_lightning.methods.{row.file}"


@by_method
def test_loss_falls_and_the_checkpoint_rebuilds_the_module(row, tmp_path):
    seed_everything(0)
    data = DigitsDataModule(SplitSpec(val=400, calibration=200), batch_size=32)
    module = row.new(data.num_classes, encoder="digits_cnn", optimizer=_sgd)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    batch = _first_batch(data, module)
    before = _loss(module, batch)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = load_module(tmp_path / "model.ckpt")
    assert type(loaded) is row.module
    assert not loaded.training
    assert {name: loaded.hparams[name] for name in row.options} == row.options
    image = next(iter(data.val_dataloader())).image
    with torch.no_grad():
        assert torch.equal(loaded(image), module.eval()(image))
    if row.switch is None:
        assert _loss(module, batch) < 0.7 * before
    else:  # another head and perhaps another loss
        assert loaded.stage == module.stage == 1
        assert loaded.head.spec == module.head.spec


@by_method
def test_gradients_are_finite_under_bf16_autocast(row):
    torch.manual_seed(0)
    module = row.new(3, encoder="digits_cnn")
    data = ToyDataModule(batch_size=16)
    batch = _first_batch(data, module)
    module.log = lambda *args, **kwargs: None
    with torch.autocast("cpu", torch.bfloat16):
        loss = module.training_step(batch, 0)
    assert loss.dtype == torch.float32
    loss.backward()
    gradients = [p.grad for p in module.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)


@by_method
def test_it_trains_in_half_precision_throughout(row, fit):
    # weights, buffers and torch's default dtype are bfloat16
    module = row.new(3, encoder="digits_cnn", optimizer=_sgd)
    data = ToyDataModule(SplitSpec(val=30, calibration=30), train_size=160)
    trainer = fit(module, data, epochs=2, precision="bf16-true")
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert all(value.isfinite() for value in trainer.callback_metrics.values())
    assert torch.get_default_dtype() == torch.float32


class _SaveAt(Callback):
    """Ask for a checkpoint after a step, as a scheduler does; the run goes on."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            signal.raise_signal(signal.SIGUSR1)


@by_method
def test_it_is_resumed_within_an_epoch_bit_for_bit(row, fit, tmp_path):
    # 5 steps in the first epoch, saved within the second of three: in the second stage of those that have one
    ends, counts = [], []
    for options in ({"callbacks": [_SaveAt(7), Preemption(tmp_path)]}, {"ckpt_path": tmp_path / "last.ckpt"}):
        module = row.new(3, encoder="digits_cnn", optimizer=_sgd)
        trainer = fit(
            module, ToyDataModule(SplitSpec(val=30, calibration=30), train_size=220, batch_size=32), 3, **options
        )
        ends.append({name: value.clone() for name, value in module.state_dict().items()})
        counts.append((trainer.global_step, int(module.train_state.count)))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 7
    assert counts[0] == counts[1]
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
    assert any(not torch.equal(value, saved["state_dict"][name]) for name, value in ends[0].items())


def _numbers(cls):
    """Names of the constructor's arguments that are decimal numbers by default."""
    return [name for name, p in inspect.signature(cls).parameters.items() if isinstance(p.default, float)]


EXPORTED = [getattr(methods, name) for name in methods.__all__]
CRITERIA = [value for value in EXPORTED if isinstance(value, type) and value.__name__.endswith(("Loss", "Transform"))]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("cls", [row.module for row in ROWS] + CRITERIA, ids=lambda cls: cls.__name__)
def test_numbers_that_are_none_are_refused_when_built(cls, bad):
    needed = {"num_classes": 3, "class_counts": [5, 6, 7]}
    known = inspect.signature(cls).parameters
    arguments = {name: value for name, value in needed.items() if name in known}
    for name in _numbers(cls):
        with pytest.raises(ValueError, match=name):
            cls(**arguments, **{name: bad})


@by_method
def test_soft_labels_train_or_are_refused(row):
    torch.manual_seed(0)
    module = row.new(3, encoder="digits_cnn")
    module.log = lambda *args, **kwargs: None
    batch = _first_batch(ToyDataModule(batch_size=16), module)
    votes = torch.distributions.Dirichlet(torch.ones(3)).sample((16,))
    if row.file == "ldam":
        module.criterion = row.build(3)  # which a fit does once the data is known
    if not row.soft:
        with pytest.raises(ValueError, match="soft targets"):
            module.training_step(batch._replace(label=votes), 0)
        return
    loss = module.training_step(batch._replace(label=votes), 0)
    loss.backward()
    assert loss.isfinite()
    # the votes themselves are the targets, not their winners
    torch.manual_seed(1)
    soft = module.loss(batch._replace(label=votes))[0]
    torch.manual_seed(1)
    assert not torch.isclose(soft, module.loss(batch._replace(label=votes.argmax(dim=-1)))[0])
    assert int(module.train_state.count) == 16


@by_method
def test_plain_settings_are_saved_and_objects_are_not(row):
    module = row.new(3, encoder="digits_cnn")
    for name, parameter in inspect.signature(row.module).parameters.items():
        if isinstance(parameter.default, int | float | str | list | tuple):
            assert name in module.hparams, name
    assert torch.load(_saved(dict(module.hparams)), weights_only=True)["encoder"] == "digits_cnn"


def _saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def _first_batch(data, module):
    data.prepare_data()
    data.setup("fit")
    data.trainer = SimpleNamespace(lightning_module=module, overfit_batches=0)
    data.stage_views = getattr(module, "views", None)
    return next(iter(data.train_dataloader()))


def _loss(module, batch):
    # in training mode: after two short epochs the running statistics of BatchNorm still lag behind
    with torch.no_grad():
        torch.manual_seed(1)  # some draw mixtures
        loss, _ = module.train().loss(batch)
    return loss.item()
