"""Classes of Lightning that exist twice: ``pytorch_lightning`` is the same code as ``lightning.pytorch``."""

from __future__ import annotations

from typing import TypeGuard, TypeVar

T = TypeVar("T")


def is_twin(value: object, *kinds: type[T]) -> TypeGuard[T]:
    """Like ``isinstance`` for classes of ``lightning``, and for their twins in the package ``pytorch_lightning``.

    The two packages share no class, so callbacks that meet trainers of both compare where a class is defined.
    """
    if isinstance(value, kinds):
        return True
    twins = {_path_of(kind) for kind in kinds}
    return any(_path_of(cls) in twins for cls in type(value).__mro__)


def _path_of(cls: type) -> str:
    path = f"{cls.__module__}.{cls.__qualname__}"
    for twin, own in (("pytorch_lightning.", "lightning.pytorch."), ("lightning_fabric.", "lightning.fabric.")):
        if path.startswith(twin):
            return own + path.removeprefix(twin)
    return path
