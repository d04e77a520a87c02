"""What files of predictions hold, of any framework; nothing in a file is executed, and nothing is guessed."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calib_lightning.predictions.csv_files import Holds, load_csv, numbers
from calib_lightning.predictions.settings import Reading

SUFFIXES = (".npz", ".npy", ".pt", ".pth", ".csv")
_COUNT_SUFFIXES = (".csv", ".npy", ".json")

Array = npt.NDArray[Any]


class Stored:
    """The content of a file, before it is checked.

    Args:
        path: A ``.npz``, ``.npy``, ``.pt``, ``.pth`` or ``.csv`` file.
        reading: Names of the arrays, and what the scores are.
        holds: What is looked for.

    Attributes:
        columns: Which columns of a CSV file were read as what; empty for other files.
        class_names: As stored, ``None`` where there are none.

    Raises:
        ValueError: The file is damaged, or of another type.
        OSError: It cannot be read.
    """

    def __init__(self, path: Path, reading: Reading, holds: Holds) -> None:
        self.path, self.reading = path, reading
        self.columns, self.class_names = "", None
        suffix = _suffix(path, SUFFIXES)
        self.is_csv = suffix == ".csv"
        self.content: Mapping[str, Tensor] | Tensor
        if suffix == ".npz":
            self.content = arrays = _load_arrays(path)
            self.class_names = arrays.strings("class_names")
        elif suffix == ".npy":
            self.content = _tensor(_load_array(path))
        elif self.is_csv:
            self.content, self.columns = load_csv(path, reading.labels_key, holds)
        else:
            self.content, self.class_names = _load_torch(path)

    def _named(self, name: str, option: str, hint: str = "") -> Tensor:
        assert not isinstance(self.content, Tensor)
        if name not in self.content:
            held = ", ".join(map(repr, self.content)) or "nothing"
            raise ValueError(f"{self.path}: no {name!r}; the file holds {held}; name one of them with {option}{hint}")
        return self.content[name]

    def array(self, name: str, option: str) -> Tensor:
        """An array of a file that names its arrays."""
        if isinstance(self.content, Tensor) or self.is_csv:
            raise ValueError(f"{self.path}: {name!r} is read only from .npz, .pt and .pth files with named arrays")
        return self._named(name, option)

    def optional(self, name: str) -> Tensor | None:
        """An array that a file may hold beside the scores."""
        return None if isinstance(self.content, Tensor) else self.content.get(name)

    @property
    def scores(self) -> Tensor:
        """The scores as they are stored; of one column ``p``, the probabilities of both classes."""
        if isinstance(self.content, Tensor):
            return self.content
        if "p" in self.content and self.is_csv:
            if self.reading.input != "probs":
                raise ValueError(f"{self.path}: column 'p' holds probabilities of class 1; say input=probs")
            return torch.stack([1.0 - self.content["p"], self.content["p"]], dim=1)
        if self.is_csv:
            return self.content["scores"]
        usual = self.reading.input
        other = {"logits": "probs", "probs": "logits"}[usual]
        hint = f", or say input={other}" if not self.reading.scores_key and other in self.content else ""
        return self._named(self.reading.scores_key or usual, "scores_key", hint)

    @property
    def labels(self) -> Tensor:
        """The labels that are stored with the scores."""
        if isinstance(self.content, Tensor):
            raise ValueError(f"{self.path}: holds scores only; give the labels in a file of their own (labels)")
        return self._named("labels" if self.is_csv else self.reading.labels_key or "labels", "labels_key")

    @property
    def only_labels(self) -> Tensor:
        """The labels of a file of labels."""
        if isinstance(self.content, Tensor):
            return self.content
        if self.is_csv and self.content["scores"].shape[1]:
            raise ValueError(f"{self.path}: a file of labels must have one column, a label in each row")
        return self.labels


def read_counts(path: Path, classes: int) -> Tensor:
    """Read the number of training images of each class.

    Args:
        path: A ``.csv`` (one row or one column), ``.npy`` or ``.json`` (a list) file.
        classes: Number of classes K.

    Returns:
        ``(K,)`` int64.

    Raises:
        ValueError: Not K whole numbers >= 0.
        OSError: The file cannot be read.
    """
    suffix = _suffix(path, _COUNT_SUFFIXES)
    if suffix == ".json":
        try:
            counts = np.asarray(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: not a JSON list of numbers ({first_line(error)})") from error
    else:
        counts = _load_array(path) if suffix == ".npy" else numbers(path, 0)
    return checked_counts(counts, classes, str(path))


def checked_counts(counts: Any, classes: int, where: str) -> Tensor:
    """Refuse counts that are not K whole numbers >= 0; return them as ``(K,)`` int64."""
    found = np.asarray(counts).reshape(-1)
    is_number = np.issubdtype(found.dtype, np.integer) or np.issubdtype(found.dtype, np.floating)
    if len(found) != classes or not is_number or bool(((found < 0) | (found != np.floor(found))).any()):
        raise ValueError(
            f"{where}: {len(found)} values of {found.dtype}, allowed: {classes} whole numbers >= 0, the training "
            "images of each class in the order of the labels"
        )
    return torch.from_numpy(found.astype(np.int64))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _suffix(path: Path, allowed: tuple[str, ...]) -> str:
    suffix = path.suffix.lower()
    if suffix not in allowed:
        raise ValueError(f"{path}: files of type {suffix or '(none)'!r} are not read, allowed: {', '.join(allowed)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
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
    except (ValueError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"{path}: {name}cannot be read as an array of numbers ({first_line(error)}); save it as a plain NumPy "
            "array, not as Python objects"
        ) from error


def _load_array(path: Path) -> Array:
    array: Array = _readable(path, "", lambda: _one_array(path)).numpy()
    return array


def _one_array(path: Path) -> Array:
    stored = np.load(path, allow_pickle=False)
    if not isinstance(stored, np.ndarray):
        raise ValueError("it holds several arrays; rename it to .npz")
    return stored


class _Arrays(Mapping[str, Tensor]):
    """The arrays of an ``.npz`` file, each read on demand: a strange one that nobody needs does no harm."""

    def __init__(self, path: Path, stored: Any) -> None:
        self._path = path
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        return _readable(self._path, f"{name!r} ", lambda: self._stored[name])

    def strings(self, name: str) -> Any:
        """An array of text as a list, ``None`` where there is none."""
        if name not in self:
            return None
        try:
            return self._stored[name].tolist()
        except (ValueError, zipfile.BadZipFile, EOFError) as error:
            raise ValueError(
                f"{self._path}: {name!r} cannot be read ({first_line(error)}); save it as numpy.array(names), text of "
                "a fixed width, not as Python objects"
            ) from error

    def __contains__(self, name: object) -> bool:
        return name in self._stored.files

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored.files)

    def __len__(self) -> int:
        return len(self._stored.files)


def _load_arrays(path: Path) -> _Arrays:
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path}: is not an .npz archive, or damaged; save it with numpy.savez (a single array is a .npy file)"
        )
    return _Arrays(path, np.load(path, allow_pickle=False))


def _load_torch(path: Path) -> tuple[Mapping[str, Tensor] | Tensor, Any]:
    """The tensors, and the names of the classes where there are any."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of tensors that are refused later
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise nearly anything
        raise ValueError(
            f"{path}: cannot be read as tensors ({_why_refused(error)}); save a dict of tensors with torch.save"
        ) from error
    if isinstance(content, Tensor):
        return content.detach(), None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: holds a {type(content).__name__}, allowed: a dict of tensors, or one tensor with a file of labels"
        )
    tensors = {str(key): value.detach() for key, value in content.items() if isinstance(value, Tensor)}
    return tensors, content.get("class_names")


def _why_refused(error: Exception) -> str:
    # PyTorch's message advises to execute what the file holds, so only the fault is taken from it.
    if "weights_only" not in str(error):
        return first_line(error)
    foreign = re.search(r"GLOBAL (\S+)", str(error))
    return f"it holds the Python object {foreign[1]}" if foreign else "it is damaged, or holds Python objects"
