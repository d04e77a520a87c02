"""What the file of a classifier says about it, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, cast

import calib_lightning
from calib_lightning.deploy.decision import OperatingPoint
from calib_lightning.deploy.preprocessing import Preprocessing
from calib_lightning.posthoc.base import Calibrator
from calib_lightning.utils.described import Spec


class Metadata(TypedDict):
    """Metadata of a saved or exported classifier, as plain data.

    Attributes:
        calib_lightning: Version that wrote the file.
        calibrator: Name of the calibrator, with its arguments.
        calibrator_spec: Specification from which the calibrator is built.
        temperature: Temperature of the calibrator, or ``None`` if it has none.
        num_classes: K.
        classes: Class names, or ``None`` if unknown.
        preprocessing: Record of the `Preprocessing`, or ``None`` if unknown.
        operating_point: Threshold, wanted risk, risk, coverage and rows, or ``None`` without a threshold. A threshold
            that accepts nothing is the string ``"inf"``, with risk ``None``.
    """

    calib_lightning: str
    calibrator: str
    calibrator_spec: Spec
    temperature: float | None
    num_classes: int
    classes: list[str] | None
    preprocessing: dict[str, Any] | None
    operating_point: dict[str, Any] | None


def metadata_of(
    calibrator: Calibrator,
    classes: Sequence[str] | None,
    preprocessing: Preprocessing | None,
    operating_point: OperatingPoint | None,
) -> Metadata:
    """Write down a classifier's calibrator, class names, preprocessing and threshold."""
    temperature = getattr(calibrator, "temperature", None) if calibrator.fitted else None
    return Metadata(
        calib_lightning=calib_lightning.__version__,
        calibrator=calibrator.name,
        calibrator_spec=calibrator.spec,
        temperature=temperature if isinstance(temperature, float) else None,
        num_classes=calibrator.num_classes if calibrator.num_classes > 0 else len(classes or ()),
        classes=None if classes is None else list(classes),
        preprocessing=None if preprocessing is None else preprocessing.record,
        operating_point=None if operating_point is None else operating_point.record,
    )


def checked_metadata(metadata: Any) -> Metadata:
    """Return untrusted metadata unchanged, or raise ``ValueError`` if entries are missing or invalid."""
    if not isinstance(metadata, Mapping) or not set(Metadata.__required_keys__) <= set(metadata):
        raise ValueError("its metadata are damaged, or it does not contain a CalibratedClassifier.")
    found = cast(Metadata, metadata)
    names = found["classes"]
    if not isinstance(found["num_classes"], int) or not isinstance(found["calib_lightning"], str):
        raise ValueError("its metadata are damaged: the number of classes or the version is missing.")
    if names is not None and (
        not isinstance(names, list)
        or len(names) != found["num_classes"]
        or not all(isinstance(name, str) for name in names)
    ):
        raise ValueError(f"its metadata are damaged: {names!r:.100} must be {found['num_classes']} class names.")
    preprocessing_of(found)
    operating_point_of(found)
    return found


def preprocessing_of(metadata: Metadata) -> Preprocessing | None:
    """The preprocessing in the metadata, or ``None``."""
    record = metadata["preprocessing"]
    return None if record is None else Preprocessing.from_record(record)


def operating_point_of(metadata: Metadata) -> OperatingPoint | None:
    """The operating point in the metadata, or ``None``."""
    record = metadata["operating_point"]
    return None if record is None else OperatingPoint.from_record(record)
