"""What calibrators use: logits, features, or the network with its images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from calib_lightning.functional import at_least_float32, logits_of
from calib_lightning.metrics.functional.checks import check_shapes, check_values, seem_probs

Need = Literal["logits", "features", "network"]
"""What a calibrator may need; ``"network"`` is the network together with the images."""

Network = Callable[[Tensor], Tensor]
"""Maps images ``(N, C, H, W)`` to logits ``(N, K)``, or to one logit z, read as ``(0, z)``; usually a module."""

Images = Tensor | Iterable[Sequence[Any]]
"""Images ``(N, C, H, W)``, or batches (a ``DataLoader``) whose first two entries are images and labels."""

PROBS_HINT = (
    "the logits are all in [0, 1] and each row sums to 1. If they are probabilities, pass as_logits(probs) instead."
)
"""Warning about logits that `look_like_probs`."""

LEAST_PROBABILITY = 2.0**-52
"""What `as_logits` takes smaller probabilities for, 0 among them."""

_BATCH = 512


class Evidence(NamedTuple):
    """Everything known about the same N rows; a calibrator uses what its `needs` name.

    Attributes:
        logits: ``(N, K)``, floating point.
        features: ``(N, d)``, floating point.
        network: The network, in evaluation mode.
        images: ``(N, C, H, W)``, floating point, normalised as the network expects; or batches of them.
    """

    logits: Tensor | None = None
    features: Tensor | None = None
    network: Network | None = None
    images: Images | None = None

    def blocks(self, rows: int) -> Iterator[Evidence]:
        """Cut logits and features into blocks; with images there is one block, since these have their own batches.

        Args:
            rows: Largest number of rows of a block.

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
    """Name the arguments that a calibrator needs and was not given; empty if it has all."""
    wanted = {
        "logits": (evidence.logits is None, "logits=(N, K)"),
        "features": (evidence.features is None, "features=(N, d)"),
        "network": (evidence.network is None or evidence.images is None, "network= and images="),
    }
    return " and ".join(text for need, (absent, text) in wanted.items() if need in needs and absent)


def asked(network: Network, image: Tensor) -> Tensor:
    """Logits ``(N, K)`` of one batch; one logit z of a binary network becomes ``(0, z)``."""
    return logits_of(network(image), image.shape[0])  # len() would fix the number of images in an export


def asked_logits(network: Network, images: Images) -> Tensor:
    """Compute the logits ``(N, K)`` of images without gradients, one batch at a time."""
    batches = torch.split(images, _BATCH) if isinstance(images, Tensor) else image_batches(images)
    some = next(iter(network.parameters()), None) if isinstance(network, nn.Module) else None
    device = None if some is None else some.device
    with torch.no_grad():
        return torch.cat([asked(network, image.to(device)) for image in batches])


def with_logits(evidence: Evidence) -> Evidence:
    """Add the network's logits if none were given."""
    if evidence.logits is not None or evidence.network is None or evidence.images is None:
        return evidence
    return evidence._replace(logits=asked_logits(evidence.network, evidence.images))


def image_batches(images: Iterable[Sequence[Any]]) -> Iterator[Tensor]:
    """Yield the images of batches; raise ``TypeError`` if they are not batches."""
    if not isinstance(images, Iterable) or isinstance(images, np.ndarray):
        raise TypeError(f"images is {type(images).__name__}; it must be a tensor (N, C, H, W) or batches of such.")
    for batch in images:
        yield batch[0]


@contextmanager
def frozen(network: Network | None) -> Iterator[None]:
    """Put a module in evaluation mode, its parameters without gradients, and restore it at the end."""
    modules = list(network.modules()) if isinstance(network, nn.Module) else []
    parameters = list(network.parameters()) if isinstance(network, nn.Module) else []
    training = [module.training for module in modules]
    wanted = [parameter.requires_grad for parameter in parameters]
    try:
        for module in modules:
            module.training = False
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, flag in zip(modules, training, strict=True):
            module.training = flag
        for parameter, flag in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(flag)


def look_like_probs(logits: Tensor) -> bool:
    """Whether logits of more than one class look like probabilities; the first row usually decides."""
    wide = logits.shape[1] > 1
    return wide and seem_probs(at_least_float32(logits[:1])) and seem_probs(at_least_float32(logits))


def warned_of_probs(logits: Tensor, where: str) -> Tensor:
    """The logits, after a warning if they `look_like_probs`; not in a graph, nor where it would wait for a device."""
    if torch.compiler.is_compiling() or logits.device.type != "cpu":
        return logits
    if look_like_probs(logits):
        warnings.warn(f"{where}: {PROBS_HINT}", stacklevel=4)
    return logits


def check_shape_of_features(features: Tensor, rows: int, where: str) -> None:
    """Raise ``ValueError`` unless features are floating point of shape ``(rows, d)``."""
    if not isinstance(features, Tensor):
        raise TypeError(f"{where}: features is {type(features).__name__}; it must be a tensor.")
    if features.ndim != 2 or features.shape[0] != rows or not features.is_floating_point():
        raise ValueError(
            f"{where}: features is {features.dtype} of shape {tuple(features.shape)}; it must be floating point of "
            f"shape ({rows}, d). Pass the features of the same rows."
        )


def check_width(features: Tensor, width: int, where: str) -> None:
    """Raise ``ValueError`` unless features ``(N, d)`` are as wide as those of the fit."""
    if features.shape[1] != width:
        raise ValueError(
            f"{where} was fitted to {width} features: features has shape {tuple(features.shape)}; it must have shape "
            f"(N, {width})."
        )


def check_features(features: Tensor, rows: int, where: str) -> Tensor:
    """Check that features are ``(rows, d)`` and finite; return them as float32 or float64."""
    check_shape_of_features(features, rows, where)
    bad = ~features.isfinite().all(dim=1)
    if bool(bad.any()):
        raise ValueError(
            f"{where}: {int(bad.sum())} of {rows} rows have features that are not finite; the first is row "
            f"{int(bad.int().argmax())}. Leave such rows out."
        )
    return at_least_float32(features.detach())


def checked_rows(evidence: Evidence, labels: Tensor | None, where: str) -> tuple[Evidence, Tensor]:
    """Check logits ``(N, K)``, which the network computes if need be, features and labels; return them for a fit."""
    with frozen(evidence.network):
        evidence = with_logits(evidence)
    logits = evidence.logits
    assert logits is not None
    if not isinstance(labels, Tensor):
        raise TypeError(f"{where}: labels is {labels!r:.100}; it must be a tensor (N,) of class numbers.")
    check_shapes(logits, labels, None, where)
    if len(labels) == 0:
        raise ValueError(f"{where}: no rows were given; give the logits and labels of the calibration split.")
    check_values(logits, labels, None, "logits", where)
    if look_like_probs(logits):
        warnings.warn(f"{where}: {PROBS_HINT}", stacklevel=3)
    features = evidence.features
    if features is not None:
        features = check_features(features, len(labels), where)
    return evidence._replace(logits=at_least_float32(logits.detach()), features=features), labels.detach().long()


def as_rows(values: Any, what: str) -> Tensor:
    """A tensor of numbers from a tensor, an array, a list or a DataFrame; lists become float64.

    Raises:
        ValueError: Lists of different lengths.
        TypeError: Not numbers.
    """
    if isinstance(values, Tensor):
        return values
    array = as_array(values, what)
    if array.dtype.kind not in "fiubc":
        raise TypeError(
            f"{what} are of the type {array.dtype}; they must be numbers. Convert them with .astype(float)."
        )
    return torch.as_tensor(array)


def as_array(values: Any, what: str) -> npt.NDArray[Any]:
    """A writable array; lists of different lengths are a ``ValueError``."""
    try:
        return np.require(values, requirements="W")
    except ValueError as error:
        raise ValueError(
            f"{what} are lists of different lengths; each row must have the same. Complete them."
        ) from error


def as_logits(probs: Any) -> Tensor:
    """Convert probabilities to logits for a calibrator: ``log p``, with p at least 2.2e-16.

    No smaller probability changes the sum of a row in double precision. A forest says 0 where none of its trees has
    seen a class: without the bound, one wrong 0 (-708 as a logit) would decide a temperature.

    Args:
        probs: A tensor, an array or a DataFrame ``(N, K)``, rows >= 0 that sum to 1 +- 1e-3; or ``(N,)``, of class 1 of
            two.

    Returns:
        ``(N, K)``, float32 or float64.

    Raises:
        TypeError: Not floating point.
        ValueError: A wrong shape, or rows that are not probabilities; the first is named.

    Example:
        >>> as_logits(torch.tensor([[0.5, 0.5]])).exp()
        tensor([[0.5000, 0.5000]])
    """
    probs = as_rows(probs, "as_logits: probs")
    if not probs.is_floating_point():
        raise TypeError(f"as_logits: probs is {probs.dtype}; it must be floating point. Give probabilities.")
    if probs.ndim == 1 or probs.shape[1:] == (1,):
        probs = torch.stack([1 - probs.reshape(-1), probs.reshape(-1)], dim=1)
    if probs.ndim != 2:
        raise ValueError(
            f"as_logits: probs has shape {tuple(probs.shape)}; it must be (N, K), or (N,) of class 1 of two. Give one "
            "row for each sample."
        )
    labels = torch.zeros(probs.shape[:1], dtype=torch.int64, device=probs.device)
    check_values(probs, labels, None, "probs", "as_logits")
    return torch.log(at_least_float32(probs).clamp_min(LEAST_PROBABILITY))
