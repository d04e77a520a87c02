"""Neural Clamping on several processes: plain functions of ``(rank, world)`` run inside an initialised gloo group."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from calib_lightning.posthoc.clamping_descent import ClampDescent, RelativeWeight, TermWeight
from calib_lightning.posthoc.clamping_start import DataDrivenStart, RandomStart
from calib_lightning.posthoc.neural_clamping import NeuralClamping

SHAPE = (2, 3, 3)
TOTAL = 90


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 5, 2), nn.BatchNorm2d(5), nn.Tanh(), nn.Flatten(), nn.Linear(20, 4)).double()


def all_rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(TOTAL, *SHAPE, generator=generator, dtype=torch.float64)
    return image, torch.randint(4, (TOTAL,), generator=generator)


def method(kind: str) -> NeuralClamping:
    descent = ClampDescent(epochs=5, lr=0.1, momentum=0.5)
    start = DataDrivenStart([-0.1, -0.2], [1.1, 1.2])
    if kind == "exact":
        return NeuralClamping((0.0, 1.0), start=start, descent=None)
    if kind == "random":
        return NeuralClamping((1.0,), start=RandomStart(0.1), descent=descent)
    return NeuralClamping((0.0, 1.0), (RelativeWeight(), TermWeight()), start, descent)


def plain(clamping: NeuralClamping) -> dict[str, Any]:
    assert clamping.report is not None
    assert clamping.search is not None
    return {
        "delta": clamping.delta.tolist(),
        "log_t": float(clamping.log_temperature),
        "classes": clamping.num_classes,
        "search": clamping.search._asdict(),
        "report": clamping.report._asdict(),
    }


def case_fit(rank: int, world: int, kind: str, sizes: list[int], loader: bool, batch: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    image, label = all_rows()
    cuts = list(itertools.accumulate([0, *sizes]))
    own = slice(cuts[rank], cuts[rank + 1])
    net, clamping = network(), method(kind)
    clamping.batch_size = batch
    if loader:
        clamping.fit(
            network=net, images=DataLoader(TensorDataset(image[own], label[own]), batch_size=batch), progress=False
        )
    else:
        clamping.fit(network=net, images=image[own], labels=label[own], progress=False)
    return plain(clamping)


def case_fault(rank: int, world: int) -> str:
    """One process has a label that there is not."""
    image, label = all_rows()
    if rank == 1:
        label[7] = 9
    try:
        method("random").fit(network=network(), images=image, labels=label, progress=False)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def case_bar(rank: int, world: int) -> str:
    """What the processes write to stderr."""
    import contextlib
    import io

    warnings.simplefilter("ignore")
    image, label = all_rows()
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    with contextlib.redirect_stderr(terminal) as written:
        method("random").fit(network=network(), images=image, labels=label, progress=True)
    return written.getvalue()
