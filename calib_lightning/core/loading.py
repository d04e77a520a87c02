"""The trained module from a checkpoint."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from calib_lightning.core.module import ClassificationModule
from calib_lightning.core.module_record import check_has, load_checkpoint, module_record, naming_file
from calib_lightning.utils.described import rebuilt
from calib_lightning.utils.registry import find_class


def load_module(path: str | Path, map_location: str | torch.device = "cpu") -> ClassificationModule:
    """Rebuild the trained module from a checkpoint: class, head and weights, in evaluation mode.

    The file is read with ``weights_only=True``: nothing in it is executed, and classes are only looked up in this
    package and in modules that are already imported.

    Args:
        path: A checkpoint written by any method of this package.
        map_location: Device of the tensors.

    Returns:
        The module in ``eval()`` mode.

    Raises:
        FileNotFoundError: If the file does not exist.
        pickle.UnpicklingError: If it holds anything but tensors and plain data.
        RuntimeError: If it is damaged or incomplete, or its weights do not fit the module that it describes.
        TypeError: If it describes a head with arguments that its class does not take.
        ValueError: If it was not written by a `ClassificationModule` or names an unknown class.

    Example:
        ``module = load_module("runs/digits-focal-0/checkpoints/best.ckpt")``
    """
    checkpoint = load_checkpoint(path, map_location)
    module_record(checkpoint, path)
    check_has(checkpoint, ["hyper_parameters"], path, "build the network. Give a file that a trainer has saved")
    with naming_file(path):
        return module_of(checkpoint).to(map_location)


def module_of(checkpoint: dict[str, Any]) -> ClassificationModule:
    """Rebuild the trained module, in ``eval()`` mode, from a loaded checkpoint; see `load_module`."""
    record = module_record(checkpoint)
    cls = find_class(record["class_path"], ClassificationModule)
    hyper_parameters = dict(checkpoint.get("hyper_parameters", {}))
    encoder = hyper_parameters.get("encoder")
    if isinstance(encoder, dict) and encoder.get("pretrained"):
        # the checkpoint provides the weights: download nothing
        hyper_parameters["encoder"] = {**encoder, "pretrained": False}
    module = cls(**_accepted(cls, rebuilt(hyper_parameters)))
    module.on_load_checkpoint(checkpoint)
    # A loss that does not remember how it was built is not rebuilt, so its state (class weights, say) is dropped. A
    # loss that a later stage has replaced keeps its initial state.
    losses, known = ("criterion.", "refinement_loss."), module.state_dict()
    state = {k: v for k, v in checkpoint["state_dict"].items() if k in known or not k.startswith(losses)}
    state |= {k: v for k, v in known.items() if k.startswith(losses) and k not in state}
    module.load_state_dict(state)
    return module.eval()


def _accepted(cls: type[ClassificationModule], hyper_parameters: dict[str, Any]) -> dict[str, Any]:
    """Keep only the constructor's arguments: base classes add theirs to the saved hyper-parameters."""
    parameters = inspect.signature(cls).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return hyper_parameters
    names = {p.name for p in parameters}
    return {key: value for key, value in hyper_parameters.items() if key in names}
