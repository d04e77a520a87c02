"""Options that methods pass on to their base."""

from __future__ import annotations

from typing import TypedDict

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from calib_lightning.core.batch_transform import BatchTransform
from calib_lightning.types import EncoderSpec


class ModuleOptions(TypedDict, total=False):
    """Options that every method forwards to `ClassificationModule`, typed once."""

    encoder: EncoderSpec
    optimizer: OptimizerCallable
    scheduler: LRSchedulerCallable | None
    batch_transform: BatchTransform | None


def with_transform(options: ModuleOptions, transform: BatchTransform) -> ModuleOptions:
    """Add a method's own batch transform to its options; reject a second one."""
    if options.get("batch_transform") is not None:
        raise ValueError(
            f"batch_transform cannot be set: this method already has {type(transform).__name__}. Pass yours to a "
            "method without one, such as CrossEntropy or Focal."
        )
    return {**options, "batch_transform": transform}
