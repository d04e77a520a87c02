"""``calib list``: everything that can be named, one line each."""

import pytest

from calib_lightning import methods, posthoc
from calib_lightning.__main__ import main
from calib_lightning.commands import list as listing
from calib_lightning.core import ClassificationModule, encoder_names
from calib_lightning.metrics import METRICS, OOD, SOFT
from calib_lightning.utils.config_search import config_names, find_config


def listed(capsys, *argv):
    """Name and text of every line."""
    assert main(["list", *argv]) == 0
    rows = [line.partition("  ") for line in capsys.readouterr().out.splitlines()]
    return {name: text.strip() for name, gap, text in rows if gap}


def test_without_a_kind_it_says_what_there_is(capsys):
    kinds = listed(capsys)
    assert list(kinds) == ["methods", "data", "networks", "metrics", "calibrators", "configs"]
    assert all(kinds.values())


def test_every_method_is_listed_with_what_it_does(capsys):
    found = listed(capsys, "methods")
    modules = [getattr(methods, name) for name in methods.__all__]
    classes = [item for item in modules if isinstance(item, type) and issubclass(item, ClassificationModule)]
    rows = listing.method_rows()
    assert {(name, row.cls) for name, row in rows.items()} == {
        (cls.__module__.rpartition(".")[2], cls.__name__) for cls in classes
    }
    assert list(found) == list(rows)
    assert list(found)[:2] == ["cross_entropy", "acls"]
    assert set(found) == set(config_names("method"))
    assert found["cross_entropy"] == "the baseline"
    assert found["brier"] == f"{rows['brier'].mechanism} (Brier 1950; Mukhoti et al. 2020)"


def test_the_table_for_the_readme(capsys):
    assert main(["list", "methods", "--markdown"]) == 0
    text = capsys.readouterr().out
    assert text == listing.method_table()
    assert len(text.splitlines()) == len(listing.method_rows()) + 2
    assert (
        "\n| `brier` | `Brier` | squared error of the probabilities | none | Brier 1950; Mukhoti et al. 2020 |\n"
        in text
    )


def test_what_a_docstring_says(tmp_path, monkeypatch):
    text = 'class Half:\n    """Half.\n\n    Paper: one.\n    Mechanism: two.\n    Extra cost: three.\n    """\n'
    (tmp_path / "half.py").write_text(f'class Other:\n    """Paper of others."""\n\n\n{text}')
    monkeypatch.setattr(listing, "_METHODS", tmp_path)
    assert listing.method_rows() == {"half": ("Half", "one", "two", "three")}


def test_a_method_that_does_not_say_what_it_costs_is_refused(tmp_path, monkeypatch):
    (tmp_path / "half.py").write_text('class Half:\n    """Half.\n\n    Paper: none\n    Mechanism: half\n    """\n')
    monkeypatch.setattr(listing, "_METHODS", tmp_path)
    with pytest.raises(ValueError, match="docstring of Half needs one line that begins with 'Extra cost: '"):
        listing.method_rows()


@pytest.mark.parametrize(("kind", "axis"), [("data", "data"), ("configs", "")])
def test_configurations_are_listed_with_their_first_comment(kind, axis, capsys):
    found = listed(capsys, kind)
    assert len(found) > 20
    for name, text in found.items():
        assert find_config(name, axis).read_text().startswith(f"# {text}\n"), name


def test_data_and_configs_are_all_there(capsys):
    assert {"digits", "digits_lt", "cifar10", "folder"} <= set(listed(capsys, "data"))
    found = set(listed(capsys, "configs"))
    assert {"quickstart", "recipe/cifar350", "callback/mac_cal", "logger/wandb"} <= found
    assert not {"papers", "method/focal", "data/digits"} & found


def test_configurations_of_the_working_directory_are_listed(capsys, tmp_path, monkeypatch):
    (tmp_path / "configs" / "recipe").mkdir(parents=True)
    (tmp_path / "configs" / "recipe" / "mine.yaml").write_text("# Mine.\nbatch_size: 3\n")
    (tmp_path / "configs" / "silent.yaml").write_text("batch_size: 3\n")
    (tmp_path / "configs" / "quickstart.yaml").write_text("# Mine, too.\nbatch_size: 3\n")
    monkeypatch.chdir(tmp_path)
    found = listed(capsys, "configs")
    assert found["recipe/mine"] == "Mine."
    assert found["silent"].endswith("silent.yaml")
    assert found["quickstart"] == "Mine, too."


def test_metrics_networks_and_calibrators(capsys):
    found = listed(capsys, "metrics")
    assert list(found) == [*METRICS, *SOFT, *OOD]
    assert found["accuracy"] == "accuracy % (higher is better)"
    assert found["signed_gap"] == "signed gap % (nearest 0 is best)"
    found = listed(capsys, "networks")
    assert list(found) == list(encoder_names())
    assert found["resnet18_cifar"] == "11.17 million parameters, 512 features"
    found = listed(capsys, "calibrators")
    assert set(found) <= set(posthoc.__all__)
    assert {"Temperature", "NeuralClamping", "OneVsRest", "Platt"} <= set(found)
    assert found["FixedTemperature"] == "Temperature scaling with a given T; the fit only records K."


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["method"], "KIND is 'method'; it must be one of methods, data, networks"),
        (["method"], "Did you mean methods?"),
        (["data", "--markdown"], "only methods are written as --markdown"),
        (["data", "methods"], "unrecognized arguments: methods"),
    ],
)
def test_a_wrong_command_line(argv, said, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["list", *argv])
    assert leaving.value.code == 2
    assert said in capsys.readouterr().err
