"""The classifier of a run: its checkpoint, the way it prepares images, and one of its calibrators."""

from __future__ import annotations

from pathlib import Path

import torch

from calib_lightning.core.loading import load_module
from calib_lightning.deploy.classifier import CalibratedClassifier
from calib_lightning.deploy.preprocessing import Preprocessing
from calib_lightning.posthoc import Calibrator, FixedTemperature, load_calibrator
from calib_lightning.utils.run_folder import calibrators_of, read_json, run_of


def classifier_of_run(
    run: str | Path, calibrator: str | Path | None = None, device: str | torch.device = "cpu"
) -> CalibratedClassifier:
    """Build the classifier of a run of `calib fit` on data of this package.

    Args:
        run: Folder of the run, for its chosen checkpoint; or one of the checkpoints in it.
        calibrator: Name of a calibrator that `calib calibrate RUN` has fitted, of which the newest file is taken, or a
            file. ``None`` leaves the probabilities as the network gives them.
        device: Device of the classifier.

    Returns:
        The classifier, with the preprocessing and the class names of the run.

    Raises:
        FileNotFoundError: There is no such run, checkpoint or calibrator.
        ValueError: The run has no checkpoint yet, or does not record how images are prepared.

    Example:
        ``classifier_of_run("runs/digits-focal-0", "Temperature").predict(images)``
    """
    folder, checkpoint = _places(Path(run))
    module = load_module(checkpoint, device)
    fitted = (
        _uncalibrated(module.num_classes) if calibrator is None else load_calibrator(calibrator_file(run, calibrator))
    )
    features = "encoder" if "features" in fitted.needs else None
    return CalibratedClassifier(module, fitted, preprocessing=Preprocessing.from_run(folder), features=features)


def _places(given: Path) -> tuple[Path, Path]:
    """The folder of a run and its checkpoint."""
    if given.is_file():
        run = run_of(given)
        if run is None:
            raise FileNotFoundError(
                f"{given} is in no folder of a run, whose run.json says how images are prepared. Give one that is, or "
                "build a CalibratedClassifier in Python and save it."
            )
        return run, given
    if not (given / "run.json").is_file():
        raise FileNotFoundError(f"{given} is not the folder of a run: it has no run.json. Give one of `calib fit`.")
    chosen = (read_json(given / "run.json").get("checkpoint") or {}).get("path")
    if not chosen or not (given / chosen).is_file():
        raise ValueError(f"{given} has no chosen checkpoint, so there is no network. Finish the training of the run.")
    return given, given / chosen


def calibrator_file(run: str | Path, calibrator: str | Path) -> Path:
    """The file of a calibrator, given as in `classifier_of_run`."""
    if Path(calibrator).is_file():
        return Path(calibrator)
    run, _ = _places(Path(run))
    found = calibrators_of(run)
    by_name = found | {load_calibrator(path).name: path for path in found.values()}
    if str(calibrator) in by_name:
        return by_name[str(calibrator)]
    has = f"it has {', '.join(found)}" if found else "it has none"
    raise FileNotFoundError(
        f"{run} has no calibrator {str(calibrator)!r}; {has}. Fit one with `calib calibrate {run} --calibrators NAME`."
    )


def _uncalibrated(classes: int) -> Calibrator:
    return FixedTemperature(1.0).fit(torch.zeros(classes, classes), torch.arange(classes))
