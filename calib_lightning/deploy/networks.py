"""Records of networks: weights and how to build the network, so that a file is sufficient to restore it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from calib_lightning.core.loading import module_of
from calib_lightning.core.module import ClassificationModule

_TIMM_OPTIONS = ("num_classes", "in_chans", "img_size")


def network_record(network: nn.Module, shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    """Record a network in evaluation mode as plain data and CPU tensors: weights and, if known, how to build it.

    A timm model is known if rebuilding it gives bit-identical logits on images of ``shape`` ``(C, H, W)``.
    """
    state = {
        name: value.detach().cpu() if isinstance(value, Tensor) else value
        for name, value in network.state_dict().items()
    }
    record: dict[str, Any] = {"state": state}
    if isinstance(network, ClassificationModule):
        checkpoint: dict[str, Any] = {"hyper_parameters": dict(network.hparams)}
        network.on_save_checkpoint(checkpoint)
        record["module"] = checkpoint
    elif type(network).__module__.startswith("timm.models."):
        record["timm"] = _timm_recipe(network, state, shape)
    return {name: value for name, value in record.items() if value is not None}


def network_of(record: Any) -> nn.Module:
    """Build a network in evaluation mode from an untrusted record; no code in the record is executed."""
    state = _state_of(record)
    if "module" not in record and "timm" not in record:
        raise ValueError(
            "the file has the weights of a network, but not how to build it, which is known only for timm models and "
            "ClassificationModules. Build the network and call load_classifier(path, network=network), or save the "
            "classifier with export_onnx or export_torch."
        )
    try:
        network = (
            module_of({**record["module"], "state_dict": state}) if "module" in record else _timm_model(record["timm"])
        )
        # assign, so that half precision is kept
        network.load_state_dict(state, assign=True)
    except Exception as error:  # a constructor may raise anything on untrusted arguments
        raise ValueError(
            f"the network cannot be built from the file, which is damaged or from another version: {error}"
        ) from error
    return network.eval()


def fill_network(network: nn.Module, record: Any) -> nn.Module:
    """Load the weights of an untrusted record into a given network, and return it."""
    try:
        network.load_state_dict(_state_of(record))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"the weights do not fit the given {type(network).__name__}: {error}") from error
    return network


def _state_of(record: Any) -> dict[str, Any]:
    if not isinstance(record, Mapping) or not isinstance(record.get("state"), Mapping):
        raise ValueError("the file is damaged: it has no weights of a network.")
    return dict(record["state"])


def _timm_model(recipe: Any) -> nn.Module:
    import timm  # the import takes seconds

    if not isinstance(recipe, Mapping) or set(recipe) != {"name", "options"} or not isinstance(recipe["name"], str):
        raise ValueError(f"{recipe!r:.200} does not describe a timm model.")
    name, options = recipe["name"], recipe["options"]
    # timm also accepts "hf-hub:..." and paths, from which it would load untrusted code and weights
    if name not in timm.list_models() or not isinstance(options, Mapping) or not set(options) <= set(_TIMM_OPTIONS):
        raise ValueError(f"timm {timm.__version__} has no model {name!r:.100} with options {options!r:.100}.")
    with torch.random.fork_rng():  # the weights drawn here are replaced
        model: nn.Module = timm.create_model(name, pretrained=False, **options)
    return model


def _timm_recipe(network: Any, state: dict[str, Any], shape: tuple[int, ...] | None) -> dict[str, Any] | None:
    config = getattr(network, "pretrained_cfg", None) or {}
    first = config.get("first_conv") or ""
    weight = state.get(f"{first if isinstance(first, str) else first[0]}.weight")
    channels = 3 if weight is None or weight.ndim != 4 else weight.shape[1]
    options: dict[str, Any] = {"num_classes": int(getattr(network, "num_classes", 0)), "in_chans": channels}
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    if size is not None:
        options["img_size"] = list(size)
    recipe = {"name": config.get("architecture"), "options": options}
    shape = shape or (channels, *(size or config.get("input_size", (3, 224, 224))[1:]))
    try:
        rebuilt = _timm_model(recipe)
        rebuilt.load_state_dict(state, assign=True)
    except Exception:  # other model families may not accept these options
        return None
    # Pooling, for example, leaves no trace in the weights, so only the outputs show whether the network is the same.
    return recipe if _agree(network, rebuilt.eval(), shape) else None


@torch.no_grad()
def _agree(network: nn.Module, rebuilt: nn.Module, shape: tuple[int, ...]) -> bool:
    reference = next(network.parameters())
    image = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(reference)
    try:
        return torch.equal(network(image), rebuilt.to(reference.device)(image))
    except Exception:
        return False
