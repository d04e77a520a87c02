"""The place of stored features in a network: they pass through the encoder and arrive at the head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from calib_lightning.core.own_data import BatchParts, image_and_label
from calib_lightning.core.submodules import evaluating


class StoredFeatures:
    """Feeds stored features to the head within a training step.

    While `in_use`, the encoder returns the features that it receives. If there are layers between encoder and head, it
    returns NaN in the shape of its output instead, and the features go to the head directly. `direct` says whether the
    head's input equals the encoder's output; it is known after the first `learn`.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        self.encoder = encoder
        self.in_use = False
        self.direct = False
        self._encode, self._own = encoder.forward, vars(encoder).get("forward")
        self._output: Any = None
        self._shapes: tuple[torch.Size, torch.Size] | None = None
        self._expected: Tensor | None = None
        self._given: Tensor | None = None
        # a hook on the encoder could replace what it returns, but not save the pass
        vars(encoder)["forward"] = self._forward
        self._handle = head.register_forward_pre_hook(self._substitute)

    def _forward(self, *inputs: Any, **options: Any) -> Any:
        if self.in_use:
            assert self._shapes is not None
            output, features = self._shapes
            (given, *_) = (*inputs, *options.values())
            self._given = given if given.shape[1:] == features else None
            if self._expected is not None:
                self._compare(self._expected)
            if self._given is not None:
                return given if self.direct else given.new_full((len(given), *output), torch.nan)
        found = self._encode(*inputs, **options)
        if self._shapes is None:
            self._output = found
        return found

    def _compare(self, expected: Tensor) -> None:
        """Check in the first step that the encoder receives stored features unchanged."""
        if self._given is None or not torch.isin(_marks(self._given), expected).all():
            raise ValueError(
                "The encoder's input in a training step differs from the loader's images: something changes the batch "
                "on the way (normalisation or mixing in the training step or a transfer hook, for example) and would "
                "change stored features instead. Move it to the data set or into the encoder, or omit CachedFeatures."
            )
        self._expected = None

    def _substitute(self, head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (self._given, *inputs[1:]) if self.in_use and not self.direct and self._given is not None else None

    def learn(self, module: LightningModule, head: nn.Module, batch: Any) -> Tensor:
        """Features ``(N, d)`` of a batch of images; the first call finds out how they reach the head."""
        with evaluating(module):
            features = caught_features(module, head, batch)
        if self._shapes is not None:
            return features
        if not isinstance(self._output, Tensor):
            raise ValueError(
                f"CachedFeatures needs an encoder whose forward returns a tensor, but when {type(module).__name__} is "
                f"called, {type(self.encoder).__name__} returns {type(self._output).__name__} or is not called itself. "
                "Name another submodule with encoder=..., or omit the cache."
            )
        self.direct = self._output.shape == features.shape and torch.equal(self._output, features)
        self._shapes, self._output = (self._output.shape[1:], features.shape[1:]), None
        # in training mode except for the head, whose statistics must not change
        with evaluating(head):
            again = caught_features(module, head, batch, grad=True)
        if again.requires_grad:
            raise ValueError(
                f"A part of {type(module).__name__} below the head is trained in this stage: its features change and "
                "cannot be stored. Omit CachedFeatures, or freeze everything but the head."
            )
        if not alike(again, features):
            raise ValueError(
                f"The features of {type(module).__name__} differ between two passes over the same images (because of "
                "dropout outside the encoder, for example), so they cannot be stored. Omit CachedFeatures."
            )
        return features

    def expect(self, features: Tensor) -> None:
        """Check in the first training step that its features are among these, ``(..., d)`` of all rows."""
        self._expected = _marks(features)

    def remove(self) -> None:
        """Restore the encoder's own forward; a second call has no effect."""
        self._handle.remove()
        if vars(self.encoder).get("forward") == self._forward:
            del vars(self.encoder)["forward"]
            if self._own is not None:
                vars(self.encoder)["forward"] = self._own


def caught_features(
    module: LightningModule, head: nn.Module, batch: Any, *, parts: BatchParts | None = None, grad: bool = False
) -> Tensor:
    """Call a module on the images of a batch and return the input ``(N, d)`` of its head.

    The images are where ``parts`` says, else the batch is a tuple or list that starts with them, or a dict with
    ``image``; it may be on any device.
    """
    if parts is None and not isinstance(batch, list | tuple) and not (isinstance(batch, Mapping) and "image" in batch):
        raise TypeError(
            f"The batch is a {type(batch).__name__}; features are computed only from tuples or lists that start with "
            "the images and from dicts with 'image'. Let the loader return one of these, or override "
            "StageSwitch.features."
        )
    caught: list[Tensor] = []
    trainer = module.trainer
    batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
    handle = head.register_forward_pre_hook(lambda _, inputs: caught.extend(inputs[:1]))
    try:
        with torch.set_grad_enabled(grad), trainer.precision_plugin.forward_context():
            if parts is not None:
                image, _ = image_and_label(batch, "StageSwitch", parts)
            else:
                image = batch["image"] if isinstance(batch, Mapping) else batch[0]
            module.forward(image)
    finally:
        handle.remove()
    if len(caught) != 1:
        raise ValueError(
            f"{type(module).__name__}.forward calls its head {len(caught)} times; it must call it exactly once, on the "
            "features of the images."
        )
    return caught[0]


def alike(values: Tensor, others: Tensor) -> bool:
    """Whether the features agree up to device rounding error."""
    largest = others.float().abs().amax().item()
    return torch.allclose(values.float(), others.float(), rtol=0, atol=0.01 * largest)


def _marks(features: Tensor) -> Tensor:
    """Fingerprint rows by their largest value and its position: int64 ``(...)`` of ``(..., d)``."""
    largest, place = features.cpu().max(dim=-1)
    return (largest.float().view(torch.int32).to(torch.int64) << 32) | place
