"""Modules of lightly, which import ``pytorch_lightning``, with the callbacks and stages of this package."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from calib_lightning import Temperature, load_calibrator
from calib_lightning.callbacks import CalibrationMonitor, PostHocCalibrate
from calib_lightning.core import CachedFeatures, StageSwitch, StageTraining, load_stages
from calib_lightning.methods import AdaptiveSparsity, MaskedClassifier

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def benchmarking(pl):
    return pytest.importorskip(
        "lightly.utils.benchmarking", reason="lightly is not installed (pip install -e '.[foreign]')"
    )


def rows(n, seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=generator)
    return torch.randn(n, 3, 16, 16, generator=generator) + 0.3 * y.view(-1, 1, 1, 1), y


def loader(n, seed):
    return DataLoader(TensorDataset(*rows(n, seed)), 32)


def encoder():
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten())


def pretrained(pl, folder):
    """An encoder trained with SimCLR from lightly's parts, as in its tutorials."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    class SimCLR(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone, self.projection_head = encoder(), SimCLRProjectionHead(144, 64, 32)
            self.criterion = NTXentLoss()

        def forward(self, x):
            return self.projection_head(self.backbone(x))

        def training_step(self, batch, batch_idx):
            x, _ = batch
            return self.criterion(self(x + 0.1 * torch.randn_like(x)), self(x.flip(-1)))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.06)

    torch.manual_seed(0)
    trainer(pl, folder).fit(module := SimCLR(), loader(256, 0))
    return module.backbone


def trainer(pl, folder, *callbacks):
    return pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, callbacks=list(callbacks), default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["LinearClassifier", "FinetuneClassifier"])
@pytest.mark.parametrize("stored", [False, True])
def test_a_masked_classifier_after_its_own_training(pl, benchmarking, kind, stored, tmp_path):
    def classifier(backbone):
        options = {"batch_size_per_device": 32, "feature_dim": 144, "num_classes": 3, "topk": (1, 2)}
        return getattr(benchmarking, kind)(backbone, lr=0.5, **options)

    module = classifier(pretrained(pl, tmp_path))
    training = StageTraining(views=CachedFeatures() if stored else None)
    switch = MaskedClassifier(
        -3,
        sparsity=AdaptiveSparsity(held_out=False),
        training=training,
        encoder="model",
        head="classification_head",
    )
    calibrate = PostHocCalibrate(Temperature(), loader(300, 2))
    run = trainer(pl, tmp_path, CalibrationMonitor(figures_every=0), switch, calibrate)
    run.fit(module, loader(256, 0), loader(200, 1))
    found = {key: float(value) for key, value in run.callback_metrics.items()}
    assert (run.current_epoch, switch.first_epoch) == (5, 2)
    assert found["monitor/accuracy"] == pytest.approx(found["val_top1"], abs=1e-6)
    assert found["monitor/accuracy"] > 0.5
    assert found["mac_cal/accuracy"] > 0.4
    path = run.checkpoint_callback.best_model_path
    x, _ = rows(9, 5)
    assert torch.equal(load_stages(classifier(encoder()), path)(x), module.eval()(x))
    assert float(load_calibrator(path).beta) == float(calibrate.calibrator.beta)


def test_another_criterion_in_the_stage(pl, benchmarking, tmp_path):
    options = {"batch_size_per_device": 32, "feature_dim": 144, "num_classes": 3, "topk": (1, 2)}
    module = benchmarking.FinetuneClassifier(encoder(), **options)
    training = StageTraining(criterion=nn.CrossEntropyLoss(label_smoothing=0.1))
    switch = StageSwitch(-1, encoder="model", head="classification_head", training=training)
    trainer(pl, tmp_path, switch).fit(module, loader(64, 0), loader(64, 1))
    assert module.criterion is training.criterion
