"""Files of staged trainings: one to start a stage from, one to restore a module from, and those of the wrong stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from calib_lightning.core.heads import build_head
from calib_lightning.core.module_record import check_has, load_checkpoint, naming_file
from calib_lightning.core.stage_base import Stage
from calib_lightning.core.submodules import put_submodule
from calib_lightning.core.twins import is_twin


def load_start(stage: Stage, module: LightningModule) -> None:
    """Load the encoder of the trained checkpoint ``init_from``, and its head if it fits."""
    assert stage.init_from is not None
    if not Path(stage.init_from).is_file():
        raise FileNotFoundError(f"init_from of {type(stage).__name__} is {stage.init_from!r}, which does not exist.")
    state: dict[str, Tensor] = load_checkpoint(stage.init_from)["state_dict"]
    encoder, head = f"{stage.encoder}." if stage.encoder else "", f"{stage.head}."
    own = {name: value for name, value in module.state_dict().items() if name.startswith((encoder, head))}

    def of(values: dict[str, Tensor], part: str) -> dict[str, tuple[int, ...]]:
        is_head = part == head
        return {
            name: tuple(value.shape)
            for name, value in values.items()
            if name.startswith(part) and name.startswith(head) == is_head
        }

    mine, theirs = of(own, encoder), of(state, encoder)
    if not stage.encoder:  # of a whole module, skip criteria and metrics
        theirs = {name: shape for name, shape in theirs.items() if name in mine}
    if mine != theirs:
        name = next(n for n in (*mine, *theirs) if mine.get(n) != theirs.get(n))
        raise ValueError(
            f"init_from is {stage.init_from!r}, which holds another encoder: {name!r} is "
            f"{theirs.get(name, 'missing')} there and {mine.get(name, 'missing')} in this module. Build the module "
            "with the encoder of the checkpoint, or give another checkpoint."
        )
    wanted = set(mine)
    stage.head_loaded = of(own, head) == of(state, head)
    if stage.head_loaded:
        wanted |= set(of(own, head))
    module.load_state_dict({name: state[name] for name in wanted}, strict=False)


def load_stages(module: LightningModule, path: str | Path) -> LightningModule:
    """Install the heads of a staged training in a module from outside this package, and load its weights.

    Use `load_module` for modules of this package. Your own head classes must derive from `Head`, and the file that
    defines them must be imported.

    Args:
        module: The module as it was built for training.
        path: A checkpoint of the training.

    Returns:
        The module, with the weights of the checkpoint, in ``eval()`` mode. A warning tells of a checkpoint from before
        the first switch.

    Raises:
        RuntimeError: If the file is damaged or lacks a part, or its weights do not fit the module.
        TypeError: If ``module`` is a class.
        ValueError: If a head in the file is not a `Head` and therefore cannot be rebuilt.

    Example:
        ``module = load_stages(MyModule(), "last.ckpt")``
    """
    if isinstance(module, type):
        raise TypeError(f"module is the class {module.__name__}; it must be a module. Pass {module.__name__}(...).")
    checkpoint = load_checkpoint(path)
    check_has({"callbacks": {}, **checkpoint}, ["callbacks"], path, "rebuild heads. Give a file that a trainer saved")
    states = [s for key, s in checkpoint.get("callbacks", {}).items() if key.startswith("StageSwitch[") and s["active"]]
    if not states:
        rank_zero_warn(
            f"{path} is from before the first switch of its run, or from a run without one: it holds no new head."
        )
    for state in sorted(states, key=lambda state: int(state["first_epoch"])):
        if state["head_spec"] is None:
            raise ValueError(
                f"{path} holds a head {state['head']!r} that is not a calib_lightning.core.Head, so it cannot be "
                "rebuilt from the file. Test or resume with a trainer that has the same StageSwitch."
            )
        if state["current"] or len(states) == 1:
            with naming_file(path):
                put_submodule(module, state["head"], build_head(state["head_spec"]))
    with naming_file(path):
        module.load_state_dict(checkpoint["state_dict"])
    return module.eval()


def warn_of_earlier_files(stage: Stage, trainer: Trainer) -> None:
    """Warn of files of a `ModelCheckpoint` that hold an earlier stage; those of `RunCheckpoint` have its number."""
    for keeper in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning does not declare it
        if not is_twin(keeper, ModelCheckpoint) or hasattr(keeper, "stage"):
            continue
        for path in dict.fromkeys(filter(None, (keeper.best_model_path, keeper.last_model_path))):
            state = _switch_in(path, stage)
            if state is not None and not state.get("current"):
                rank_zero_warn(
                    f"{path} is from before the stage of {type(stage).__name__}: {type(keeper).__name__} compares all "
                    f"stages, and {keeper.monitor or 'its metric'} was better then. The network in memory is of the "
                    "last stage; save it with trainer.save_checkpoint, or train the stage in a run of its own, with "
                    "init_from=CHECKPOINT."
                )


def _switch_in(path: str, stage: Stage) -> Any:
    """The state of a switch in a checkpoint; nothing for a file that cannot be read."""
    try:
        return load_checkpoint(path)["callbacks"].get(stage.state_key)
    except Exception:  # the run is over: a file that is gone or elsewhere must not end it with an error
        return None
