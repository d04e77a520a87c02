"""Small networks, images with labels, and fitted classifiers, for the tests of deployment."""

import torch
from torch import Tensor, nn

from calib_lightning.deploy import CalibratedClassifier, Preprocessing
from calib_lightning.posthoc import Calibrator
from calib_lightning.posthoc.temperature import Temperature

CLASSES = ("ant", "bee", "cat", "dog", "eel")
PREPROCESSING = Preprocessing(size=(8, 8), mean=(0.4,), std=(0.3,))


class SmallNet(nn.Module):
    """Logits of 8 x 8 grey images in 5 classes; dropout and batch norm tell training from evaluation."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.pool = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5))
            self.fc = nn.Linear(8, len(CLASSES))
        self.fc.weight.data *= 5

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.pool(image))


def images(n: int = 300, seed: int = 1) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def labelled(n: int = 300, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Images whose labels the network gets right in some six of ten rows."""
    image = images(n, seed)
    with torch.no_grad():
        logits = SmallNet().eval()(image)
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed + 100))
    return image, (logits + 1.2 * noise).argmax(dim=1)


def batches(n: int = 300, seed: int = 1, size: int = 128) -> list[tuple[Tensor, Tensor, Tensor]]:
    """A loader: a list of (image, label, index)."""
    image, label = labelled(n, seed)
    return list(zip(image.split(size), label.split(size), torch.arange(n).split(size), strict=True))


def classifier(calibrator: Calibrator | None = None, **options) -> CalibratedClassifier:
    made = CalibratedClassifier(SmallNet(), Temperature() if calibrator is None else calibrator, **options)
    return made.fit(batches())
