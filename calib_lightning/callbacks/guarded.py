"""Loggers whose failure does not end a run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lightning.fabric.loggers.logger import _DummyExperiment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from calib_lightning.callbacks.logged_keys import is_core
from calib_lightning.utils.once import warn_once

L = TypeVar("L", bound=Logger)

_METHODS = (
    "log_metrics",
    "log_hyperparams",
    "log_graph",
    "log_image",
    "log_table",
    "log_text",
    "after_save_checkpoint",
    "save",
    "finalize",
)


class _Guarded(Logger):
    """Comes before the class of a logger, so that the logger stays an instance of its class."""

    _unusable = False  # its experiment could not be made: it is not tried again, which may take minutes each time
    core_only = False
    """Whether `log_metrics` leaves out what is not among the core values."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self).__mro__[2],), self.__getstate__()


def guarded(logger: L) -> L:
    """Let a logger fail without ending the run: of its errors the first gives a warning, and the run goes on.

    A call that fails is left out, and the next one is tried. If its ``experiment`` cannot be made, the logger does
    nothing more. `calib fit` and the other commands guard every logger; in Python it is for you to say whether a run
    may go on without its logger: ``Trainer(logger=[guarded(WandbLogger()), CSVLogger("runs")])``.

    Args:
        logger: Any logger of Lightning's kind, which is changed.

    Returns:
        The logger, still an instance of its class.

    Example:
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> isinstance(guarded(CSVLogger("runs")), CSVLogger)
        True
    """
    if not isinstance(logger, _Guarded):
        logger.__class__ = _guarded_class(type(logger))
    return logger


@functools.cache
def _guarded_class(base: type[Logger]) -> type[Any]:
    members: dict[str, Any] = {
        name: _without_errors(name, getattr(base, name)) for name in _METHODS if callable(getattr(base, name, None))
    }
    members["log_metrics"] = _without_errors("log_metrics", _of_core(base.log_metrics))
    if hasattr(base, "experiment"):
        members["experiment"] = property(functools.partial(_experiment_of, base))
    members |= {"__module__": base.__module__, "__doc__": base.__doc__}
    return type(base.__name__, (_Guarded, base), members)


def attempt(logger: Logger, what: str, call: Callable[[], Any]) -> Any:
    """Call what talks to a logger; of an error, the first of this logger, it gives a warning.

    Args:
        logger: The logger.
        what: What is called, for the warning.
        call: The call.

    Returns:
        What the call returns; None if it failed.

    Example:
        ``attempt(logger, "define_metric", lambda: logger.experiment.define_metric("epoch"))``
    """
    try:
        return call()
    except Exception as error:
        _tell(logger, what, error)
        return None


def _of_core(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def log_metrics(self: Any, metrics: Mapping[str, Any], step: int | None = None) -> Any:
        if self.core_only:
            metrics = {key: value for key, value in metrics.items() if is_core(key)}
        return method(self, metrics, step)

    return log_metrics


def _without_errors(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return attempt(self, name, lambda: method(self, *args, **kwargs))

    return call


def _experiment_of(base: Any, logger: Any) -> Any:
    if not logger._unusable:
        try:
            return base.experiment.__get__(logger, base)
        except Exception as error:
            logger._unusable = True
            _tell(logger, "experiment", error)
    return _DummyExperiment()


def _rebuilt(base: type[Logger]) -> Logger:
    logger: Logger = object.__new__(_guarded_class(base))
    return logger


def _tell(logger: Logger, what: str, error: Exception) -> None:
    if getattr(rank_zero_only, "rank", 0) != 0:
        return
    message = (
        f"{type(logger).__name__}.{what} failed ({type(error).__name__}: {error}). The run goes on, and metrics.csv "
        "and run.json have every value (in Python: those of a CSVLogger). Further failures of this logger are not "
        "reported; look at its connection, login and space."
    )
    warn_once(logger, message, stacklevel=1)  # in a quiet run warnings from Lightning's files are not seen
