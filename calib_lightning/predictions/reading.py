"""Scores and labels from files of any framework; nothing in a file is executed, and nothing is guessed."""

from __future__ import annotations

import csv
import json
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calib_lightning.metrics.functional.proper import check_soft_labels, check_soft_values
from calib_lightning.metrics.functional.rows import InputKind, check_shapes, check_values

SUFFIXES = (".npz", ".npy", ".pt", ".pth", ".csv")
_COUNT_SUFFIXES = (".csv", ".npy", ".json")

Array = npt.NDArray[Any]
Holds = Literal["scores and labels", "scores", "labels"]


class Predictions(NamedTuple):
    """What a file says about a set, checked.

    Attributes:
        scores: ``(N, K)``, floating point.
        labels: ``(N,)`` int64 in ``0..K-1``.
        confidence: ``(N,)`` in ``[0, 1]``, or ``None``.
        columns: Which columns of a CSV file were read as what; empty for other files.
        input: What the scores are.
        class_names: K names in the order of the scores, or ``None``.
        label_distribution: Shares of the classes ``(N, K)``, such as people's votes, or ``None``.
    """

    scores: Tensor
    labels: Tensor
    confidence: Tensor | None
    columns: str = ""
    input: InputKind = "logits"
    class_names: tuple[str, ...] | None = None
    label_distribution: Tensor | None = None


class Names(NamedTuple):
    """Names of the arrays in a file; ``None`` is the usual name.

    Attributes:
        scores: Name of the scores; ``logits`` or ``probs`` by what they are.
        labels: Name of the labels; ``labels``, in a CSV file ``label``.
    """

    scores: str | None = None
    labels: str | None = None


def read_predictions(
    path: Path, input: InputKind = "logits", names: Names | None = None, labels_path: Path | None = None
) -> Predictions:
    """Read and check one file.

    Args:
        path: A ``.npz``, ``.npy``, ``.pt``, ``.pth`` or ``.csv`` file.
        input: What the scores are.
        names: Names of the arrays.
        labels_path: File of the labels, where ``path`` does not hold them.

    Returns:
        The predictions.

    Raises:
        ValueError: Names the file, what is wrong with it and what is allowed.
        TypeError: A dtype that is not allowed.
        OSError: The file cannot be read.
    """
    names = names or Names()
    found = _Found(
        path, names._replace(scores=names.scores or input), "scores and labels" if labels_path is None else "scores"
    )
    scores, confidence = found.scores, found.confidence
    labels = found.labels if labels_path is None else _Found(labels_path, names, "labels").only_labels
    where = str(path)
    _check_dense(scores, f"{where}: scores")
    if confidence is not None:
        _check_dense(confidence, f"{where}: confidence")
    _check_dense(labels, f"{labels_path or path}: labels")
    labels = _hard_labels(labels, str(labels_path or path))
    if scores.ndim == 1 or scores.shape[1:] == (1,):
        raise ValueError(
            f"{where}: scores have shape {tuple(scores.shape)}, allowed: (N, K) with a column for each of K >= 2 "
            "classes; a binary classifier with logit z has the columns 0 and z"
        )
    if confidence is not None:
        confidence = confidence.reshape(-1) if confidence.shape[1:] == (1,) else confidence
    if scores.ndim == 2 and len(scores) != len(labels):
        raise ValueError(
            f"{where}: {len(scores)} rows of scores but {len(labels)} labels"
            + (f" in {labels_path}" if labels_path else "")
            + "; give one label for each row"
        )
    check_shapes(scores, labels, confidence, where)
    check_values(scores, labels, confidence, input, where)
    class_names = _checked_names(found.class_names, scores.shape[1], where)
    return Predictions(scores, labels, confidence, found.columns, input, class_names, _distribution(found, scores))


def _checked_names(names: Any, classes: int, where: str) -> tuple[str, ...] | None:
    if names is None:
        return None
    if not isinstance(names, list | tuple) or len(names) != classes or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{where}: class_names are {names!r:.100}, allowed: {classes} strings, one for each class in the order of "
            "the scores"
        )
    return tuple(names)


def _distribution(found: _Found, scores: Tensor) -> Tensor | None:
    distribution = found.label_distribution
    if distribution is not None:
        what = f"{found.path}: label_distribution"
        _check_dense(distribution, what)
        check_soft_labels(scores, distribution, what)
        check_soft_values(distribution, what)
    return distribution


def read_features(path: Path, name: str, rows: int) -> Tensor:
    """Read the features that stand in a file beside the scores.

    Args:
        path: A ``.npz``, ``.pt`` or ``.pth`` file.
        name: Name of the array.
        rows: N, the number of scores.

    Returns:
        ``(N, d)``, floating point.

    Raises:
        ValueError: The file has no such array, or its shape is wrong.
        TypeError: It is not floating point.
        OSError: The file cannot be read.
    """
    features = _Found(path, Names(), "scores").array(name, "--features-key")
    _check_dense(features, f"{path}: {name!r}")
    if features.ndim != 2 or len(features) != rows:
        raise ValueError(
            f"{path}: {name!r} has shape {tuple(features.shape)}, allowed: ({rows}, d), one row of features for each "
            "row of scores"
        )
    if not features.is_floating_point():
        raise TypeError(f"{path}: {name!r} is {features.dtype}, allowed: features of a floating-point dtype")
    return features


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
            raise ValueError(f"{path}: not a JSON list of numbers ({_first_line(error)})") from error
    else:
        counts = _load_array(path) if suffix == ".npy" else _numbers(path, 0)
    counts = counts.reshape(-1)
    is_number = np.issubdtype(counts.dtype, np.integer) or np.issubdtype(counts.dtype, np.floating)
    if len(counts) != classes or not is_number or bool(((counts < 0) | (counts != np.floor(counts))).any()):
        raise ValueError(
            f"{path}: {len(counts)} values of {counts.dtype}, allowed: {classes} whole numbers >= 0, the training "
            "images of each class in the order of the labels"
        )
    return torch.from_numpy(counts.astype(np.int64))


class _Found:
    """What a file holds, before it is checked."""

    def __init__(self, path: Path, names: Names, holds: Holds) -> None:
        self.path = path
        self.columns = ""
        self.names = names
        suffix = _suffix(path, SUFFIXES)
        self.is_csv = suffix == ".csv"
        self.content: Mapping[str, Tensor] | Tensor
        self.class_names: Any = None
        if suffix == ".npz":
            self.content = arrays = _load_arrays(path)
            self.class_names = arrays.strings("class_names")
        elif suffix == ".npy":
            self.content = _tensor(_load_array(path))
        elif self.is_csv:
            self.content, self.columns = _load_csv(path, names.labels, holds)
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

    @property
    def scores(self) -> Tensor:
        """The scores as they are stored."""
        if isinstance(self.content, Tensor):
            return self.content
        if self.is_csv:
            return self.content["scores"]
        name = self.names.scores or "logits"
        other = {"logits": "probs", "probs": "logits"}.get(name)
        hint = f", or say --input {other}" if other in self.content else ""
        return self._named(name, "--scores-key", hint)

    @property
    def confidence(self) -> Tensor | None:
        """The method's own confidence, where there is one."""
        return None if isinstance(self.content, Tensor) else self.content.get("confidence")

    @property
    def label_distribution(self) -> Tensor | None:
        """Shares of the classes, where there are any."""
        return None if isinstance(self.content, Tensor) else self.content.get("label_distribution")

    @property
    def labels(self) -> Tensor:
        """The labels that are stored with the scores."""
        if isinstance(self.content, Tensor):
            raise ValueError(f"{self.path}: holds scores only; give the labels with --labels FILE")
        return self._named("labels" if self.is_csv else self.names.labels or "labels", "--labels-key")

    @property
    def only_labels(self) -> Tensor:
        """The labels of a file of labels."""
        if isinstance(self.content, Tensor):
            return self.content
        if self.is_csv and self.content["scores"].shape[1]:
            raise ValueError(f"{self.path}: a file for --labels must have one column, a label in each row")
        return self.labels


def _suffix(path: Path, allowed: tuple[str, ...]) -> str:
    suffix = path.suffix.lower()
    if suffix not in allowed:
        raise ValueError(f"{path}: files of type {suffix or '(none)'!r} are not read, allowed: {', '.join(allowed)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return suffix


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _tensor(array: Array) -> Tensor:
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind == "f":
        return torch.from_numpy(array.astype(f"=f{size}" if size in (2, 4, 8) else "=f8"))
    if kind in "iu":
        return torch.from_numpy(array.astype(np.int64))
    if kind == "b":
        return torch.from_numpy(array)
    raise TypeError(f"an array of dtype {array.dtype} is no array of numbers")


def _readable(path: Path, name: str, load: Callable[[], Array]) -> Tensor:
    try:
        return _tensor(load())
    except (ValueError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"{path}: {name}cannot be read as an array of numbers ({_first_line(error)}); save it as a plain NumPy "
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
    """The arrays of an ``.npz`` file, each read when it is asked for: a strange one that nobody needs is no fault."""

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
                f"{self._path}: {name!r} cannot be read ({_first_line(error)}); save it as numpy.array(names), text of "
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
            f"{path}: is no .npz archive, or a damaged one; save it with numpy.savez (a single array is a .npy file)"
        )
    return _Arrays(path, np.load(path, allow_pickle=False))


def _load_torch(path: Path) -> tuple[Mapping[str, Tensor] | Tensor, Any]:
    """The tensors, and the names of the classes where there are any."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of tensors that are refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise nearly anything
        raise ValueError(
            f"{path}: cannot be read as tensors ({_why_refused(error)}); save a dict of tensors with torch.save"
        ) from error
    if isinstance(content, Tensor):
        return content.detach(), None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: holds a {type(content).__name__}, allowed: a dict of tensors, or one tensor with --labels FILE"
        )
    tensors = {str(key): value.detach() for key, value in content.items() if isinstance(value, Tensor)}
    return tensors, content.get("class_names")


def _why_refused(error: Exception) -> str:
    # The message of PyTorch advises to execute what the file holds, so only what is wrong is taken from it.
    if "weights_only" not in str(error):
        return _first_line(error)
    foreign = re.search(r"GLOBAL (\S+)", str(error))
    return f"it holds the Python object {foreign[1]}" if foreign else "it is damaged, or holds Python objects"


def _numbers(path: Path, header: int, unread: Collection[int] = ()) -> Array:
    with path.open(encoding="utf-8-sig") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*input contained no data")
        try:
            return np.loadtxt(
                file,
                delimiter=",",
                skiprows=header,
                ndmin=2,
                comments=None,
                quotechar='"',
                converters={place: lambda _: 0.0 for place in unread} or None,
            )
        except ValueError as error:
            raise ValueError(
                f"{path}: {_first_line(error).partition(';')[0].rstrip('.')} (rows are counted after the header); "
                "allowed: numbers with commas between them, equally many in each row"
            ) from error


def _load_csv(path: Path, labels_name: str | None, holds: Holds) -> tuple[Mapping[str, Tensor], str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = [cell.strip() for cell in next(csv.reader(file), [])]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: is no text in UTF-8 with commas between cells ({_first_line(error)})") from error
    if not first:
        raise ValueError(f"{path}: is empty; allowed: rows of scores with a label, with or without a header")
    if first[0].startswith("#"):  # numpy.savetxt writes its header as a comment
        first[0] = first[0].lstrip("# ")
    header = first if _is_header(path, first) else []
    special = {name: place for place, name in enumerate(header) if name in ("confidence", "index")}
    # pandas writes the index first and without a name.
    unread = {place for name, place in special.items() if name == "index"} | (
        {0} if header and not header[0] else set()
    )
    rest = [place for place in range(len(first)) if place not in {*special.values(), *unread}]
    label = _label_column(path, header, labels_name, holds == "scores")
    if label is None and rest and holds != "scores":
        label = rest[-1]
        if header and len(rest) > 1 and _no_scores([header[place] for place in rest]) == "":
            raise ValueError(
                f"{path}: no column of labels among {_quoted(header)}; name it 'label', name another with "
                "--labels-key, or give the labels with --labels FILE"
            )
    rest = [place for place in rest if place != label]
    if header and holds != "labels":
        fault = _no_scores([header[place] for place in rest])
        if fault:
            raise ValueError(f"{path}: {fault}")
    table = _numbers(path, 1 if header else 0, unread)
    if table.size == 0:
        table = np.zeros((0, len(first)))
    if header and table.shape[1] != len(header):
        raise ValueError(f"{path}: the header has {len(header)} columns but the rows have {table.shape[1]}")
    content = {"scores": torch.from_numpy(table[:, rest])}
    if label is not None:
        content["labels"] = _whole(path, table[:, label])
    if "confidence" in special:
        content["confidence"] = torch.from_numpy(table[:, special["confidence"]].copy())
    return content, _columns_read(header or range(1, len(first) + 1), rest, None if holds == "scores" else label)


def _columns_read(called: Sequence[str | int], scores: Sequence[int], label: int | None) -> str:
    if not scores:
        return ""
    ends = f"{called[scores[0]]!r} to {called[scores[-1]]!r}" if len(scores) > 1 else repr(called[scores[0]])
    of_labels = "" if label is None else f"; the labels are column {called[label]!r}"
    return f"the scores are {len(scores)} columns of the file, {ends}{of_labels}"


def _is_header(path: Path, first: Sequence[str]) -> bool:
    if all(map(_is_number, first)):
        return False
    if any(cell and not _is_number(cell) for cell in first):
        return True
    if len(first) > 1 and list(first) == ["", *map(str, range(len(first) - 1))]:
        return True
    raise ValueError(
        f"{path}: row 0, the first, has an empty cell in column {list(first).index('') + 1}; allowed: a number in each "
        "cell, or a header with a name for each column (the first may have none: it is an index and left out)"
    )


def _quoted(names: Sequence[str]) -> str:
    shown = [repr(name) if name else "one without a name" for name in names]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:10], "...", shown[-1]])


def _no_scores(names: Sequence[str]) -> str:
    """Say why columns are not the scores of classes 0, 1, ... in their order; empty if they can be."""
    parts = [None if _is_number(name) and not name.isdecimal() else re.fullmatch(r"(.*?)(\d+)", name) for name in names]
    common = Counter(part[1] for part in parts if part).most_common(1)
    prefix = common[0][0] if common else None
    extra = [name for name, part in zip(names, parts, strict=True) if part is None or part[1] != prefix]
    how = (
        "columns of scores are named 0, 1, 2, ... or with one prefix before the number (z0, z1, z2, ...), in the order "
        "of the classes"
    )
    if extra:
        return f"columns that are no scores: {_quoted(extra)}; {how}; drop what is none, rename what is one"
    numbers = [int(part[2]) for part in parts if part]
    starts = (0, 1) if prefix else (0,)
    if numbers and (numbers[0] not in starts or numbers != list(range(numbers[0], numbers[0] + len(numbers)))):
        return f"columns of scores out of order or missing: {_quoted(names)}; {how}"
    return ""


def _label_column(path: Path, header: list[str], wanted: str | None, scores_only: bool) -> int | None:
    for name in [wanted] if wanted else ["label", "labels"]:
        if name in header:
            return header.index(name)
    if wanted and not scores_only:
        held = _quoted(header) or "no header"
        raise ValueError(f"{path}: no column {wanted!r}; the file has {held}; name one of them with --labels-key")
    return None


def _whole(path: Path, column: npt.NDArray[np.float64]) -> Tensor:
    broken = np.flatnonzero(~(np.isfinite(column) & (column == np.floor(column)) & (np.abs(column) < 2**53)))
    if len(broken):
        raise ValueError(
            f"{path}: row {broken[0]} has label {column[broken[0]]}, allowed: whole numbers; the labels are the last "
            "column, or that named by --labels-key"
        )
    return torch.from_numpy(column.astype(np.int64))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _check_dense(tensor: Tensor, what: str) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else str(tensor.layout)
        raise TypeError(
            f"{what} are a {kind} tensor, allowed: a dense one; save tensor.to_dense(), quantized .dequantize()"
        )


def _hard_labels(labels: Tensor, where: str) -> Tensor:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    if labels.ndim != 1:
        raise ValueError(
            f"{where}: labels have shape {tuple(labels.shape)}, allowed: (N,) or (N, 1) class numbers; one-hot or soft "
            "labels are not scored: save their argmax"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(
            f"{where}: labels are {labels.dtype}, allowed: class numbers of an integer dtype; write them as integers"
        )
    return labels.long()
