"""Checks of a stage before training: each function rejects what would fail, or go wrong in silence, at the switch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from calib_lightning.core.batch_transform import BatchTransform
from calib_lightning.core.data_in_use import can_change_loading, can_change_views, datamodule_in_use
from calib_lightning.core.distributed import check_strategy
from calib_lightning.core.heads import Head, head_size
from calib_lightning.core.learning import learners_of
from calib_lightning.core.module import ClassificationModule
from calib_lightning.core.own_data import image_and_label
from calib_lightning.core.randomness import seeded_head
from calib_lightning.core.schedules import CosineToEnd
from calib_lightning.core.stage_base import Stage, stages_of
from calib_lightning.core.submodules import evaluating, linear_layers, submodule_of
from calib_lightning.core.twins import is_twin
from calib_lightning.functional import logits_of
from calib_lightning.types import Views

FEW_STEPS = 100
"""Warn when a stage has fewer steps."""


def check_stage(stage: Stage, trainer: Trainer, module: LightningModule) -> None:
    """Reject a stage that is impossible in this run; called in the set-up of a fit."""
    name = type(stage).__name__
    check_strategy(trainer, name)
    _check_epoch(stage, trainer)
    averaging = [c for c in trainer.callbacks if is_twin(c, StochasticWeightAveraging, WeightAveraging)]  # type: ignore[attr-defined]
    if averaging:
        raise ValueError(
            f"{type(averaging[0]).__name__} averages the weights of all stages: it would change what {name} "
            "freezes and mix two heads. Omit it, or average in a run with one stage."
        )
    head, encoder = stage.module_head(module), submodule_of(module, stage.encoder, "encoder")
    kept = {id(parameter) for parameter in head.parameters()}
    layers = [part for part in head.modules() if part._parameters]
    if len(layers) > 1 and all(id(parameter) in kept for parameter in module.parameters()):
        raise ValueError(
            f"head is {stage.head!r}, which holds all parameters of {type(module).__name__}; it must be the last layer "
            f"alone, since {name} freezes the rest. Name that layer: {linear_layers(module)}."
        )
    _check_schedule(stage, trainer, module)
    views, transform = stage.training.views, _kept_transform(stage, module)
    if views is None or not views.stores_features:
        _check_images(stage, trainer, transform)
    if views is not None and views.stores_features and stage.batch is not None:
        raise ValueError(
            f"batch of {name} is {stage.batch!r}; it must be None with {type(views).__name__}, which stores features "
            "of tuples that start with the images. Omit the cache, or let the data set return such tuples."
        )
    if views is not None:
        views.check(trainer, module, encoder, head, transform)
    _check_criterion(stage, trainer, module, transform)


def _check_criterion(stage: Stage, trainer: Trainer, module: LightningModule, transform: BatchTransform | None) -> None:
    """Check criterion and batch transform of the stage against the module and the run."""
    name, training, learners = type(stage).__name__, stage.training, learners_of(stage.training.criterion)
    if not isinstance(module, ClassificationModule):
        if training.criterion is not None and not hasattr(module, "criterion"):
            raise ValueError(
                f"{name}'s training has a criterion, but {type(module).__name__} has no attribute 'criterion' for its "
                "training step to call. Omit the criterion, or make the module call self.criterion."
            )
        if learners:
            raise ValueError(
                f"{name}'s training has a {type(learners[0]).__name__}, which learns from what a ClassificationModule "
                f"tells it, but the module is a {type(module).__name__}. Use a method of this package, or another "
                "criterion."
            )
    first, known = stage.first(trainer), (trainer.max_epochs or -1) > 0
    for part in learners:
        part.check(trainer, transform, range(first, first + stage.length(trainer) if known else sys.maxsize))


def _check_epoch(stage: Stage, trainer: Trainer) -> None:
    name, first, epochs = type(stage).__name__, stage.first(trainer), trainer.max_epochs
    if not stage.active:
        if epochs is not None and 0 <= epochs <= first:
            raise ValueError(
                f"at_epoch of {name} is {stage.at_epoch}; it must be at most {epochs - 1} in a run of {epochs} "
                "epochs, or the switch never takes place. Train longer, or append a stage of T epochs with "
                "at_epoch=-T."
            )
        if first == 0 and stage.init_from is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"{name} freezes the module before its first step, and there is no init_from: this is right for a "
                "trained module and useless for a new one."
            )
    for other in stages_of(trainer):
        if other is not stage and other.first(trainer) == first:
            raise ValueError(
                f"{name} and {type(other).__name__} both switch at epoch {first}. Give them different values of "
                "at_epoch."
            )
    if stage.init_from is not None and first > 0 and not stage.active:
        raise ValueError(
            f"init_from is {stage.init_from!r}, but the switch is at epoch {first}: trained weights are only for a "
            f"run that begins with it. Set at_epoch to 0 (now {stage.at_epoch}), or train stage 1 without init_from."
        )


def _check_schedule(stage: Stage, trainer: Trainer, module: LightningModule) -> None:
    training = stage.training
    if training.scheduler is None:
        return
    schedule: Any = training.scheduler(training.optimizer([nn.Parameter(torch.zeros(1))]))
    if isinstance(schedule, CosineToEnd):
        stage.length(trainer)  # must be known
    elif isinstance(schedule, ReduceLROnPlateau) and not isinstance(module, ClassificationModule):
        raise ValueError(
            f"ReduceLROnPlateau monitors val/nll, which {type(module).__name__} may not log. Give "
            f"{type(stage).__name__} a schedule that follows the epochs, such as CosineToEnd."
        )


def _kept_transform(stage: Stage, module: LightningModule) -> BatchTransform | None:
    """The batch transform of the stage: that of the module; with a criterion, that for stages."""
    if not isinstance(module, ClassificationModule):
        return None
    return module.batch_transform if stage.training.criterion is None else module.stage_transform


def _check_images(stage: Stage, trainer: Trainer, transform: BatchTransform | None) -> None:
    """Check images and batch size of the stage against the data and the batch transform."""
    views, size = stage.training.views, stage.training.batch_size
    blocked = None if can_change_views(trainer) else views
    if blocked or (size and not can_change_loading(trainer)):
        data = datamodule_in_use(trainer)
        said = (
            f"{'views' if blocked else 'batch_size'} of {type(stage).__name__}'s training is incompatible with "
            f"{type(data).__name__ if data else 'plain loaders'}: only data modules of this package change their "
            "images and batch size at a switch."
        )
        if blocked is None or not blocked.optional:
            wrap = "for views a DataLoader over a ViewedDataset, or " if blocked and data is None else ""
            raise ValueError(f"{said} Omit it, or use {wrap}a BenchmarkDataModule.")
        rank_zero_warn(f"{said} The stage uses the loader's batches.")
    elif views is not None:
        _check_views(views, transform)


def _check_views(views: Views, transform: BatchTransform | None) -> None:
    if transform is not None and type(transform).views is not BatchTransform.views:
        raise ValueError(
            f"{type(transform).__name__} needs its own views, but the stage has {type(views).__name__}. Omit one of "
            "them."
        )
    image = views.transform(_AsFloat(), None, 0)(torch.zeros(1, 3, 32, 32).byte(), torch.zeros(1).long(), 0)
    if image.ndim != 4:
        raise ValueError(
            f"{type(views).__name__} makes {image.shape[1]} views of each image; a stage that classifies needs "
            "exactly one. Use CleanViews or ResizedCropFlip."
        )


class _AsFloat(nn.Module):
    """Stands in for a normalisation."""

    def forward(self, image: Tensor, index: Tensor, epoch: int) -> Tensor:
        return image.float()


def check_heads(stages: Sequence[Stage], module: LightningModule) -> None:
    """Build and run all new heads once, to report a wrong width before training starts."""
    trainer = module.trainer
    head: dict[str, nn.Module] = {}
    for stage in sorted(stages, key=lambda stage: stage.first(trainer)):
        if stage.active:
            continue
        old = head.get(stage.head, stage.module_head(module))
        features, classes = head_size(module, old)
        with seeded_head(0):
            new = head[stage.head] = stage.new_head(module, old)
        name, parameter = type(new).__name__, next(new.parameters(), None)
        if not isinstance(new, Head):
            told = f"The head {name} of {type(stage).__name__} is not a calib_lightning.core.Head"
            if isinstance(module, ClassificationModule):
                raise ValueError(f"{told}, so a checkpoint could not rebuild it. Derive it from Head.")
            rank_zero_warn(
                f"{told}, so load_stages cannot rebuild it from a checkpoint. Derive it from Head if it should."
            )
        rows = torch.zeros(2, features) if parameter is None else parameter.new_zeros(2, features)
        try:
            with torch.no_grad(), evaluating(new):
                shape = tuple(new(rows).shape)
        except RuntimeError as error:
            raise ValueError(
                f"The head {name} of {type(stage).__name__} does not fit: it cannot process {features} features "
                f"({error}). Build it for the encoder's number of features."
            ) from error
        if shape != (2, classes):
            raise ValueError(
                f"The head {name} of {type(stage).__name__} does not fit: it maps 2 rows of {features} features to "
                f"{shape}, but {classes} classes need (2, {classes})."
            )


def check_is_last(stage: Stage, trainer: Trainer, module: LightningModule, batch: Any) -> None:
    """Reject a head that does not return the logits of a module from outside this package; called in the first step.

    Where the module cannot be called on the images of a batch, nothing is known and nothing said.
    """
    if isinstance(module, ClassificationModule) or stage.feed is not None:
        return
    returned: list[Any] = []
    handle = stage.module_head(module).register_forward_hook(lambda _, inputs, output: returned.append(output))
    try:
        with evaluating(module), torch.no_grad(), torch.random.fork_rng([]), trainer.precision_plugin.forward_context():
            output = module.forward(image_and_label(batch, type(stage).__name__, stage.batch)[0])
        of_head, of_module = (logits_of(found).shape[1] for found in (returned[-1], output))
    except Exception:  # its forward may need more than images, or return something else
        return
    finally:
        handle.remove()
    if of_head != of_module:
        raise ValueError(
            f"head is {stage.head!r}, which returns {of_head} values for each image; it must be the layer that returns "
            f"the {of_module} logits of {type(module).__name__}. Name that layer: {linear_layers(module)}."
        )


def check_optimizers(stage: Stage, trainer: Trainer, module: LightningModule) -> None:
    """Reject several optimisers, and a schedule under manual optimisation."""
    several = len(trainer.optimizers) > 1
    if several or (stage.training.scheduler is not None and not module.automatic_optimization):
        what = f"{len(trainer.optimizers)} optimisers" if several else "manual optimisation"
        raise ValueError(
            f"{type(module).__name__} has {what}, but {type(stage).__name__} installs a single "
            f"optimiser{'' if several else ' and a scheduler'} that Lightning steps. Use a module with one "
            f"optimiser{'.' if several else ', or omit the scheduler.'}"
        )


def warn_of_few_steps(stage: Stage, trainer: Trainer) -> None:
    """Warn of a stage that is too short for a new head; called at the switch, when the loader is known."""
    if (trainer.max_epochs or -1) > 0 and isinstance(trainer.num_training_batches, int):
        steps = stage.length(trainer) * trainer.num_training_batches // trainer.accumulate_grad_batches
        if steps < FEW_STEPS:
            where = "batch_size of its training" if can_change_loading(trainer) else "of your loader"
            rank_zero_warn(
                f"The stage of {type(stage).__name__} has only {steps} steps, too few for a new head. Use more "
                f"epochs (at_epoch) or smaller batches ({where})."
            )
