"""Submodules by name, and temporary evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, then restore the mode of every submodule."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def submodule_of(module: nn.Module, name: str, what: str) -> nn.Module:
    """Return the submodule called ``name`` (``""``: the module itself); ``what`` is the argument that gave it."""
    try:
        return module.get_submodule(name)
    except AttributeError:
        names = ", ".join(repr(own) for own, _ in module.named_children())
        raise ValueError(
            f"{what} is {name!r}; it must be the name of a submodule of {type(module).__name__}. Its top-level "
            f"submodules are {names or 'none'}."
        ) from None
