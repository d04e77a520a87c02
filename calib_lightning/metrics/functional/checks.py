"""What scores, labels and confidences must be: checks of types and shapes, of values, and what is wrong with a row."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from calib_lightning.functional import at_least_float32

InputKind = Literal["logits", "probs"]
"""What the scores ``(N, K)`` are; it is never guessed from the values."""

PROBS_TOLERANCE = 1e-3
"""How far the sum of a row of probabilities may be from one."""

FAULTS = ("logits", "labels", "confidence")
"""The kinds of invalid values, in the order of `fault_masks`."""


def check_kind(input: str) -> None:
    """Refuse an ``input`` other than ``"logits"`` and ``"probs"``."""
    if input not in ("logits", "probs"):
        raise ValueError(f"input is {input!r}; it must be 'logits' or 'probs'.")


def check_shapes(logits: Tensor, labels: Tensor, confidence: Tensor | None, where: str) -> None:
    """Refuse inputs of the wrong type or shape, without reading values."""
    named = {"logits": logits, "labels": labels} | ({} if confidence is None else {"confidence": confidence})
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            hint = " Of a network's output with logits, pass functional.logits_of(output)." if name == "logits" else ""
            raise TypeError(f"{where}: {name} is {type(tensor).__name__}; it must be a tensor.{hint}")
        is_integer = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
        if name == "labels" and not is_integer:
            raise TypeError(
                f"{where}: labels is {tensor.dtype} of shape {tuple(tensor.shape)}; it must be class numbers of an "
                "integer dtype. Pass the hard labels of mixed or soft targets, or functional.binary_labels(labels) of "
                "a binary network."
            )
        if name != "labels" and not tensor.is_floating_point():
            raise TypeError(f"{where}: {name} is {tensor.dtype}; it must be floating point. Convert it with .float().")
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise ValueError(f"{where}: logits has shape {tuple(logits.shape)}; it must have shape (N, K) with K >= 1.")
    for name in named.keys() - {"logits"}:
        if named[name].shape != logits.shape[:1]:
            column = f" Pass {name}.squeeze(1)." if named[name].shape == (len(logits), 1) else ""
            raise ValueError(
                f"{where}: {name} has shape {tuple(named[name].shape)}; it must have shape ({logits.shape[0]},) to "
                f"match logits of shape {tuple(logits.shape)}.{column}"
            )


def fault_masks(logits: Tensor, labels: Tensor, confidence: Tensor | None, input: InputKind) -> Tensor:
    """Masks ``(3, N)`` of the rows with invalid values, one for each of `FAULTS`."""
    if input == "probs":
        wide = at_least_float32(logits)
        bad_scores = ~(((wide.sum(dim=-1) - 1.0).abs() <= PROBS_TOLERANCE) & (wide >= 0).all(dim=-1))
    else:
        bad_scores = ~logits.isfinite().all(dim=-1)
    bad_labels = (labels < 0) | (labels >= logits.shape[1])
    valid = torch.ones_like(bad_labels) if confidence is None else (confidence >= 0) & (confidence <= 1)
    return torch.stack([bad_scores, bad_labels, ~valid])


def check_values(logits: Tensor, labels: Tensor, confidence: Tensor | None, input: InputKind, where: str) -> None:
    """Refuse invalid values and name the first; it reads them, so it is for tensors on the CPU."""
    if len(labels) == 0 or _seem_valid(logits, labels, confidence, input):
        return
    for kind, mask in zip(FAULTS, fault_masks(logits, labels, confidence, input), strict=True):
        count = int(mask.sum())
        if count:
            row = int(mask.int().argmax())
            found, allowed = _describe(kind, row, logits, labels, confidence, input)
            raise ValueError(
                f"{where}: {count} of {len(labels)} rows have invalid {input if kind == 'logits' else kind}; "
                f"row {row} {found}; it must {allowed}"
            )


def seem_probs(scores: Tensor) -> bool:
    """Whether scores ``(N, K)`` look like probabilities: all in [0, 1], every row sums to 1; False without rows."""
    if len(scores) == 0 or bool((scores < 0).any()):
        return False
    return bool(((scores.double().sum(dim=1) - 1.0).abs() <= PROBS_TOLERANCE).all())


def _seem_valid(logits: Tensor, labels: Tensor, confidence: Tensor | None, input: InputKind) -> bool:
    # Comparisons are written so that NaN fails them.
    """Whether no value is invalid, by a few reductions of whole tensors; False may be a false alarm."""
    logits, confidence = logits.detach(), None if confidence is None else confidence.detach()
    if input == "probs":
        wide = at_least_float32(logits)
        low, high = wide.sum(dim=-1).aminmax()
        valid = 1.0 - PROBS_TOLERANCE <= float(low) <= float(high) <= 1.0 + PROBS_TOLERANCE
        valid = valid and float(wide.numpy().min()) >= 0  # torch takes three times as long
    else:
        valid = abs(float(logits.sum(dtype=at_least_float32(logits).dtype))) < torch.inf
    least, most = labels.aminmax()
    valid = valid and int(least) >= 0 and int(most) < logits.shape[1]
    if confidence is not None:
        low, high = confidence.aminmax()
        valid = valid and 0.0 <= float(low) <= float(high) <= 1.0
    return valid


class _Finding(NamedTuple):
    found: str
    allowed: str


def _describe(
    kind: str, row: int, logits: Tensor, labels: Tensor, confidence: Tensor | None, input: InputKind
) -> _Finding:
    """What is wrong with a row, and what it must be."""
    if kind == "labels":
        hint = " A set without labels (-1) has no such metrics." if int(labels[row]) == -1 else ""
        if logits.shape[1] == 1:
            hint = (
                " There is one column. For the logit z of a binary network, pass functional.two_columns(z)."
                if input == "logits"
                else " There is one column. For probabilities p of class 1, pass torch.stack([1 - p, p], dim=1)."
            )
        return _Finding(f"has label {int(labels[row])}", f"be in 0..{logits.shape[1] - 1}.{hint}")
    if kind == "confidence" and confidence is not None:
        return _Finding(f"has confidence {float(confidence[row])}", "be in [0, 1].")
    scores = logits[row].double()
    if input == "logits":
        column = int((~scores.isfinite()).int().argmax())
        return _Finding(f"has {float(scores[column])} for class {column}", "be finite.")
    total = float(scores.sum())
    lowest = int(scores.argmin())
    found = f"has {float(scores[lowest])} for class {lowest} and sums to {total:.6g}"
    rounded = bool((scores >= 0).all()) and abs(total - 1.0) < 0.1
    hint = "Divide rounded rows by their sum." if rounded else "If these are logits, do not give them as probabilities."
    return _Finding(found, f"be >= 0 and sum to 1 +- {PROBS_TOLERANCE}. {hint}")
