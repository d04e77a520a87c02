"""Finding a class by its dotted path without ever importing code that is not ours.

Class paths come from checkpoints, and a checkpoint may come from anyone. A path is therefore looked up only in modules
that are loaded already or that belong to this package, and it must lead, through classes alone, to a subclass of what
the caller expects; nothing on the way is called.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")

_PACKAGE = __name__.partition(".")[0]


def class_path_of(cls: type) -> str:
    """Return the dotted path that `find_class` turns back into ``cls``.

    Args:
        cls: Any class.

    Returns:
        Module and qualified name, joined by a dot.

    Example:
        >>> class_path_of(torch.nn.Linear)
        'torch.nn.modules.linear.Linear'
    """
    return f"{cls.__module__}.{cls.__qualname__}"


def find_class(class_path: str, base: type[T]) -> type[T]:
    """Find a subclass of ``base`` by its dotted path, or by its name alone, without importing foreign modules.

    Args:
        class_path: ``package.module.Class``, a nested ``package.module.Outer.Inner``, or just ``Class`` for a class
            whose module is imported.
        base: The class that the result must equal or be derived from.

    Returns:
        The class itself; it has not been called.

    Raises:
        TypeError: If ``class_path`` is not a string.
        ValueError: If no loaded module and no module of this package has such a class, if what is there is not a
            subclass of ``base``, or if a name alone fits several classes and not just one of this package.

    Example:
        >>> find_class("calib_lightning.core.heads.LinearHead", torch.nn.Module)
        <class 'calib_lightning.core.heads.LinearHead'>
    """
    if not isinstance(class_path, str):
        raise TypeError(f"A class path must be a string such as 'package.module.Class', not {class_path!r}.")
    if "." not in class_path:
        return _find_by_name(class_path, base)
    found = _walk(class_path.split("."))
    if found is None:
        raise ValueError(
            f"There is no class {class_path!r} in {_PACKAGE} or in a module that is imported: "
            f"import the module that defines it first.{_suggestion(class_path, base)}"
        )
    if not issubclass(found, base):
        raise ValueError(
            f"The class path {class_path!r} leads to a class that is not a {base.__name__}. If it is meant to be "
            f"another class, import the module that defines it first.{_suggestion(class_path, base)}"
        )
    return found


def _find_by_name(name: str, base: type[T]) -> type[T]:
    paths = {class_path_of(cls) for cls in _family(base) if cls.__name__ == name}
    if not paths:
        raise ValueError(
            f"No {base.__name__} called {name!r} is known: give its whole path, or import the module that defines it "
            f"first.{_suggestion(name, base)}"
        )
    ours = {path for path in paths if path.startswith(f"{_PACKAGE}.")}
    if len(ours) == 1:  # torch has classes of the same names
        paths = ours
    if len(paths) > 1:
        raise ValueError(f"{name!r} may be any of {', '.join(sorted(paths))}: give the whole path.")
    # by its path: a class that a notebook has defined twice is still in memory in its first version
    return find_class(paths.pop(), base)


def _walk(parts: list[str]) -> type | None:
    """Follow the parts through modules, then classes, by their own dictionaries: no descriptor and no hook runs."""
    for length in range(len(parts) - 1, 0, -1):
        module = _module(parts[:length])
        if module is None:
            continue
        namespace: Mapping[str, Any] = vars(module)
        found: type | None = None
        for part in parts[length:]:
            value = namespace.get(part)
            if not isinstance(value, type):
                break
            found, namespace = value, vars(value)
        else:
            return found
    return None


def _module(parts: list[str]) -> ModuleType | None:
    """Return a loaded module, or load one of this package; private modules (``__main__``) are not loaded."""
    name = ".".join(parts)
    if name not in sys.modules and parts[0] == _PACKAGE and all(p.isidentifier() and p[0] != "_" for p in parts):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            # a missing dependency of an existing module is the user's to hear about
            if not f"{name}.".startswith(f"{error.name}."):
                raise
    module = sys.modules.get(name)
    return module if isinstance(module, ModuleType) else None


def _family(base: type[T]) -> set[type[T]]:
    """``base`` and every class derived from it that is loaded."""
    family, queue = {base}, [base]
    while queue:
        new = set(type.__subclasses__(queue.pop())) - family
        family |= new
        queue += new
    return family


def _suggestion(class_path: str, base: type[Any]) -> str:
    wanted = class_path.rpartition(".")[2].lower()
    names = {cls.__name__.lower(): cls for cls in _family(base)}
    near = difflib.get_close_matches(wanted, names, n=3)
    return f" Did you mean {' or '.join(class_path_of(names[name]) for name in near)}?" if near else ""
