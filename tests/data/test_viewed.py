"""Views for plain loaders: the draws of our data modules, and a fit of RefCal in both stages."""

from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from PIL import Image
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset, TensorDataset

from calib_lightning.core import CachedFeatures, StageSwitch, StageTraining
from calib_lightning.data import CleanViews, ContrastiveViews, Normalize, ResizedCropFlip, ViewedDataset
from calib_lightning.methods import CrossEntropyLoss, RefCal

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),
]
VIEWS = ContrastiveViews((0.5, 1.0), flip=False)
CROPS = ResizedCropFlip((0.5, 1.0), flip=False)


def images(rows=40, channels=1):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (rows, channels, 8, 8), generator=generator, dtype=torch.uint8)


def labels(rows=40):
    return torch.arange(rows) % 3


class Pictures(Dataset):
    def __init__(self, image):
        self.image = image

    def __len__(self):
        return len(self.image)

    def __getitem__(self, place):
        array = self.image[place].permute(1, 2, 0).numpy()
        return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array), int(place) % 3


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("views", [None, CROPS, VIEWS], ids=["clean", "crop", "two"])
def test_items_are_the_rows_of_the_transform_of_our_data_modules(channels, views):
    seed_everything(7)
    image, mean, std = images(12, channels), (0.3,) * channels, (0.4,) * channels
    transform = (views or CleanViews()).transform(Normalize(mean, std), None, 7)
    for data in (TensorDataset(image, labels(12)), Pictures(image)):
        viewed = ViewedDataset(data, views, mean, std)
        assert len(viewed) == 12
        for epoch in (0, 3):
            viewed.set_epoch(epoch)
            made, label = zip(*(viewed[place] for place in range(12)), strict=True)
            torch.testing.assert_close(torch.stack(made), transform(image, torch.arange(12), epoch))
            assert [int(each) for each in label] == labels(12).tolist()
    seeded = ViewedDataset(data, views, mean, std, seed=8)[1][0]
    assert torch.equal(seeded, ViewedDataset(data, views, mean, std)[1][0]) == (views is None)


class Watch(Callback):
    """The images of every epoch, by position."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        image, _, index = batch
        self.seen.setdefault(trainer.current_epoch, {}).update(zip(index.tolist(), image.clone(), strict=True))


def fit(tmp_path, loader, epochs=(2, 3), views=CROPS, **options):
    seed_everything(3)
    training = StageTraining(partial(SGD, lr=0.05), criterion=CrossEntropyLoss(), views=views)
    switch = StageSwitch(-epochs[1], training=training, **options)
    module = RefCal(3, 16, views=VIEWS, switch=switch, encoder="digits_cnn", optimizer=partial(SGD, lr=0.1))
    watch = Watch()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs[0],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch],
        num_sanity_val_steps=0,
    )
    validation = DataLoader(ViewedDataset(TensorDataset(images(), labels())), batch_size=16)
    trainer.fit(module, loader, validation)
    return trainer, module, watch


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1, "persistent_workers": True}], ids=["here", "worker"])
def test_refcal_trains_both_stages_on_a_plain_loader(tmp_path, workers):
    data = ViewedDataset(TensorDataset(images(), labels()))
    trainer, module, watch = fit(tmp_path, DataLoader(data, batch_size=16, shuffle=True, **workers))
    assert module.stage == 1
    assert {"val/accuracy", "train/accuracy"} <= set(trainer.callback_metrics)
    for epoch in range(5):
        expected = (VIEWS if epoch < 2 else CROPS).transform(Normalize((0.5,), (0.5,)), None, 3)
        made = expected(images(), torch.arange(40), epoch)
        assert sorted(watch.seen[epoch]) == list(range(40))
        for place, image in watch.seen[epoch].items():
            torch.testing.assert_close(image, made[place])
    assert data.stage_views is None  # as before the fit


def test_stored_features_are_those_of_clean_images(tmp_path):
    data = ViewedDataset(TensorDataset(images(), labels()))
    trainer, module, _ = fit(tmp_path, DataLoader(data, batch_size=16, shuffle=True), views=CachedFeatures())
    assert module.stage == 1
    assert trainer.callback_metrics["train/accuracy"] > 0


def test_a_loader_without_views_is_told_to_wrap_its_data_set(tmp_path):
    plain = DataLoader(TensorDataset(images().float(), labels()), batch_size=16)
    with pytest.raises(ValueError, match=r"plain loaders.*DataLoader over a ViewedDataset"):
        fit(tmp_path, plain)
    with pytest.raises(ValueError, match=r"images have shape \(16, 1, 8, 8\).*DataLoader\(ViewedDataset\(dataset\)"):
        fit(tmp_path, plain, views=None)
    viewed = DataLoader(ViewedDataset(TensorDataset(images(), labels())), batch_size=16)
    training = StageTraining(criterion=CrossEntropyLoss(), batch_size=8)
    module = RefCal(3, 16, switch=StageSwitch(-1, training=training), encoder="digits_cnn")
    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"batch_size of StageSwitch's training is incompatible with plain loaders"):
        trainer.fit(module, viewed)


@pytest.mark.parametrize(
    ("item", "error", "named"),
    [
        ((torch.zeros(1, 8, 8), 0), ValueError, r"image of item 1 of list is torch\.float32 .*remove ToTensor\(\)"),
        ((torch.zeros(8, 8).byte(), 0), ValueError, r"torch\.uint8 of shape \(8, 8\)"),
        ((np.zeros((8, 8)), 0), ValueError, r"torch\.float64 of shape \(1, 8, 8\)"),
        (torch.zeros(1, 8, 8), TypeError, r"Item 1 of list is a Tensor; it must be \(image, label\)"),
    ],
)
def test_items_that_are_no_bytes_are_named(item, error, named):
    with pytest.raises(error, match=named):
        ViewedDataset([None, item])[1]


def test_other_views_are_refused():
    with pytest.raises(TypeError, match=r"views is 3; it must be an object such as ContrastiveViews\(\)"):
        ViewedDataset([], 3)
