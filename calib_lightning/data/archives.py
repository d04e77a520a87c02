"""Files from the internet: download, unpack and read them, whole or not at all."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from tokenize import TokenError
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from tqdm.auto import tqdm  # type: ignore[import-untyped]

_CHUNK = 1 << 16
_TIMEOUT = 30
_PAUSES = (0.5, 1.0, 2.0)  # seconds before a broken download is continued
_WEB_PAGE = "a web page, not the file"
_REMEDY = "Delete it and download it again."
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    UnicodeDecodeError,
    RuntimeError,  # zipfile's, of a version or compression that it does not know
)


class Archive(NamedTuple):
    """A file on the internet.

    Args:
        url: Where it is: ``http://``, ``https://`` or ``file:``.
        name: Its file name in the folder that it is downloaded to.
        md5: Its checksum in hexadecimal digits, or ``None`` where none is known.
        size: Its size in bytes, or ``None`` where it is not known.
    """

    url: str
    name: str
    md5: str | None = None
    size: int | None = None


def md5_of(path: Path) -> str:
    """Compute the md5 of a file.

    Args:
        path: The file; it is read in pieces.

    Returns:
        32 hexadecimal digits.

    Raises:
        OSError: If the file cannot be read.

    Example:
        >>> md5_of(Path(os.devnull))
        'd41d8cd98f00b204e9800998ecf8427e'
    """
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock of a path; the system frees it when its holder dies.

    Args:
        path: What is to be written; the lock is ``.<name>.lock`` beside it. Its folder is made where it is missing.
            :func:`fetch` takes the lock of the file it downloads, so do not hold that one around it.

    Raises:
        OSError: If the folder cannot be made or written.

    Example:
        >>> with locked(Path(tempfile.mkdtemp()) / "images"):
        ...     pass
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield


def fetch(archive: Archive, folder: Path) -> Path:
    """Download a file unless it is there; processes take turns.

    The bytes go to ``.<name>.part``, which is renamed once it is whole. A broken connection is continued where it
    stopped. So is the ``.part`` of an earlier call if the md5 is known; nothing else would tell that the file changed.

    Args:
        archive: The file.
        folder: Where it goes; it is made if it is missing.

    Returns:
        Path of the whole file.

    Raises:
        OSError: If it cannot be downloaded or written.
        ValueError: If the file that is there or came is not the expected one. What was there is left as it is.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "a.txt").write_text("a")
        >>> fetch(Archive((folder / "a.txt").as_uri(), "b.txt", size=1), folder).read_text()
        'a'
    """
    path = folder / archive.name
    if not path.exists():
        if urlsplit(archive.url).scheme not in {"http", "https", "file"}:
            raise ValueError(f"url is {archive.url!r}; it must begin with http://, https:// or file:. Correct it.")
        with locked(path):
            if not path.exists():  # another process may have downloaded it meanwhile
                _download(archive, path)
                return path
    if fault := _fault(path, archive):
        raise ValueError(f"{path} is damaged: it is {fault}. Delete it to download it again from {archive.url}.")
    return path


def _fault(path: Path, archive: Archive) -> str | None:
    """What a file is instead of the expected one; ``None`` if it is that one as far as anybody knows."""
    size = path.stat().st_size
    if not path.is_file():
        return "a folder, not a file"
    if _is_web_page(path):
        return _WEB_PAGE
    if size == 0 or size != (archive.size or size):
        return f"{size} bytes long, expected {archive.size or 'more'}"
    if archive.md5 is not None and (found := md5_of(path)) != archive.md5.lower():
        return f"a file with md5 {found}, expected {archive.md5}"
    return None


def _is_web_page(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(512).removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith((b"<!doctype html", b"<html"))


def _download(archive: Archive, path: Path) -> None:
    """Download to the ``.part`` file, as often as it takes, check it and rename it."""
    part = path.with_name(f".{path.name}.part")
    by_hand = f"Try again later, or put the file at {path} by hand."
    if archive.md5 is None:
        part.unlink(missing_ok=True)
    for pause in (*_PAUSES, None):
        try:
            page = _receive(archive, part)
            break
        except (OSError, HTTPException) as error:
            if pause is None or (isinstance(error, HTTPError) and error.code < 500):
                reason = str(error) or type(error).__name__
                raise OSError(f"{archive.url} could not be downloaded: {reason}. {by_hand}") from error
            time.sleep(pause)
    if page or (fault := _fault(part, archive)) == _WEB_PAGE:
        fault = f"the server answered with {_WEB_PAGE}"
    if fault:
        if not page:  # a page was not written: what came before it may be continued
            part.unlink()
        raise ValueError(f"{archive.url} did not give the expected file: {fault}. {by_hand}")
    part.replace(path)


def _receive(archive: Archive, part: Path) -> bool:
    """Ask once for what the ``.part`` file lacks; true if the server calls its answer a web page."""
    done = part.stat().st_size if part.exists() else 0
    if done and done == archive.size:
        return False
    request = Request(archive.url, headers={"User-Agent": "calib_lightning"})
    if done:
        request.add_header("Range", f"bytes={done}-")
    try:
        answer = urlopen(request, timeout=_TIMEOUT)
    except HTTPError as error:
        if error.code != 416:
            raise
        part.unlink(missing_ok=True)
        raise ConnectionError(f"the server has nothing after byte {done}") from error
    with answer:
        if answer.headers.get_content_type() == "text/html":
            return True
        if answer.status == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
            part.unlink(missing_ok=True)
            raise ConnectionError(f"the server did not continue at byte {done}")
        done = done if answer.status == 206 else 0
        length = answer.headers.get("Content-Length")
        total = None if length is None else done + int(length)
        bar = tqdm(desc=archive.name, total=total, initial=done, unit="B", unit_scale=True, disable=None)
        with bar, part.open("ab" if done else "wb") as file:
            while chunk := answer.read(_CHUNK):
                done += file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and done < total:
        raise ConnectionError(f"the answer is truncated, {done} of {total} bytes")
    return False


class _Member(NamedTuple):
    """One entry of an archive; ``kind`` is "a file", "a folder" or what else it is."""

    name: str
    size: int
    kind: str
    open: Callable[[], Any]


def extract(archive: Path, folder: Path) -> None:
    """Unpack a ``.zip``, ``.tar``, ``.tar.gz`` or ``.tgz`` file, all of it or nothing.

    Files and folders are unpacked to a hidden folder in ``folder`` and then renamed, with plain permissions. Hold
    :func:`locked` around it where several processes may unpack.

    Args:
        archive: The file.
        folder: Where its entries go; it is made if it is missing. Other entries of it stay as they are.

    Raises:
        ValueError: If the archive is damaged, encrypted, expands to far more than its size, or has a member that is a
            link or device or would leave ``folder``.
        OSError: If an entry of the same name exists, or if the archive cannot be read or the folder not written.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> with zipfile.ZipFile(folder / "a.zip", "w") as file:
        ...     file.writestr("images/0.txt", "zero")
        >>> extract(folder / "a.zip", folder)
        >>> (folder / "images" / "0.txt").read_text()
        'zero'
    """
    with _naming_damage(archive), ExitStack() as stack:
        members = []
        total, limit = 0, max(10 << 20, 100 * archive.stat().st_size)
        for member in _members(archive, stack):
            if fault := _member_fault(member):
                raise ValueError(f"{archive} has the member {member.name!r}, {fault}. Do not use this archive.")
            if (total := total + member.size) > limit:
                raise ValueError(
                    f"{archive} would be more than {limit} bytes when unpacked, from the member {member.name!r} on; "
                    "an archive may grow a hundredfold. Do not use this archive."
                )
            members.append(member)
        tops = sorted({PurePosixPath(member.name).parts[0] for member in members if PurePosixPath(member.name).parts})
        for top in tops:
            if os.path.lexists(folder / top):
                raise FileExistsError(f"{folder / top} exists already. Remove it to unpack {archive} again.")
        _unpack(members, tops, folder)


def _unpack(members: list[_Member], tops: list[str], folder: Path) -> None:
    """Write all members, then rename the top-level entries; undo everything if that fails."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    temporary, moved = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder)), []
    try:
        for member in members:
            path = temporary / member.name
            (path if member.kind == "a folder" else path.parent).mkdir(parents=True, exist_ok=True)
            if member.kind == "a file":
                with member.open() as source, path.open("wb") as file:
                    shutil.copyfileobj(source, file, _CHUNK)
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
    """Open an archive for as long as the stack lives and list its entries."""
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
    # tarfile takes a damaged header and a file cut between two members for the end, and skips the checksum of gzip.
    file = tape.fileobj
    file.seek(tape.offset)
    if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it has no end")
    while file.read(_CHUNK):
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
def _naming_damage(path: Path) -> Iterator[None]:
    """Say which file is damaged, or that it is a web page or missing, and what to do."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. Download it.")
    if _is_web_page(path):
        raise ValueError(f"{path} is {_WEB_PAGE}. {_REMEDY}")
    try:
        yield
    except _DAMAGE as error:
        raise ValueError(f"{path} is damaged, truncated or of another format ({error}). {_REMEDY}") from error


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
        >>> path = Path(tempfile.mkdtemp()) / "a.npz"
        >>> np.savez(path, label=np.arange(3))
        >>> load_npz(path, ["label"])
        {'label': array([0, 1, 2])}
    """
    with _naming_damage(path), zipfile.ZipFile(path) as pack:
        found = [name.removesuffix(".npy") for name in pack.namelist() if name.endswith(".npy")]
        if missing := sorted(set(names or ()) - set(found)):
            raise ValueError(f"{path} has no array {missing[0]!r}, only {', '.join(found)}. Name one of these.")
        arrays = {}
        for name in found if names is None else names:
            with pack.open(f"{name}.npy") as file:
                arrays[name] = _array(f"the array {name!r} of {path}", partial(np.lib.format.read_array, file))
                while file.read(_CHUNK):  # the checksum is compared at the end
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
        >>> path = Path(tempfile.mkdtemp()) / "a.npy"
        >>> np.save(path, np.arange(3))
        >>> load_npy(path)
        array([0, 1, 2])
    """
    with _naming_damage(path), path.open("rb") as file:
        if mmap:
            return _array(str(path), partial(np.lib.format.open_memmap, path, mode="r"))
        return _array(str(path), partial(np.lib.format.read_array, file))


def _array(name: str, read: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """Read one array and say which it is if that fails."""
    try:
        return read()
    except (ValueError, SyntaxError, TypeError, TokenError) as error:
        if "objects in dtype" in str(error) or "Object arrays" in str(error):
            raise ValueError(f"{name} holds Python objects, which are never loaded. Save numbers or text.") from error
        raise ValueError(f"{name} is damaged, truncated or of another format ({error}). {_REMEDY}") from error
