"""The checkpoints of a run: fixed names, never a numbered copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint


class RunCheckpoint(ModelCheckpoint):
    """Lightning's checkpoint callback with a fixed file name, saved when an epoch is over.

    A run folder may be moved: the best score so far is kept if the file that it belongs to is in the folder now.

    Args:
        folder: Where the file goes.
        filename: Its name without ending; each save replaces it.
        monitor: The metric that must improve for a save; None saves after every epoch.
        mode: ``"min"`` or ``"max"``.
    """

    def __init__(self, folder: str | Path, filename: str, monitor: str | None = None, mode: str = "min") -> None:
        # Saved when the epoch is over, so that a resumed run begins with the next one.
        super().__init__(
            folder,
            filename=filename,
            monitor=monitor,
            mode=mode,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the scores of a checkpoint, under the paths that its files have now."""
        folder = Path(str(self.dirpath))
        name = Path(state_dict.get("best_model_path", "")).name
        if name and (folder / name).is_file():
            here = str(folder / name)
            state_dict = {
                **state_dict,
                "dirpath": self.dirpath,
                "best_model_path": here,
                "kth_best_model_path": here,
                "best_k_models": dict.fromkeys([here], state_dict["best_model_score"]) if self.monitor else {},
            }
        super().load_state_dict(state_dict)
