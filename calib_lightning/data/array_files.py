"""Arrays from files of NumPy; what else such a file may hold is never loaded."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib_lightning.data.archives import REMEDY, naming_damage
from calib_lightning.data.web_files import CHUNK


def npz_names(path: Path) -> list[str]:
    """List the arrays of a ``.npz`` file.

    Args:
        path: The file.

    Returns:
        Their names.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or of another format.
    """
    with naming_damage(path), zipfile.ZipFile(path) as pack:
        return [name.removesuffix(".npy") for name in pack.namelist() if name.endswith(".npy")]


def load_npz(path: Path, names: Collection[str] | None = None) -> dict[str, NDArray[Any]]:
    """Read arrays of a ``.npz`` file; Python objects are never loaded.

    Args:
        path: The file.
        names: The arrays to read; ``None`` reads all.

    Returns:
        The arrays by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or of another format, has not all names, or an array holds Python objects.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.npz"
        >>> np.savez(path, label=np.arange(3))
        >>> load_npz(path, ["label"])
        {'label': array([0, 1, 2])}
    """
    found = npz_names(path)
    with naming_damage(path), zipfile.ZipFile(path) as pack:
        if missing := sorted(set(names or ()) - set(found)):
            raise ValueError(f"{path} has no array {missing[0]!r}, only {', '.join(found)}. Name one of these.")
        arrays = {}
        for name in found if names is None else names:
            with pack.open(f"{name}.npy") as file:
                arrays[name] = _array(f"the array {name!r} of {path}", partial(np.lib.format.read_array, file))
                while file.read(CHUNK):  # the checksum is compared at the end
                    pass
        return arrays


def load_npy(path: Path, *, mmap: bool = False) -> NDArray[Any]:
    """Read a ``.npy`` file; Python objects are never loaded.

    Args:
        path: The file.
        mmap: Whether rows stay on the disk until they are read; the array is then read-only.

    Returns:
        The array.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or of another format, or holds Python objects.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.npy"
        >>> np.save(path, np.arange(3))
        >>> load_npy(path)
        array([0, 1, 2])
    """
    with naming_damage(path), path.open("rb") as file:
        if mmap:
            return _array(str(path), partial(np.lib.format.open_memmap, path, mode="r"))
        return _array(str(path), partial(np.lib.format.read_array, file))


def _array(name: str, read: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """Read one array and say which it is if that fails."""
    try:
        return read()
    except (ValueError, SyntaxError, TypeError, TokenError, MemoryError, OverflowError) as error:
        if "objects in dtype" in str(error) or "Object arrays" in str(error):
            raise ValueError(f"{name} holds Python objects, which are never loaded. Save numbers or text.") from error
        raise ValueError(f"{name} is damaged, truncated or of another format ({error}). {REMEDY}") from error
