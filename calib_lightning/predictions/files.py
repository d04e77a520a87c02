"""Read files of predictions from any framework, without executing code in a file and without guessing."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calib_lightning.predictions.csv_files import load_csv, numbers
from calib_lightning.predictions.csv_header import Columns, Holds
from calib_lightning.predictions.settings import Reading
from calib_lightning.utils.stored import DamagedFileError, check_archive, load_torch, read_array

SUFFIXES = (".npz", ".npy", ".pt", ".pth", ".csv")
_COUNT_SUFFIXES = (".csv", ".npy", ".json")

Array = npt.NDArray[Any]


class Stored:
    """The unchecked content of a file with a suffix of ``SUFFIXES``.

    ``columns`` are those of a CSV file, else ``None``; ``class_names`` are as stored, or ``None``.
    """

    def __init__(self, path: Path, reading: Reading, holds: Holds) -> None:
        self.path, self.reading = path, reading
        self.columns: Columns | None = None
        self.class_names = None
        suffix = _suffix(path, SUFFIXES)
        self.is_csv = suffix == ".csv"
        self.content: Mapping[str, Tensor] | Tensor
        if suffix == ".npz":
            self.content = arrays = _load_arrays(path, reading.max_gb)
            self.class_names = arrays.strings("class_names")
        elif suffix == ".npy":
            self.content = _tensor(_load_array(path))
        elif self.is_csv:
            self.columns, self.content, self._texts = load_csv(path, reading.labels_key, holds)
            self.class_names = self.columns.class_names
        else:
            self.content, self.class_names = _load_torch(path, reading.kind)

    def _named(self, name: str, option: str, hint: str = "") -> Tensor:
        assert not isinstance(self.content, Tensor)
        if name not in self.content:
            held = ", ".join(map(repr, self.content)) or "nothing"
            raise ValueError(f"{self.path} has no {name!r}; it has {held}. Set {option}{hint}.")
        return self.content[name]

    def array(self, name: str, option: str) -> Tensor:
        """An array of a file with named arrays."""
        if isinstance(self.content, Tensor) or self.is_csv:
            raise ValueError(f"{self.path}: {name!r} is read only from .npz, .pt and .pth files with named arrays.")
        return self._named(name, option)

    def optional(self, name: str) -> Tensor | None:
        """An array that a file may have in addition to the scores, or ``None``."""
        return None if isinstance(self.content, Tensor) else self.content.get(name)

    def others(self, scores: str) -> dict[str, Array]:
        """The named arrays, numbers or text, beside scores of any kind and their confidence; for another file."""
        names = [] if isinstance(self.content, Tensor) else self.content
        kept = [name for name in names if name not in (scores, "logits", "probs", "confidence")]
        assert not isinstance(self.content, Tensor) or not kept
        found = {name: self._raw(name) for name in kept}
        return found if self.class_names is None else found | {"class_names": np.array(self.class_names)}

    def _raw(self, name: str) -> Array:
        assert not isinstance(self.content, Tensor)
        if isinstance(self.content, _Arrays):
            return self.content.raw(name)
        tensor = self.content[name]
        try:
            array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        except (TypeError, RuntimeError) as error:
            raise ValueError(
                f"{self.path}: {name!r} is {tensor.dtype} ({tensor.layout}), which no .npz file holds. Leave it out, "
                "or save it as a dense tensor of float32."
            ) from error
        return array

    @property
    def scores(self) -> Tensor:
        """The scores as stored; for a single column ``p``, the probabilities of both classes."""
        if isinstance(self.content, Tensor):
            return self.content
        if self.is_csv and "p" in self.content and self.reading.kind != "probs":
            assert self.columns is not None
            name = self.columns.header[self.columns.scores[0]]
            raise ValueError(f"{self.path}: column {name!r} has probabilities of class 1. Set input=probs.")
        if self.is_csv:
            return self.content["scores"]
        usual = self.reading.kind
        other = {"logits": "probs", "probs": "logits"}[usual]
        hint = f" or input={other}" if not self.reading.scores_key and other in self.content else ""
        return self._named(self.reading.scores_key or usual, "scores_key", hint)

    @property
    def labels(self) -> Tensor | Array:
        """The labels in a file with scores; in a CSV file their text."""
        if isinstance(self.content, Tensor):
            raise ValueError(f"{self.path} has only scores. Give the labels in a separate file (labels).")
        if self.is_csv and self._texts is not None:
            return np.array(self._texts, dtype=str)
        return self._named("labels" if self.is_csv else self.reading.labels_key or "labels", "labels_key")

    @property
    def only_labels(self) -> Tensor | Array:
        """The labels in a file of labels."""
        if isinstance(self.content, Tensor):
            return self.content
        if self.is_csv and self.content["scores"].shape[1]:
            raise ValueError(f"{self.path}: a file of labels must have one column.")
        return self.labels


def read_counts(path: Path, classes: int) -> Tensor:
    """Read training images per class ``(K,)``, int64, from a .csv (row or column), .npy or .json (list) file."""
    suffix = _suffix(path, _COUNT_SUFFIXES)
    if suffix == ".json":
        try:
            counts = np.asarray(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: the file is not a JSON list of numbers ({first_line(error)}).") from error
    else:
        counts = _load_array(path) if suffix == ".npy" else numbers(path, 0)
    return checked_counts(counts, classes, str(path))


def checked_counts(counts: Any, classes: int, where: str) -> Tensor:
    """Return counts as ``(K,)`` int64, or raise ``ValueError`` if they are not K whole numbers >= 0."""
    found = np.asarray(counts).reshape(-1)
    is_number = np.issubdtype(found.dtype, np.integer) or np.issubdtype(found.dtype, np.floating)
    if len(found) != classes or not is_number or bool(((found < 0) | (found != np.floor(found))).any()):
        raise ValueError(
            f"{where}: there are {len(found)} values of {found.dtype}; there must be {classes} whole numbers >= 0, the "
            "training images of each class in the order of the labels."
        )
    return torch.from_numpy(found.astype(np.int64))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _suffix(path: Path, allowed: tuple[str, ...]) -> str:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; it must be a file, such as RUN/predictions/test.npz of a run")
    suffix = path.suffix.lower()
    if suffix not in allowed:
        packed = " Unpack it first." if suffix in (".gz", ".bz2", ".xz", ".zip") else ""
        raise ValueError(
            f"{path}: the suffix is {suffix or '(none)'!r}; it must be one of {', '.join(allowed)}.{packed}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    return suffix


def _tensor(array: Array) -> Tensor:
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind == "f":
        return torch.from_numpy(array.astype(f"=f{size}" if size in (2, 4, 8) else "=f8"))
    if kind in "iu":
        return torch.from_numpy(array.astype(np.int64))
    if kind == "b":
        return torch.from_numpy(array)
    raise TypeError(f"dtype {array.dtype} is not numeric")


def _readable(path: Path, name: str, load: Callable[[], Array]) -> Tensor:
    try:
        return _tensor(load())
    except (ValueError, TypeError, zipfile.BadZipFile, EOFError, MemoryError, OverflowError) as error:
        raise ValueError(
            f"{path}: {name}cannot be read as an array of numbers ({first_line(error)}). Save it as a plain NumPy "
            "array, not as Python objects."
        ) from error


def _load_array(path: Path) -> Array:
    array: Array = _readable(path, "", lambda: _one_array(path)).numpy()
    return array


def _one_array(path: Path) -> Array:
    if zipfile.is_zipfile(path):
        raise ValueError("it contains several arrays; rename it to .npz")
    with path.open("rb") as file:
        return read_array(file, path.stat().st_size)


class _Arrays(Mapping[str, Tensor]):
    """The arrays of an ``.npz`` file, read on demand, so that invalid ones that are not needed do no harm."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._archive = zipfile.ZipFile(path)
        self._members = {member.filename.removesuffix(".npy"): member for member in self._archive.infolist()}

    def _array(self, name: str) -> Array:
        with self._archive.open(self._members[name]) as file:
            return read_array(file, self._members[name].file_size)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._members:
            raise KeyError(name)
        return _readable(self._path, f"{name!r} ", lambda: self._array(name))

    def strings(self, name: str) -> Any:
        """An array of text as a list, or ``None`` if there is none."""
        return self.raw(name).tolist() if name in self else None

    def raw(self, name: str) -> Array:
        """An array of numbers or text, as it is stored."""
        try:
            return self._array(name)
        except (ValueError, zipfile.BadZipFile, EOFError, MemoryError, OverflowError) as error:
            raise ValueError(
                f"{self._path}: {name!r} cannot be read ({first_line(error)}). Save it as numpy.array(...) of "
                "numbers or fixed-width text, not as Python objects."
            ) from error

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)


def _load_arrays(path: Path, max_gb: float) -> _Arrays:
    try:
        reason = "" if check_archive(path, 1e9 * max_gb) or zipfile.is_zipfile(path) else "it is not an archive"
    except DamagedFileError as error:
        reason = str(error)
    if reason:
        raise ValueError(
            f"{path} is damaged or not an .npz archive ({reason}). Save it with numpy.savez (or a single array as "
            ".npy)." + (" Or raise max_gb." if "limit" in reason else "")
        )
    return _Arrays(path)


def _load_torch(path: Path, kind: str) -> tuple[Mapping[str, Tensor] | Tensor, Any]:
    """The tensors, and the class names or ``None``."""
    try:
        with warnings.catch_warnings():
            # about tensors that are rejected later
            warnings.filterwarnings("ignore", category=UserWarning, module="torch")
            content = load_torch(path)
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(
            f"{path} cannot be read as tensors ({first_line(error)}). Save a dict of tensors with torch.save."
        ) from error
    if isinstance(content, Tensor):
        return content.detach(), None
    if isinstance(content, tuple | list) and len(content) == 2 and all(isinstance(part, Tensor) for part in content):
        return {kind: content[0].detach(), "labels": content[1].detach()}, None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} contains a {type(content).__name__}; it must contain a dict of the tensors {kind!r} and "
            f"'labels', a tuple of these two, or one tensor of {kind} with a separate file of labels."
        )
    tensors = {str(key): value.detach() for key, value in content.items() if isinstance(value, Tensor)}
    return tensors, content.get("class_names")
