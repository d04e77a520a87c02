"""Data sets and data modules as other packages write them."""

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, random_split


class Blobs(Dataset):
    """Images of three classes; the first pixel is the position."""

    def __init__(self, n=40, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.randint(3, (n,), generator=generator).tolist()
        self.images = torch.randn(n, 1, 8, 8, generator=generator)
        self.images += torch.tensor(self.targets)[:, None, None, None]
        self.images[:, 0, 0, 0] = torch.arange(n)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return self.images[i], self.targets[i]


class DictBlobs(Blobs):
    def __getitem__(self, i):
        return {"image": self.images[i], "label": self.targets[i], "path": f"{i}.png"}


class Bolts(LightningDataModule):
    """As in lightning-bolts: a random split, plain tuples."""

    def setup(self, stage=None):
        self.dataset_train, self.dataset_val = random_split(Blobs(), [30, 10])
        self.dataset_test = Blobs(15, seed=1)

    def train_dataloader(self):
        return DataLoader(self.dataset_train, batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.dataset_val, batch_size=8)

    def test_dataloader(self):
        return DataLoader(self.dataset_test, batch_size=8)

    def predict_dataloader(self):
        return DataLoader(TensorDataset(self.dataset_test.images), batch_size=8)


class Dicts(LightningDataModule):
    """As in torchgeo: batches are dicts, and a hook changes them on the device."""

    def train_dataloader(self):
        return DataLoader(DictBlobs(), batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(DictBlobs(15, seed=1), batch_size=8)

    test_dataloader = val_dataloader

    def on_after_batch_transfer(self, batch, dataloader_idx):
        batch["image"] = batch["image"] * 1.0
        return {**batch, "path": None}


class Stream(IterableDataset):
    """Every process reads its own part."""

    def __init__(self, rank=0, world=1):
        self.rows = [row for i, row in enumerate(Blobs()) if i % world == rank] if world > 1 else [*Blobs()]

    def __iter__(self):
        return iter(self.rows)
