"""Parts and attributes of a module by name, temporary evaluation mode, and the state to return to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
            f"submodules are {names or 'none'}; {linear_layers(module)}."
        ) from None


def linear_layers(module: nn.Module) -> str:
    """Say which linear layers a module has, of which the last is usually the head; the last five are named."""
    names = [repr(name) for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    if not names:
        return "it has no linear layers"
    return f"its {'last ' if len(names) > 5 else ''}linear layers are {', '.join(names[-5:])}"


def put_submodule(module: nn.Module, name: str, part: nn.Module) -> None:
    """Replace the submodule called ``name``."""
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, part)


def set_attribute(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute regardless of whether it is or was a submodule."""
    module._modules.pop(name, None)
    setattr(module, name, value)


class ModuleState:
    """What a module is at some moment: one part, what is trainable, all modes, and some attributes."""

    def __init__(self, module: nn.Module, part: str, attributes: tuple[str, ...]) -> None:
        self.module, self.part, self.old = module, part, module.get_submodule(part)
        self._trainable = [p for p in module.parameters() if p.requires_grad]
        self._modes = [(part, part.training) for part in module.modules()]
        self._attributes = {name: getattr(module, name) for name in attributes if hasattr(module, name)}

    def restore(self) -> None:
        """Return to it."""
        put_submodule(self.module, self.part, self.old)
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        for part, mode in self._modes:
            part.training = mode
        for name, value in self._attributes.items():
            set_attribute(self.module, name, value)
