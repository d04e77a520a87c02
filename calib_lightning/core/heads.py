"""Heads: the part of a classifier that maps features to logits, and remembers how it was built."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypedDict

from torch import Tensor, nn

from calib_lightning.utils.registry import class_path_of, find_class


class HeadSpec(TypedDict):
    """How to build a head again; plain data, so that it travels in a checkpoint.

    Attributes:
        class_path: Dotted path of the head's class.
        init_args: Its constructor's arguments by name, defaults included.
    """

    class_path: str
    init_args: dict[str, Any]


def _recording(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap a head's constructor so that the outermost one notes its arguments; ``super().__init__`` calls do not."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def recording_init(self: Head, *args: Any, **kwargs: Any) -> None:
        if "_init_args" not in self.__dict__:
            self.__dict__["_init_args"] = _named_arguments(type(self), signature, (self, *args), kwargs)
        init(self, *args, **kwargs)

    return recording_init


def _named_arguments(
    cls: type[Head], signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{cls.__name__}: {error}.") from None
    # the defaults too: a checkpoint must not change its meaning when a later version changes one
    bound.apply_defaults()
    named: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        kind = signature.parameters[name].kind
        if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise TypeError(f"{cls.__name__}.__init__ takes {name!r} by position only; heads need named arguments.")
        named.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return {name: _plain(cls, name, value) for name, value in named.items()}


def _plain(cls: type[Head], name: str, value: Any) -> Any:
    # exact types: numpy's float64 is a float and an IntEnum is an int, yet neither loads with weights_only
    if value is None or type(value) in (int, float, str, bool):
        return value
    if type(value) is list:
        return [_plain(cls, f"{name}[{i}]", item) for i, item in enumerate(value)]
    if type(value) is dict and all(type(key) is str for key in value):
        return {key: _plain(cls, f"{name}[{key!r}]", item) for key, item in value.items()}
    raise TypeError(
        f"{cls.__name__}: argument {name} is {value!r} of type {type(value).__name__}; a head's arguments are stored "
        "in checkpoints and must be plain data: int, float, str, bool, None, or lists and string-keyed dicts of them."
    )


class Head(nn.Module):
    """Maps features ``(N, d)`` to logits ``(N, K)`` and remembers how it was built.

    A subclass writes an ordinary ``__init__`` with named arguments and a ``forward``; what the constructor is called
    with is recorded by itself, in `spec`. The arguments must be plain data (int, float, str, bool, None, and lists and
    string-keyed dicts of them), because `spec` is stored in checkpoints that load without unpickling objects.

    Raises:
        TypeError: If an argument of a subclass's constructor is not plain data or has no name.

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

    _init_args: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.__dict__.setdefault("_init_args", {})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            setattr(cls, "__init__", _recording(vars(cls)["__init__"]))  # noqa: B010  mypy refuses the plain assignment

    @property
    def spec(self) -> HeadSpec:
        """How to build this head again, with `build_head`; a copy, safe to change."""
        return HeadSpec(class_path=class_path_of(type(self)), init_args=copy.deepcopy(self._init_args))


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


def build_head(spec: HeadSpec) -> Head:
    """Build the head that a spec describes, with fresh weights.

    The spec may come from a checkpoint that is not trusted: the class must be a `Head` that is already imported or
    belongs to this package, and nothing else is imported or called.

    Args:
        spec: As `Head.spec` returns it.

    Returns:
        A new head; ``build_head(head.spec).spec == head.spec``.

    Raises:
        TypeError: If the constructor does not take these arguments.
        ValueError: If the spec has other keys, or its class is unknown or not a head.

    Example:
        >>> build_head({"class_path": "LinearHead", "init_args": {"in_features": 64, "num_classes": 10}})
        LinearHead(
          (linear): Linear(in_features=64, out_features=10, bias=True)
        )
    """
    keys = {"class_path", "init_args"}
    if not isinstance(spec, dict) or set(spec) != keys or not isinstance(spec["init_args"], dict):
        raise ValueError(f"A head's spec is {{'class_path': str, 'init_args': dict}}, not {spec!r}.")
    return find_class(spec["class_path"], Head)(**spec["init_args"])
