"""Balancing a linear and a fixed classifier, BalCAL (Ni, Zhao, Gao, Guo and Zha, CVPR 2025)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from calib_lightning.core import ClassificationModule, Encoder, ModuleOptions
from calib_lightning.core.submodules import evaluating
from calib_lightning.functional import at_least_float32, checked_batch
from calib_lightning.types import Batch

JOINED_BATCHES = 50


def simplex_etf(num_features: int, num_classes: int) -> Tensor:
    """Draw a simplex equiangular tight frame, ``M = sqrt(K / (K - 1)) P (I - 11^T / K)``.

    ``P`` has orthonormal columns, from the QR decomposition of a uniform random matrix. The columns of ``M`` have
    norm 1 and pairwise cosine ``-1 / (K - 1)``: K directions as far from each other as there can be.

    Args:
        num_features: d, at least K.
        num_classes: K, at least 2.

    Returns:
        ``M``, ``(d, K)`` float32.

    Example:
        >>> frame = simplex_etf(8, 3)
        >>> torch.allclose(frame.T @ frame, 1.5 * torch.eye(3) - 0.5, atol=1e-6)
        True
    """
    basis, _ = torch.linalg.qr(torch.rand(num_features, num_classes, dtype=torch.float64, device="cpu"))
    frame: Tensor = math.sqrt(num_classes / (num_classes - 1)) * (basis - basis.mean(dim=1, keepdim=True))
    return frame.float()


def batch_class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Weights of the classes in a batch, ``E_k = sqrt((N / C) / n_k)``, 1 for a class that is not there.

    Args:
        labels: ``(N,)`` int64.
        num_classes: K.

    Returns:
        ``(K,)`` float32; ``C`` is the number of classes in the batch, ``n_k`` that of rows of class k.

    Example:
        >>> batch_class_weights(torch.tensor([0, 0, 0, 1]), 3).square()
        tensor([0.6667, 2.0000, 1.0000])
    """
    counts = labels.new_zeros(num_classes).index_add_(0, labels, torch.ones_like(labels))
    present = counts > 0
    weights = (len(labels) / present.sum().float() / counts.clamp_min(1)).sqrt()
    return torch.where(present, weights, 1.0)


def balcal_loss(linear_logits: Tensor, etf_logits: Tensor, labels: Tensor, *, lam: float | Tensor) -> Tensor:
    """Loss of BalCAL (Ni et al., 2025), ``L = lam CE(l_lin, y) + (1 - lam) CE(E * l_etf, y)``.

    ``E`` are the `batch_class_weights` of the batch, one for each column.

    Args:
        linear_logits: ``(N, K)`` of the linear classifier.
        etf_logits: ``(N, K)`` of the fixed classifier.
        labels: ``(N,)`` int64; soft targets have no classes to weigh.
        lam: Weight of the linear classifier, in ``[0, 1]``.

    Returns:
        Scalar, in nats.

    Raises:
        TypeError: If a dtype is wrong (see `calib_lightning.functional.checked_batch`).
        ValueError: If shapes do not fit, there is no row, or a label is outside ``0..K-1``.

    Example:
        >>> zeros = torch.zeros(2, 4)
        >>> round(balcal_loss(zeros, zeros, torch.tensor([0, 1]), lam=0.8).item(), 4)
        1.3863
    """
    linear_logits, labels = checked_batch(linear_logits, labels, soft=False)
    if etf_logits.shape != linear_logits.shape:
        raise ValueError(
            f"The logits of the fixed classifier have the shape {tuple(etf_logits.shape)}, those of the linear one "
            f"{tuple(linear_logits.shape)}; both must be (N, K)."
        )
    weighted = at_least_float32(etf_logits) * batch_class_weights(labels, linear_logits.shape[1])
    return lam * F.cross_entropy(linear_logits, labels) + (1.0 - lam) * F.cross_entropy(weighted, labels)


def find_balance(figures: Callable[[float], tuple[float, float]], delta: float, tolerance: float = 1e-4) -> float:
    """Search the weight with which confidence equals ``delta`` times accuracy (Ni et al., 2025).

    ``lam = 1`` if the linear classifier alone is less confident than that. Otherwise bisection of ``[0, 1]``: up if
    ``delta * accuracy > confidence`` of the mixture with the middle, down if not; the last middle is the result.

    Args:
        figures: Gives accuracy and mean confidence of the mixture with weight ``lam`` of the linear classifier.
        delta: Confidence that is aimed at, as a fraction of the accuracy.
        tolerance: Width of the interval at which the search ends.

    Returns:
        ``lam`` in ``[0, 1]``.

    Example:
        >>> round(find_balance(lambda lam: (0.8, lam), delta=0.5), 3)
        0.4
    """

    def is_underconfident(lam: float) -> bool:
        accuracy, confidence = figures(lam)
        return delta * accuracy > confidence

    if is_underconfident(1.0):
        return 1.0
    low, high, middle = 0.0, 1.0, 1.0
    while high - low > tolerance:
        middle = (low + high) / 2.0
        if is_underconfident(middle):
            low = middle
        else:
            high = middle
    return middle


class ETFBranch(nn.Module):
    """Residual adaptor and fixed classifier of BalCAL, on a feature map ``F`` of C channels.

    ``F' = F + conv(relu(bn(conv(relu(bn(F))))))``, ``h = gap(relu(bn(F')))`` scaled to norm 1, logits ``s h M``.

    Args:
        channels: C, at least K.
        num_classes: K.
        width: Channels between the two 3x3 convolutions.
        scale: ``s``.

    Attributes:
        etf: ``M``, ``(C, K)``: see `simplex_etf`.
    """

    etf: Tensor

    def __init__(self, channels: int, num_classes: int, width: int, scale: float) -> None:
        super().__init__()
        self.adaptor = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, channels, 3, padding=1, bias=False),
        )
        self.norm = nn.BatchNorm2d(channels)
        self.scale = scale
        self.register_buffer("etf", simplex_etf(channels, num_classes))

    def forward(self, feature_map: Tensor) -> Tensor:
        """Logits ``(N, K)``, float32 or wider, of feature maps ``(N, C, H, W)``."""
        activation = F.relu(self.norm(feature_map + self.adaptor(feature_map)))
        # The logits lie in [-s, s], where half precision would leave a few hundred values.
        with torch.autocast(activation.device.type, enabled=False):
            features = F.normalize(at_least_float32(activation).mean(dim=(2, 3)), dim=-1)
            return self.scale * (features @ at_least_float32(self.etf))


class BalCAL(ClassificationModule):
    """Train a linear and a fixed classifier, balanced by their confidence (Ni et al., CVPR 2025).

    Paper: Ni et al. 2025.
    Mechanism: a fixed classifier that is never sure balances the linear one.
    Extra cost: an adaptor of two 3x3 convolutions; 8 N K bytes for the logits of an epoch.

    Logits are ``lam l_lin + (1 - lam) l_etf``: ``l_lin`` comes from the linear head, ``l_etf`` from a simplex
    equiangular tight frame behind an adaptor (`ETFBranch`), both on the feature map before the encoder's last block.
    ``lam`` starts at 0.8, is constant during an epoch and set anew at the end of each (`find_balance`), from the logits
    of all training steps of the epoch, in which those of the fixed classifier are weighted as in the loss. This happens
    before the validation that ends the epoch, so that its figures, the choice of a checkpoint and the ``lam`` in the
    file belong together; a validation in the middle of an epoch has the ``lam`` of that epoch.

    Args:
        num_classes: K, at least 2; the command line takes it from the data.
        delta: Confidence that is aimed at on the training set, as a fraction of the accuracy; tune it for a data set.
        etf_scale: Factor of the logits of the fixed classifier. With 1 they lie in ``[-1, 1]``, and its confidence
            cannot exceed 0.252 for 10 classes or 0.027 for 100.
        adaptor_width: Channels in the middle of the adaptor. Default: half of those of the feature map.
        **options: See `ClassificationModule`; no batch transform, since the loss is no criterion on logits alone. The
            encoder must have blocks, of which the last but one ends in a feature map ``(N, C, H, W)`` with C >= K.

    Attributes:
        lam: ``lam``, a scalar float32 buffer.

    Raises:
        NoBlocksError: If the encoder is not a sequence of blocks.
        ValueError: If an option is impossible, the encoder has no feature map of the shape above, or there is a batch
            transform.

    Deviations:
        The paper's network ends in batch norm, ReLU and pooling, which belong to the linear branch. Here that branch is
        what the encoder has after its last stage: where the stage ends in ReLU, ``l_lin`` is the head on the encoder's
        features, and only the adaptor begins with a batch norm and ReLU of its own. ``lam`` is set before the
        validation, not after it. Under DDP the weights of the classes are those of a process's batch; the search sees
        the rows of all.

    Example:
        >>> BalCAL(10, encoder="digits_cnn")(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    lam: Tensor

    def __init__(
        self,
        num_classes: int,
        delta: float = 0.95,
        etf_scale: float = 1.0,
        adaptor_width: int | None = None,
        **options: Unpack[ModuleOptions],
    ) -> None:
        if options.get("batch_transform") is not None:
            raise ValueError(
                "BalCAL takes no batch_transform: its loss is no criterion on logits that a transform could mix. Leave "
                "it out, or combine the transform with a method whose loss is a criterion."
            )
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; BalCAL needs at least 2.")
        if not 0 < delta <= 1:
            raise ValueError(f"delta is {delta}; it must be in (0, 1] (0.95 in the authors' script for CIFAR-10).")
        if not 0 < etf_scale < math.inf:
            raise ValueError(f"etf_scale is {etf_scale}; it must be above 0 and finite (1 in the authors' code).")
        if adaptor_width is not None and adaptor_width < 1:
            raise ValueError(f"adaptor_width is {adaptor_width}; it must be at least 1, or left out.")
        super().__init__(num_classes, **options)
        channels = _channels(self.encoder)
        if channels < num_classes:
            raise ValueError(
                f"The feature map of the encoder {self.encoder.name!r} has {channels} channels, but {num_classes} "
                "classes need at least as many for an equiangular frame: choose a wider encoder."
            )
        self.delta = delta
        self.etf_branch = ETFBranch(channels, num_classes, adaptor_width or max(1, channels // 2), etf_scale)
        self.register_buffer("lam", torch.tensor(0.8))
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None
        self._waiting: list[tuple[Tensor, ...]] = []
        self._joined: list[tuple[Tensor, ...]] = []

    # --- the network -------------------------------------------------------------------------------------------------

    def branch_logits(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(N, K)`` of the linear and of the fixed classifier; one pass through the encoder."""
        if image.ndim != 4 or image.shape[1] != self.encoder.in_channels:
            self.encoder(image)  # says what is wrong with the images
        *stages, last = self.encoder.blocks
        feature_map = image
        for stage in stages:
            feature_map = stage(feature_map)
        return self.head(last(feature_map).flatten(1)), self.etf_branch(feature_map)

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``(N, K)``, float32 or wider, of images ``(N, C, H, W)``: the mixture of both classifiers."""
        if self.plain_loss:
            return super().forward(image)
        return _mixed(*self.branch_logits(image), self.lam)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss (scalar) and mixed logits ``(N, K)`` of one batch."""
        linear, etf = self.branch_logits(batch.image)
        # A loss in half precision loses the tail of the softmax; autocast would not widen it for every operation.
        with torch.autocast(linear.device.type, enabled=False):
            loss = balcal_loss(linear, etf, batch.label, lam=self.lam)
        self._seen = linear.detach(), etf.detach(), batch.label
        return loss, _mixed(linear, etf, self.lam)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step; its logits are kept for the end of the epoch."""
        loss = super().training_step(batch, batch_idx)
        if not self.plain_loss:
            assert self._seen is not None
            self._keep(*self._seen)
        return loss

    # --- the balance -------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        """Start the epoch's logits from nothing."""
        super().on_train_epoch_start()
        self._forget()

    def on_validation_start(self) -> None:
        """Set ``lam`` before the validation that ends an epoch."""
        super().on_validation_start()
        trainer = self.trainer
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        # the second: a run that ends within an epoch, by max_steps or early stopping
        if trainer.is_last_batch or trainer.fit_loop.epoch_loop.done:
            self._balance()

    def on_train_epoch_end(self) -> None:
        """Set ``lam`` if no validation has ended the epoch; log it and the training metrics."""
        self._balance()
        self.log("train/lambda", self.lam.clone())
        super().on_train_epoch_end()

    def epoch_rows(self) -> dict[str, Tensor]:
        """Logits of both classifiers and labels of the begun epoch."""
        empty = torch.zeros((0, self.num_classes), device=self.device)
        kept = [*self._joined, *self._waiting] or [(empty, empty, empty[:, 0].long())]
        # those of a checkpoint come on the CPU
        linear, etf, labels = _joined([tuple(part.to(self.device) for part in parts) for parts in kept])
        return {"linear": linear, "etf": etf, "labels": labels}

    def restore_epoch_rows(self, rows: dict[str, Tensor]) -> None:
        """Take back the rows of the begun epoch."""
        self._forget()
        self._joined.append((rows["linear"], rows["etf"], rows["labels"]))

    def _keep(self, linear: Tensor, etf: Tensor, labels: Tensor) -> None:
        weighted = etf * batch_class_weights(labels, self.num_classes)
        self._waiting.append((linear.float(), weighted.float(), labels))
        # the search goes through all of it some fifteen times: few large parts, at no time all of it twice
        if len(self._waiting) == JOINED_BATCHES:
            self._joined.append(_joined(self._waiting))
            self._waiting.clear()

    def _forget(self) -> None:
        self._waiting.clear()
        self._joined.clear()

    def _balance(self) -> None:
        """Set ``lam`` from the rows of all processes, if there are any; all processes must call it."""
        parts = [tuple(part.to(self.device) for part in parts) for parts in (*self._joined, *self._waiting)]
        own = torch.tensor([sum(len(labels) for *_, labels in parts)], device=self.device)
        count = int(self.trainer.strategy.reduce(own, reduce_op="sum"))
        if count == 0 or self.plain_loss:
            return

        def figures(lam: float) -> tuple[float, float]:
            sums = self.trainer.strategy.reduce(_sums(parts, lam, self.device), reduce_op="sum")
            correct, confidence = sums.tolist()
            return correct / count, confidence / count

        # Sums are the same on every process, and so are the steps of the search.
        self.lam.fill_(find_balance(figures, self.delta))
        self._forget()


def _mixed(linear: Tensor, etf: Tensor, lam: float | Tensor) -> Tensor:
    return lam * at_least_float32(linear) + (1.0 - lam) * at_least_float32(etf)


def _joined(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


@torch.no_grad()
def _sums(parts: list[tuple[Tensor, ...]], lam: float, device: torch.device) -> Tensor:
    """Number of correct rows and sum of confidences ``(2,)`` float64 of the mixture."""
    none = torch.zeros(0, device=device)
    confidences, correct = [none], [none]
    for linear, etf, labels in parts:
        confidence, predicted = _mixed(linear, etf, lam).softmax(dim=-1).max(dim=-1)
        confidences.append(confidence)
        correct.append((predicted == labels).to(confidence.dtype))
    # one sum over all rows, not one for each part: how they were cut must not show in the last bits
    return torch.stack([torch.cat(columns).sum(dtype=torch.float64) for columns in (correct, confidences)])


@torch.no_grad()
def _channels(encoder: Encoder) -> int:
    """Channels of the feature map before the encoder's last block; leaves no trace in it and draws nothing."""
    blocks = encoder.blocks[:-1]
    config: Any = getattr(encoder.network, "pretrained_cfg", {})
    size = config.get("input_size", (3, 32, 32))[1:]
    weight = next(encoder.parameters())
    with evaluating(encoder):
        feature_map: Tensor = blocks(weight.new_zeros((1, encoder.in_channels, *size)))
    if feature_map.ndim != 4 or getattr(encoder.network, "output_fmt", "NCHW") != "NCHW":
        raise ValueError(
            f"The encoder {encoder.name!r} gives {tuple(feature_map.shape)} before its last block, not a feature map "
            "(N, C, H, W): BalCAL needs a convolutional network, such as resnet18_cifar, resnet50 or convnext_tiny."
        )
    return feature_map.shape[1]
