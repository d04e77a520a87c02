"""What calibrators look at: logits, features, or the network with its images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from calib_lightning.functional import at_least_float32
from calib_lightning.metrics.functional.rows import check_shapes, check_values

Need = Literal["logits", "features", "network"]
"""What a calibrator may ask for; ``"network"`` is the network together with the images."""

Network = Callable[[Tensor], Tensor]
"""Maps images ``(N, C, H, W)`` to logits ``(N, K)``; mostly an ``nn.Module``."""

Images = Tensor | Iterable[Sequence[Any]]
"""Images ``(N, C, H, W)``, or batches (a ``DataLoader``) whose first two entries are images and labels."""


_BATCH = 512


class Evidence(NamedTuple):
    """Everything that is known of the same N rows; a calibrator takes from it what its `needs` name.

    Attributes:
        logits: ``(N, K)``, floating point.
        features: ``(N, d)``, floating point.
        network: The network, in evaluation mode.
        images: ``(N, C, H, W)``, floating point, normalised as the network takes them; or batches of them.
    """

    logits: Tensor | None = None
    features: Tensor | None = None
    network: Network | None = None
    images: Images | None = None

    def blocks(self, rows: int) -> Iterator[Evidence]:
        """Cut logits and features into blocks; images stay whole, since they come in batches of their own.

        Args:
            rows: Most rows of a block.

        Yields:
            At least one block.
        """
        if self.logits is None or self.images is not None:
            yield self
            return
        for start in range(0, max(1, len(self.logits)), rows):
            some = slice(start, start + rows)
            yield Evidence(self.logits[some], None if self.features is None else self.features[some])


def missing(evidence: Evidence, needs: Sequence[Need]) -> str:
    """What a calibrator needs and was not given, in words; empty where it has all."""
    wanted = {
        "logits": (evidence.logits is None, "logits=(N, K)"),
        "features": (evidence.features is None, "features=(N, d)"),
        "network": (evidence.network is None or evidence.images is None, "network= and images="),
    }
    return " and ".join(text for need, (absent, text) in wanted.items() if need in needs and absent)


def asked_logits(network: Network, images: Images) -> Tensor:
    """Ask a network for the logits ``(N, K)`` of images, without gradients, a batch at a time."""
    batches = torch.split(images, _BATCH) if isinstance(images, Tensor) else (batch[0] for batch in images)
    some = next(iter(network.parameters()), None) if isinstance(network, nn.Module) else None
    device = None if some is None else some.device
    with torch.no_grad():
        return torch.cat([network(image.to(device)) for image in batches])


def check_shape_of_features(features: Tensor, rows: int, where: str) -> None:
    """Refuse features that are not floating point of shape ``(rows, d)``."""
    if features.ndim != 2 or features.shape[0] != rows or not features.is_floating_point():
        raise ValueError(
            f"{where}: features are {features.dtype} of shape {tuple(features.shape)}; they must be floating point of "
            f"shape ({rows}, d). Give the features of the same rows."
        )


def check_features(features: Tensor, rows: int, where: str) -> Tensor:
    """Refuse features that are not a finite row for each row of logits; return them as float32 or float64."""
    check_shape_of_features(features, rows, where)
    bad = ~features.isfinite().all(dim=1)
    if bool(bad.any()):
        raise ValueError(
            f"{where}: {int(bad.sum())} of {rows} rows have features that are not finite; the first is row "
            f"{int(bad.int().argmax())}"
        )
    return at_least_float32(features.detach())


def as_logits(probs: Tensor) -> Tensor:
    """Turn probabilities into logits for a calibrator: ``log p``, at least the log of the smallest normal number.

    Args:
        probs: ``(N, K)``, rows >= 0 that sum to 1 +- 1e-3.

    Returns:
        ``(N, K)``, float32 or float64.

    Raises:
        TypeError: Not floating point.
        ValueError: A wrong shape, or rows that are not probabilities; the first is named.

    Example:
        >>> as_logits(torch.tensor([[0.5, 0.5]])).exp()
        tensor([[0.5000, 0.5000]])
    """
    labels = torch.zeros(probs.shape[:1], dtype=torch.int64, device=probs.device)
    check_shapes(probs, labels, None, "as_logits")
    check_values(probs, labels, None, "probs", "as_logits")
    wide = at_least_float32(probs)
    return torch.log(wide.clamp_min(torch.finfo(wide.dtype).tiny))
