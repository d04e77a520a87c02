"""``calib fit`` on data modules of somebody else, found in the working directory."""

import json
import sys

import numpy as np
import pytest
import yaml

NET = ("--model.encoder=digits_cnn", "--trainer.accelerator=cpu", "--trainer.max_epochs=2", "--quiet=true")
SOURCE = '''
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split


class Blobs(Dataset):
    def __init__(self, n, seed, keys=None):
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.randint(3, (n,), generator=generator)
        self.data = torch.randn(n, 1, 8, 8, generator=generator) + self.targets[:, None, None, None]
        self.keys = keys

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        image, label = self.data[i], int(self.targets[i])
        return dict(zip(self.keys, (image, label))) if self.keys else (image, label)


class Unlabelled:
    """No attribute says what the labels are."""

    def __init__(self):
        self.rows = Blobs(60, 0)

    def __len__(self):
        return 60

    def __getitem__(self, i):
        return self.rows[i]


class Tuples(LightningDataModule):
    def __init__(self, batch_size: int = 16):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage=None):
        self.train, self.val = random_split(Blobs(60, 0), [50, 10])

    def train_dataloader(self):
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, self.batch_size)

    def test_dataloader(self):
        return DataLoader(Blobs(30, 1), self.batch_size)

    def predict_dataloader(self):
        return DataLoader(Blobs(30, 1).data, batch_size=self.batch_size)


class Calibrated(Tuples):
    def calibration_dataloader(self):
        return DataLoader(Blobs(20, 2), 16)


class Mistaken(Tuples):
    def setup(self, stage=None):
        self.rooot.read()


class Dicts(LightningDataModule):
    num_classes = 3

    def train_dataloader(self):
        return DataLoader(Blobs(60, 0, ("image", "label")), 16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(Blobs(30, 1, ("image", "label")), 16)

    test_dataloader = val_dataloader


class OnlyTraining(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Unlabelled(), 16, shuffle=True)

    def val_dataloader(self):
        return None


class Nothing(LightningDataModule):
    pass


class WrongKeys(Dicts):
    def train_dataloader(self):
        return DataLoader(Blobs(60, 0, ("image", "target")), 16)
'''


@pytest.fixture
def own(calib, tmp_path):
    """``calib`` in a folder with a module of data modules, which no other test has imported."""
    (tmp_path / "own_data_of_a_test.py").write_text(SOURCE)
    before = [*sys.path]

    def run(command, data, method, *options):
        options = NET + options
        return calib(command, f"--data=own_data_of_a_test.{data}", f"--model={method}", *options)

    yield run
    sys.path[:] = before
    sys.modules.pop("own_data_of_a_test", None)


@pytest.mark.parametrize("method", ["cross_entropy", "crl", "balcal", "ldam"])
@pytest.mark.parametrize("data", ["Tuples", "Dicts"])
def test_every_method_is_fitted_and_tested(own, only_run, data, method):
    done = own("fit", data, method)
    assert done.code == 0, done.err
    run = only_run()
    record = json.loads((run / "run.json").read_text())
    assert [stage["status"] for stage in record["stages"]] == ["finished", "finished"]
    assert record["checkpoint"]["select_on"].startswith("val/")
    assert record["results"]["test/n"] == 30
    assert record["stages"][0]["images_per_second"] > 0
    with np.load(run / "predictions" / "test.npz") as saved:
        assert saved["index"].tolist() == [*range(30)]
        right = (saved["logits"].argmax(axis=1) == saved["labels"]).mean()
    assert record["results"]["test/accuracy"] == pytest.approx(right, abs=1e-6)


def test_a_run_is_predicted_from_its_configuration(own, calib, only_run):
    assert own("fit", "Tuples", "cross_entropy", "--data.batch_size=7").code == 0
    run = only_run()
    done = calib("predict", "-c", run / "config.yaml", "--quiet=true")
    assert done.code == 0, done.err
    with np.load(run / "predict" / "predictions" / "predict-0.npz") as saved:
        assert saved["labels"].tolist() == [-1] * 30
        assert saved["index"].tolist() == [*range(30)]


def test_without_validation_and_test_set_the_last_checkpoint_is_kept(own, only_run):
    done = own("fit", "OnlyTraining", "crl", "--num_classes=3")
    assert done.code == 0, done.err
    assert done.err.count("no validation set: the last checkpoint is kept") == 1
    assert "OnlyTraining has no test set: nothing was tested" in done.out
    run = only_run()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    assert json.loads((run / "run.json").read_text())["checkpoint"]["select_on"] == "last"
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["num_classes"] == 3
    assert saved["select_on"] is None


def test_our_data_without_validation_keeps_the_last_checkpoint(calib, only_run):
    done = calib("fit", "--data=ToyDataModule", "--model=cross_entropy", *NET)
    assert done.code == 0, done.err
    assert "no validation set: the last checkpoint is kept" in done.err
    assert json.loads((only_run() / "run.json").read_text())["checkpoint"]["select_on"] == "last"


@pytest.mark.parametrize(
    ("data", "method", "options", "said"),
    [
        ("OnlyTraining", "crl", (), "OnlyTraining lacks what calib fit needs: the number of classes (--num_classes=K"),
        (
            "OnlyTraining",
            "ldam",
            (),
            "needs: the number of classes (--num_classes=K, or an attribute num_classes); class counts (--model.class_",
        ),
        ("OnlyTraining", "ldam", ("--num_classes=3",), "needs: class counts ("),
        ("Nothing", "ldam", (), "or an attribute num_classes); a method train_dataloader(); class counts ("),
        ("Nothing", "crl", ("--num_classes=3",), "needs: a method train_dataloader()."),
        ("Dicts", "crl", ("--num_classes=4",), "num_classes is 4, but Dicts says that it has 3 classes"),
        ("OnlyTraining", "crl", ("--num_classes=3", "--select_on=val/nll"), "select_on is 'val/nll', but the data has"),
    ],
)
def test_a_refusal_names_all_that_is_missing_and_leaves_no_folder(own, tmp_path, data, method, options, said):
    done = own("fit", data, method, *options)
    assert done.code == 1
    assert said in done.err
    assert "compute_fn" not in done.err
    assert "Traceback" not in done.err
    assert not [*(tmp_path / "runs").glob("*")]


def test_class_counts_can_be_given(own, only_run):
    done = own("fit", "OnlyTraining", "ldam", "--num_classes=3", "--model.class_counts=[20,20,20]")
    assert done.code == 0, done.err
    assert (only_run() / "checkpoints" / "last.ckpt").is_file()


def test_a_batch_of_another_form_is_explained(own):
    done = own("fit", "WrongKeys", "cross_entropy")
    assert done.code == 1
    assert "a dict with the keys 'image', 'target': label is missing" in done.err


def test_a_module_in_the_working_directory_is_found(forked, tmp_path):
    (tmp_path / "own_data_of_a_test.py").write_text(SOURCE)
    # a process of its own, which has the folder neither on its path nor as a module
    process = forked("fit", "--data=own_data_of_a_test.Nothing", "--model=crl", *NET)
    assert "Nothing lacks what calib fit needs" in process.ended()
    assert process.returncode == 1


def test_help_says_how_data_of_ones_own_is_named(calib):
    text = calib("fit", "--help").out
    assert "--num_classes" in text
    assert "my_module.MyDataModule" in " ".join(text.split())


def test_mac_cal_on_data_of_its_own(own, only_run):
    done = own("fit", "Calibrated", "mac_cal", "--model.switch.at_epoch=-1")
    assert done.code == 0, done.err
    assert "The stage uses the loader's batches" in done.err
    record = json.loads((only_run() / "run.json").read_text())
    assert record["results"]["test/n"] == 30
    assert record["calibration_used_by"] == ["MaskedClassifier"]


def test_a_mistake_in_somebodys_setup_is_told_as_it_is(own):
    with pytest.raises(AttributeError, match="no attribute 'rooot'"):  # with the line of their file
        own("fit", "Mistaken", "cross_entropy")
