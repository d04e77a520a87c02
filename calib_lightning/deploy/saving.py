"""Save and load calibrated classifiers, without executing code in a file."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calib_lightning.deploy.classifier import CalibratedClassifier
from calib_lightning.deploy.metadata import checked_metadata, operating_point_of, preprocessing_of
from calib_lightning.deploy.networks import fill_network, network_of, network_record
from calib_lightning.posthoc import Calibrator, Sequential
from calib_lightning.posthoc.saving import calibrator_of, calibrator_record
from calib_lightning.utils.files import write_whole
from calib_lightning.utils.stored import load_torch

FILE_KEY = "calib_lightning.classifier"
"""Key of the record in a file of `save_classifier`."""


def save_classifier(classifier: CalibratedClassifier, path: str | Path) -> None:
    """Write a classifier to one file: weights, calibrator and metadata.

    Args:
        classifier: With a fitted calibrator.
        path: The file, usually ``.pt``, written or replaced atomically.

    Raises:
        RuntimeError: The calibrator is not fitted.
        OSError: The file cannot be written; an existing file is left unchanged.

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
    """Load a classifier with ``weights_only=True``, so that no code in the file is executed.

    timm models and modules of this package are rebuilt; classes are looked up only in this package and in modules that
    are already imported.

    Args:
        path: A file of `save_classifier`.
        network: The network to load the weights into; required if it is neither a timm model nor of this package.
        device: Device of the classifier.

    Returns:
        The classifier; on the same device its log-probabilities are bit-identical to those of the saved one.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, of another kind, contains more than tensors and plain data, or needs a network.

    Example:
        ``load_classifier("classifier.pt").predict(image)``
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no classifier {path}. Save one with save_classifier(classifier, path), or give the folder of a "
            "run."
        )
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
        raise ValueError(f"{path} is damaged: {error!r}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return classifier.to(device)


def check_fitted(classifier: CalibratedClassifier) -> None:
    """Raise ``RuntimeError`` if the calibrator is not fitted."""
    if not classifier.calibrator.fitted:
        raise RuntimeError(f"{classifier.calibrator.name} is not fitted. Call fit(loader) on the classifier first.")


def _calibrator_of(record: Mapping[str, Any]) -> Calibrator:
    """The calibrator; files of version 0.1 may also have a perturbation, which is applied first."""
    calibrator = calibrator_of(record["calibrator"], "the record")
    if record.get("clamping") is None:
        return calibrator
    both = Sequential(calibrator_of(record["clamping"], "the record of its perturbation"), calibrator)
    both.num_classes = calibrator.num_classes
    return both


def _read(path: Path) -> Mapping[str, Any]:
    content = _plain(path)
    if not isinstance(content, Mapping) or not isinstance(content.get(FILE_KEY), Mapping):
        raise ValueError(f"{path} does not contain a classifier. Save one with save_classifier(classifier, path).")
    return content


def _plain(path: Path) -> Any:
    try:
        return load_torch(path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not loaded: {error}. Save a classifier with save_classifier(classifier, path)."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or was not written by save_classifier: {error}") from error
