"""What a run of Weights & Biases is given beside values: definitions of metrics, files, and a table of predictions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from calib_lightning.metrics import CORE, METRICS

ROWS = 10_000
"""Rows of a table of predictions; the artifact has all of them."""


def define_metrics(run: Any, sets: Iterable[str], best: bool) -> None:
    """Define the core metrics of some sets, over epochs.

    Args:
        run: The run of Weights & Biases.
        sets: Names of the sets.
        best: Whether the summary keeps the best value of all epochs, such as ``val/nll.min``, as of sets that are
            evaluated in each. Else it has the last value, which is that of the chosen checkpoint, under the metric's
            own key: with ``summary="last"`` that would become ``test/nll.last``.
    """
    kept = {"higher": "max", "lower": "min"} if best else {}
    run.define_metric("epoch")
    for name in sets:
        for metric in CORE:
            run.define_metric(f"{name}/{metric}", step_metric="epoch", summary=kept.get(METRICS[metric].better))


def log_files(run: Any, kind: str, files: Mapping[str, Path], limit: float) -> None:
    """Log files as one artifact, ``<kind>-<id of the run>``; its size is among its facts.

    Args:
        run: The run of Weights & Biases.
        kind: Type of the artifact: ``model``, ``predictions`` or ``run``.
        files: The files by their names in the artifact; nothing is logged without any.
        limit: Mebibytes; above that, nothing is logged either, and a note says so.
    """
    from wandb import Artifact

    size = sum(path.stat().st_size for path in files.values()) / 2**20
    if size > limit > 0:
        rank_zero_info(f"Weights & Biases gets no artifact {kind}: {size:.0f} MiB are above log_limit ({limit:g} MiB).")
    if not files or size > limit:
        return
    artifact = Artifact(f"{kind}-{run.id}", type=kind, metadata={"mib": round(size, 3)})
    for name, path in files.items():
        artifact.add_file(str(path), name=name)
    run.log_artifact(artifact)


def log_predictions(logger: WandbLogger, path: Path, step: int) -> None:
    """Log the saved predictions of a set as a table: one row per image, the first 10,000.

    Args:
        logger: The logger.
        path: The file that `SavePredictions` has written; nothing is logged if it is missing.
        step: The step.
    """
    if not path.is_file():
        return
    with np.load(path) as file:
        saved = {name: file[name][:ROWS] for name in ("index", "labels", "logits")}
        confidence = file["confidence"][:ROWS] if "confidence" in file else _largest_prob(saved["logits"])
        names = file["class_names"].tolist() if "class_names" in file else None
    predicted = saved["logits"].argmax(axis=1)
    spelled = [
        values.tolist() if names is None else [names[value] if value >= 0 else None for value in values]
        for values in (saved["labels"], predicted)
    ]
    correct = (predicted == saved["labels"]).tolist()
    rows = zip(saved["index"].tolist(), *spelled, confidence.tolist(), correct, strict=True)
    columns = ["index", "label", "prediction", "confidence", "correct"]
    logger.log_table(f"{path.stem}/predictions", columns=columns, data=[list(row) for row in rows], step=step)


def _largest_prob(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    wide = logits.astype(np.float64)
    probs: np.ndarray[Any, Any] = 1 / np.exp(wide - wide.max(axis=1, keepdims=True)).sum(axis=1)
    return probs
