"""Read files of `torch.save` and NumPy, and check archives.

What is damaged, or says that it is larger than the file could be, is refused before memory is used.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import tokenize
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_GROWTH, _SMALL = 100, 10 << 20
"""A tensor of repeated elements may take this many times the size of its file, or this many bytes."""


class DamagedFileError(RuntimeError):
    """The content of a file does not agree with the checksums or sizes in it."""


def load_torch(path: str | Path, map_location: Any = "cpu", *, weights_only: bool = True) -> Any:
    """Read a file of `torch.save`, whose checksums are checked first; `torch.load` ignores them.

    Files of torch before version 1.6 have no checksums, nor have those written after
    ``torch.serialization.set_crc32_options(False)``: a warning says that damage in them is not noticed.

    Args:
        path: The file.
        map_location: As in `torch.load`.
        weights_only: ``False`` executes what the file holds.

    Returns:
        The content.

    Raises:
        DamagedFileError: A part of the file does not match its checksum, or a tensor is larger than the file.
        pickle.UnpicklingError: The file holds more than tensors and plain data, or is not one of `torch.save`; which it
            is, without torch's advice to execute it.
        Exception: What else `torch.load` raises for a damaged file.

    Example:
        ``load_torch("last.ckpt")["state_dict"]``
    """
    with Path(path).open("rb") as file:  # one file for both: nobody replaces it in between
        checked = check_archive(file)
        try:
            content = torch.load(file, map_location=map_location, weights_only=weights_only)
        except pickle.UnpicklingError as error:
            if not weights_only:
                raise
            raise pickle.UnpicklingError(_why_refused(error)) from None  # a traceback would show the advice
        if weights_only:
            _check_sizes(content, os.fstat(file.fileno()).st_size)
    if not checked:
        warnings.warn(
            f"{path} has no checksums, so damage in it is not noticed. Save it again with this version of torch.",
            stacklevel=2,
        )
    return content


def _why_refused(error: pickle.UnpicklingError) -> str:
    """What the file is, in the words of torch's message that are not advice to execute it."""
    foreign = re.search(r"GLOBAL (\S+)", str(error))
    if foreign:
        return f"it holds the Python object {foreign[1]}, and loading such an object can execute code"
    return "it is not a file of torch.save, or holds Python objects, which can execute code when they are loaded"


def check_archive(source: str | Path | IO[bytes], limit: float = 0) -> bool:
    """Compare all parts of a zip archive (``.pt``, ``.ckpt``, ``.pt2``, ``.npz``) with their CRC32 checksums.

    Args:
        source: The file; one that is open is left at its start.
        limit: Bytes that the parts may take, if that is more than the file has: only compressed parts do.

    Returns:
        Whether there are checksums: ``False`` for a file that is not an archive, which the reader must judge.

    Raises:
        DamagedFileError: A part is damaged or missing, or the parts are larger than ``limit``.
    """
    if isinstance(source, str | Path):
        with Path(source).open("rb") as file:
            return check_archive(file, limit)
    size = source.seek(0, os.SEEK_END)
    source.seek(0)
    is_archive = source.read(4) == b"PK\x03\x04" or zipfile.is_zipfile(source)
    source.seek(0)
    if not is_archive:
        return False
    try:
        with zipfile.ZipFile(source) as archive:
            members = archive.infolist()
            total = sum(member.file_size for member in members)
            if total > max(limit, size):
                raise DamagedFileError(
                    f"its parts would take {total / 1e9:.3g} GB, and the limit is {max(limit, size) / 1e9:.3g} GB"
                )
            if not any(member.CRC for member in members):  # torch writes zeros where it is told to write none
                return False
            damaged = archive.testzip()
    except DamagedFileError:
        raise
    except Exception as error:  # depends on which byte is damaged
        raise DamagedFileError(f"its archive is damaged: {str(error) or type(error).__name__}") from error
    finally:
        source.seek(0)
    if damaged is not None:
        raise DamagedFileError(f"its part {damaged!r} does not match its checksum")
    return True


def read_array(file: IO[bytes], size: int) -> npt.NDArray[Any]:
    """Read one array in NumPy's format; Python objects are never loaded.

    Args:
        file: Open at the start of the array.
        size: Bytes of the file, from there.

    Raises:
        ValueError: The header is damaged, or its shape needs more or fewer bytes than there are.
    """
    start = file.tell()
    shape, dtype = read_header(file)
    if not dtype.hasobject and math.prod(shape) * max(dtype.itemsize, 1) > size:
        raise ValueError(f"its header says shape {shape} of {dtype}, which is more than the {size} bytes that it has")
    file.seek(start)
    array: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    if file.tell() - start < size:  # a damaged length of the header shifts all numbers
        raise ValueError(f"it has {size - (file.tell() - start)} bytes more than its header says")
    return array


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read shape and type of an array in NumPy's format.

    Args:
        file: Open at the start of the array.

    Raises:
        ValueError: The header is damaged.
    """
    version = np.lib.format.read_magic(file)
    headers: dict[Any, Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in headers:
        raise ValueError(f"version {version} of the format is for arrays with named fields")
    try:
        shape, _, dtype = headers[version](file)
    except (SyntaxError, tokenize.TokenError, RecursionError, TypeError) as error:  # NumPy evaluates the header
        raise ValueError(f"its header is damaged ({type(error).__name__})") from error
    return shape, dtype


def _check_sizes(content: Any, size: int) -> None:
    """Reject tensors with more elements than their memory, memory larger than the file, and lists that repeat others.

    Such a tensor (of ``expand``, say) takes its full size with the first copy.
    """
    queue, seen, most = [content], 0, max(100_000, size)
    while queue:
        item = queue.pop()
        if (seen := seen + 1) > most:
            raise DamagedFileError(f"it has more than {most:,} values; a file of {size:,} bytes holds fewer")
        if isinstance(item, Mapping):
            queue.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            queue.extend(item)
        elif isinstance(item, Tensor) and item.layout == torch.strided and not item.is_nested:
            needed, held = item.numel() * item.element_size(), item.untyped_storage().nbytes()
            if held > size or needed > max(held, _GROWTH * size, _SMALL):
                raise DamagedFileError(
                    f"it has a tensor {tuple(item.shape)} of {needed:,} bytes, but holds {min(held, size):,} of them; "
                    "save tensor.clone() if it was made by expand"
                )
