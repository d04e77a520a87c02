"""Heads: the part of a classifier that maps features to logits; they remember how they were built."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from calib_lightning.utils.described import Described, Spec, build, is_spec
from calib_lightning.utils.registry import class_path_of, find_class


class Head(Described, nn.Module):
    """Maps features ``(N, d)`` to logits ``(N, K)`` and remembers how it was built.

    A subclass writes an ordinary ``__init__`` and a ``forward``; see `Described` for what its arguments may be.

    Raises:
        TypeError: If an argument of a subclass's constructor cannot be stored in a checkpoint.

    Example:
        >>> class ScaledHead(Head):
        ...     def __init__(self, in_features: int, num_classes: int, scale: float = 10.0) -> None:
        ...         super().__init__()
        ...         self.linear = nn.Linear(in_features, num_classes)
        ...         self.scale = scale
        ...     def forward(self, features: Tensor) -> Tensor:
        ...         return self.scale * self.linear(features)
        >>> ScaledHead(64, 10).spec["init_args"]
        {'in_features': 64, 'num_classes': 10, 'scale': 10.0}
    """

    def __init__(self) -> None:
        super().__init__()
        _ = self.spec  # rejects arguments that a checkpoint could not store


class LinearHead(Head):
    """One linear layer, ``z = W h + b``.

    Args:
        in_features: d, the number of features.
        num_classes: K.
        bias: Whether there is a ``b``.

    Example:
        >>> LinearHead(64, 10)(torch.zeros(2, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(self, in_features: int, num_classes: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(N, K)`` of features ``(N, d)``."""
        logits: Tensor = self.linear(features)
        return logits


def build_head(spec: Spec) -> Head:
    """Build the head that a spec describes, with fresh weights.

    The spec may come from an untrusted checkpoint: the class must be a `Head` from this package or one that is already
    imported; nothing else is imported or called.

    Args:
        spec: As `Head.spec` returns it.

    Returns:
        A new head; ``build_head(head.spec).spec == head.spec``.

    Raises:
        ValueError: If it is not a spec, its class is unknown or not a head, or does not take the arguments.

    Example:
        >>> build_head({"class_path": "LinearHead", "init_args": {"in_features": 64, "num_classes": 10}})
        LinearHead(
          (linear): Linear(in_features=64, out_features=10, bias=True)
        )
    """
    return build(spec, Head)


def head_size(module: LightningModule, head: nn.Module) -> tuple[int, int]:
    """Return ``(d, K)`` of a head: the size of its input, and the number of classes."""
    arguments = head.spec["init_args"] if isinstance(head, Head) else {}
    linear = [part for part in head.modules() if isinstance(part, nn.Linear)]
    features = arguments.get("in_features", linear[0].in_features if linear else None)
    built = arguments.get("num_classes", linear[-1].out_features if linear else None)
    classes = getattr(module, "num_classes", None)
    if not isinstance(classes, int) or (classes == 2 and built == 1):  # one logit for two classes
        classes = built
    if features is None or classes is None:
        raise ValueError(
            f"The head is a {type(head).__name__}, whose numbers of features and classes are unknown: it is not a Head "
            "and has no nn.Linear. Name another submodule with head=..., or override StageSwitch.new_head."
        )
    return features, classes


def has_spec(head: Head, spec: Mapping[str, Any]) -> bool:
    """Whether a head is as recorded, perhaps by a version in which one of its classes was in another module."""
    return spec == head.spec or _under_todays_paths(spec) == head.spec


def _under_todays_paths(value: Any) -> Any:
    if is_spec(value):
        path = value["class_path"]
        with suppress(ValueError):  # building it will say that there is no such class
            path = class_path_of(find_class(path, Described))
        return {"class_path": path, "init_args": _under_todays_paths(value["init_args"])}
    if isinstance(value, Mapping):
        return {name: _under_todays_paths(item) for name, item in value.items()}
    return [_under_todays_paths(item) for item in value] if isinstance(value, list) else value
