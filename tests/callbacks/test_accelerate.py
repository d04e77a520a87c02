"""The same network in another memory format, compiled or not."""

import pytest
import torch
from torch import nn

from calib_lightning.callbacks import Accelerate
from calib_lightning.core import ClassificationModule, load_module
from calib_lightning.data import SplitSpec, ToyDataModule
from tests.ddp.cases import sgd, trainer

IMAGES = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def module():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return ClassificationModule(3, encoder="digits_cnn", optimizer=sgd)


def data():
    return ToyDataModule(SplitSpec(val=30), train_size=126)


def fitted(folder, *callbacks, epochs=1):
    own = module()
    torch.manual_seed(0)
    run = trainer(folder, callbacks=list(callbacks), max_epochs=epochs)
    run.fit(own, datamodule=data())
    return own, run


def is_channels_last(weight):
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def weights(root):
    """Those of convolutions in which the two formats differ."""
    return [m.weight for m in root.modules() if isinstance(m, nn.Conv2d) and m.in_channels > 1]


def test_weights_change_their_format_and_nothing_else(tmp_path):
    plain, _ = fitted(tmp_path)
    fast, run = fitted(tmp_path, Accelerate())
    assert len(weights(fast.encoder)) == 2
    assert all(map(is_channels_last, weights(fast.encoder)))
    assert not any(map(is_channels_last, weights(plain.encoder)))
    shapes = [{name: value.shape for name, value in own.state_dict().items()} for own in (plain, fast)]
    assert shapes[0] == shapes[1]
    assert list(shapes[0]) == list(shapes[1])

    with torch.no_grad():
        expected, found = plain.eval()(IMAGES), fast.eval()(IMAGES)
    assert is_channels_last(fast.encoder.network[:2](IMAGES))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    run.save_checkpoint(tmp_path / "fast.ckpt")
    loaded = load_module(tmp_path / "fast.ckpt")
    for name, value in fast.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with torch.no_grad():
        torch.testing.assert_close(loaded(IMAGES), found, rtol=1e-5, atol=1e-5)


@pytest.fixture
def compiled(monkeypatch):
    """The modules that were to be compiled."""
    calls = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *args, **kwargs: calls.append(self))
    return calls


def test_the_encoder_is_compiled_once_for_a_fit_and_its_test(tmp_path, compiled):
    own, run = fitted(tmp_path, callback := Accelerate(channels_last=False, compile=True))
    run.test(own, datamodule=data(), verbose=False)
    assert compiled == [own.encoder]
    assert not any(map(is_channels_last, weights(own.encoder)))
    other = module()
    trainer(tmp_path, callbacks=[callback]).test(other, datamodule=data(), verbose=False)
    assert compiled == [own.encoder, other.encoder]


def test_a_test_behind_a_fit_and_one_of_a_checkpoint_give_the_same_figures(tmp_path, compiled):
    own, run = fitted(tmp_path, Accelerate())
    run.test(own, datamodule=data(), verbose=False)
    figures = {key: float(value) for key, value in run.callback_metrics.items() if key.startswith("test/")}
    run.save_checkpoint(tmp_path / "fast.ckpt")
    fresh, again = module(), trainer(tmp_path, callbacks=[Accelerate()])
    again.test(fresh, datamodule=data(), ckpt_path=tmp_path / "fast.ckpt", verbose=False, weights_only=True)
    assert all(map(is_channels_last, [*weights(own.encoder), *weights(fresh.encoder)]))
    assert figures
    assert {key: float(again.callback_metrics[key]) for key in figures} == figures
    assert compiled == []


def test_another_submodule_or_the_whole_module(tmp_path):
    own, _ = fitted(tmp_path, Accelerate(encoder="encoder.network.stage1"), epochs=0)
    assert [is_channels_last(weight) for weight in weights(own)] == [True, False]
    own, _ = fitted(tmp_path, Accelerate(encoder=""), epochs=0)
    assert [is_channels_last(weight) for weight in weights(own)] == [True, True]


def test_a_submodule_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"encoder is 'backbone'; it must be the name of a submodule.*'encoder', 'head'"
    ):
        fitted(tmp_path, Accelerate(encoder="backbone"))
