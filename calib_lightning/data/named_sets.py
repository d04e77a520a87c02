"""What an entry of the options ``shift`` and ``ood`` names: another benchmark, one's own data, or a generator."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml  # type: ignore[import-untyped]

from calib_lightning.data.divided import DividedData
from calib_lightning.data.generated import GENERATED, GeneratedShift
from calib_lightning.data.options import OtherSet
from calib_lightning.utils.config_search import check_aliases, config_names, find_config
from calib_lightning.utils.names import did_you_mean
from calib_lightning.utils.registry import find_class

Kind = Literal["shift", "ood"]
_LONGEST = 200
_ROOT = "data"  # of a configuration that does not choose one


class NamedSet(NamedTuple):
    """Another set: which option names it, how it is called, and its data module or generator."""

    kind: Kind
    name: str
    data: DividedData | GeneratedShift


def named_set(kind: Kind, entry: OtherSet, files: Mapping[str, Any]) -> NamedSet:
    """Find and build what an entry names.

    Args:
        kind: The option.
        entry: A name, a file, or a dict of such a ``name``, settings and, optionally, what to call it (``as``).
        files: ``root`` and ``download``, if neither the entry nor its configuration says them.

    Returns:
        The set; nothing of it is read yet.

    Raises:
        ValueError: If the name is unknown, or a setting is wrong.
    """
    if not isinstance(entry, str | dict):
        raise ValueError(f"{kind} has {entry!r}; each entry must be {_WANTED}")
    settings: dict[str, Any] = {"name": entry} if isinstance(entry, str) else dict(entry)
    name, called = settings.pop("name", None), settings.pop("as", None)
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST:
        raise ValueError(f"{kind} has {entry!r:.300}; each entry must be {_WANTED}")
    if called is not None and (not isinstance(called, str) or not re.fullmatch(r"[\w.-]+", called)):
        raise ValueError(f"{kind}: {name}: as is {called!r}; it must be a word of letters, digits, '_', '-' and '.'.")
    if name == GENERATED:
        if kind == "ood":
            raise ValueError("ood has 'generated'; corrupted test images keep their classes. Name it under shift.")
        return NamedSet(kind, called or name, _build(f"{kind}: {name}", GeneratedShift, settings))
    path = find_config(name, "data") if name.strip("/.") else None
    if path is None:
        known = [*config_names("data"), *([GENERATED] if kind == "shift" else [])]
        raise ValueError(
            f"{kind} has {name!r}; it must be a name of `calib data list` or a file of that kind."
            f"{did_you_mean(name, known)}"
        )
    if "split" in settings:
        raise ValueError(f"{kind}: {name}: split is given; of other sets all test images are evaluated. Leave it out.")
    cls, init = _read(kind, path)
    if hasattr(cls, "test_only"):
        # a file of one's own may choose its root; the configurations that are shipped do not
        init = {**init, **files} if init.get("root", _ROOT) == _ROOT else {**files, **init}
    data = _build(f"{kind}: {name}", cls.of_other_classes if kind == "ood" else cls, init | settings)
    if hasattr(data, "test_only"):
        data.test_only = True
    return NamedSet(kind, called or path.stem, data)


_WANTED = "a name, or a name with settings such as {name: svhn, root: DIR}. `calib data list` lists all names."


def _read(kind: Kind, path: Path) -> tuple[type[DividedData], dict[str, Any]]:
    """Class and arguments in a configuration file of data, without its split."""
    try:
        text = path.read_text(encoding="utf-8")
        check_aliases(text)
        config = yaml.safe_load(text)
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ValueError(f"{kind} names {path}, which cannot be read: {' '.join(str(error).split())}") from error
    arguments = config.get("init_args") or {} if isinstance(config, dict) else None
    if arguments is None or not isinstance(config.get("class_path"), str) or not isinstance(arguments, dict):
        raise ValueError(f"{kind} names {path}; it must have a class_path and init_args. Write one as in configs/data.")
    cls: type[DividedData] = find_class(config["class_path"], DividedData)
    return cls, {key: value for key, value in arguments.items() if key != "split"}


def _build(where: str, make: Callable[..., Any], settings: Mapping[str, Any]) -> Any:
    try:
        return make(**settings)
    except (TypeError, AttributeError) as error:
        owner = getattr(make, "__self__", make)
        raise ValueError(f"{where}: {error}. Its settings are those of {owner.__name__}.") from error
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{where}: {error}") from error
