"""Classifiers as ``torch.export`` programs and ONNX models, checked against the module before they are written."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from calib_lightning.deploy.classifier import CalibratedClassifier
from calib_lightning.deploy.exported import (
    INPUT,
    METADATA_FILE,
    METADATA_KEY,
    OUTPUTS,
    Runner,
    first_line,
    need,
    onnx_runner,
    onnx_session,
    torch_runner,
)
from calib_lightning.deploy.saving import check_fitted
from calib_lightning.utils.files import write_whole

RTOL, ATOL = 1e-3, 1e-4
"""Tolerance of an exported classifier, relative to the module, for log-probabilities and confidences."""


class ParityError(RuntimeError):
    """The outputs of an exported classifier differ from those of the module; no file was written."""


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
        _check_parity(module, torch_runner(torch.export.load(file)), image, "torch.export program")
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
    need("onnx", "onnxscript", "onnxruntime")
    with _on_host(classifier):
        module, image = _prepared(classifier, example)
        content = _onnx_model(module, image)
        _check_parity(module, onnx_runner(onnx_session(content, "cpu")), image, "ONNX model")
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
                f"{_named(classifier)} does not accept an example {tuple(image.shape)} in float32: {first_line(error)}"
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
            f"{_named(module.classifier)} cannot be exported with a dynamic batch size: {first_line(error)}"
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
            f"{_named(module.classifier)} cannot be written as one ONNX file: {first_line(error)}"
        ) from error
    return content


@torch.no_grad()
def _check_parity(module: _Outputs, run: Runner, example: Tensor, what: str) -> None:
    for image in (example, example[:1], torch.cat([example, example[:1]])):
        expected = module(image)
        try:
            found = run(image)
        except Exception as error:  # a runtime has its own errors
            raise ParityError(f"the {what} does not run on a batch of {len(image)}: {first_line(error)}") from error
        for name, wanted, got in zip(OUTPUTS, expected, found, strict=False):
            if not torch.allclose(got, wanted, rtol=RTOL, atol=ATOL):
                gap = float((got - wanted).abs().max())
                raise ParityError(
                    f"the {what} of {_named(module.classifier)} differs from the module by {gap:.3g} in {name} of a "
                    f"batch of {len(image)}, more than {ATOL} + {RTOL} |{name}|; no file was written"
                )


def _named(classifier: CalibratedClassifier) -> str:
    return f"{type(classifier.network).__name__} with {classifier.calibrator.name}"
