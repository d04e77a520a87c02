"""Safe, atomic unpacking of archives."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from calib_lightning.data.web_files import CHUNK, WEB_PAGE, is_web_page
from calib_lightning.utils.files import owner_suffix, remove_leftovers

REMEDY = "Download it or save it again."
"""What to do with a damaged file."""
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    UnicodeDecodeError,
    RuntimeError,  # from zipfile, for an unknown version or compression
)


class _Member(NamedTuple):
    """An archive entry; ``kind`` is "a file", "a folder" or a description of anything else."""

    name: str
    size: int
    kind: str
    open: Callable[[], Any]


def extract(archive: Path, folder: Path) -> None:
    """Unpack a ``.zip``, ``.tar``, ``.tar.gz`` or ``.tgz`` file into ``folder``, completely or not at all.

    Entries go to a hidden folder first and are then renamed, with default permissions. Existing entries, links, paths
    outside ``folder`` and decompression bombs are errors. Hold `locked` if several processes may unpack.
    """
    with naming_damage(archive), ExitStack() as stack:
        members = []
        total, limit = 0, max(10 << 20, 100 * archive.stat().st_size)
        for member in _members(archive, stack):
            if fault := _member_fault(member):
                raise ValueError(f"{archive} has the member {member.name!r}, {fault}. Do not use this archive.")
            if (total := total + member.size) > limit:
                raise ValueError(
                    f"{archive} would exceed {limit} bytes when unpacked, from the member {member.name!r} on; an "
                    "archive may grow at most a hundredfold. Do not use this archive."
                )
            members.append(member)
        tops = sorted({PurePosixPath(member.name).parts[0] for member in members if PurePosixPath(member.name).parts})
        for top in tops:
            if os.path.lexists(folder / top):
                raise FileExistsError(f"{folder / top} already exists. Remove it to unpack {archive} again.")
        with tqdm(desc=f"Unpacking {archive.name}", total=total, unit="B", unit_scale=True, disable=None) as bar:
            _unpack(members, tops, folder, bar.update)


def _unpack(members: list[_Member], tops: list[str], folder: Path, told: Callable[[int], object]) -> None:
    """Write all members, then rename the top-level entries; undo everything on failure."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.glob(".unpacking*"))
    temporary, moved = Path(tempfile.mkdtemp(prefix=".unpacking-", suffix=owner_suffix(), dir=folder)), []
    try:
        for member in members:
            path = temporary / member.name
            (path if member.kind == "a folder" else path.parent).mkdir(parents=True, exist_ok=True)
            if member.kind == "a file":
                with member.open() as source, path.open("wb") as file:
                    shutil.copyfileobj(source, file, CHUNK)
                told(member.size)
        for top in tops:
            (temporary / top).rename(folder / top)
            moved.append(top)
    except BaseException:
        for top in moved:
            (folder / top).rename(temporary / top)
        shutil.rmtree(temporary)
        if new:
            folder.rmdir()
        raise
    temporary.rmdir()


def _members(archive: Path, stack: ExitStack) -> Iterator[_Member]:
    """Open an archive for the lifetime of the stack and list its entries."""
    if archive.name.lower().endswith(".zip"):
        pack = stack.enter_context(zipfile.ZipFile(archive))
        for entry in pack.infolist():
            kind = "a folder" if entry.is_dir() else "a file"
            if entry.flag_bits & 1:
                kind = "encrypted"
            elif stat.S_IFMT(entry.external_attr >> 16) not in {0, stat.S_IFREG, stat.S_IFDIR}:
                kind = "a link or device"
            yield _Member(entry.filename, entry.file_size, kind, partial(pack.open, entry))
        return
    tape = stack.enter_context(tarfile.TarFile.open(archive))
    for info in tape:
        kind = "a folder" if info.isdir() else "a file" if info.isreg() else "a link or device"
        yield _Member(info.name, info.size, kind, partial(tape.extractfile, info))
    # tarfile treats a damaged header and a file truncated between members as the end, and skips gzip's checksum.
    file = tape.fileobj
    file.seek(tape.offset)
    if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it is truncated")
    while file.read(CHUNK):
        pass


def _member_fault(member: _Member) -> str | None:
    """Why a member is not unpacked."""
    if member.kind not in {"a file", "a folder"}:
        return f"which is {member.kind}"
    if member.name.startswith("/"):
        return "whose path is absolute"
    if "\\" in member.name or member.name[1:2] == ":":
        return "whose path has a backslash or a drive letter"
    return "whose path has '..'" if ".." in PurePosixPath(member.name).parts else None


@contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """Turn errors about a damaged or missing file, or a web page, into ones that name it and say what to do."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Download it, or name another file.")
    if is_web_page(path):
        raise ValueError(f"{path} is {WEB_PAGE}. {REMEDY}")
    try:
        yield
    except _DAMAGE as error:
        raise ValueError(f"{path} is damaged, truncated or in another format ({error}). {REMEDY}") from error
