"""A trainer for tests of single methods."""

import pytest
from lightning.pytorch import Trainer, seed_everything

from calib_lightning.core import StageSwitch, StepSeed


@pytest.fixture
def fit(tmp_path):
    """``fit(module, data, epochs)`` on the CPU, without files; the trainer comes back.

    ``epochs`` are all those of the run, those that stages add among them.
    """

    def run(module, data, epochs=1, **options):
        seed_everything(0)
        callbacks, ckpt_path = options.pop("callbacks", []), options.pop("ckpt_path", None)
        parts = (*callbacks, getattr(module, "switch", None), getattr(module, "tuning", None))
        added = sum(-part.at_epoch for part in parts if isinstance(part, StageSwitch) and part.at_epoch < 0)
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=epochs if options.get("fast_dev_run") else epochs - added,
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[StepSeed(), *callbacks],
            **{"num_sanity_val_steps": 0} | options,
        )
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return trainer

    return run
