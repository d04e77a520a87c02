"""Calibrated classifiers as files; nothing in a file is executed."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import nn

from calib_lightning.deploy.classifier import CalibratedClassifier, Metadata
from calib_lightning.deploy.decision import OperatingPoint
from calib_lightning.deploy.networks import fill_network, network_of, network_record
from calib_lightning.deploy.preprocessing import Preprocessing
from calib_lightning.posthoc import Calibrator, Sequential
from calib_lightning.posthoc.saving import calibrator_of, calibrator_record
from calib_lightning.utils.files import write_whole

FILE_KEY = "calib_lightning.classifier"
"""What a file of `save_classifier` holds the record under."""


def save_classifier(classifier: CalibratedClassifier, path: str | Path) -> None:
    """Write a classifier to one file, whole or not at all: weights, calibrator and metadata.

    Args:
        classifier: With a fitted calibrator.
        path: The file to write or replace; ``.pt`` is customary.

    Raises:
        RuntimeError: The calibrator is not fitted.
        OSError: The file cannot be written; an older one is then as it was.

    Example:
        ``save_classifier(classifier, "classifier.pt")``
    """
    check_fitted(classifier)
    shape = None if classifier.preprocessing is None else classifier.preprocessing.shape
    content = {
        "network": network_record(classifier.network, shape),
        "calibrator": dict(calibrator_record(classifier.calibrator)),
        "features": classifier.features,
        "metadata": dict(classifier.metadata),
    }
    write_whole(Path(path), lambda file: torch.save({FILE_KEY: content}, file))


def load_classifier(
    path: str | Path, network: nn.Module | None = None, device: str | torch.device = "cpu"
) -> CalibratedClassifier:
    """Read a classifier; the file is loaded with ``weights_only=True``, so nothing in it is executed.

    timm models and modules of this package are built again; classes are looked up only in this package and in modules
    that are imported already.

    Args:
        path: A file of `save_classifier`.
        network: The network to load the weights into, needed where it is neither.
        device: Where the classifier goes.

    Returns:
        The classifier; its log-probabilities are those of the one that was saved, to the last bit on the same device.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a file of a classifier, is damaged, holds more than tensors and plain data, or needs a
            network.

    Example:
        ``load_classifier("classifier.pt").predict(image)``
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no classifier {path}.")
    content = _read(path)
    try:
        record, metadata = content[FILE_KEY], checked_metadata(content[FILE_KEY]["metadata"])
        calibrator = _calibrator_of(record)
        built = network_of(record["network"]) if network is None else fill_network(network, record["network"])
        classifier = CalibratedClassifier(
            built,
            calibrator,
            preprocessing=preprocessing_of(metadata),
            classes=metadata["classes"],
            features=record["features"],
        )
        classifier.operating_point = operating_point_of(metadata)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: is damaged: {error!r}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return classifier.to(device)


def check_fitted(classifier: CalibratedClassifier) -> None:
    """Refuse a classifier that cannot be used.

    Args:
        classifier: The classifier.

    Raises:
        RuntimeError: Its calibrator is not fitted.
    """
    if not classifier.calibrator.fitted:
        raise RuntimeError(f"{classifier.calibrator.name} is not fitted: call fit(loader) on the classifier first.")


# --- metadata --------------------------------------------------------------------------------------------------------


def checked_metadata(metadata: Any) -> Metadata:
    """Check what a file says about its classifier.

    Args:
        metadata: Plain data; it may come from anybody.

    Returns:
        The same.

    Raises:
        ValueError: Something is missing or of the wrong kind.
    """
    if not isinstance(metadata, Mapping) or not set(Metadata.__required_keys__) <= set(metadata):
        raise ValueError("its metadata are damaged, or it is no file of a CalibratedClassifier")
    found = cast(Metadata, metadata)
    names = found["classes"]
    if not isinstance(found["num_classes"], int) or not isinstance(found["calib_lightning"], str):
        raise ValueError("its metadata are damaged: the number of classes or the version is missing")
    if names is not None and (
        not isinstance(names, list)
        or len(names) != found["num_classes"]
        or not all(isinstance(name, str) for name in names)
    ):
        raise ValueError(f"its metadata are damaged: {names!r:.100} are no names of {found['num_classes']} classes")
    preprocessing_of(found)
    operating_point_of(found)
    return found


def preprocessing_of(metadata: Metadata) -> Preprocessing | None:
    """How images are prepared, as metadata say; ``None`` where they do not."""
    record = metadata["preprocessing"]
    return None if record is None else Preprocessing.from_record(record)


def operating_point_of(metadata: Metadata) -> OperatingPoint | None:
    """The operating point, as metadata say it; ``None`` where no threshold was chosen."""
    record = metadata["operating_point"]
    return None if record is None else OperatingPoint.from_record(record)


# --- parts -----------------------------------------------------------------------------------------------------------


def _calibrator_of(record: Mapping[str, Any]) -> Calibrator:
    """The calibrator; version 0.1 kept a perturbation beside it, which is applied first."""
    calibrator = calibrator_of(record["calibrator"], "the record")
    if record.get("clamping") is None:
        return calibrator
    both = Sequential(calibrator_of(record["clamping"], "the record of its perturbation"), calibrator)
    both.num_classes = calibrator.num_classes
    return both


def _read(path: Path) -> Mapping[str, Any]:
    with path.open("rb") as file:
        content = _plain(file, path)
    if not isinstance(content, Mapping) or not isinstance(content.get(FILE_KEY), Mapping):
        raise ValueError(f"{path}: holds no classifier; save one with save_classifier(classifier, path).")
    return content


def _plain(file: IO[bytes], path: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds more than tensors and plain data, or is no file of torch.save, and is not read: "
            f"{str(error).splitlines()[0]}"
        ) from error
    # torch says OSError of an archive that is cut off; one of the disk came up when the file was opened
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: is damaged or no file of save_classifier: {error}") from error
