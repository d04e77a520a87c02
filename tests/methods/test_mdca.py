"""MDCA: a penalty beside any criterion."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from calib_lightning.core import load_module
from calib_lightning.data import ToyDataModule
from calib_lightning.methods.focal import focal_loss
from calib_lightning.methods.label_smoothing import LabelSmoothingLoss
from calib_lightning.methods.mdca import MDCA, MDCALoss, mdca_penalty

LABELS = torch.tensor([0, 1, 2, 2, 1, 0, 0])


@pytest.fixture
def logits():
    return torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_it_is_0_where_mean_probabilities_are_the_frequencies():
    # every row is wrong about itself, the columns are right
    probs = torch.tensor([[0.25, 0.75], [0.75, 0.25]], dtype=torch.float64)
    assert mdca_penalty(probs.log(), torch.tensor([0, 1])).item() == pytest.approx(0, abs=1e-15)


def test_the_order_of_rows_does_not_matter(logits):
    torch.testing.assert_close(mdca_penalty(logits.flip(0), LABELS.flip(0)), mdca_penalty(logits, LABELS))


def test_classes_that_are_absent_from_the_batch_count():
    assert mdca_penalty(torch.zeros(1, 4), torch.tensor([0])).item() == pytest.approx((0.75 + 3 * 0.25) / 4)


def test_strength_0_is_the_criterion_and_the_default_criterion_is_focal_1(logits):
    torch.testing.assert_close(MDCALoss(strength=0.0)(logits, LABELS), focal_loss(logits, LABELS, gamma=1.0))


def test_any_criterion_goes_with_it(logits):
    ours = MDCALoss(nn.CrossEntropyLoss(), 2.0)(logits, LABELS)
    torch.testing.assert_close(ours, F.cross_entropy(logits, LABELS) + 2 * mdca_penalty(logits, LABELS))


def test_a_foreign_criterion_gets_float32(logits):
    criterion = MDCALoss(nn.CrossEntropyLoss())
    torch.testing.assert_close(criterion(logits.bfloat16(), LABELS), criterion(logits.bfloat16().float(), LABELS))


@pytest.mark.parametrize("strength", [-1.0, float("nan")])
def test_impossible_strength_is_named(strength):
    with pytest.raises(ValueError, match=str(strength)):
        MDCALoss(strength=strength)


def test_the_criterion_comes_back_from_the_checkpoint(fit, tmp_path):
    module = MDCA(3, criterion=LabelSmoothingLoss(0.2), strength=0.5, encoder="digits_cnn")
    trainer = fit(module, ToyDataModule(batch_size=64))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = load_module(tmp_path / "a.ckpt")
    assert module.criterion.criterion.smoothing == 0.2
    assert loaded.criterion.spec == module.criterion.spec
    given = {name: value for name, value in loaded.hparams.items() if value is not None}
    assert given == {
        "num_classes": 3,
        "strength": 0.5,
        "encoder": "digits_cnn",
        "criterion": LabelSmoothingLoss(0.2).spec,
    }
