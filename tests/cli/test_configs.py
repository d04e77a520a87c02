"""Every shipped configuration is complete and composes with the others."""

from pathlib import Path

import pytest
import yaml

from calib_lightning.config_search import config_folders, find_config

from .conftest import TOY

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
METHODS = sorted(path.stem for path in (CONFIGS / "method").glob("*.yaml"))


def _files(*folders):
    return sorted(path for folder in folders for path in (CONFIGS / folder).glob("*.yaml"))


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_no_list_of_configs_and_no_anchor(path):
    text = path.read_text()
    content = yaml.safe_load(text)
    # a list under `config` is ignored in silence by the parser
    assert not isinstance(content.get("config"), list)
    assert "&" not in text
    assert text.startswith("#"), "a configuration begins with a comment that says what it is"


def test_every_axis_parses_with_every_other(calib):
    for data in _files("data"):
        done = calib("fit", "-c", "recipe/cifar350", "--data", data.stem, "--model", "focal", "--print_config")
        assert done.code == 0, done.err
        assert yaml.safe_load(done.out)["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.1


@pytest.mark.parametrize("method", METHODS)
def test_every_method_fits_resumes_and_tests(calib, tmp_path, method):
    options = ("--model", method, "--model.encoder=digits_cnn", *TOY, "--trainer.accelerator=cpu")
    assert calib("fit", *options, "--trainer.max_epochs=1", "--run_dir=runs/m").code == 0
    run = tmp_path / "runs" / "m"
    done = calib(
        "fit", "-c", run / "config.yaml", "--trainer.max_epochs=2", "--ckpt_path", run / "checkpoints/last.ckpt"
    )
    assert done.code == 0, done.err
    done = calib("test", "-c", run / "config.yaml")
    assert done.code == 0, done.err
    assert "iid" in done.out


def test_names_are_found_in_working_directory_clone_and_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("quickstart") == CONFIGS / "quickstart.yaml"
    assert find_config("focal", "method") == CONFIGS / "method" / "focal.yaml"
    assert find_config("recipe/cifar350") == CONFIGS / "recipe" / "cifar350.yaml"
    assert find_config("nothing") is None
    own = tmp_path / "configs" / "quickstart.yaml"
    own.parent.mkdir()
    own.write_text("# mine\n")
    assert find_config("quickstart") == own
    assert config_folders()[0] == own.parent
