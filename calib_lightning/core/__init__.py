"""The base module of every method, its parts, and fault tolerance."""

from calib_lightning.core.batch_transform import BatchTransform
from calib_lightning.core.checkpoint_io import AtomicCheckpointIO
from calib_lightning.core.encoders import Encoder, build_encoder, encoder_names
from calib_lightning.core.feature_cache import CachedFeatures
from calib_lightning.core.finite import DivergedError
from calib_lightning.core.heads import Head, LinearHead, build_head
from calib_lightning.core.history import CorrectnessHistory
from calib_lightning.core.learning import LearningCriterion
from calib_lightning.core.loading import load_module
from calib_lightning.core.module import ClassificationModule
from calib_lightning.core.module_options import ModuleOptions
from calib_lightning.core.module_record import load_checkpoint
from calib_lightning.core.preemption import Preemption
from calib_lightning.core.randomness import StepSeed
from calib_lightning.core.schedules import CosineToEnd, WarmupCosine, WarmupMultiStep
from calib_lightning.core.stages import StageSwitch, StageTraining, SwitchOptions, load_stages

__all__ = [
    "AtomicCheckpointIO",
    "BatchTransform",
    "CachedFeatures",
    "ClassificationModule",
    "CorrectnessHistory",
    "CosineToEnd",
    "DivergedError",
    "Encoder",
    "Head",
    "LearningCriterion",
    "LinearHead",
    "ModuleOptions",
    "Preemption",
    "StageSwitch",
    "StageTraining",
    "StepSeed",
    "SwitchOptions",
    "WarmupCosine",
    "WarmupMultiStep",
    "build_encoder",
    "build_head",
    "encoder_names",
    "load_checkpoint",
    "load_module",
    "load_stages",
]
