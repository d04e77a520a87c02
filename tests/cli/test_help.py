"""Help is short, complete and there at once; every command is found by its name."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from calib_lightning.__main__ import main
from calib_lightning.commands.help import trainer_help
from calib_lightning.commands.names import COMMANDS, TRAINER, with_underscores

TRAINERS = [name for name, command in COMMANDS.items() if command.module == TRAINER]
COMMAND_FILES = Path(__file__).resolve().parents[2] / "calib_lightning" / "commands"


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_every_command_is_listed_in_one_line(argv, capsys):
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in COMMANDS.items():
        assert [line.split(maxsplit=1) for line in lines if line.startswith(f"  {name} ")] == [[name, command.line]]


def test_every_module_of_a_command_is_in_the_table():
    have_main = {path.stem for path in COMMAND_FILES.glob("*.py") if re.search(r"(?m)^def main\(", path.read_text())}
    assert have_main == {command.module.rpartition(".")[2] for command in COMMANDS.values()}
    for command in COMMANDS.values():
        assert callable(importlib.import_module(command.module).main)


def test_help_needs_nothing_heavy():
    script = (
        "import sys, time\nfrom calib_lightning.__main__ import main\n"
        "codes = [main(['--help']), main(['fit', '--help']), main(['fti']), main(['list', 'data'])]\n"
        "print(codes, {'torch', 'lightning', 'jsonargparse', 'numpy', 'rich'} & set(sys.modules), time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    codes, heavy, seconds = re.fullmatch(r"(\[.*\]) (.*) (\S+)", done.stdout.splitlines()[-1]).groups()
    assert (codes, heavy) == ("[0, 0, 2, 0]", "set()")
    assert float(seconds) < 1  # about 0.15 on an idle machine; torch alone takes more


@pytest.mark.parametrize("command", TRAINERS)
def test_short_help_names_only_options_that_there_are(command, calib):
    done = calib(command, "--help")
    assert done.code == 0
    assert len(done.out.splitlines()) <= 60
    complete = calib(command, "--help_all").out
    known = set(re.findall(r"(?<![\w.])--?[a-z_][\w.+]*", complete))
    named = set(re.findall(r"(?<![\w.])--?[a-z_][\w.]*\+?", done.out)) - {"--help_all"}
    assert len(named) > 15
    for option in named:
        setting = re.fullmatch(r"--(data|model)\.(?!help)[\w.]+", option)  # the parser knows those of a class
        assert option.rstrip(".") in known or setting, option


@pytest.mark.parametrize("command", TRAINERS)
def test_settings_and_examples_of_the_short_help_work(command, calib):
    text = trainer_help(command)
    settings = [
        "--data=folder",
        *re.findall(r"--(?:data|model)\.[a-z_.]+=[A-Za-z0-9.]+", text.partition("examples")[0]),
    ]
    settings = [word.replace("NAME", "digits_cnn") for word in settings]
    assert len(settings) == 4
    examples = [
        line.split("  ")[1].split()[1:] for line in text.partition("examples:\n")[2].splitlines() if "  calib" in line
    ]
    examples = [
        [word for word in argv if "RUN" not in word and word not in ("-c", "--ckpt_path")]
        if "RUN" in str(argv)
        else argv
        for argv in examples
    ]
    assert examples
    for argv in [[command, "-c", "quickstart", *settings], *([*argv, "-c", "quickstart"] for argv in examples)]:
        done = calib(*argv, "--print_config")
        assert done.code == 0, done.err


def test_help_of_a_method_and_of_data_takes_the_names_of_configurations(calib):
    done = calib("fit", "--model.help", "focal")
    assert done.code == 0
    assert "--model.gamma" in done.out
    assert "--data.root" in calib("fit", "--data.help=cifar10").out


def test_a_misspelt_command_is_told_the_nearest(capsys):
    assert main(["fti"]) == 2
    assert "there is no command 'fti'. Did you mean fit?" in capsys.readouterr().err
    assert main(["xyzzy"]) == 2
    assert "Did you mean" not in capsys.readouterr().err


def test_images_are_for_classify(capsys):
    for images in (["--images", "DIR"], ["--images=DIR"]):
        assert main(["predict", *images, "--model", "FILE"]) == 2
        assert "is now `calib classify DIR --model FILE`" in capsys.readouterr().err


def test_other_commands_get_what_follows_their_name(monkeypatch):
    import calib_lightning.commands.paper

    given = []
    monkeypatch.setattr(calib_lightning.commands.paper, "main", lambda argv: given.append(argv) or 7)
    assert main(["paper", "refcal", "--row=plain-one"]) == 7
    assert given == [["refcal", "--row=plain-one"]]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("--run-dir=runs/my-run", "--run_dir=runs/my-run"),
        ("--run-dir", "--run_dir"),
        ("--no-test-after-fit", "--no_test_after_fit"),
        ("--trainer.callbacks+=my-callback", "--trainer.callbacks+=my-callback"),
        ("--model.init-args.x-y=-1", "--model.init_args.x_y=-1"),
        ("-c", "-c"),
        ("-some-file.npz", "-some-file.npz"),
        ("recipe/cpu-evening", "recipe/cpu-evening"),
        ("--not an option-name=1", "--not an option-name=1"),
        ("---x-y", "---x-y"),
    ],
)
def test_hyphens_in_names_of_options(written, meant):
    assert with_underscores(["fit", written]) == ["fit", meant]
    assert with_underscores(["paper", "--", written]) == ["paper", "--", written]


def test_an_option_with_hyphens_is_the_same_option(calib):
    done = calib("fit", "-c", "quickstart", "--run-dir=runs/of-hyphens", "--test-after-fit", "false", "--print-config")
    assert done.code == 0, done.err
    assert "run_dir: runs/of-hyphens\n" in done.out
    assert "test_after_fit: false\n" in done.out
