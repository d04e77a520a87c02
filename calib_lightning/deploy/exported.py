"""Classifiers as they come back from the files of an export."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

from calib_lightning.deploy.decision import Decision, decide
from calib_lightning.deploy.metadata import Metadata, checked_metadata, operating_point_of, preprocessing_of
from calib_lightning.utils.stored import DamagedFileError, check_archive

METADATA_KEY = "calib_lightning"
"""Key of the metadata, as JSON, in the ``metadata_props`` of an ONNX model."""
METADATA_FILE = "calib_lightning.json"
"""Extra file with the metadata in a ``.pt2`` archive."""
INPUT = "image"
OUTPUTS = ("log_probs", "confidence")
"""The second exists only if the confidence of the calibrator is not the largest probability."""

Runner = Callable[[Tensor], Sequence[Tensor]]
"""Maps images ``(N, C, H, W)`` to log-probabilities ``(N, K)`` and, with a second output, confidences."""


class ExportedClassifier:
    """A classifier loaded from the file of an export.

    Args:
        run: Runs the program or model on a batch of images.
        metadata: Metadata in the file.

    Attributes:
        metadata: Metadata in the file.
        preprocessing: Converts an image file to an input, or ``None`` if unknown.
        classes: Class names, or ``None`` if unknown.
        operating_point: The threshold below which `predict` abstains, or ``None`` without one.
    """

    def __init__(self, run: Runner, metadata: Metadata) -> None:
        self.run, self.metadata = run, metadata
        self.preprocessing, self.operating_point = preprocessing_of(metadata), operating_point_of(metadata)
        self.classes = metadata["classes"]

    def predict(self, image: Tensor, threshold: float | None = None) -> Decision:
        """Label, confidence and whether to abstain, as in `CalibratedClassifier.predict`.

        Args:
            image: ``(N, C, H, W)`` float32, N >= 1.
            threshold: Confidence below which to abstain. Default: the threshold of `operating_point`, or 0 without one.

        Returns:
            The decision, whose fields have shape ``(N,)``.
        """
        log_probs, *confidence = self.run(image)
        if threshold is None:
            threshold = 0.0 if self.operating_point is None else self.operating_point.threshold
        return decide(log_probs, confidence[0] if confidence else None, threshold)


def load_exported(path: str | Path, device: str | torch.device = "cpu") -> ExportedClassifier:
    """Read a file of `export_torch` (``.pt2``) or `export_onnx` (``.onnx``).

    Loading a ``.pt2`` file may execute code in it (`torch.export.load` unpickles objects and evaluates expressions):
    load such files only from sources that you trust. An ONNX model contains only a graph and numbers.

    Args:
        path: The file.
        device: Device on which it runs.

    Returns:
        The classifier.

    Raises:
        FileNotFoundError: There is no such file.
        ModuleNotFoundError: ONNX Runtime is missing.
        ValueError: The file is damaged or of another kind, or the device is not available.
    """
    path, device = Path(path), torch.device(device)
    if not path.is_file():
        raise FileNotFoundError(f"There is no classifier {path}. Write one with export_torch or export_onnx.")
    if path.suffix == ".onnx":
        need("onnxruntime")
        session = onnx_session(path.read_bytes(), device.type, str(path))
        text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY, "")
        run = onnx_runner(session)
    elif path.suffix == ".pt2":
        try:
            whole = check_archive(path)
        except DamagedFileError as error:
            raise ValueError(f"{path} is damaged: {error}. Copy or export it again.") from error
        if not whole:
            raise ValueError(f"{path} is damaged, or was not written by export_torch.")
        extra = {METADATA_FILE: ""}
        try:
            program = torch.export.load(path, extra_files=extra)
            if device.type != "cpu":
                program = move_to_device_pass(program, device)
        except Exception as error:  # a damaged archive may raise anything
            raise ValueError(f"{path} is damaged, or was written by another torch: {first_line(error)}") from error
        text, run = extra[METADATA_FILE], torch_runner(program, device)
    else:
        raise ValueError(f"path is {path}; its suffix must be .pt2 (export_torch) or .onnx (export_onnx).")
    try:
        return ExportedClassifier(run, checked_metadata(json.loads(text)))
    except ValueError as error:
        raise ValueError(f"{path} was not written by export_torch or export_onnx: {error}") from error


def torch_runner(program: torch.export.ExportedProgram, device: torch.device | None = None) -> Runner:
    """Run a ``torch.export`` program on a device, by default where it is."""
    module: Any = program.module()

    @torch.no_grad()
    def run(image: Tensor) -> Sequence[Tensor]:
        outputs: Sequence[Tensor] = module(image if device is None else image.to(device))
        return outputs

    return run


def onnx_session(content: bytes, device: str, where: str = "the ONNX model") -> Any:
    """Open an ONNX model in ONNX Runtime."""
    import onnxruntime  # type: ignore[import-untyped]

    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(device)
    if provider not in onnxruntime.get_available_providers():
        raise ValueError(
            f"device is {device!r}; it must be one that this ONNX Runtime supports. Use cpu, or install another build."
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(content, options, providers=[provider])
    except Exception as error:  # its errors have no common class
        raise ValueError(f"{where} is damaged or not an ONNX model: {first_line(error)}") from error


def onnx_runner(session: Any) -> Runner:
    """Run an ONNX model, whose images and outputs are on the CPU."""

    def run(image: Tensor) -> Sequence[Tensor]:
        try:
            return [torch.from_numpy(output) for output in session.run(None, {INPUT: image.cpu().numpy()})]
        except Exception as error:  # its errors have no common class
            raise RuntimeError(f"ONNX Runtime failed on images {tuple(image.shape)}: {first_line(error)}") from error

    return run


def need(*packages: str) -> None:
    """Raise if a package of the extra ``export`` is missing."""
    for package in packages:
        try:
            __import__(package)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{package} is not installed, but ONNX models need it. Run pip install 'calib-lightning[export]'."
            ) from error


def first_line(error: Exception) -> str:
    """The message of another library's error, without what follows."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
