"""Input of Neural Clamping: a frozen network and images with labels, in batches, on every process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from calib_lightning.functional import at_least_float32, logits_of
from calib_lightning.posthoc.evidence import Images, Network, look_like_probs

WHERE = "NeuralClamping.fit"
"""Prefix of messages."""


def several_processes() -> bool:
    """Whether this is one of several processes of a group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def reduced(values: Tensor, op: Literal["SUM", "MIN", "MAX"] = "SUM") -> Tensor:
    """Reduce a tensor over all processes, each of which must call this with the same shape."""
    if several_processes():
        values = values.clone()
        dist.all_reduce(values, op=getattr(dist.ReduceOp, op))
    return values


class ClampRows:
    """Images and labels of this process, on the device of the network.

    Args:
        network: The network.
        images: ``(N, C, H, W)``, floating point and normalised, or batches.
        labels: ``(N,)`` integer; may be ``None`` if ``images`` are batches, and is else compared to theirs.
        batch_size: Batch size for a tensor of images.

    Attributes:
        classes: K; 0 before the network has run.
        look_like_probs: Whether all outputs of the network so far look like probabilities.

    Raises:
        TypeError: Images or labels of a wrong type or dtype, or batches that can be read only once.
        ValueError: Labels are missing or have a wrong shape.
    """

    def __init__(self, network: Network, images: Images, labels: Tensor | None, batch_size: int) -> None:
        self._network, self._images, self._labels, self._size = network, images, labels, batch_size
        if labels is not None:
            _check_labels(labels)
        if isinstance(images, Tensor):
            _check_images(images)
            if labels is None or labels.shape != images.shape[:1]:
                found = "labels is None" if labels is None else f"labels has shape {tuple(labels.shape)}"
                raise ValueError(
                    f"{WHERE}: {found}; it must have shape ({len(images)},) to match images of shape "
                    f"{tuple(images.shape)}."
                )
        elif not isinstance(images, Iterable) or isinstance(images, Iterator | np.ndarray):
            raise TypeError(
                f"{WHERE}: images is {type(images).__name__}; it must be a tensor (N, C, H, W) or batches that can be "
                "read repeatedly. Pass a DataLoader or a list of batches."
            )
        some = next(iter(network.parameters()), None) if isinstance(network, nn.Module) else None
        self._device = None if some is None else some.device
        self._like = images[:0].to(self._device) if isinstance(images, Tensor) else None
        self.classes = 0
        self.look_like_probs = True

    @property
    def device(self) -> torch.device:
        """Device of the network, as far as it is known."""
        known = self._device if self._like is None else self._like.device
        return torch.device("cpu") if known is None else known

    def like(self) -> Tensor:
        """Zeros of the shape ``(C, H, W)`` and device of an image, float32 or float64; known after the first batch."""
        if self._like is None:
            raise ValueError(f"{WHERE}: images has no batches; every process needs at least one.")
        return torch.zeros(self._like.shape[1:], dtype=at_least_float32(self._like).dtype, device=self._like.device)

    def batches(self, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels (int64) of all rows once, on the network's device.

        Args:
            generator: Draws the order of the rows; ``None`` keeps it. Batches are never reordered.
        """
        if not isinstance(self._images, Tensor):
            yield from self._given_batches(self._labels if generator is None else None)
            return
        assert self._labels is not None
        rows = len(self._images)
        order = torch.arange(rows) if generator is None else torch.randperm(rows, generator=generator)
        for index in torch.split(order, self._size) if rows else ():
            some = index.to(self._images.device)
            image, label = self._images[some].to(self._device), self._labels[index.to(self._labels.device)]
            yield image, label.to(image.device).long()

    def _given_batches(self, expected: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches that were given; their labels must be the expected ones."""
        first = 0
        for batch in self._images:
            _check_images(batch[0])
            _check_labels(batch[1])
            image = batch[0].to(self._device)
            if self._like is None:
                self._like = image[:0]
            last = first + len(batch[1])
            if expected is not None and not torch.equal(expected[first:last].cpu().long(), batch[1].cpu().long()):
                raise ValueError(
                    f"{WHERE}: labels differs from those of the batches in rows {first}..{last - 1}; it must be in "
                    "their order. Use a loader that does not shuffle, or labels=None."
                )
            first = last
            yield image, batch[1].to(image.device).long()
        if expected is not None and first != len(expected):
            raise ValueError(f"{WHERE}: labels has {len(expected)} rows; it must have {first}, as the batches have.")

    def logits(self, image: Tensor) -> Tensor:
        """Run the network; return logits ``(N, K)``, float32 or float64."""
        try:
            logits = logits_of(self._network(image), len(image))
        except TypeError as error:
            raise ValueError(f"{WHERE}: {error}") from error
        if len(logits) != len(image):
            raise ValueError(
                f"{WHERE}: the network's output is {tuple(logits.shape)}; it must be logits of shape ({len(image)}, "
                "K). Wrap the network in a function that returns them."
            )
        self.classes = logits.shape[1]
        self.look_like_probs = self.look_like_probs and look_like_probs(logits.detach())
        return at_least_float32(logits)

    def differentiable_logits(self, image: Tensor) -> Tensor:
        """Run the network as `logits` does; raise ``ValueError`` if the logits have no gradient by the image."""
        logits = self.logits(image)
        if not logits.requires_grad:
            raise ValueError(
                f"{WHERE}: the logits have no gradient by the image. Use a network that does not detach them, or keep "
                "delta at a random start with descent=None."
            )
        return logits


def _check_images(image: Any) -> None:
    if not isinstance(image, Tensor) or not image.is_floating_point() or image.ndim < 2:
        found = f"{image.dtype} of shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(
            f"{WHERE}: images is {found}; it must be a tensor, floating point of shape (N, C, H, W), normalised as the "
            "network expects."
        )


def _check_labels(labels: Any) -> None:
    found = str(labels.dtype) if isinstance(labels, Tensor) else type(labels).__name__
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"{WHERE}: labels is {found}; it must be a tensor of class numbers of an integer dtype.")


def check_like_fit(image: Any, delta: Tensor) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless images are normalised ones of the shape of those of the fit."""
    if not isinstance(image, Tensor) or not image.is_floating_point():
        found = str(image.dtype) if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(
            f"NeuralClamping: images is {found}; it must be a tensor, floating point, normalised as in the fit."
        )
    if image.shape[1:] != delta.shape:
        raise ValueError(
            f"NeuralClamping was fitted to other images: images has shape {tuple(image.shape)}; it must have shape "
            f"(N, {', '.join(map(str, delta.shape))})."
        )
