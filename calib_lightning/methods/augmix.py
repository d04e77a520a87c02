"""AugMix with its consistency loss (Hendrycks et al., ICLR 2020)."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from calib_lightning.core import BatchTransform, ClassificationModule, ModuleOptions
from calib_lightning.core.batch_transform import Classifier
from calib_lightning.core.module_options import with_transform
from calib_lightning.data.augmix import AugMixViews
from calib_lightning.functional import at_least_float32
from calib_lightning.types import Batch


def jsd_consistency(logits_clean: Tensor, logits_1: Tensor, logits_2: Tensor) -> Tensor:
    """Jensen-Shannon divergence of three predictions (Hendrycks et al., 2020), ``mean_n (1/3) sum_v KL(p_nv || M_n)``.

    ``M = (p_clean + p_1 + p_2) / 3``, clamped to ``[1e-7, 1]``. It is 0 if all views agree, and at most ``log 3``.

    Args:
        logits_clean: ``(N, K)``, of the clean images.
        logits_1: ``(N, K)``, of a first view.
        logits_2: ``(N, K)``, of a second view.

    Returns:
        Scalar, in nats; float32 or wider.

    Raises:
        TypeError: If logits are not floating point.
        ValueError: If they do not all have the same shape (N, K), N and K above 0.

    Example:
        >>> same = torch.zeros(1, 2)
        >>> jsd_consistency(same, same, same).item()
        0.0
    """
    for logits in (logits_clean, logits_1, logits_2):
        if not logits.is_floating_point():
            raise TypeError(
                f"The logits have dtype {logits.dtype}; it must be floating point. Pass the network's output."
            )
        if logits.ndim != 2 or 0 in logits.shape or logits.shape != logits_clean.shape:
            shapes = ", ".join(str(tuple(view.shape)) for view in (logits_clean, logits_1, logits_2))
            raise ValueError(
                f"The logits of the three views have the shapes {shapes}; all must have the same shape (N, K), N and K "
                "above 0."
            )
    log_probs = torch.stack([at_least_float32(x) for x in (logits_clean, logits_1, logits_2)]).log_softmax(dim=-1)
    probs = log_probs.exp()
    log_mixture = probs.mean(dim=0).clamp(1e-7, 1).log()
    return (probs * (log_probs - log_mixture)).sum(dim=-1).mean()


class AugMixTransform(BatchTransform):
    """AugMix around any criterion (Hendrycks et al., 2020): ``L = L(clean) + strength JSD(clean, mixed 1, mixed 2)``.

    One forward pass of 3 N images, so BatchNorm sees all views together. The data module makes the views; your own data
    set must return images ``(3, C, H, W)``, the clean one first.

    Args:
        strength: Weight of `jsd_consistency`, at least 0.
        severity: Maximum level of the operations, in ``[0.1, 10]``; see `AugMixViews`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> AugMixTransform(strength=6.0).strength
        6.0
    """

    def __init__(self, strength: float = 12.0, severity: float = 3.0) -> None:
        super().__init__()
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength is {strength}; it must be at least 0 and finite. The paper uses 12.")
        AugMixViews(nn.Identity(), severity)  # rejects a bad severity here rather than when training starts
        self.strength = strength
        self.severity = severity

    def views(self, normalize: nn.Module, seed: int) -> nn.Module:
        """Return the transform of uint8 images into one clean and two mixed views."""
        return AugMixViews(normalize, self.severity, seed=seed)

    def loss(self, module: Classifier, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss (scalar), and logits ``(N, K)`` of the clean images, for images ``(N, 3, C, H, W)``.

        Raises:
            ValueError: If the images are not (N, 3, C, H, W).
        """
        image = batch.image
        if image.ndim != 5 or image.shape[1] != 3:
            raise ValueError(
                f"The images have shape {tuple(image.shape)}; AugMix needs three views of each, (N, 3, C, H, W). Data "
                "modules of calib_lightning make them during a fit of the module; your own data set must return (3, C, "
                "H, W): the clean image, then two views from calib_lightning.data.AugMixViews."
            )
        logits = module(image.transpose(0, 1).flatten(0, 1))
        clean, first, second = logits.chunk(3)
        return module.criterion_value(clean, batch.label) + self.strength * jsd_consistency(clean, first, second), clean


class AugMix(ClassificationModule):
    """Train with cross-entropy and consistent predictions for augmented views, AugMix (Hendrycks et al., ICLR 2020).

    Paper: Hendrycks et al. 2020.
    Mechanism: consistent predictions for an image and two random mixtures of its augmentations.
    Extra cost: 3 x the forward and backward passes; the views.

    To use another method's criterion on the clean images, pass `AugMixTransform` as its ``batch_transform``.

    Args:
        num_classes: K; the command line takes it from the data.
        strength: Weight of the consistency loss.
        severity: Maximum level of the operations, in ``[0.1, 10]``.
        **options: See `ClassificationModule`.

    Example:
        >>> AugMix(10, strength=6.0, encoder="digits_cnn").hparams.strength
        6.0
    """

    def __init__(
        self, num_classes: int, strength: float = 12.0, severity: float = 3.0, **options: Unpack[ModuleOptions]
    ) -> None:
        super().__init__(num_classes, **with_transform(options, AugMixTransform(strength, severity)))
