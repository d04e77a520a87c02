"""Hyper-parameters of a run in TensorBoard's HPARAMS tab, with the metrics that are its columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities.logger import _flatten_dict
from lightning.pytorch.loggers import TensorBoardLogger


def log_hparams(logger: TensorBoardLogger, facts: dict[str, Any], metrics: Sequence[str]) -> None:
    """Write hyper-parameters once, at the start; the tab shows the last value that is logged of each metric.

    Lightning's own way writes a first value of every metric, which would be no measurement.

    Args:
        logger: The logger, whose ``hparams.yaml`` has the hyper-parameters too.
        facts: The hyper-parameters, perhaps nested.
        metrics: Keys of the metrics.
    """
    logger.log_hyperparams(facts, metrics={})
    from torch.utils.tensorboard.summary import hparams

    plain = logger._sanitize_params(_flatten_dict(facts))
    writer = logger.experiment._get_file_writer()
    experiment, start, _ = hparams(plain, dict.fromkeys(metrics, 0.0))  # type: ignore[no-untyped-call]
    for summary in (experiment, start):
        writer.add_summary(summary)
