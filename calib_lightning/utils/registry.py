"""Look up classes by dotted path without importing foreign code.

Class paths come from checkpoints, which may be untrusted. A path is therefore only looked up in modules that are
already loaded or belong to this package, and it must lead, through classes only, to a subclass of the expected base;
nothing on the way is called.
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
    """Return the dotted path from which `find_class` returns ``cls``."""
    return f"{cls.__module__}.{cls.__qualname__}"


def find_class(class_path: str, base: type[T]) -> type[T]:
    """Return a subclass of ``base`` by its dotted path, or by its name alone, without importing foreign modules.

    A path may be nested, ``package.module.Outer.Inner``; a name must be unambiguous among loaded classes, where classes
    of this package take precedence.
    """
    if not isinstance(class_path, str):
        raise TypeError(f"class_path is {class_path!r}; it must be a string such as 'package.module.Class'.")
    if "." not in class_path:
        return _find_by_name(class_path, base)
    found = _walk(class_path.split("."))
    if found is None:
        raise ValueError(
            f"class_path is {class_path!r}, which does not exist in {_PACKAGE} or an imported module. Import the "
            f"module that defines it first.{_suggestion(class_path, base)}"
        )
    if not issubclass(found, base):
        raise ValueError(
            f"class_path is {class_path!r}, which is not a {base.__name__}. If another class is meant, import the "
            f"module that defines it first.{_suggestion(class_path, base)}"
        )
    return found


def _find_by_name(name: str, base: type[T]) -> type[T]:
    paths = {class_path_of(cls) for cls in family(base) if cls.__name__ == name}
    if not paths:
        raise ValueError(
            f"There is no known {base.__name__} called {name!r}. Give its full path, or import the module that defines "
            f"it first.{_suggestion(name, base)}"
        )
    ours = {path for path in paths if path.startswith(f"{_PACKAGE}.")}
    if len(ours) == 1:  # torch has classes with the same names
        paths = ours
    if len(paths) > 1:
        raise ValueError(f"{name!r} is ambiguous: it may be any of {', '.join(sorted(paths))}. Give the full path.")
    # by its path: the first version of a class that a notebook defines twice is still in memory
    return find_class(paths.pop(), base)


def _walk(parts: list[str]) -> type | None:
    """Follow the parts through modules, then classes, by their dictionaries: no descriptor or hook runs."""
    for length in range(len(parts) - 1, 0, -1):
        module = _module(parts[:length])
        if module is None:
            continue
        namespace: Mapping[str, Any] = vars(module)
        if parts[0] == _PACKAGE:  # its modules import some names on first use
            namespace = {**namespace, parts[length]: getattr(module, parts[length], None)}
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
            # report a missing dependency of an existing module
            if not f"{name}.".startswith(f"{error.name}."):
                raise
    module = sys.modules.get(name)
    return module if isinstance(module, ModuleType) else None


def family(base: type[T]) -> set[type[T]]:
    """``base`` and every loaded subclass."""
    family, queue = {base}, [base]
    while queue:
        new = set(type.__subclasses__(queue.pop())) - family
        family |= new
        queue += new
    return family


def _suggestion(class_path: str, base: type[Any]) -> str:
    wanted = class_path.rpartition(".")[2].lower()
    names = {cls.__name__.lower(): cls for cls in family(base)}
    near = difflib.get_close_matches(wanted, names, n=3)
    return f" Did you mean {' or '.join(class_path_of(names[name]) for name in near)}?" if near else ""
