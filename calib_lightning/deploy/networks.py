"""Writing down how a network is built, so that a file of its weights is enough to have it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from calib_lightning.core.module import ClassificationModule, module_of

_TIMM_OPTIONS = ("num_classes", "in_chans", "img_size")


def network_record(network: nn.Module, shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    """Write a network down as plain data and tensors on the CPU.

    Args:
        network: The network, in evaluation mode.
        shape: Shape ``(C, H, W)`` of its images, for a trial of a rebuilt timm model.

    Returns:
        What `network_of` takes: its weights, and under ``"timm"`` or ``"module"`` how it is built where that is known.
        A timm model counts as known only if a rebuilt one gives the same logits to the last bit.
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
    """Build the network that a record describes; nothing of a record is executed.

    Args:
        record: Of `network_record`; it may come from anybody.

    Returns:
        The network, with its weights, on the CPU and in evaluation mode.

    Raises:
        ValueError: It does not say how the network is built, is damaged, or names a class that is not known.
    """
    state = _state_of(record)
    if "module" not in record and "timm" not in record:
        raise ValueError(
            "it holds the weights of a network, but not how it is built, which is known of timm models and "
            "ClassificationModules only: build the network and give load_classifier(path, network=network)"
        )
    try:
        network = (
            module_of({**record["module"], "state_dict": state}) if "module" in record else _timm_model(record["timm"])
        )
        # the tensors themselves, so that half precision stays half precision
        network.load_state_dict(state, assign=True)
    except Exception as error:  # a constructor that is given what a stranger wrote may fail in any way
        raise ValueError(
            f"the network cannot be built as the file says, which is damaged or of another version: {error}"
        ) from error
    return network.eval()


def fill_network(network: nn.Module, record: Any) -> nn.Module:
    """Load the weights of a record into a network that was built by somebody else.

    Args:
        network: As it was when it was saved.
        record: Of `network_record`; it may come from anybody.

    Returns:
        The same network.

    Raises:
        ValueError: The weights do not fit it.
    """
    try:
        network.load_state_dict(_state_of(record))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"the weights do not fit the {type(network).__name__} given: {error}") from error
    return network


def _state_of(record: Any) -> dict[str, Any]:
    if not isinstance(record, Mapping) or not isinstance(record.get("state"), Mapping):
        raise ValueError("it is damaged: it has no weights of a network")
    return dict(record["state"])


def _timm_model(recipe: Any) -> nn.Module:
    import timm  # here: it takes seconds

    if not isinstance(recipe, Mapping) or set(recipe) != {"name", "options"} or not isinstance(recipe["name"], str):
        raise ValueError(f"{recipe!r:.200} does not describe a timm model")
    name, options = recipe["name"], recipe["options"]
    # timm itself would also take "hf-hub:..." and paths, from which it reads code and weights of anyone
    if name not in timm.list_models() or not isinstance(options, Mapping) or not set(options) <= set(_TIMM_OPTIONS):
        raise ValueError(f"timm {timm.__version__} has no model {name!r:.100} with options {options!r:.100}")
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
    except Exception:  # another family of models may take none of these options
        return None
    # Pooling, say, leaves no trace in the weights: only the outputs tell whether it is the same network.
    return recipe if _agree(network, rebuilt.eval(), shape) else None


@torch.no_grad()
def _agree(network: nn.Module, rebuilt: nn.Module, shape: tuple[int, ...]) -> bool:
    reference = next(network.parameters())
    image = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(reference)
    try:
        return torch.equal(network(image), rebuilt.to(reference.device)(image))
    except Exception:
        return False
