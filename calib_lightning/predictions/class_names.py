"""Names of classes: labels as text become class numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calib_lightning.posthoc.evidence import as_array
from calib_lightning.predictions.csv_header import classes_of, quoted
from calib_lightning.utils.names import did_you_mean

Names = tuple[str, ...] | None


def named_columns(scores: Any, where: str) -> tuple[Any, Names]:
    """Scores in the order of the classes, and the names of these: the columns of a DataFrame."""
    columns = getattr(scores, "columns", None)
    if columns is None:
        return scores, None
    order, names = classes_of([str(name) for name in columns], where)
    return np.asarray(scores)[:, order], names


def numbered(labels: Any, names: Names, where: str) -> tuple[Any, Names]:
    """Labels as class numbers, if they are text or names of classes, and the names of all classes.

    A single name is that of class 1 of two. Labels of other kinds are returned as they are, for the checks that name
    them.

    Args:
        labels: ``(N,)`` or ``(N, 1)``.
        names: Names of the classes, if known.
        where: Their source, for messages.

    Returns:
        Class numbers ``(N,)``, or ``labels``; the names of all K classes, or ``None`` if they are not known.

    Raises:
        ValueError: A label is neither the name of a class nor a class number.
    """
    sound = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    if isinstance(labels, Tensor) and not sound:  # no names, or some that a later check refuses
        return labels, names
    array = as_array(labels.detach().cpu() if isinstance(labels, Tensor) else labels, f"{where}: labels")
    array = array.reshape(-1) if array.shape[1:] == (1,) else array
    is_text = array.dtype.kind in "OUST" and array.ndim == 1
    missing = _missing(array) if array.ndim == 1 else np.zeros(0, dtype=bool)
    if missing.any():
        row = int(missing.argmax())
        raise ValueError(
            f"{where}: row {row} has no label ({str(array[row])!r}); each row must have one. Give it, or "
            "leave the row out."
        )
    whole = _whole(array)
    of_two = names is not None and len(names) == 1
    if whole is None and is_text and (names is None or (of_two and names[0].lower() not in ("true", "false"))):
        whole = _truth(array)
    if names is None or (of_two and whole is not None and not names[0].isdecimal()):
        if is_text and whole is None:
            raise ValueError(_unnamed(array, where))
        return (torch.from_numpy(whole) if is_text else labels), None if names is None else (f"not {names[0]}", *names)
    if array.ndim != 1 or not (is_text or whole is not None or array.dtype == bool):
        return labels, names
    texts, places = np.unique((array if whole is None else whole).astype(str), return_inverse=True)
    if of_two:
        names = _both(texts.tolist(), names[0], where)
    by_name = {name: number for number, name in enumerate(names)}
    if whole is not None and not any(name.isdecimal() for name in names):
        return torch.from_numpy(whole), names
    unknown = [place for place, text in enumerate(texts) if str(text) not in by_name]
    if unknown:
        row = int(np.isin(places, unknown).argmax())
        raise ValueError(
            f"{where}: row {row} has label {str(array[row])!r}; it must be the name of a class: {quoted(names)}."
            f"{'' if whole is not None else did_you_mean(str(array[row]), names)} The columns of scores name them."
        )
    return torch.from_numpy(np.array([by_name[str(text)] for text in texts], dtype=np.int64)[places]), names


def same_classes(one: Names, other: Names) -> bool:
    """Whether classes and their order agree; names that are unknown, or made up (``not spam``), agree with any."""
    if one is None or other is None:
        return True
    made_up = any(len(names) == 2 and names[0] == f"not {names[1]}" for names in (one, other))
    return one[1:] == other[1:] if made_up else one == other


def check_columns(scores: Tensor, labels: Tensor, names: Names, where: str) -> tuple[str, ...]:
    """Refuse columns that are no scores, such as an age; a note on those that are the label of no row.

    Args:
        scores: ``(N, K)``.
        labels: ``(N,)``.
        names: The names of their columns, or ``None``.
        where: Their source, for messages.

    Raises:
        ValueError: A column has whole numbers, others have not, and no row has its name as label.
    """
    present = set(labels.tolist())
    absent = [] if names is None else [place for place in range(len(names)) if place not in present]
    if names is None or not absent:
        return ()
    whole = (scores == scores.floor()).all(dim=0)
    foreign = [names[place] for place in absent if whole[place] and not whole.all() and scores[:, place].any()]
    if foreign:
        raise ValueError(
            f"{where}: {quoted(foreign)} must be the scores of a class, as all columns but 'label' and 'confidence'; "
            "there are whole numbers, and no row has this label. Drop what is no class."
        )
    return (f"no row has the label {quoted([names[place] for place in absent])}; drop columns that are no class",)


def _missing(array: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which labels are missing: empty cells, None and NaN."""
    if array.dtype.kind == "f":
        return np.asarray(np.isnan(array))
    if array.dtype.kind not in "OUST":
        return np.zeros(len(array), dtype=bool)
    texts = np.char.strip(array.astype(str))
    missing = np.isin(texts, ["", "nan"])  # numpy makes the text "nan" of a NaN among texts in a list
    if array.dtype.kind == "O":
        is_text = np.array([isinstance(label, str) for label in array], dtype=bool)
        missing |= np.isin(texts, ["None", "<NA>", "NaT"]) & ~is_text
    return missing


def _whole(array: npt.NDArray[Any]) -> npt.NDArray[np.int64] | None:
    """The labels as int64 if all are whole numbers, also written as text."""
    if array.dtype.kind in "iu":
        return array.astype(np.int64)
    try:
        values = array.astype(np.float64) if array.dtype.kind in "fOUST" else np.array([np.nan])
    except (ValueError, TypeError):
        return None
    sound = np.isfinite(values) & (values == np.floor(values)) & (np.abs(values) < 2**53)
    return values.astype(np.int64) if bool(sound.all()) else None


def _truth(array: npt.NDArray[Any]) -> npt.NDArray[np.int64] | None:
    """The labels True and False as 1 and 0."""
    texts = np.char.lower(array.astype(str))
    return (texts == "true").astype(np.int64) if set(texts.tolist()) <= {"true", "false"} else None


def _both(found: Sequence[str], positive: str, where: str) -> tuple[str, str]:
    """The names of two classes, of which one names the column of scores, and the other is among the labels."""
    others = [text for text in found if text != positive]
    if positive == "1" and others in ([], ["0"]):
        return "0", "1"
    if len(others) == len(found) or len(others) > 1:
        raise ValueError(
            f"{where}: the labels are {quoted(found)}; they must be {positive!r}, which names the column of scores, "
            "and one other. Name the column by the class that it is the probability of."
        )
    return others[0] if others else f"not {positive}", positive


def _unnamed(array: npt.NDArray[Any], where: str) -> str:
    row = next(place for place, text in enumerate(array) if _whole(np.array([text], dtype=object)) is None)
    return (
        f"{where}: row {row} has label {str(array[row])!r}; it must be a whole number, since the classes have no "
        "names. Name the columns of scores by their classes (in Python: pandas.DataFrame(probs, columns=model.classes_)"
        "), or give class numbers from 0."
    )
