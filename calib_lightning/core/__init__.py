"""The module under every method, its parts, and what keeps a run from being lost."""

from calib_lightning.core.batch_transform import BatchTransform
from calib_lightning.core.checkpoint_io import AtomicCheckpointIO
from calib_lightning.core.encoders import Encoder, build_encoder, encoder_names
from calib_lightning.core.heads import Head, HeadSpec, LinearHead, build_head
from calib_lightning.core.history import CorrectnessHistory
from calib_lightning.core.module import ClassificationModule, ModuleOptions, load_checkpoint, load_module
from calib_lightning.core.preemption import Preemption
from calib_lightning.core.randomness import StepSeed

__all__ = [
    "AtomicCheckpointIO",
    "BatchTransform",
    "ClassificationModule",
    "CorrectnessHistory",
    "Encoder",
    "Head",
    "HeadSpec",
    "LinearHead",
    "ModuleOptions",
    "Preemption",
    "StepSeed",
    "build_encoder",
    "build_head",
    "encoder_names",
    "load_checkpoint",
    "load_module",
]
