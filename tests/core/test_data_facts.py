"""What data of other packages says of itself: labels, classes, sets."""

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import ConcatDataset, DataLoader, Subset, SubsetRandomSampler, TensorDataset

from calib_lightning import methods
from calib_lightning.core.data_facts import class_names_of, has_test, has_validation, labels_of, num_classes_of, prepare
from calib_lightning.methods import LDAM
from tests.core.foreign_data import Blobs, Bolts, Stream
from tests.ddp.cases import sgd, trainer


class With:
    """A data set of three rows with the given attributes."""

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def __len__(self):
        return 3


@pytest.mark.parametrize(
    ("data", "labels"),
    [
        (With(targets=[2, 0, 1]), [2, 0, 1]),
        (With(labels=np.array([[2], [0], [1]], dtype=np.uint8)), [2, 0, 1]),
        (With(y=torch.tensor([2, 0, 1], dtype=torch.int16)), [2, 0, 1]),
        (With(samples=[("a.png", 2), ("b.png", 0), ("c.png", 1)]), [2, 0, 1]),
        (With(targets=[3, 1, 2], target_transform=lambda label: label - 1), [2, 0, 1]),
        (With(targets=["c", "a", "b"], labels=[2, 0, 1]), [2, 0, 1]),
        (TensorDataset(torch.zeros(3, 2), torch.tensor([2, 0, 1])), [2, 0, 1]),
        (Subset(Subset(With(targets=[2, 0, 1]), [2, 0]), [1]), [2]),
        (ConcatDataset([With(targets=[2, 0, 1]), With(y=[1, 1, 1])]), [2, 0, 1, 1, 1, 1]),
        (ConcatDataset([With(targets=[2, 0, 1]), With()]), None),
        (With(targets=[2, 0]), None),
        (With(targets=[0.5, 0.1, 0.2]), None),
        (With(), None),
        (TensorDataset(torch.zeros(3, 2)), None),
        (Stream(), None),
    ],
)
def test_labels_are_found_without_images(data, labels):
    found = labels_of(data)
    assert (None if found is None else found.tolist()) == labels
    assert found is None or found.dtype == torch.int64


class Over(LightningDataModule):
    def __init__(self, data, **attributes):
        super().__init__()
        self.data = data
        vars(self).update(attributes)

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=2)


@pytest.mark.parametrize(
    ("data", "number"),
    [
        (Over(None, num_classes=7), 7),
        (Over(None, n_classes=np.int64(6)), 6),
        (Over(None, class_names=("a", "b")), 2),
        (Over(Subset(With(classes=list("abcd"), targets=[0, 1, 2]), [0])), 4),
        (Over(With(targets=[0, 4, 1])), 5),
        (Over(With()), None),
        (Bolts(), 3),
        (LightningDataModule(), None),
    ],
)
def test_the_number_of_classes_is_found(data, number):
    assert num_classes_of(data) == number


def test_names_of_classes_are_strings_and_as_many_as_classes():
    assert class_names_of(Over(None, class_names=["a", "b"])) == ("a", "b")
    assert class_names_of(Subset(With(classes=["a", "b"]), [0])) == ("a", "b")
    assert class_names_of(Over(With(classes=["a", "b"]))) == ("a", "b")
    assert class_names_of(Over(None, class_names=["a", "b"], num_classes=3)) is None
    assert class_names_of(With(classes=[0, 1])) is None
    assert class_names_of(LightningDataModule()) is None


def test_a_look_at_the_data_leaves_random_numbers_as_they_were():
    calls = []

    class Counting(Bolts):
        def prepare_data(self):
            calls.append("prepare")

        def setup(self, stage=None):
            calls.append(stage)
            super().setup(stage)

    data = Counting()
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    assert num_classes_of(data) == 3
    assert has_validation(data)
    assert prepare(data)
    assert torch.equal(torch.rand(1), expected)
    assert calls == ["prepare", "fit"]


def test_data_that_asks_for_its_trainer_is_not_looked_at():
    class Asking(Bolts):
        def setup(self, stage=None):
            self.world = self.trainer.world_size

    assert num_classes_of(Asking()) is None
    assert has_validation(Asking())


def test_data_without_some_sets_is_told():
    class Empty(Over):
        def val_dataloader(self):
            return []

        def test_dataloader(self):
            return None

    for data in (Over(Blobs()), Empty(Blobs())):
        assert not has_validation(data)
        assert not has_test(data)
    assert has_validation(Bolts())
    assert has_test(Bolts())


def test_class_counts_are_those_of_the_rows_that_are_drawn(tmp_path):
    labels = torch.tensor(Blobs().targets)
    rows = [*range(1, 40, 2)]
    module = LDAM(3, encoder="digits_cnn", optimizer=sgd)
    trainer(tmp_path, max_epochs=1).fit(module, DataLoader(Blobs(), batch_size=5, sampler=SubsetRandomSampler(rows)))
    margins = methods.ldam_margins(labels[rows].bincount())
    torch.testing.assert_close(module.criterion.margins.double(), margins, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r"class_counts=\[...\]"):
        trainer(tmp_path, max_epochs=1).fit(
            LDAM(3, encoder="digits_cnn", optimizer=sgd), DataLoader(Stream(), batch_size=8)
        )
