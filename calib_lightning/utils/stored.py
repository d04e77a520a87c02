"""Read files of `torch.save`, and check archives: a file that is damaged is refused before anything is read from it."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import torch


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
        DamagedFileError: A part of the file does not match its checksum.
        pickle.UnpicklingError: The file holds more than tensors and plain data, or is not one of `torch.save`.
        Exception: What else `torch.load` raises for a damaged file.

    Example:
        ``load_torch("last.ckpt")["state_dict"]``
    """
    with Path(path).open("rb") as file:  # one file for both: nobody replaces it in between
        checked = check_archive(file)
        content = torch.load(file, map_location=map_location, weights_only=weights_only)
    if not checked:
        warnings.warn(
            f"{path} has no checksums, so damage in it is not noticed. Save it again with this version of torch.",
            stacklevel=2,
        )
    return content


def check_archive(source: str | Path | IO[bytes]) -> bool:
    """Compare all parts of a zip archive (``.pt``, ``.ckpt``, ``.pt2``, ``.npz``) with their CRC32 checksums.

    Args:
        source: The file; one that is open is left at its start.

    Returns:
        Whether there are checksums: ``False`` for a file that is not an archive, which the reader must judge.

    Raises:
        DamagedFileError: A part is damaged or missing.
    """
    if isinstance(source, str | Path):
        with Path(source).open("rb") as file:
            return check_archive(file)
    source.seek(0)
    is_archive = source.read(4) == b"PK\x03\x04" or zipfile.is_zipfile(source)
    source.seek(0)
    if not is_archive:
        return False
    try:
        with zipfile.ZipFile(source) as archive:
            members = archive.infolist()
            if not any(member.CRC for member in members):  # torch writes zeros where it is told to write none
                return False
            damaged = archive.testzip()
    except Exception as error:  # depends on which byte is damaged
        raise DamagedFileError(f"its archive is damaged: {str(error) or type(error).__name__}") from error
    finally:
        source.seek(0)
    if damaged is not None:
        raise DamagedFileError(f"its part {damaged!r} does not match its checksum")
    return True
