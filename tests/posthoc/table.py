"""One row for every calibrator; whoever adds one adds a row, and it goes through the same tests."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from calib_lightning import posthoc as P
from tests.metrics.golden import golden_set


class Row(NamedTuple):
    """How a calibrator is made, and what is known of it.

    Attributes:
        new: Makes one that is not fitted.
        identity: Whether an NLL fit over a family that contains the identity, which can never be worse on its own rows.
        shift: Whether a constant added to all logits of a row changes nothing, as in the uncalibrated probabilities.
        exact_order: Whether a fit is the same, bit for bit or to 1e-6, for rows in any order.
        looks_up: Whether a row is looked up among those of the fit, so that there it must leave itself out.
        diverges: Whether steps of a fixed length may diverge where the logits are huge, which must then be said.
    """

    new: Callable[[], P.Calibrator]
    identity: bool = False
    shift: bool = True
    exact_order: bool = True
    looks_up: bool = False
    diverges: bool = False


def _clamping() -> P.NeuralClamping:
    return P.NeuralClamping((1.0,), P.FixedWeight(0.1), descent=P.ClampDescent(epochs=40, lr=0.3))


ROWS = {
    "FixedTemperature": Row(lambda: P.FixedTemperature(1.5)),
    "Temperature": Row(P.Temperature, identity=True),
    "FocalTemperature": Row(P.FocalTemperature),
    "ECETemperature": Row(P.ECETemperature),
    "EnsembleTemperature": Row(P.EnsembleTemperature),
    "EnsembleTemperature-nll": Row(lambda: P.EnsembleTemperature("nll"), identity=True),
    "VectorScaling": Row(P.VectorScaling, identity=True, shift=False),
    "MatrixScaling": Row(P.MatrixScaling, identity=True, shift=False),
    "MatrixScalingODIR": Row(
        lambda: P.MatrixScalingODIR((0.01, 1.0), folds=2), identity=True, shift=False, exact_order=False
    ),
    "MatrixScalingODIR-ensemble": Row(
        lambda: P.MatrixScalingODIR((0.1, 1.0), folds=3, ensemble=True), shift=False, exact_order=False
    ),
    "Dirichlet": Row(lambda: P.Dirichlet((0.01, 1.0), folds=2), identity=True, exact_order=False),
    "StructuredVectorScaling": Row(P.StructuredVectorScaling),
    "StructuredMatrixScaling": Row(P.StructuredMatrixScaling),
    "OneVsRest-Isotonic": Row(lambda: P.OneVsRest(P.Isotonic())),
    "OneVsRest-Beta": Row(lambda: P.OneVsRest(P.Beta())),
    "OneVsRest-HistogramBinning": Row(lambda: P.OneVsRest(P.HistogramBinning())),
    "TopLabel-Platt": Row(lambda: P.TopLabel(P.Platt())),
    "TopLabel-Isotonic": Row(lambda: P.TopLabel(P.Isotonic())),
    "TopLabel-ScalingBinning": Row(lambda: P.TopLabel(P.ScalingBinning())),
    "TopLabel-Spline": Row(lambda: P.TopLabel(P.Spline())),
    "OneVsRest-BBQ": Row(lambda: P.OneVsRest(P.BBQ())),
    "IRM": Row(P.IRM),
    "DensityRatio": Row(P.DensityRatio, looks_up=True),
    "TrustScore": Row(lambda: P.TrustScore(alpha=0.1), looks_up=True),
    "NeuralClamping": Row(_clamping, diverges=True),
    "NeuralClamping-exact": Row(lambda: P.NeuralClamping((0.0,), descent=None)),
    "Sequential": Row(lambda: P.Sequential(P.Temperature(), P.TopLabel(P.Beta()))),
    "Sequential-features": Row(lambda: P.Sequential(P.Temperature(), P.DensityRatio()), looks_up=True),
    "Sequential-network": Row(lambda: P.Sequential(_clamping(), P.Temperature()), diverges=True),
}


def features_of(logits: Tensor) -> Tensor:
    """Features from which the logits could come: eight fixed directions."""
    generator = torch.Generator().manual_seed(3)
    return torch.tanh(logits.double() @ torch.randn(logits.shape[1], 8, generator=generator, dtype=torch.float64))


def the_set(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and features of 500 rows."""
    logits, labels = golden_set()
    return logits.to(dtype), labels, features_of(logits).to(dtype)


def evidence_of(logits: Tensor, features: Tensor | None = None) -> P.Evidence:
    """All that a calibrator may ask for: the images are the logits, and the network lays them flat again."""
    features = features_of(logits).to(logits.dtype) if features is None else features
    return P.Evidence(logits, features, torch.nn.Flatten(), logits[:, :, None, None])
