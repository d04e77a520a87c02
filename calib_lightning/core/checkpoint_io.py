"""Atomic checkpoint writing, and checkpoint reading that cannot execute code."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fsspec.core import strip_protocol  # type: ignore[import-untyped]
from fsspec.utils import get_protocol  # type: ignore[import-untyped]
from lightning.pytorch.plugins.io import TorchCheckpointIO

from calib_lightning.utils.disk import naming
from calib_lightning.utils.files import remove_leftovers, replaceable, temporary_name
from calib_lightning.utils.stored import DamagedFileError, check_archive, load_torch


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints atomically: a crash leaves either the old file or the new one, never a partial one.

    Saving: write under a temporary name *in the target folder* (another folder may be on another file system, where a
    rename is a copy), flush and fsync the file, rename it to its final name, fsync the folder. On failure the temporary
    file is removed, the old file is unchanged and the error is re-raised. A killed process leaves its temporary file
    behind; its name starts with a dot and does not end in ``.ckpt``, so it is not mistaken for a checkpoint, and the
    next save in that folder on the same machine removes it once its writer is dead.

    Loading: the checksums in the file are compared first, so that a damaged file is never trained on; then
    ``weights_only=True`` unless the caller overrides it, so that an untrusted file cannot execute code.

    The parent class handles paths with a protocol other than ``file`` (``s3://...``).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[AtomicCheckpointIO()], logger=False)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path`` completely or not at all.

        Args:
            checkpoint: The contents that Lightning stores.
            path: Final name of the file; missing folders are created.
            storage_options: Must be ``None``, as in the parent class.

        Raises:
            OSError: If the disk is full or the folder is not writable; ``path`` is then unchanged.
        """
        if not _is_local(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(strip_protocol(str(path)))
        replaceable(target)  # a link is replaced itself: ``last.ckpt`` may lead to a checkpoint that is kept
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(target)
        try:
            with naming(target):
                _write(checkpoint, temporary)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)
        remove_leftovers(target.parent.glob("*.tmp"))

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[[Any, Any], Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint without executing code in it.

        Args:
            path: File or URL.
            map_location: As in `torch.load`; the default keeps the tensors on the CPU.
            weights_only: ``None`` means ``True``. Pass ``False`` only for a file that you created yourself.

        Returns:
            The stored dictionary.

        Raises:
            FileNotFoundError: If the file does not exist.
            pickle.UnpicklingError: If the file holds anything but tensors and plain data.
            RuntimeError: If the file is damaged or incomplete.
        """
        try:
            if not _is_local(path):
                return super().load_checkpoint(path, map_location, weights_only is not False)
            found: dict[str, Any] = load_torch(
                strip_protocol(str(path)), map_location, weights_only=weights_only is not False
            )
            if not isinstance(found, dict):
                raise RuntimeError(
                    f"{path} holds {_kind(found)}, not the dict of a checkpoint. Give a file that a trainer has saved."
                )
            return found
        except pickle.UnpicklingError as error:
            raise pickle.UnpicklingError(
                f"{path} is not a checkpoint of tensors and plain data only: {_refusal(error)}. It was not loaded. "
                "Give a file that a trainer has saved. If it is your own, save its weights with "
                "torch.save(module.state_dict(), FILE), and settings as numbers and text."
            ) from None
        except (EOFError, RuntimeError) as error:
            # torch raises RuntimeError for other problems too (a missing device), whose messages are clear
            torchs = any(name in str(error) for name in ("PytorchStreamReader", "inline_container"))
            if isinstance(error, RuntimeError) and not isinstance(error, DamagedFileError) and not torchs:
                raise
            raise _damaged(path, error) from error


def check_checkpoint(path: Any) -> None:
    """Compare the checksums in a checkpoint that another reader loads; what is no local file is left to it.

    Raises:
        RuntimeError: If the file is damaged or incomplete.
    """
    if isinstance(path, str | Path) and _is_local(path) and Path(strip_protocol(str(path))).is_file():
        try:
            check_archive(strip_protocol(str(path)))
        except DamagedFileError as error:
            raise _damaged(path, error) from error


def _damaged(path: str | Path, error: Exception) -> RuntimeError:
    return RuntimeError(
        f"{path} is damaged or incomplete ({_reason(error)}). Copy it from its source again, or resume from an older "
        "checkpoint in the same folder."
    )


class _Sink:
    """A file that remembers why a write failed; torch's archive writer hides the cause behind its own error."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    sink = _Sink(path)
    try:
        with sink.file:
            torch.save(checkpoint, sink)  # type: ignore[arg-type]  # torch only needs write and flush
            sink.flush()
            os.fsync(sink.file.fileno())
    except RuntimeError as error:
        raise (sink.error or error) from error


def _is_local(path: str | Path) -> bool:
    return str(get_protocol(str(path))) in ("file", "local")


def _sync_folder(folder: Path) -> None:
    """Make the rename durable."""
    if os.name != "posix":  # elsewhere folders cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _refusal(error: pickle.UnpicklingError) -> str:
    """Why a file was refused; other readers than `load_torch` quote torch, which advises to execute it."""
    return "it holds Python objects" if "weights_only" in str(error) else _reason(error)


def _kind(content: object) -> str:
    name = type(content).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
