"""``calib score FILE...``: every metric of saved logits and labels, without a model and without the trainer."""

from calib_lightning.score.command import main

__all__ = ["main"]
