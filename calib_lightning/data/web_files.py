"""Atomic downloads, by one process at a time."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from filelock import FileLock
from tqdm.auto import tqdm  # type: ignore[import-untyped]

CHUNK = 1 << 16
"""Bytes per read."""
WEB_PAGE = "a web page, not the file"
"""Description of a file that a server has sent for a missing one."""
_TIMEOUT = 30
_PAUSES = (0.5, 1.0, 2.0)  # seconds before a broken download is continued


class Archive(NamedTuple):
    """A file to download from ``url`` (``http://``, ``https://`` or ``file:``), with md5 and size if known."""

    url: str
    name: str
    md5: str | None = None
    size: int | None = None


def md5_of(path: Path) -> str:
    """Compute the md5 of a file as 32 hexadecimal digits."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock of a path, ``.<name>.lock`` beside it; the system releases it when its holder dies.

    `fetch` takes the lock of the file that it downloads, so do not hold that one around it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield


def fetch(archive: Archive, folder: Path) -> Path:
    """Download a file into ``folder`` unless it exists, and return its path; processes take turns.

    The bytes go to ``.<name>.part``, which is renamed when complete. A broken connection is resumed; so is the
    ``.part`` of an earlier call if the md5 is known, since otherwise a changed file would go unnoticed.
    """
    path = folder / archive.name
    if not path.exists():
        if urlsplit(archive.url).scheme not in {"http", "https", "file"}:
            raise ValueError(f"url is {archive.url!r}; it must start with http://, https:// or file:.")
        with locked(path):
            if not path.exists():  # another process may have downloaded it
                _download(archive, path)
                return path
    if fault := _fault(path, archive):
        raise ValueError(f"{path} is damaged: it is {fault}. Delete it to download it again from {archive.url}.")
    return path


def _fault(path: Path, archive: Archive) -> str | None:
    """What is wrong with a file; ``None`` if it is the expected one as far as known."""
    size = path.stat().st_size
    if not path.is_file():
        return "a folder, not a file"
    if is_web_page(path):
        return WEB_PAGE
    if size == 0 or size != (archive.size or size):
        return f"{size} bytes long, expected {archive.size or 'more'}"
    if archive.md5 is not None and (found := md5_of(path)) != archive.md5.lower():
        return f"a file with md5 {found}, expected {archive.md5}"
    return None


def is_web_page(path: Path) -> bool:
    """Return whether a file is a web page, which servers may send for missing files."""
    with path.open("rb") as file:
        return file.read(512).removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith((b"<!doctype html", b"<html"))


def _download(archive: Archive, path: Path) -> None:
    """Download to the ``.part`` file with retries, verify it and rename it."""
    part = path.with_name(f".{path.name}.part")
    by_hand = f"Try again later, or put the file at {path} manually."
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
    if page or (fault := _fault(part, archive)) == WEB_PAGE:
        fault = f"the server sent {WEB_PAGE}"
    if fault:
        if not page:  # a page is not written, so the existing part can still be resumed
            part.unlink()
        raise ValueError(f"{archive.url} did not return the expected file: {fault}. {by_hand}")
    part.replace(path)


def _receive(archive: Archive, part: Path) -> bool:
    """Request once what the ``.part`` file lacks; return True if the server declares the response a web page."""
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
            while chunk := answer.read(CHUNK):
                done += file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and done < total:
        raise ConnectionError(f"the response is truncated, {done} of {total} bytes")
    return False
