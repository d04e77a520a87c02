"""The classifiers of MaC-Cal, whose weights are masked in training."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib_lightning.core import Head, LinearHead
from calib_lightning.utils.names import check_choice
from calib_lightning.utils.seeding import derive_seed

Gradient = Literal["restricted", "held", "destroyed", "straight_through"]
Scaling = Literal["expected", "none", "inverted"]
Layers = Literal["both", "first", "last"]


class MaskedLinear(nn.Module):
    """Linear layer with random weight masks in training, ``z = (M * W) h + b`` with ``M ~ Bernoulli(q)``.

    `draw` creates a mask, `clear` removes it. Without a mask, and always in evaluation mode, the layer is deterministic
    and ``W`` is scaled according to ``scaling``. Biases are never masked.

    Args:
        in_features: Inputs.
        out_features: Outputs.
        bias: Whether there is a ``b``.
        gradient: What a step does to masked weights. "restricted": they get no gradient, as autograd has it, but
            momentum and weight decay move them. "held": they keep their values. "destroyed": they become 0.
            "straight_through": all of ``W`` gets the gradient of ``M * W``. "held" and "destroyed" need `before_update`
            before the optimiser's step, and `clear` after it.
        scaling: "expected": ``q W`` in evaluation, the mean of ``M * W``. "none": ``W``. "inverted": ``M * W / q`` in
            training, ``W`` in evaluation.

    Raises:
        ValueError: If ``gradient`` or ``scaling`` is unknown.

    Attributes:
        keep: ``q``, a scalar buffer, initially 1.
        mask: The mask ``(out, in)``, bool, or ``None``; not a buffer, since it belongs to one step.

    Example:
        >>> layer = MaskedLinear(4, 2, bias=False)
        >>> _ = layer.keep.fill_(0.5)
        >>> layer.draw(seed=1)
        >>> bool((layer(torch.ones(1, 4)) == (layer.weight * layer.mask).sum(dim=1)).all())
        True
    """

    keep: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        gradient: Gradient = "restricted",
        scaling: Scaling = "expected",
    ) -> None:
        super().__init__()
        check_choice("gradient", gradient, Gradient)
        check_choice("scaling", scaling, Scaling)
        plain = nn.Linear(in_features, out_features, bias=bias)  # its initial weights
        self.weight, self.bias = plain.weight, plain.bias
        self.gradient, self.scaling = gradient, scaling
        self.register_buffer("keep", torch.ones(()))
        self.mask: Tensor | None = None
        self._kept: Tensor | None = None  # by any mask since the last step of the optimiser, which may have several
        self._before: Tensor | None = None

    def draw(self, seed: int) -> None:
        """Draw a mask as a function of seed, keep rate and device type."""
        device = self.weight.device
        generator = torch.Generator(device).manual_seed(seed)
        # compared on the device: reading the rate would synchronise every step
        self.mask = torch.rand(self.weight.shape, generator=generator, device=device) < self.keep
        if self.gradient in ("held", "destroyed"):
            self._kept = self.mask if self._kept is None else self._kept | self.mask

    def before_update(self) -> None:
        """Note what masked weights are to be after a step of the optimiser; called before it."""
        if self.gradient == "held":
            self._before = self.weight.detach().clone()
        elif self.gradient == "destroyed":
            self._before = torch.zeros_like(self.weight)

    @torch.no_grad()
    def clear(self) -> None:
        """Remove the mask; after a step of the optimiser, restore or destroy what all masks of the step masked."""
        self.mask = None
        if self._before is not None and self._kept is not None:
            self.weight.copy_(torch.where(self._kept, self.weight, self._before))
            self._kept = self._before = None

    def effective_weight(self) -> Tensor:
        """The weights ``(out, in)`` in current use: masked or scaled."""
        if self.mask is None or not self.training:
            return self.weight * self.keep if self.scaling == "expected" else self.weight
        masked = self.weight * self.mask
        if self.gradient == "straight_through":
            masked = self.weight + (masked - self.weight).detach()
        return masked / self.keep if self.scaling == "inverted" else masked

    def forward(self, features: Tensor) -> Tensor:
        """Outputs ``(N, out)`` of inputs ``(N, in)``."""
        return F.linear(features, self.effective_weight(), self.bias)

    def extra_repr(self) -> str:
        """Sizes and options for ``print``."""
        out_features, in_features = self.weight.shape
        bias = self.bias is not None
        return f"{in_features}, {out_features}, bias={bias}, gradient={self.gradient!r}, scaling={self.scaling!r}"


class MaskedHead(Head):
    """A head with masked layers, which share a keep rate but have separate masks.

    A subclass creates at least one `MaskedLinear` and implements ``forward``.
    """

    def layers(self) -> list[MaskedLinear]:
        """The masked layers, from the input up."""
        return [layer for layer in self.modules() if isinstance(layer, MaskedLinear)]

    @property
    def keep(self) -> float:
        """The keep rate of the masks."""
        return float(self.layers()[0].keep)

    def set_keep(self, keep: float) -> None:
        """Set the keep rate of all layers.

        Args:
            keep: In ``(0, 1]``.

        Raises:
            ValueError: If it is outside.
        """
        if not 0 < keep <= 1:
            raise ValueError(f"keep is {keep}; it must be above 0 and at most 1.")
        for layer in self.layers():
            layer.keep.fill_(keep)

    def draw(self, seed: int) -> None:
        """Draw a mask for each layer, each from its own seed."""
        for number, layer in enumerate(self.layers()):
            layer.draw(derive_seed(seed, number))

    def clear(self) -> None:
        """Remove all masks."""
        for layer in self.layers():
            layer.clear()

    def before_update(self) -> None:
        """Note the weights before a step of the optimiser (see `MaskedLinear`)."""
        for layer in self.layers():
            layer.before_update()

    def check_interval(self, every: str) -> None:
        """Reject masks that destroy the weights in every step."""
        if every == "batch" and any(layer.gradient == "destroyed" for layer in self.layers()):
            raise ValueError(
                "gradient is 'destroyed' and mask_every is 'batch': every step would set other weights to 0, until few "
                "are left. Use mask_every='epoch', or gradient='held'."
            )


class MaskedLinearHead(MaskedHead):
    """One masked linear layer (see `MaskedLinear`).

    Args:
        in_features: d, the number of features.
        num_classes: K.
        bias: Whether there is a bias.
        gradient: "restricted", "held", "destroyed" or "straight_through".
        scaling: "expected", "none" or "inverted".

    Example:
        >>> MaskedLinearHead(64, 10)(torch.zeros(2, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = True,
        gradient: Gradient = "restricted",
        scaling: Scaling = "expected",
    ) -> None:
        super().__init__()
        self.linear = MaskedLinear(in_features, num_classes, bias, gradient, scaling)

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(N, K)`` of features ``(N, d)``."""
        logits: Tensor = self.linear(features)
        return logits


class MaskedBottleneck(MaskedHead):
    """Two masked linear layers, the classifier of Ni et al. (see `MaskedLinear`).

    Args:
        in_features: d, the number of features.
        num_classes: K.
        hidden: Units between the layers. Default: ``max(K, d // 4)``.
        activation: Whether there is a ReLU between the layers.
        bias: Whether the layers have biases.
        layers: The masked layers: "both", "first" or "last".
        gradient: "restricted", "held", "destroyed" or "straight_through".
        scaling: "expected", "none" or "inverted".

    Raises:
        ValueError: If an option is unknown, or ``hidden`` is below 1.

    Example:
        >>> MaskedBottleneck(64, 10).hidden
        16
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        hidden: int | None = None,
        activation: bool = True,
        bias: bool = True,
        layers: Layers = "both",
        gradient: Gradient = "restricted",
        scaling: Scaling = "expected",
    ) -> None:
        super().__init__()
        check_choice("layers", layers, Layers)
        if hidden is not None and hidden < 1:
            raise ValueError(f"hidden is {hidden}; it must be at least 1, or None for max(K, d // 4).")
        self.hidden = max(num_classes, in_features // 4) if hidden is None else hidden
        masked = partial(MaskedLinear, bias=bias, gradient=gradient, scaling=scaling)
        plain = partial(nn.Linear, bias=bias)
        self.first = (plain if layers == "last" else masked)(in_features, self.hidden)
        self.last = (plain if layers == "first" else masked)(self.hidden, num_classes)
        self.activation = activation

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(N, K)`` of features ``(N, d)``."""
        inner: Tensor = self.first(features)
        logits: Tensor = self.last(inner.relu() if self.activation else inner)
        return logits


def start_from(head: MaskedHead, old: nn.Module) -> None:
    """Copy the weights of a linear classifier, scaled so that the deployed classifier equals it.

    Args:
        head: A `MaskedLinearHead`.
        old: A linear classifier of the same sizes, masked or not.

    Raises:
        TypeError: If ``head`` is not a `MaskedLinearHead`.
        ValueError: If ``old`` is not linear, or does not fit.
    """
    if not isinstance(head, MaskedLinearHead):
        raise TypeError(
            f"warm_start is true, but the classifier is a {type(head).__name__}; it must be a MaskedLinearHead. Use "
            "one, or warm_start=False."
        )
    new, source = head.linear, old.linear if isinstance(old, LinearHead | MaskedLinearHead) else old
    if not isinstance(source, nn.Linear | MaskedLinear):
        raise ValueError(
            f"warm_start is true, but the previous classifier is a {type(old).__name__}; it must be linear. Use "
            "warm_start=False."
        )
    weight = source.effective_weight() if isinstance(source, MaskedLinear) else source.weight
    if weight.shape != new.weight.shape or (source.bias is not None and new.bias is None):
        raise ValueError(
            f"warm_start is true, but the previous classifier, {source}, does not fit {new}: both need the same sizes, "
            "and a bias if the previous one has a bias. Use warm_start=False."
        )
    with torch.no_grad():
        new.weight.copy_(weight / new.keep.to(weight.device) if new.scaling == "expected" else weight)
        if new.bias is not None:
            new.bias.zero_() if source.bias is None else new.bias.copy_(source.bias)
