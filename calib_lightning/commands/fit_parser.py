"""The command line's parser: messages for people, and what the parser underneath gets wrong."""

from __future__ import annotations

import re
from typing import Any, NoReturn

import yaml  # type: ignore[import-untyped]
from jsonargparse import _typehints, _util, get_loader, set_loader
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser

from calib_lightning import data, methods  # noqa: F401  # short names are found among the classes that are imported
from calib_lightning.commands.hints import hint, plain_message
from calib_lightning.utils.config_search import check_aliases

# --- three mends of the parser, which offers no hooks for them


_resolve = _typehints.resolve_class_path_by_name
_read = _util.parse_value_or_config
_adapt: Any = _typehints.adapt_partial_callable_class
_untyped: Any = _typehints


def _ours_first(cls: type | tuple[type], name: str) -> str:
    """The class of this package where others have the same short name, as torch's ``CrossEntropyLoss``."""
    if "." not in name and not isinstance(cls, tuple):
        paths = _typehints.get_all_subclass_paths(cls)
        ours = [path for path in paths if path.startswith("calib_lightning.") and path.endswith(f".{name}")]
        if len(ours) == 1:
            return ours[0]
    return str(_resolve(cls, name))


def _null_stays(value: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """``--model.switch.training.scheduler=null``: the parser would hand "None" on to the level below."""
    if isinstance(value, _util.NestedArg) and value.val == "null" and "." in value.key:
        return value, None
    return _read(value, *args, **kwargs)


def _classes_only(callable_type: Any, spec: Any) -> tuple[Any, Any]:
    """``optimizer: {class_path: os.system}``: of what has arguments the parser checks classes, but calls functions."""
    returned = _untyped.get_callable_return_type(callable_type)
    wanted = _untyped.get_subclass_types(returned)
    if wanted and not isinstance(_util.import_object(_ours_first(returned, spec["class_path"])), type):
        names = " or ".join(sorted(kind.__name__ for kind in wanted))
        raise ImportError(
            f"class_path is {spec['class_path']!r}; it must be a subclass of {names}. Of a function give the bare name "
            f"without class_path and init_args, and annotate it with '-> {names}'."
        )
    partial: tuple[Any, Any] = _adapt(callable_type, spec)
    return partial


_typehints.resolve_class_path_by_name = _ours_first
vars(_typehints)["adapt_partial_callable_class"] = _classes_only
vars(_typehints)["parse_value_or_config"] = _null_stays


def _bounded_yaml(text: str) -> Any:
    """The parser copies what an alias repeats: ten lines of them would take minutes."""
    check_aliases(text)
    return _yaml(text)


_yaml = get_loader("yaml")
set_loader("yaml", _bounded_yaml, (yaml.YAMLError,))


class NamedData(_typehints.ActionTypeHint):
    """Takes ``--data NAME`` for all that is said of the data: what an earlier configuration says is of other data."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forget what was said of other data, then take the value."""
        if len(args) == 4 and args[3] == "--data":
            args[1].pop(self.dest, None)
        return super().__call__(*args, **kwargs)  # type: ignore[no-untyped-call]


def data_begins_anew(parser: LightningArgumentParser) -> None:
    """Let ``--data NAME`` replace what was said of other data."""
    for action in parser._actions:
        if action.dest == "data":
            action.__class__ = NamedData


class CalibParser(LightningArgumentParser):
    """Lightning's parser; its errors name what comes nearest to a misspelt name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        about = re.fullmatch(r"Help for --(\w+)\.help=\S*\.(\w+)", str(kwargs.get("description")))
        if about:
            kwargs["description"] = f"Settings of {about[2]}, in the configuration of --{about[1]}."
        # An abbreviated option would be taken for the one that it begins: a misspelling in disguise.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with exit code 2, the message and the nearest known name."""
        text = plain_message(message)
        super().error(text + hint(text, self), ex)

    def print_usage(self, file: Any = None) -> None:
        """Print nothing: fifty lines of options would hide the error under them, which says where help is."""


def data_parser(prog: str) -> CalibParser:
    """The parser of a command that needs data alone: ``--data NAME --data.SETTING=VALUE``, as in ``calib fit``."""
    parser = CalibParser(prog=prog)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    data_begins_anew(parser)
    return parser
