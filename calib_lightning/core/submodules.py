"""Parts of a module: one by its name, and all of them in evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode for a while; every part gets back the mode that it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def submodule_of(module: nn.Module, name: str, what: str) -> nn.Module:
    """Find a submodule by its name.

    Args:
        module: The module.
        name: Dotted name of the submodule; ``""`` for the module itself.
        what: The argument that the name was given as, for the message.

    Returns:
        The submodule.

    Raises:
        ValueError: If there is none of that name.

    Example:
        >>> submodule_of(nn.Sequential(nn.ReLU()), "0", "encoder")
        ReLU()
    """
    try:
        return module.get_submodule(name)
    except AttributeError:
        names = ", ".join(repr(own) for own, _ in module.named_children())
        raise ValueError(
            f"{type(module).__name__} has no submodule {name!r}: give the name of its {what} as {what}=...; at the top "
            f"it has {names or 'none'}."
        ) from None
