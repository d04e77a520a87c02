"""Objects that can be written down as plain data and built again, without executing anything that a file holds."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict, TypeVar

import numpy as np
from torch import nn

from calib_lightning.utils.registry import class_path_of, find_class


class Spec(TypedDict):
    """How to build an object again.

    Attributes:
        class_path: Dotted path of its class.
        init_args: Its constructor's arguments by name; objects among them are specs themselves.
    """

    class_path: str
    init_args: dict[str, Any]


class Described:
    """Knows how it was built: every argument of its constructor is kept as an attribute of the same name.

    Arguments are plain data (int, float, str, bool, None, sequences of them) or other `Described` objects.

    Attributes:
        instead: What to write in place of the name alone where it cannot stand alone, with ``{0}`` for the name.
    """

    instead: ClassVar[str] = ""

    @property
    def spec(self) -> Spec:
        """Plain data from which `build` makes an equal object that is not fitted."""
        names = list(inspect.signature(type(self)).parameters)
        return Spec(
            class_path=class_path_of(type(self)), init_args={name: _plain(getattr(self, name)) for name in names}
        )

    @property
    def name(self) -> str:
        """How the object is written in reports: its class and the arguments that differ from the defaults."""
        parts: list[str] = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name)
            if parameter.kind is parameter.VAR_POSITIONAL:
                parts += [_written(item) for item in value]
            elif _plain(value) != _plain(parameter.default):
                positional = isinstance(value, Described) and parameter.default is parameter.empty
                parts.append(_written(value) if positional else f"{name}={_written(value)}")
        return type(self).__name__ + (f"({', '.join(parts)})" if parts else "")


T = TypeVar("T", bound=Described)


def build(spec: Mapping[str, Any], base: type[T]) -> T:
    """Build what a spec describes; classes are looked up only in this package and in modules that are imported.

    Args:
        spec: Of `Described.spec`.
        base: What the result must be an instance of.

    Returns:
        A new object.

    Raises:
        ValueError: It is no spec, or its class is not known, is abstract or does not take the arguments.
    """
    if not isinstance(spec, Mapping) or set(spec) != {"class_path", "init_args"} or not _is_names(spec["init_args"]):
        raise ValueError(f"{spec!r:.200} does not describe a {base.__name__}: it needs class_path and init_args.")
    cls = find_class(spec["class_path"], base)
    return _construct(cls, {name: _built(value) for name, value in spec["init_args"].items()})


def parse(text: str, base: type[T]) -> T:
    """Build what is written as in Python, ``Name`` or ``Name(argument, name=value)``; nothing else is evaluated.

    Args:
        text: The expression; arguments are literals or further expressions of this kind.
        base: What the result must be an instance of.

    Returns:
        A new object.

    Raises:
        ValueError: It cannot be read, names an unknown class, or the class does not take the arguments.

    Example:
        >>> from calib_lightning.posthoc import Calibrator
        >>> parse("FixedTemperature(1.5)", Calibrator).name
        'FixedTemperature(temperature=1.5)'
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{text!r:.200} cannot be read; write Name or Name(argument=value).") from None
    found = _evaluate(tree, text, base)
    if not isinstance(found, base):
        raise ValueError(f"{text!r:.200} is no {base.__name__}; write Name or Name(argument=value).")
    return found


def _evaluate(node: ast.expr, text: str, base: type[Described]) -> Any:
    if isinstance(node, ast.Name):
        return _construct(_named(node.id, base), {})
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if any(keyword.arg is None for keyword in node.keywords):
            raise ValueError(f"{text!r:.200}: ** is not read; write every argument by its name.")
        positional = [_evaluate(argument, text, Described) for argument in node.args]
        named = {str(keyword.arg): _evaluate(keyword.value, text, Described) for keyword in node.keywords}
        cls = _named(node.func.id, base)
        try:
            bound = inspect.signature(cls).bind(*positional, **named)
        except TypeError as error:
            raise ValueError(f"{text!r:.200}: {cls.__name__} takes {_signature(cls)}: {error}.") from None
        return _construct(cls, dict(bound.arguments))
    if isinstance(node, ast.Tuple | ast.List):
        return [_evaluate(item, text, Described) for item in node.elts]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"{text!r:.200}: {ast.unparse(node)!r} is neither a name nor a literal.") from None


def _named(name: str, base: type[T]) -> type[T]:
    try:
        return find_class(name, base)
    except ValueError:
        try:
            other = find_class(name, Described)
        except ValueError:
            other = Described
        if other.instead:
            raise ValueError(f"{name} is no {base.__name__} by itself; write {other.instead.format(name)}.") from None
        raise


def _construct(cls: type[T], arguments: Mapping[str, Any]) -> T:
    if inspect.isabstract(cls):
        raise ValueError(f"{cls.__name__} is a base class; name one of its subclasses.")
    parameters = inspect.signature(cls).parameters
    unknown = [name for name in arguments if name not in parameters]
    if unknown:
        raise ValueError(f"{cls.__name__} has no argument {', '.join(unknown)}; it takes {_signature(cls)}.")
    several: list[Any] = []
    named = {}
    for name, value in arguments.items():
        if parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
            several = list(value)
        else:
            named[name] = value
    try:
        return cls(*several, **named)
    except TypeError as error:
        raise ValueError(f"{cls.__name__} takes {_signature(cls)}: {error}.") from None


def _signature(cls: type) -> str:
    return ", ".join(str(parameter) for parameter in inspect.signature(cls).parameters.values()) or "no arguments"


def _is_names(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


def _built(value: Any) -> Any:
    if isinstance(value, Mapping):
        return build(value, Described)
    return [_built(item) for item in value] if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Described):
        return value.spec
    if isinstance(value, list | tuple | nn.ModuleList):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _written(value: Any) -> str:
    if isinstance(value, Described):
        return value.name
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_written, value))}]"
    return repr(_plain(value))
