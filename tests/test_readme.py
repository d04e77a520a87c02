"""README and docs promise only what runs."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from calib_lightning.__main__ import main
from calib_lightning.callbacks import LogFigures
from calib_lightning.commands.data_list import data_table
from calib_lightning.commands.list import KINDS, method_table
from calib_lightning.commands.names import COMMANDS, TRAINER
from calib_lightning.core import encoder_names
from calib_lightning.deploy import CalibratedClassifier, Preprocessing, export_onnx
from calib_lightning.methods import MaskedLinearHead
from calib_lightning.metrics import METRICS, SOFT
from calib_lightning.posthoc import FixedTemperature
from calib_lightning.utils.config_search import find_config
from tests.methods.table import ROWS

REPOSITORY = Path(__file__).resolve().parent.parent
README = REPOSITORY / "README.md"
DOCUMENTS = [README, *sorted(REPOSITORY.glob("docs/*.md"))]
TEXTS = {str(path.relative_to(REPOSITORY)): path.read_text() for path in DOCUMENTS}
BLOCKS = {name: re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL) for name, text in TEXTS.items()}
PYTHON = {f"{name}-{i}": text for name in BLOCKS for i, (kind, text) in enumerate(BLOCKS[name]) if kind == "python"}
PROSE = {name: re.sub(r"```.*?```", "", text, flags=re.DOTALL) for name, text in TEXTS.items()}

# commands that do not train; the documents' are run with small files
OWN = tuple(name for name, command in COMMANDS.items() if command.module != TRAINER)


def _lines(document):
    text = "".join(text for kind, text in BLOCKS[document] if kind == "bash")
    for line in text.replace("\\\n", " ").splitlines():
        yield from (command.strip() for command in line.partition("  #")[0].split("&&"))


def _commands(document):
    """Commands of calib, also those that torchrun starts."""
    words = [shlex.split(line.replace("-m calib_lightning ", "calib ")) for line in _lines(document)]
    return [line[line.index("calib") + 1 :] for line in words if "calib" in line]


def _only_prints(command):
    return command[0].startswith("--") or command[-1] == "--help" or "--model.help" in command


def _left(command):
    """Run a command; the code that it ends with."""
    try:
        return main(command)
    except SystemExit as leaving:
        return leaving.code or 0


TRAINER_COMMANDS = {
    " ".join(command): command
    for document in TEXTS
    for command in _commands(document)
    if command[0] not in OWN and not _only_prints(command)
}


# --- what the commands and blocks are run with -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with every file that the documents name, made small; RUN is a run of one epoch."""
    folder = tmp_path_factory.mktemp("documents")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(LogFigures, "on_test_epoch_end", Callback.on_test_epoch_end)  # nothing looks at them
        _write_predictions()
        _write_images()
        Path("configs").symlink_to(REPOSITORY / "configs")
        fit = ["fit", "-c", "quickstart", "--trainer.max_epochs=1", "--run_dir=RUN", "--quiet=true"]
        assert main(fit) == 0
        os.environ.pop("PL_GLOBAL_SEED", None)
        assert main(["calibrate", "RUN", "--no_intervals"]) == 0
        _write_benchmark(Path("runs/quickstart"))
    return folder


def _write_predictions():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    for name in ("val", "test", "a", "b", "mine", "theirs", "seed0", "seed1", "svhn", "textures", "new"):
        logits = 2 * torch.randn(120, 3, generator=generator) + 2 * torch.nn.functional.one_hot(labels, 3)
        features = logits[:, :2] + torch.randn(120, 2, generator=generator)
        np.savez(f"{name}.npz", logits=logits.numpy(), labels=labels.numpy(), features=features.numpy())
        probs = np.column_stack([np.arange(120), labels, logits.double().softmax(1)])
        np.savetxt(f"{name}.csv", probs, delimiter=",", header="id,label,0,1,2", comments="")
    shutil.copy("a.csv", "probs.csv")
    np.save("logits.npy", logits.numpy())
    np.save("labels.npy", labels)
    Path("counts.json").write_text("[200, 50, 5]")


def _write_benchmark(folder):
    """The record of a benchmark whose only run is RUN."""
    folder.mkdir(parents=True)
    (folder / "run").symlink_to(Path("RUN").resolve())
    run = {"folder": "run", "data": "digits_lt", "network": "digits_cnn", "method": "mixup", "seed": 0}
    record = {"baseline": None, "runs": [run | {"calibrators": ["Temperature"], "status": "finished"}]}
    (folder / "benchmark.json").write_text(json.dumps(record))


def _write_images():
    own = "from lightning.pytorch import LightningDataModule\n\n\nclass MyDataModule(LightningDataModule):\n    pass\n"
    Path("my_module.py").write_text(own)
    Path("DIR").mkdir()
    Image.new("RGB", (4, 4), (200, 10, 10)).save("DIR/red.png")
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    calibrator = FixedTemperature(1.5).fit(torch.randn(9, 3), torch.arange(9) % 3)
    plain = Preprocessing(size=(2, 2), mean=(0.5,) * 3, std=(0.5,) * 3)
    export_onnx(CalibratedClassifier(network, calibrator, preprocessing=plain), "classifier.onnx")


@pytest.fixture
def workplace(made, tmp_path, monkeypatch):
    """A copy of that folder, as the working directory."""
    folder = shutil.copytree(made, tmp_path / "workplace", symlinks=True)
    monkeypatch.chdir(folder)
    return folder


class _Own(LightningModule):
    """A module as somebody else has it."""

    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 4))
        self.classifier = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.classifier(self.backbone(x).relu())

    def training_step(self, batch, batch_idx):
        x, y = batch
        return torch.nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def _names(block):
    """What a block may use without defining it."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 3
    size = 32 if "timm" in block else 2
    images = torch.rand(48, 3 if "timm" in block else 1, size, size, generator=generator)
    loader = DataLoader(TensorDataset(images, labels), 24)
    logits = 2 * torch.randn(48, 3, generator=generator) + torch.nn.functional.one_hot(labels, 3)
    names = {"logits": logits, "labels": labels, "images": images, "features": logits[:, :2]}
    names |= {"val_logits": logits.flip(0) + 0.1, "val_labels": labels.flip(0)}
    names |= dict.fromkeys(("train_loader", "val_loader", "calibration_loader", "test_loader"), loader)
    names |= {"batches": [(logits[:24], labels[:24]), (logits[24:], labels[24:])]}
    if "timm" in block:
        import timm

        return names | {"network": timm.create_model("resnet10t", num_classes=3)}
    return names | {"module": _Own(), "network": _Own()}


# --- what is run -----------------------------------------------------------------------------------------------------


def test_the_two_setup_commands_are_those_that_are_checked():
    installs = [line for name in TEXTS for kind, text in BLOCKS[name] for line in text.splitlines() if "pip " in line]
    assert installs == [
        "pip install -e . && calib fit -c configs/quickstart.yaml",
        "pip install -e '.[test]' && pytest",
    ]
    script = (REPOSITORY / ".ci" / "run").read_text()
    assert "pip install --quiet -e '.[test]' && pytest" in script


def test_every_block_is_run():
    # those of YAML and of a cluster's scripts: tests/benchmark/test_documents.py
    assert {kind for blocks in BLOCKS.values() for kind, _ in blocks} == {"bash", "python", "yaml", "text"}
    for document in TEXTS:
        for line in filter(None, _lines(document)):
            assert line.split()[0] in ("calib", "pip", "pytest", "torchrun"), (document, line)
        for command in _commands(document):
            assert command[0] in COMMANDS or _only_prints(command), (document, command)


@pytest.mark.parametrize("command", TRAINER_COMMANDS.values(), ids=TRAINER_COMMANDS)
def test_commands_of_the_trainer_parse(command, made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    monkeypatch.syspath_prepend(made)
    code = _left([*(word for word in command if word != "--print_config"), "--print_config"])
    done = capsys.readouterr()
    assert code == 0, done.err
    assert "class_path:" in done.out


@pytest.mark.parametrize("document", [d for d in TEXTS if any(c[0] in OWN or _only_prints(c) for c in _commands(d))])
def test_other_commands_do_what_they_say(document, workplace, capsys):
    # in the order of the document, so that one finds what another has written
    for command in (c for c in _commands(document) if c[0] in OWN or _only_prints(c)):
        words = command[: command.index("--run")] if "--run" in command else command
        if command[0] == "benchmark":
            words = [*(word for word in words if word != "--print"), "--dry-run"]  # a benchmark takes minutes
        words = [word for some in words for word in (sorted(map(str, Path().glob(some))) if "*" in some else [some])]
        code, done = _left(words), capsys.readouterr()
        assert code == 0, (command, done.err)
        written = command[command.index("--output") + 1] if "--output" in command else ""
        assert len(done.out.splitlines()) > 2 or Path(written).is_file(), command
        if {"--row", "--column"} <= set(command):
            assert "\ncalib fit -c recipe/" in done.out
        if "--figures" in command:
            assert len(list(Path("figures").rglob("*.svg"))) == 3
        if command[0] == "classify":
            assert "red.png" in Path(written).read_text()


@pytest.mark.parametrize("block", PYTHON.values(), ids=PYTHON)
@pytest.mark.filterwarnings("ignore:operating_point", r"ignore:MaskedClassifier. the keep rate")  # the rows are few
def test_python_runs_as_written(block, workplace):
    torch.manual_seed(0)  # the weights of the module must not depend on the tests before
    names = _names(block)
    exec(compile(block, "a Python block", "exec"), names)
    if "export_onnx" in block:
        assert Path("classifier.onnx").stat().st_mtime > (workplace / "DIR").stat().st_mtime
    if "abstain" in block:
        assert names["confidence"].shape == (48,)
    if "log_probs =" in block:
        assert names["log_probs"].exp().sum(1).allclose(torch.ones(48), atol=1e-5)
    if "load_calibrator(trainer" in block:
        assert names["calibrator"].temperature == names["calibrate"].calibrator.temperature
    if "MaskedClassifier" in block:
        assert isinstance(names["module"].classifier, MaskedLinearHead)


# --- what is written -------------------------------------------------------------------------------------------------


def test_the_readme_takes_two_minutes():
    assert len(README.read_text().splitlines()) <= 200


def test_links_lead_somewhere():
    for name, text in PROSE.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("http"):
                continue
            path, _, anchor = target.partition("#")
            found = (REPOSITORY / name).parent / path if path else REPOSITORY / name
            assert found.is_file(), (name, target)
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert not anchor or anchor in slugs, (name, target)


def test_the_index_has_every_page():
    index = set(re.findall(r"^\| \[(\S+)\]\(\1\)", TEXTS["docs/index.md"], re.MULTILINE))
    assert index == {path.name for path in REPOSITORY.glob("docs/*.md")} - {"index.md"}


def test_options_in_the_text_are_there(capsys):
    for name, command in COMMANDS.items():
        _left([name, "--help_all" if command.module == TRAINER else "--help"])
    options = set(re.findall(r"--[a-z]\w*", capsys.readouterr().out))
    for name, text in PROSE.items():
        codes = [code for code in re.findall(r"`([^`]+)`", text) if not code.startswith("pytest ")]
        assert set(re.findall(r"(?<!\S)--[a-z]\w*", " ".join(codes))) <= options, name


def test_the_table_of_methods_is_that_of_their_docstrings():
    assert method_table() in TEXTS["docs/methods.md"], "paste what `calib list methods --markdown` prints"


def test_the_table_of_data_is_that_of_the_cards():
    assert data_table() in TEXTS["docs/data.md"], "paste what `calib data list --markdown` prints"


def test_methods_without_soft_labels_are_named():
    sentence = re.search(r"train on soft labels except (.*?), whose", TEXTS["docs/methods.md"], re.DOTALL).group(1)
    assert sorted(re.findall(r"`(\w+)`", sentence)) == sorted(row.file for row in ROWS if not row.soft)


def test_every_data_set_calibrator_network_and_recipe_is_named():
    for kind, document in {"data": "data", "calibrators": "calibrators", "configs": "recipes"}.items():
        named = re.findall(r"[\w-]+", " ".join(re.findall(r"`([^`]+)`", PROSE[f"docs/{document}.md"])))
        for name, text in KINDS[kind].rows():
            if text and (kind != "configs" or name.startswith("recipe/")):
                assert name.removeprefix("recipe/") in named, name


def test_tables_name_only_what_is_there():
    for axis, document in {"data": "data", "recipe": "recipes"}.items():
        for name in _named_in_table(document, "name" if axis == "data" else "recipe"):
            assert find_config(name, axis) is not None, name
    assert sorted(_named_in_table("networks", "name")) == sorted(encoder_names())


def _named_in_table(document, title):
    """What stands in the first column of the first table under this title."""
    rows = TEXTS[f"docs/{document}.md"].partition(f"\n| {title} |")[2].partition("\n\n")[0].splitlines()[2:]
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert names, (document, title)
    return names


def test_every_metric_is_explained():
    for name, metric in (METRICS | SOFT).items():
        row = re.search(rf"^\|[^|]*`{re.escape(name)}`[^|]*\|.*\| (.*?) \|$", TEXTS["docs/metrics.md"], re.MULTILINE)
        assert row, name
        assert row.group(1) == {"zero": "nearest 0"}.get(metric.better, metric.better)
