"""The README promises only what runs."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from calib_lightning.__main__ import main
from calib_lightning.commands.list import method_table
from calib_lightning.commands.names import COMMANDS, TRAINER
from calib_lightning.deploy import CalibratedClassifier, Preprocessing, export_onnx
from calib_lightning.methods import MaskedLinearHead
from calib_lightning.posthoc import FixedTemperature, Temperature, save_calibrator
from calib_lightning.predictions.calibrating import named_calibrators
from calib_lightning.utils.config_search import find_config
from tests.methods.table import ROWS

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
SHELL = "".join(text for kind, text in BLOCKS if kind == "bash")
PYTHON = [text for kind, text in BLOCKS if kind == "python"]


# commands of ours that are not the trainer's; each is tested with small files below or needs none
OWN = tuple(name for name, command in COMMANDS.items() if command.module != TRAINER)


def _of_trainer(command):
    return command[0] not in OWN and "--help" not in command


def _only_prints(command):
    return command[0] in ("list", "--help") or (command[0] not in OWN and "--help" in command)


def _commands():
    for line in SHELL.replace("\\\n", " ").splitlines():
        for command in line.partition("  #")[0].split("&&"):
            if command.strip().startswith("calib "):
                yield shlex.split(command)[1:]


def test_the_two_setup_commands_are_those_that_are_checked():
    installs = [line for line in SHELL.splitlines() if line.startswith("pip ")]
    assert installs == [
        "pip install -e . && calib fit -c configs/quickstart.yaml",
        "pip install -e '.[test]' && pytest",
    ]
    script = (REPOSITORY / ".ci" / "run").read_text()
    assert "pip install --quiet -e '.[test]' && pytest" in script


@pytest.mark.parametrize(
    "command", [c for c in _commands() if "RUN" not in " ".join(c) and _of_trainer(c)], ids=" ".join
)
def test_commands_parse(command, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(REPOSITORY)
    own = "from lightning.pytorch import LightningDataModule\n\n\nclass MyDataModule(LightningDataModule):\n    pass\n"
    (tmp_path / "my_module.py").write_text(own)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as leaving:
        main([*command, "--print_config"])
    assert leaving.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", [c for c in _commands() if _only_prints(c)], ids=" ".join)
def test_commands_that_only_print_do_so(command, capsys):
    assert main(command) == 0
    assert len(capsys.readouterr().out.splitlines()) > 5


@pytest.mark.parametrize("command", [c for c in _commands() if c[0] == "paper"], ids=" ".join)
def test_commands_of_papers_print_a_script(command, capsys):
    assert main(command) == 0
    assert "\ncalib fit -c recipe/" in capsys.readouterr().out


def test_commands_on_a_run_are_there():
    # their behaviour is tested with real runs in tests/cli/test_runs.py
    on_runs = [c for c in _commands() if "RUN" in " ".join(c) and _of_trainer(c)]
    assert {c[0] for c in on_runs} == {"fit", "test"}


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_runs_as_written(number, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 3, generator=generator), torch.arange(8) % 3) for _ in range(2)]
    train_loader = DataLoader(TensorDataset(torch.randn(16, 5), torch.arange(16) % 3), 8)
    names = {"batches": batches, "module": _Own(), "train_loader": train_loader, "val_loader": train_loader}
    names |= {"calibration_loader": train_loader, "images": torch.randn(4, 5)}
    if "timm" in PYTHON[number]:
        pictures = DataLoader(TensorDataset(torch.rand(12, 3, 64, 64), torch.arange(12) % 3), 6)
        names |= {"calibration_loader": pictures, "val_loader": pictures, "images": torch.rand(4, 3, 64, 64)}
    exec(compile(PYTHON[number], f"README.md, python block {number}", "exec"), names)
    if "timm" in PYTHON[number]:
        assert Path("classifier.onnx").exists()
        assert names["confidence"].shape == (4,)
    if "PostHocCalibrate" in PYTHON[number]:
        assert names["log_probs"].exp().sum(1).allclose(torch.ones(4))
        assert torch.equal(names["calibrator"].beta, names["calibrate"].calibrator.beta)
    if "MaskedClassifier" in PYTHON[number]:
        assert isinstance(names["module"].classifier, MaskedLinearHead)


class _Own(LightningModule):
    """A module as somebody else has it."""

    def __init__(self):
        super().__init__()
        self.backbone, self.classifier = torch.nn.Linear(5, 4), torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.classifier(self.backbone(x).relu())

    def training_step(self, batch, batch_idx):
        x, y = batch
        return torch.nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def test_the_table_of_methods_is_that_of_their_docstrings():
    assert method_table() in README, "paste what `calib list methods --markdown` prints"


def test_methods_without_soft_labels_are_named():
    sentence = re.search(r"Soft labels train all methods\nbut (.*?), whose", README, re.DOTALL).group(1)
    assert sorted(re.findall(r"`(\w+)`", sentence)) == sorted(row.file for row in ROWS if not row.soft)


def test_every_method_and_data_set_named_is_there_and_every_method_is_named():
    table = re.findall(r"^\| `(\w+)` \| .*\|$", README.partition("| `--model` |")[2].partition("\n\n")[0], re.MULTILINE)
    assert sorted(table) == sorted(path.stem for path in (REPOSITORY / "configs" / "method").glob("*.yaml"))
    sentence = re.search(r"`--data` takes (.*?);", README, re.DOTALL).group(1)
    named = re.findall(r"`(\w+)`", sentence)
    assert sorted(named) == sorted(path.stem for path in (REPOSITORY / "configs" / "data").glob("*.yaml"))
    for name in named:
        assert find_config(name, "data") is not None, name


def test_every_metric_is_explained():
    from calib_lightning.metrics import METRICS, SOFT

    section = README.partition("## What the figures mean")[2]
    for name, metric in (METRICS | SOFT).items():
        row = re.search(rf"^\|[^|]*`{re.escape(name)}`[^|]*\|.*\| (.*?) \|$", section, re.MULTILINE)
        assert row, name
        assert row.group(1) == {"zero": "nearest 0"}.get(metric.better, metric.better)


def test_score_commands_do_what_they_say(monkeypatch, tmp_path, capsys):
    # every file that they name, made small; each command must print or write something
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(60) % 3).numpy()
    for name in ("RUN/predictions/test", "a", "b", "mine", "theirs", "seed0", "seed1"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        logits = 2 * torch.randn(60, 3, generator=generator)
        np.savez(f"{name}.npz", logits=logits.numpy(), labels=labels)
    np.save("logits.npy", logits.numpy())
    np.save("labels.npy", labels)
    np.savetxt("probs.csv", np.column_stack([logits.double().softmax(1), labels]), delimiter=",")
    Path("counts.json").write_text("[200, 50, 5]")
    np.savez("test.npz", logits=logits.numpy(), labels=labels)
    Path("calibrated").mkdir()
    save_calibrator(Temperature().fit(logits, torch.from_numpy(labels)), "calibrated/Temperature.pt")
    commands = [c for c in _commands() if c[0] == "score"]
    assert len(commands) == 7
    for command in commands:
        files = [["seed0.npz", "seed1.npz"] if word == "seed*.npz" else [word] for word in command]
        assert main([word for some in files for word in some]) == 0, command
        out = capsys.readouterr().out
        assert "ECE" in out or Path("report.json").exists(), command
    assert len(list(Path("figures").rglob("*.svg"))) == 3


def test_calibrate_commands_do_what_they_say(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for name in ("val", "test"):
        labels = torch.arange(200) % 3
        logits = 3 * torch.randn(200, 3, generator=generator) + 2 * torch.nn.functional.one_hot(labels, 3)
        np.savez(f"{name}.npz", logits=logits.numpy(), labels=labels.numpy())
    # the command on a run is tested with a real one in tests/cli/test_calibrate.py
    commands = [c for c in _commands() if c[0] == "calibrate" and "RUN" not in c]
    assert len(commands) == 3
    for command in commands:
        assert main(command) == 0, command
        assert "Temperature" in capsys.readouterr().out, command
    assert Path("calibrated/Temperature.pt").is_file()
    for command in (c for c in _commands() if c[0] == "calibrate" and "--calibrators" in c):
        assert named_calibrators(command[command.index("--calibrators") + 1])


def test_classify_command_does_what_it_says(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    calibrator = FixedTemperature(1.5).fit(torch.randn(9, 3), torch.arange(9) % 3)
    plain = Preprocessing(size=(2, 2), mean=(0.5,) * 3, std=(0.5,) * 3)
    export_onnx(CalibratedClassifier(network, calibrator, preprocessing=plain), "classifier.onnx")
    Path("DIR").mkdir()
    Image.new("RGB", (4, 4), (200, 10, 10)).save("DIR/red.png")
    (command,) = [c for c in _commands() if c[0] == "classify"]
    assert main(command) == 0, capsys.readouterr().err
    assert "red.png" in Path("answers.csv").read_text()
