"""Classifiers as ``torch.export`` programs and ONNX models, checked against the module before they are written."""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from calib_lightning.deploy.classifier import CalibratedClassifier, Metadata
from calib_lightning.deploy.decision import Decision, decide
from calib_lightning.deploy.saving import check_fitted, checked_metadata, operating_point_of, preprocessing_of
from calib_lightning.utils.files import write_whole

METADATA_KEY = "calib_lightning"
"""Key of the metadata, as JSON, in the ``metadata_props`` of an ONNX model."""
METADATA_FILE = "calib_lightning.json"
"""Extra file with the metadata in a ``.pt2`` archive."""
INPUT = "image"
OUTPUTS = ("log_probs", "confidence")
"""The second exists only if the confidence of the calibrator is not the largest probability."""
RTOL, ATOL = 1e-3, 1e-4
"""Tolerance of an exported classifier, relative to the module, for log-probabilities and confidences."""

Runner = Callable[[Tensor], Sequence[Tensor]]
"""Maps images ``(N, C, H, W)`` to log-probabilities ``(N, K)`` and, with a second output, confidences."""


class ParityError(RuntimeError):
    """The outputs of an exported classifier differ from those of the module; no file was written."""


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


# --- writing ---------------------------------------------------------------------------------------------------------


def export_torch(classifier: CalibratedClassifier, path: str | Path, example: Tensor | None = None) -> None:
    """Write a classifier as a ``torch.export`` program (``.pt2``), which runs without the code of its network.

    The batch size is dynamic, the image size is fixed. The metadata are in the extra file ``calib_lightning.json``.
    The program is loaded again and compared with the module on the example and on two other batch sizes.

    `torch.export.load` may execute code in a file: load ``.pt2`` files only from sources that you trust. Files of
    `save_classifier` and ONNX models are safe to load.

    Args:
        classifier: With a fitted calibrator.
        path: The file, written or replaced atomically.
        example: Images ``(N, C, H, W)`` float32. Default: random images of the size in the preprocessing.

    Raises:
        ParityError: The outputs of the program differ from those of the module.
        RuntimeError: The calibrator is not fitted, or the network cannot be exported.
        TypeError: The example is not float32, or the network does not accept it.
        ValueError: The example differs in size from the preprocessing, or neither is given.
        OSError: The file cannot be written; an existing file is left unchanged.

    Example:
        ``export_torch(classifier, "classifier.pt2", torch.randn(2, 3, 224, 224))``
    """
    file = io.BytesIO()
    extra = {METADATA_FILE: json.dumps(classifier.metadata, allow_nan=False)}
    with _on_host(classifier):
        module, image = _prepared(classifier, example)
        torch.export.save(_traced(module, image), file, extra_files=extra)
        file.seek(0)
        _check_parity(module, _torch_runner(torch.export.load(file)), image, "torch.export program")
    write_whole(Path(path), lambda target: target.write(file.getvalue()))


def export_onnx(classifier: CalibratedClassifier, path: str | Path, example: Tensor | None = None) -> None:
    """Write a classifier as an ONNX model: input ``image``, outputs ``log_probs`` and possibly ``confidence``.

    The batch size is dynamic, the image size is fixed. The metadata are JSON under the key ``calib_lightning`` of the
    model's ``metadata_props``. The model is run with ONNX Runtime and compared with the module on the example and on
    two other batch sizes. The state of the calibrator, float64 in the module, is converted to float32.

    Args:
        classifier: With a fitted calibrator.
        path: The file, usually ``.onnx``, written or replaced atomically.
        example: Images ``(N, C, H, W)`` float32. Default: random images of the size in the preprocessing.

    Raises:
        ModuleNotFoundError: A package of the extra ``export`` is missing.
        ParityError: The outputs of the model differ from those of the module.
        RuntimeError: The calibrator is not fitted, the network cannot be exported, or the model exceeds 2 GB, the limit
            of a single file.
        TypeError: The example is not float32, or the network does not accept it.
        ValueError: The example differs in size from the preprocessing, or neither is given.
        OSError: The file cannot be written; an existing file is left unchanged.

    Example:
        ``export_onnx(classifier, "classifier.onnx", torch.randn(2, 3, 224, 224))``
    """
    _need("onnx", "onnxscript", "onnxruntime")
    with _on_host(classifier):
        module, image = _prepared(classifier, example)
        content = _onnx_model(module, image)
        _check_parity(module, _onnx_runner(_session(content, "cpu")), image, "ONNX model")
    write_whole(Path(path), lambda target: target.write(content))


class _Outputs(nn.Module):
    """The exported module, with one or two outputs."""

    def __init__(self, classifier: CalibratedClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        logits, confidence = self.classifier.outputs(image)
        return (logits,) if confidence is None else (logits, confidence.to(logits.dtype))


@contextlib.contextmanager
def _on_host(classifier: CalibratedClassifier) -> Iterator[None]:
    # Moved and moved back: a copy of a trained module would also copy its trainer.
    device = classifier.device
    classifier.cpu()
    try:
        yield
    finally:
        classifier.to(device)


def _prepared(classifier: CalibratedClassifier, example: Tensor | None) -> tuple[_Outputs, Tensor]:
    """The module to export, and an example of at least two images."""
    check_fitted(classifier)
    if example is None:
        if classifier.preprocessing is None:
            raise ValueError(
                "example is None, but without a preprocessing the size of the images is not known. Pass images "
                "(N, C, H, W)."
            )
        example = torch.randn(2, *classifier.preprocessing.shape, generator=torch.Generator().manual_seed(0))
    if not isinstance(example, Tensor) or example.dtype != torch.float32 or len(example) == 0:
        found = f"{example.dtype} of {len(example)} rows" if isinstance(example, Tensor) else type(example).__name__
        raise TypeError(f"example is {found}; it must be one or more images (N, C, H, W) in float32.")
    if classifier.preprocessing is not None and example.shape[1:] != classifier.preprocessing.shape:
        raise ValueError(
            f"example has shape {tuple(example.shape)}; it must have the shape (N, "
            f"{', '.join(map(str, classifier.preprocessing.shape))}) of the preprocessing."
        )
    module = _Outputs(classifier).eval()
    image = example.detach().cpu()
    if len(image) == 1:
        image = torch.cat([image, image])  # torch.export would treat a batch size of 1 as a constant
    with torch.no_grad():
        try:
            found_dtype = module(image)[0].dtype
        except RuntimeError as error:
            raise TypeError(
                f"{_named(classifier)} does not accept an example {tuple(image.shape)} in float32: {_first_line(error)}"
            ) from error
    if found_dtype != torch.float32:
        raise TypeError(
            f"{_named(classifier)} returns {found_dtype}; it must return float32. Convert the network with .float()."
        )
    return module, image


def _traced(module: _Outputs, image: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad():
            return torch.export.export(module, (image,), dynamic_shapes=({0: batch},), strict=False)
    except Exception as error:  # the code of the network may raise anything
        raise RuntimeError(
            f"{_named(module.classifier)} cannot be exported with a dynamic batch size: {_first_line(error)}"
        ) from error


def _onnx_model(module: _Outputs, image: Tensor) -> bytes:
    traced = _traced(module, image)
    try:
        program = torch.onnx.export(
            traced,
            dynamo=True,
            input_names=[INPUT],
            output_names=list(OUTPUTS[: len(module(image))]),
            dynamic_shapes=({0: "batch"},),
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props[METADATA_KEY] = json.dumps(module.classifier.metadata, allow_nan=False)
        content: bytes = program.model_proto.SerializeToString()
    except Exception as error:  # the exporter, protobuf and their checkers have their own errors
        raise RuntimeError(
            f"{_named(module.classifier)} cannot be written as one ONNX file: {_first_line(error)}"
        ) from error
    return content


@torch.no_grad()
def _check_parity(module: _Outputs, run: Runner, example: Tensor, what: str) -> None:
    for image in (example, example[:1], torch.cat([example, example[:1]])):
        expected = module(image)
        try:
            found = run(image)
        except Exception as error:  # a runtime has its own errors
            raise ParityError(f"the {what} does not run on a batch of {len(image)}: {_first_line(error)}") from error
        for name, wanted, got in zip(OUTPUTS, expected, found, strict=False):
            if not torch.allclose(got, wanted, rtol=RTOL, atol=ATOL):
                gap = float((got - wanted).abs().max())
                raise ParityError(
                    f"the {what} of {_named(module.classifier)} differs from the module by {gap:.3g} in {name} of a "
                    f"batch of {len(image)}, more than {ATOL} + {RTOL} |{name}|; no file was written"
                )


# --- reading ---------------------------------------------------------------------------------------------------------


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
        _need("onnxruntime")
        session = _session(path.read_bytes(), device.type, str(path))
        text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY, "")
        run = _onnx_runner(session)
    elif path.suffix == ".pt2":
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is damaged, or was not written by export_torch.")
        extra = {METADATA_FILE: ""}
        try:
            program = torch.export.load(path, extra_files=extra)
            if device.type != "cpu":
                program = move_to_device_pass(program, device)
        except Exception as error:  # a damaged archive may raise anything
            raise ValueError(f"{path} is damaged, or was written by another torch: {_first_line(error)}") from error
        text, run = extra[METADATA_FILE], _torch_runner(program, device)
    else:
        raise ValueError(f"path is {path}; its suffix must be .pt2 (export_torch) or .onnx (export_onnx).")
    try:
        return ExportedClassifier(run, checked_metadata(json.loads(text)))
    except ValueError as error:
        raise ValueError(f"{path} was not written by export_torch or export_onnx: {error}") from error


def _torch_runner(program: torch.export.ExportedProgram, device: torch.device | None = None) -> Runner:
    module: Any = program.module()

    @torch.no_grad()
    def run(image: Tensor) -> Sequence[Tensor]:
        outputs: Sequence[Tensor] = module(image if device is None else image.to(device))
        return outputs

    return run


def _session(content: bytes, device: str, where: str = "the ONNX model") -> Any:
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
        raise ValueError(f"{where} is damaged or not an ONNX model: {_first_line(error)}") from error


def _onnx_runner(session: Any) -> Runner:
    def run(image: Tensor) -> Sequence[Tensor]:
        try:
            return [torch.from_numpy(output) for output in session.run(None, {INPUT: image.cpu().numpy()})]
        except Exception as error:  # its errors have no common class
            raise RuntimeError(f"ONNX Runtime failed on images {tuple(image.shape)}: {_first_line(error)}") from error

    return run


def _need(*packages: str) -> None:
    for package in packages:
        try:
            __import__(package)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{package} is not installed, but ONNX models need it. Run pip install 'calib-lightning[export]'."
            ) from error


def _named(classifier: CalibratedClassifier) -> str:
    return f"{type(classifier.network).__name__} with {classifier.calibrator.name}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
