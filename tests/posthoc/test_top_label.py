"""A new confidence for the predicted class, against a float64 reference written here."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from calib_lightning.posthoc.top_label import top_log_odds, with_top_confidence
from tests.metrics.golden import golden_set, random_set


def reference(logits, confidence):
    """Rescaled distribution where nothing has to be capped."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    rows, top = np.arange(len(p)), p.argmax(1)
    q = p * ((1 - confidence) / (1 - p[rows, top]))[:, None]
    q[rows, top] = confidence
    return q


def test_rescales_the_others_in_proportion():
    logits, _ = golden_set()
    confidence = np.linspace(0.6, 0.99, len(logits))
    ours = with_top_confidence(logits, torch.from_numpy(confidence).logit())
    np.testing.assert_allclose(ours.exp().numpy(), reference(logits.numpy(), confidence), rtol=1e-11)


def test_own_log_odds_change_nothing():
    logits, _ = golden_set()
    odds = top_log_odds(logits)
    np.testing.assert_allclose(odds.sigmoid(), logits.softmax(1).amax(1), rtol=1e-13)
    np.testing.assert_allclose(with_top_confidence(logits, odds), logits.log_softmax(1), rtol=1e-10, atol=1e-12)


def test_confidence_that_rounds_to_one_is_lowered():
    logits = torch.tensor([[100.0, 1.0, 0.0], [0.0, 200.0, 0.0]])
    assert logits.softmax(1).amax() == 1.0
    ours = with_top_confidence(logits, torch.tensor([0.7, 0.6]).logit()).exp()
    share = 1 / (1 + np.exp(-1.0))
    expected = [[0.7, 0.3 * share, 0.3 * (1 - share)], [0.2, 0.6, 0.2]]
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    assert top_log_odds(logits.double())[0].item() == pytest.approx(100 - np.log(np.e + 1), rel=1e-15)


def test_others_are_mixed_with_their_mean_until_they_are_below_the_top():
    logits = torch.tensor([[0.5, 0.4, 0.06, 0.04]], dtype=torch.float64).log()
    ours = with_top_confidence(logits, torch.tensor([0.3], dtype=torch.float64).logit()).exp()[0].numpy()
    others = np.array([0.4, 0.06, 0.04]) / 0.5
    a = (others[0] - 0.999 * 0.3 / 0.7) / (others[0] - 1 / 3)  # solves 0.7 ((1 - a) r + a / 3) = 0.999 * 0.3
    np.testing.assert_allclose(ours, [0.3, *(0.7 * ((1 - a) * others + a / 3))], rtol=1e-12)
    assert ours[0] > ours[1] > ours[2] > ours[3]


@settings(max_examples=60, deadline=None)
@given(
    classes=st.sampled_from([2, 3, 10, 1000]),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 50.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 50),
)
def test_any_confidence_gives_a_distribution_with_the_same_prediction(classes, scale, dtype, seed):
    logits = random_set(40, classes, scale, seed)[0].to(dtype)
    odds = torch.linspace(-40.0, 40.0, 40, dtype=dtype)
    odds[:2] = torch.tensor([-torch.inf, torch.inf])
    ours = with_top_confidence(logits, odds)
    assert ours.dtype == dtype
    assert not ours.isnan().any()
    assert torch.equal(ours.argmax(1), logits.argmax(1))
    top = ours.gather(1, logits.argmax(1, keepdim=True))
    others = ours.scatter(1, logits.argmax(1, keepdim=True), -torch.inf)
    assert bool((others.amax(1, keepdim=True) < top).all())
    np.testing.assert_allclose(ours.double().exp().sum(1), 1.0, atol=1e-12 if dtype == torch.float64 else 3e-6)
    kept = odds > 0.1
    np.testing.assert_allclose(top.exp().squeeze(1)[kept], odds.sigmoid()[kept], rtol=1e-6)


def test_exports_with_any_number_of_rows():
    class Module(nn.Module):
        def forward(self, logits, odds):
            return with_top_confidence(logits, odds + top_log_odds(logits))

    logits, odds = random_set(7, 5)[0], torch.linspace(-3, 3, 7, dtype=torch.float64)
    rows = torch.export.Dim("rows")
    program = torch.export.export(Module(), (logits, odds), dynamic_shapes=({0: rows}, {0: rows}))
    again = program.module()(logits[:3], odds[:3])
    assert torch.equal(again, Module()(logits[:3], odds[:3]))
