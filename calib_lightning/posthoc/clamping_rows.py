"""What Neural Clamping reads: a network that stays as it is, and images with labels, in batches, on every process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from calib_lightning.functional import at_least_float32
from calib_lightning.posthoc.evidence import Images, Network

WHERE = "NeuralClamping.fit"
"""Who speaks in messages."""


@contextmanager
def frozen(network: Network) -> Iterator[None]:
    """Put a module in evaluation mode without gradients of its parameters, and leave it as it was found.

    Args:
        network: A module; another callable is left alone.

    Yields:
        Nothing.
    """
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


def several_processes() -> bool:
    """Whether there are other processes that must do the same."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def reduced(values: Tensor, op: Literal["SUM", "MIN", "MAX"] = "SUM") -> Tensor:
    """Reduce a tensor over all processes, which must all call it with the same shape.

    Args:
        values: Any tensor.
        op: How.

    Returns:
        The same on every process; with one process, ``values``.
    """
    if several_processes():
        values = values.clone()
        dist.all_reduce(values, op=getattr(dist.ReduceOp, op))
    return values


class ClampRows:
    """Images and labels of this process, as the network takes them.

    Args:
        network: The network.
        images: ``(N, C, H, W)``, floating point and normalised, or batches.
        labels: ``(N,)`` integer; ``None`` where ``images`` are batches.
        batch_size: Rows of a batch; where ``images`` are batches, they stay as they are.

    Raises:
        TypeError: Images that are neither, or not floating point.
        ValueError: Labels are missing or not of the same rows, or the batches can be read only once.
    """

    def __init__(self, network: Network, images: Images, labels: Tensor | None, batch_size: int) -> None:
        self._network, self._images, self._labels, self._size = network, images, labels, batch_size
        if isinstance(images, Tensor):
            if labels is None or labels.ndim != 1 or len(labels) != len(images):
                found = None if labels is None else tuple(labels.shape)
                raise ValueError(
                    f"{WHERE}: images of shape {tuple(images.shape)} need labels of shape ({len(images)},), got {found}"
                )
            _check_images(images)
        elif labels is not None:
            raise ValueError(f"{WHERE}: labels were given beside batches; batches bring their own as the second entry")
        elif not isinstance(images, Iterable) or isinstance(images, Iterator):
            raise TypeError(
                f"{WHERE}: images must be a tensor (N, C, H, W) or batches that can be read again and again, such as a "
                f"DataLoader or a list, got {type(images).__name__}"
            )
        some = next(iter(network.parameters()), None) if isinstance(network, nn.Module) else None
        self._device = None if some is None else some.device
        self._like = images[:0].to(self._device) if isinstance(images, Tensor) else None
        self.classes = 0  # K, once the network has been asked

    @property
    def device(self) -> torch.device:
        """Where the network reads images, as far as that is known."""
        known = self._device if self._like is None else self._like.device
        return torch.device("cpu") if known is None else known

    def like(self) -> Tensor:
        """Zeros of the shape ``(C, H, W)`` and device of an image, float32 or float64; known after the first batch.

        Raises:
            ValueError: There was no batch.
        """
        if self._like is None:
            raise ValueError(f"{WHERE}: there are no batches; every process needs at least one")
        return torch.zeros(self._like.shape[1:], dtype=at_least_float32(self._like).dtype, device=self._like.device)

    def batches(self, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through all rows once, on the device of the network's parameters.

        Args:
            generator: Draws the order of the rows; ``None`` keeps it. Batches keep theirs in any case.

        Yields:
            Images and labels (int64).

        Raises:
            TypeError: Images of a batch are not floating point.
        """
        if not isinstance(self._images, Tensor):
            for batch in self._images:
                _check_images(batch[0])
                image = batch[0].to(self._device)
                if self._like is None:
                    self._like = image[:0]
                yield image, batch[1].to(image.device).long()
            return
        assert self._labels is not None
        rows = len(self._images)
        order = torch.arange(rows) if generator is None else torch.randperm(rows, generator=generator)
        for index in torch.split(order, self._size) if rows else ():
            some = index.to(self._images.device)
            image, label = self._images[some].to(self._device), self._labels[index.to(self._labels.device)]
            yield image, label.to(image.device).long()

    def logits(self, image: Tensor) -> Tensor:
        """Ask the network.

        Args:
            image: ``(N, C, H, W)``.

        Returns:
            ``(N, K)``, float32 or float64.

        Raises:
            ValueError: It returns something else.
        """
        logits = self._network(image)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(image):
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"{WHERE}: the network must return logits of shape ({len(image)}, K), got {found}; wrap it in a "
                "function that returns them"
            )
        self.classes = logits.shape[1]
        return at_least_float32(logits)

    def differentiable_logits(self, image: Tensor) -> Tensor:
        """Ask the network, as `logits` does, for logits whose gradient by the image will be asked for.

        Args:
            image: ``(N, C, H, W)``, with gradient.

        Returns:
            ``(N, K)``, float32 or float64.

        Raises:
            ValueError: The logits have no gradient.
        """
        logits = self.logits(image)
        if not logits.requires_grad:
            raise ValueError(
                f"{WHERE}: the logits have no gradient by the image; give a network that does not detach them, or "
                "keep delta at a random start with descent=None"
            )
        return logits


def _check_images(image: Any) -> None:
    if not isinstance(image, Tensor) or not image.is_floating_point() or image.ndim < 2:
        found = f"{image.dtype} of shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(
            f"{WHERE}: images must be floating point of shape (N, C, H, W), normalised as the network takes them, "
            f"got {found}"
        )
