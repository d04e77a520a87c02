"""Objects that are stored as plain data and rebuilt from it, without executing code in a file."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from typing import Any, ClassVar, TypedDict, TypeVar

import numpy as np
from torch import Tensor

from calib_lightning.utils.names import did_you_mean
from calib_lightning.utils.registry import class_path_of, family, find_class


class Spec(TypedDict):
    """Specification of an object: dotted path of its class, and constructor arguments (objects as specs) by name."""

    class_path: str
    init_args: dict[str, Any]


class Described:
    """Records its constructor arguments, from which heads, calibrators, solvers and criteria are rebuilt.

    A subclass has an ordinary ``__init__``; the arguments of the outermost one are recorded, including defaults, so
    that a file keeps its meaning if a later version changes a default. They are plain data (int, float, str, bool,
    None, lists and string-keyed dicts of them) or other `Described` objects.

    Attributes:
        instead: What to write if the name alone is not sufficient, with ``{0}`` for the name.
    """

    instead: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            setattr(cls, "__init__", _recording(vars(cls)["__init__"]))  # noqa: B010  mypy refuses the plain assignment

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments by name."""
        recorded: dict[str, Any] | None = vars(self).get("_arguments")
        if recorded is None and is_dataclass(self):  # its constructor comes too late to be recorded
            return {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return recorded or {}  # a class without a constructor has no arguments

    @property
    def spec(self) -> Spec:
        """Plain data from which `build` makes an equal, unfitted object; a copy that may be changed.

        Raises:
            TypeError: An argument is neither plain data nor `Described`.
        """
        owner = type(self).__name__
        arguments = {name: _plain(owner, name, value) for name, value in self.arguments.items()}
        return Spec(class_path=class_path_of(type(self)), init_args=arguments)

    @property
    def name(self) -> str:
        """Name in reports: the class and the arguments that differ from the defaults."""
        parts: list[str] = []
        arguments = self.arguments
        for name, parameter in inspect.signature(type(self)).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD or name not in arguments:
                continue
            value = arguments[name]
            if parameter.kind is parameter.VAR_POSITIONAL:
                parts += [_written(item) for item in value]
            elif not _same(value, parameter.default):
                positional = isinstance(value, Described) and parameter.default is parameter.empty
                parts.append(_written(value) if positional else f"{name}={_written(value)}")
        return type(self).__name__ + (f"({', '.join(parts)})" if parts else "")


def _recording(init: Callable[..., None]) -> Callable[..., None]:
    """Record the arguments of the outermost constructor, not those of ``super().__init__``."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def recording_init(self: Any, *args: Any, **kwargs: Any) -> None:
        if "_arguments" not in vars(self):
            vars(self)["_arguments"] = _named_arguments(type(self).__name__, signature, (self, *args), kwargs)
        init(self, *args, **kwargs)

    return recording_init


def _named_arguments(
    owner: str, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{owner}: {error}.") from None
    bound.apply_defaults()
    named: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        value = _containers_copied(value)
        named.update(value if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return named


def _containers_copied(value: Any) -> Any:
    """The value with copies of its containers, which the caller may change later."""
    if type(value) is dict:
        return {name: _containers_copied(item) for name, item in value.items()}
    return [_containers_copied(item) for item in value] if type(value) is list else value


def storable(value: Any) -> bool:
    """Whether a checkpoint can store an argument: plain data or a `Described` object."""
    try:
        _plain("", "", value)
    except TypeError:
        return False
    return True


def is_data(value: Any) -> bool:
    """Whether a value is made of Python's own types alone, some of which cannot be stored as plain data."""
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(is_data, value))
    if isinstance(value, dict):
        return all(is_data(key) and is_data(item) for key, item in value.items())
    return value is None or isinstance(value, int | float | complex | str | bytes)


def stored(value: Any) -> Any:
    """A `storable` argument as plain data, with specs for objects."""
    return _plain("", "", value)


T = TypeVar("T", bound=Described)


def build(spec: Mapping[str, Any], base: type[T]) -> T:
    """Build an object from its spec; classes are looked up only in this package and in imported modules.

    Args:
        spec: A `Described.spec`.
        base: Class that the result must be an instance of.

    Returns:
        A new object.

    Raises:
        ValueError: It is not a spec, or its class is unknown, is abstract or does not accept the arguments.
    """
    if not is_spec(spec):
        raise ValueError(f"the spec of a {base.__name__} is {spec!r:.200}; it must have class_path and init_args.")
    cls = find_class(spec["class_path"], base)
    return _construct(cls, {name: rebuilt(value) for name, value in spec["init_args"].items()})


def parse(text: str, base: type[T]) -> T:
    """Build an object from ``Name`` or ``Name(argument, name=value)``, as in Python; nothing else is evaluated.

    Args:
        text: The expression; arguments are literals or nested expressions.
        base: Class that the result must be an instance of.

    Returns:
        A new object.

    Raises:
        ValueError: The text cannot be parsed, the class is unknown, or it does not accept the arguments.

    Example:
        >>> from calib_lightning.posthoc import Calibrator
        >>> parse("FixedTemperature(1.5)", Calibrator).name
        'FixedTemperature(temperature=1.5)'
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{text!r:.200} cannot be parsed. Write Name or Name(argument=value).") from None
    found = _evaluate(tree, text, base)
    if not isinstance(found, base):
        raise ValueError(f"{text!r:.200} is not a {base.__name__}. Write Name or Name(argument=value).")
    return found


def _evaluate(node: ast.expr, text: str, base: type[Described]) -> Any:
    if isinstance(node, ast.Name):
        return _construct(_named(node.id, base), {})
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if any(keyword.arg is None for keyword in node.keywords):
            raise ValueError(f"{text!r:.200}: ** is not supported. Write every argument by its name.")
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
            raise ValueError(f"{name} alone is not a {base.__name__}. Write {other.instead.format(name)}.") from None
        known = [cls.__name__ for cls in family(base) if not inspect.isabstract(cls)]
        raise ValueError(f"there is no {base.__name__} {name!r}.{did_you_mean(name, known)}") from None


def _construct(cls: type[T], arguments: Mapping[str, Any]) -> T:
    if inspect.isabstract(cls):
        raise ValueError(f"{cls.__name__} is a base class. Use one of its subclasses.")
    parameters = inspect.signature(cls).parameters
    unknown = [name for name in arguments if name not in parameters]
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        raise ValueError(f"{cls.__name__} has no argument {', '.join(unknown)}; it takes {_signature(cls)}.")
    named, positional = dict(arguments), []
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters.values()):
        for name, parameter in parameters.items():
            if parameter.kind is parameter.VAR_POSITIONAL:
                positional += named.pop(name, [])
            elif parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name in named:
                positional.append(named.pop(name))
    try:
        return cls(*positional, **named)
    except TypeError as error:
        reason = str(error).removeprefix(f"{cls.__name__}: ").removesuffix(".")
        raise ValueError(f"{cls.__name__} takes {_signature(cls)}: {reason}.") from None


def _signature(cls: type) -> str:
    return ", ".join(str(parameter) for parameter in inspect.signature(cls).parameters.values()) or "no arguments"


def is_spec(value: Any) -> bool:
    """Whether plain data is a `Described.spec`."""
    if not isinstance(value, Mapping) or set(value) != {"class_path", "init_args"}:
        return False
    return isinstance(value["init_args"], Mapping) and all(isinstance(name, str) for name in value["init_args"])


def rebuilt(value: Any) -> Any:
    """What `stored` made plain, with the objects that the specs in it describe."""
    if is_spec(value):
        return build(value, Described)
    if isinstance(value, Mapping):
        return {name: rebuilt(item) for name, item in value.items()}
    return [rebuilt(item) for item in value] if isinstance(value, list | tuple) else value


def _plain(owner: str, name: str, value: Any) -> Any:
    if isinstance(value, Described):
        return value.spec
    value = value.tolist() if isinstance(value, np.generic | np.ndarray | Tensor) else value
    value = str(value) if isinstance(value, PurePath) else value
    if value is None or type(value) in (int, float, str, bool):  # exact types: an IntEnum is an int, but does not load
        return value
    if type(value) in (list, tuple):
        return [_plain(owner, f"{name}[{i}]", item) for i, item in enumerate(value)]
    if type(value) is dict and all(type(key) is str for key in value):
        return {key: _plain(owner, f"{name}[{key!r}]", item) for key, item in value.items()}
    raise TypeError(
        f"{owner}: argument {name} is {value!r:.100} of type {type(value).__name__}; it must be plain data, to be "
        "stored in checkpoints: int, float, str, bool, None, or lists and string-keyed dicts of them."
    )


def _same(value: Any, default: Any) -> bool:
    if not storable(value) or not storable(default):
        return value is default
    return bool(stored(value) == stored(default))


def _written(value: Any) -> str:
    if isinstance(value, Described):
        return value.name
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_written, value))}]"
    return repr(value.tolist() if isinstance(value, np.generic | np.ndarray | Tensor) else value)
