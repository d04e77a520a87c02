"""Arrays from NumPy files, which are never unpickled."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calib_lightning.data.archives import REMEDY, naming_damage
from calib_lightning.data.web_files import CHUNK
from calib_lightning.utils.stored import read_array, read_header


def npz_names(path: Path) -> list[str]:
    """List the names of the arrays of a ``.npz`` file."""
    with naming_damage(path), zipfile.ZipFile(path) as pack:
        return [name.removesuffix(".npy") for name in pack.namelist() if name.endswith(".npy")]


def load_npz(path: Path, names: Collection[str] | None = None) -> dict[str, NDArray[Any]]:
    """Read named arrays (``None``: all) of a ``.npz`` file; Python objects are never loaded."""
    found = npz_names(path)
    with naming_damage(path), zipfile.ZipFile(path) as pack:
        if missing := sorted(set(names or ()) - set(found)):
            raise ValueError(f"{path} has no array {missing[0]!r}; it has {', '.join(found)}. Name one of these.")
        arrays = {}
        for name in found if names is None else names:
            size = pack.getinfo(f"{name}.npy").file_size
            with pack.open(f"{name}.npy") as file:
                arrays[name] = _array(f"the array {name!r} of {path}", partial(read_array, file, size))
                while file.read(CHUNK):  # the checksum is verified at the end
                    pass
        return arrays


def npz_stand_in(path: Path, name: str) -> NDArray[Any]:
    """An array of zeros of the shape and type of one of a ``.npz`` file, of which only the header is read."""
    with naming_damage(path), zipfile.ZipFile(path) as pack, pack.open(f"{name}.npy") as file:
        shape, dtype = read_header(file)
    return np.broadcast_to(np.zeros((), dtype), shape)


def load_npy(path: Path, *, mmap: bool = False) -> NDArray[Any]:
    """Read a ``.npy`` file, lazily and read-only with ``mmap``; Python objects are never loaded."""
    with naming_damage(path), path.open("rb") as file:
        if mmap:
            return _array(str(path), partial(np.lib.format.open_memmap, path, mode="r"))
        return _array(str(path), partial(read_array, file, path.stat().st_size))


def mapped(array: NDArray[Any]) -> torch.Tensor:
    """A tensor over the same bytes, without the warning about read-only memory."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _array(name: str, read: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """Read one array, and name it in errors."""
    try:
        return read()
    except (ValueError, SyntaxError, TypeError, TokenError, MemoryError, OverflowError) as error:
        if "objects in dtype" in str(error) or "Object arrays" in str(error):
            raise ValueError(
                f"{name} holds Python objects, which are never loaded. Save numbers or text instead."
            ) from error
        raise ValueError(f"{name} is damaged, truncated or in another format ({error}). {REMEDY}") from error
