import math

import numpy as np
import pytest
import torch

from calib_lightning.posthoc.bbq import BBQ
from calib_lightning.posthoc.beta import Beta
from calib_lightning.posthoc.binary import BinaryCalibrator, bounded_log_odds, interpolate
from calib_lightning.posthoc.histogram_binning import HistogramBinning
from calib_lightning.posthoc.isotonic import Isotonic
from calib_lightning.posthoc.platt import Platt
from calib_lightning.posthoc.scaling_binning import ScalingBinning
from calib_lightning.posthoc.spline import Spline
from calib_lightning.utils.described import build

F64 = torch.float64
ALL = [
    "BBQ()",
    "Beta()",
    "Beta('am')",
    "Beta('ab')",
    "HistogramBinning(1)",
    "HistogramBinning()",
    "HistogramBinning(equal_mass=True)",
    "Isotonic()",
    "Platt()",
    "ScalingBinning()",
    "ScalingBinning(split=True)",
    "Spline()",
]
CLASSES = {cls.__name__: cls for cls in (BBQ, Beta, HistogramBinning, Isotonic, Platt, ScalingBinning, Spline)}


def made(text):
    return eval(text, CLASSES)


def degenerate():
    generator = torch.Generator().manual_seed(0)
    rows = 2 * torch.randn(60, generator=generator, dtype=F64) + 1
    coins = torch.rand(60, generator=generator) < 0.6
    return {
        "all hits": (rows, torch.ones(60, dtype=torch.bool)),
        "no hits": (rows, torch.zeros(60, dtype=torch.bool)),
        "one hit": (rows[:1], torch.tensor([True])),
        "one miss": (rows[:1], torch.tensor([False])),
        "ten rows": (rows[:10], coins[:10]),
        "constant": (torch.full((60,), 1.3, dtype=F64), coins),
        "constant at one half": (torch.zeros(60, dtype=F64), coins),
        "constant but for rounding": (5 + 1e-14 * rows, coins),
        "separated": (rows, rows > 0.5),
        "the wrong way round": (rows, rows < 0.5),
        "certain": (rows.abs() + 50, coins),
        "huge": (1e5 * rows, coins),
    }


@pytest.mark.parametrize("text", ALL)
@pytest.mark.parametrize("case", list(degenerate()))
def test_degenerate_rows_give_probabilities_inside(text, case):
    log_odds, hits = degenerate()[case]
    calibrator = made(text)
    optimum = calibrator.fit(log_odds, hits)
    assert optimum.converged
    # Where the likelihood rises without end this is said; counts and steps have no such end.
    if text in ("Beta()", "Beta('am')", "Platt()", "ScalingBinning()"):
        assert optimum.at_bound == (case in ("all hits", "no hits", "one hit", "one miss", "separated"))
    out = calibrator(torch.cat([log_odds, torch.tensor([-1e5, -800.0, 0.0, 800.0, 1e5], dtype=F64)]))
    assert out.dtype == F64
    assert out.isfinite().all()
    own = torch.sigmoid(calibrator(log_odds))
    assert ((own > 0) & (own < 1)).all() or case in ("huge", "certain", "separated")
    if case == "constant":
        # BBQ adds a prior of two rows, half of them hits; the mean of a third of the rows is only near that of all.
        expected = float(hits.sum() + 1) / 62 if text == "BBQ()" else float(hits.double().mean())
        assert own.numpy() == pytest.approx(expected, abs=0.1 if "split" in text else 1e-6)


@pytest.mark.parametrize("text", ALL)
def test_state_and_spec_travel(text):
    log_odds, hits = degenerate()["ten rows"]
    calibrator = made(text)
    assert not calibrator.fitted
    calibrator.fit(log_odds, hits)
    other = build(calibrator.spec, BinaryCalibrator)
    assert not other.fitted
    other.load_state_dict(calibrator.state_dict())
    assert other.fitted
    assert torch.equal(other(log_odds), calibrator(log_odds))
    assert not list(calibrator.parameters())


@pytest.mark.parametrize("text", ALL)
def test_float32_input_meets_the_knots_of_its_fit(text):
    log_odds, hits = degenerate()["ten rows"]
    calibrator = made(text)
    calibrator.fit(log_odds.float(), hits)
    assert torch.equal(calibrator(log_odds.float()), calibrator(log_odds.float().double()))


def test_bad_input_is_refused():
    hits = torch.tensor([True, False])
    with pytest.raises(TypeError, match="float"):
        Platt().fit(torch.tensor([1, 2]), hits)
    with pytest.raises(TypeError, match="int64"):
        Platt().fit(torch.zeros(2), hits.long())
    with pytest.raises(ValueError, match=r"\(3,\)"):
        Platt().fit(torch.zeros(3), hits)
    with pytest.raises(ValueError, match="with N >= 1"):
        Platt().fit(torch.zeros(0), hits[:0])
    with pytest.raises(ValueError, match=r"log_odds\[1\]"):
        Platt().fit(torch.tensor([0.0, math.inf]), hits)
    with pytest.raises(RuntimeError, match="not fitted"):
        Platt()(torch.zeros(2))


def test_interpolation_is_numpys():
    knots = torch.tensor([-1.0, 0.5, 2.0], dtype=F64)
    values = torch.tensor([0.25, 0.75, 0.5], dtype=F64)
    x = torch.tensor([-9.0, -1.0, 0.0, 0.5, 1.9, 2.0, 9.0], dtype=F64)
    found = interpolate(x, knots, values)
    assert found.numpy() == pytest.approx(np.interp(x.numpy(), knots.numpy(), values.numpy()))
    assert torch.equal(interpolate(knots, knots, values), values)


def test_bounded_log_odds_of_certainty():
    found = bounded_log_odds(torch.tensor([0.0, 0.25, 1.0], dtype=F64))
    assert found.tolist() == pytest.approx([math.log(1e-6 / (1 - 1e-6)), -math.log(3), math.log((1 - 1e-6) / 1e-6)])
