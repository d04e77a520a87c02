"""A trainer for tests of single methods."""

import pytest
from lightning.pytorch import Trainer, seed_everything

from calib_lightning.core import StepSeed


@pytest.fixture
def fit(tmp_path):
    """``fit(module, data, epochs)`` on the CPU, without files; the trainer comes back."""

    def run(module, data, epochs=1, **options):
        seed_everything(0)
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=epochs,
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[StepSeed(), *options.pop("callbacks", [])],
            **{"num_sanity_val_steps": 0} | options,
        )
        trainer.fit(module, datamodule=data)
        return trainer

    return run
