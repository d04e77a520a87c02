"""Images a second of our loaders beside torchvision's transforms and ImageFolder; reported, never judged.

Run with ``pytest tests/benchmarks/test_loading.py -m slow -n0 --benchmark-enable -s``.
"""

import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from calib_lightning.data import Compose, CropFlip, FolderDataModule, InMemorySet, Normalize, ResumableLoader, SplitSpec

ROUNDS, BATCH = 2, 128
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def rate(loader, images):
    """Images a second of whole passes, start of the workers included: the best of a few."""
    best = 0.0
    for _ in range(ROUNDS):
        start, seen = time.perf_counter(), 0
        for batch in loader:
            seen += len(batch[0])
        best = max(best, seen / (time.perf_counter() - start))
        assert seen == images
    return best


class Bytes(Dataset):
    """Images in memory with per-image transforms, as torchvision's CIFAR10 has them."""

    def __init__(self, image, label, transform):
        self.image, self.label, self.transform = image, label, transform

    def __len__(self):
        return len(self.label)

    def __getitem__(self, row):
        return self.transform(Image.fromarray(self.image[row])), self.label[row]


def test_crop_flip_and_normalise_in_memory(benchmark):
    """20,000 images of 32 x 32 as in CIFAR: ours in this process and with 2 workers, torchvision's with 2 workers."""
    image = np.random.RandomState(0).randint(0, 256, (20_000, 32, 32, 3)).astype(np.uint8)
    label = torch.arange(len(image)) % 10
    transform = Compose(CropFlip(seed=0), Normalize(MEAN, STD))
    data = InMemorySet(
        torch.from_numpy(image).permute(0, 3, 1, 2).contiguous(), label, torch.arange(len(image)), transform
    )
    ours = {n: rate(ResumableLoader(data, BATCH, shuffle=True, seed=0, num_workers=n), len(image)) for n in (0, 2)}
    each = T.Compose([T.RandomCrop(32, 4), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)])
    theirs = {n: rate(DataLoader(Bytes(image, label, each), BATCH, True, num_workers=n), len(image)) for n in (0, 2)}
    benchmark.pedantic(lambda: list(ResumableLoader(data, BATCH, shuffle=True, seed=0)), rounds=1)
    benchmark.extra_info |= {"ours": ours, "torchvision": theirs}
    print(f"\nin memory, images/s: ours {ours}, torchvision {theirs}")


@pytest.mark.parametrize("crop", [False, True], ids=["centre crop", "random crop"])
def test_image_files(benchmark, real_data, crop):
    """1,000 JPEG files of about 256 x 340: ours and ImageFolder with 0 and 2 workers."""
    root = real_data / "imagenet-sample" / "val"
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    view = (
        [T.RandomResizedCrop(224, (0.35, 1.0)), T.RandomHorizontalFlip()]
        if crop
        else [T.Resize(224), T.CenterCrop(224)]
    )
    folder = ImageFolder(root, T.Compose([*view, T.ToTensor(), T.Normalize(mean, std)]))
    data = FolderDataModule(root, SplitSpec(), batch_size=32, size=224, augment=crop)
    data.setup()
    ours, theirs = {}, {}
    for workers in (0, 2):
        data.num_workers = workers
        ours[workers] = rate(data.train_dataloader(), len(folder))
        theirs[workers] = rate(DataLoader(folder, 32, True, num_workers=workers), len(folder))
    benchmark.pedantic(lambda: list(data.train_dataloader()), rounds=1)
    benchmark.extra_info |= {"ours": ours, "ImageFolder": theirs}
    print(f"\nfiles, images/s: ours {ours}, ImageFolder {theirs}")
