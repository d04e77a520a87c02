"""The folder of a run is named after its data, its method and its seed."""

import pytest
from jsonargparse import Namespace

from calib_lightning.commands.fit_folder import default_folder, save_config

NOTHING = (
    "--model.encoder=digits_cnn",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=0",
    "--test_after_fit=false",
)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (("--data=digits_lt", "--model=label_smoothing"), "digits_lt-label_smoothing-0"),
        (("--data=DigitsDataModule", "--model=LabelSmoothing", "--seed_everything=3"), "digits-label_smoothing-3"),
        (("-c=quickstart", "--model=focal"), "digits_lt-focal-0"),
        (("-c=quickstart", "--data=ToyDataModule"), "toy-cross_entropy-0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_names_of_configurations_and_of_classes(calib, only_run, options, name):
    done = calib("fit", *options, *NOTHING)
    assert done.code == 0, done.err
    assert only_run().name == name
    assert f"; runs/{name}\n" in done.out


def test_a_folder_that_exists_is_left_alone(calib, tmp_path):
    for _ in range(2):
        assert calib("fit", "--data=digits", "--model=focal", *NOTHING).code == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["digits-focal-0", "digits-focal-0-2"]


@pytest.mark.parametrize(("seed", "name"), [(7, "digits-flsd-7"), (False, "digits-flsd"), (None, "digits-flsd")])
def test_without_a_seed_the_name_has_none(seed, name):
    data = Namespace(class_path="calib_lightning.data.DigitsDataModule")
    model = Namespace(class_path="calib_lightning.methods.FLSD")
    config = Namespace(data=data, model=model, seed_everything=seed)
    assert default_folder(config).as_posix() == f"runs/{name}"


def test_a_configuration_never_replaces_another(tmp_path):
    for name in ("config.yaml", "config-2.yaml", "config-3.yaml"):
        save_config(f"name: {name}\n", tmp_path)
        assert (tmp_path / name).read_text() == f"name: {name}\n"
