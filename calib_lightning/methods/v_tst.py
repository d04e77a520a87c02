"""Variational two-stage training, V-TST (Jordahn and Olmos, ICML 2024)."""

from __future__ import annotations

import math
from typing import Unpack

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.optim import Adam

from calib_lightning.core import ClassificationModule, Head, ModuleOptions, StageSwitch, StageTraining
from calib_lightning.core.stages import own_switches
from calib_lightning.functional import at_least_float32
from calib_lightning.methods.cross_entropy import CrossEntropyLoss
from calib_lightning.methods.tst import bottleneck, checked_switch
from calib_lightning.types import Batch

_NOISE_SEED = 0


def gaussian_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence from the standard normal distribution, per dimension (Jordahn and Olmos, 2024).

    ``KL / Z = -1 / (2 Z) mean_n sum_d (1 + log v_nd - mu_nd^2 - v_nd)``

    Args:
        mu: Means ``(N, Z)``.
        logvar: Logarithms ``log v`` of the variances, ``(N, Z)``.

    Returns:
        Scalar, in nats, at least 0.

    Raises:
        ValueError: If the shapes differ, or are not ``(N, Z)`` with N and Z above 0.

    Example:
        >>> gaussian_kl(torch.ones(2, 4), torch.zeros(2, 4)).item()
        0.5
    """
    if mu.shape != logvar.shape or mu.ndim != 2 or 0 in mu.shape:
        raise ValueError(
            f"mu has shape {tuple(mu.shape)} and logvar {tuple(logvar.shape)}; both must be (N, Z), N and Z above 0."
        )
    mu, logvar = at_least_float32(mu), at_least_float32(logvar)
    # expm1: near v = 1 the plain terms would cancel
    return 0.5 * (mu.square() + logvar.expm1() - logvar).mean()


class VTSTHead(Head):
    """Stochastic classifier of V-TST, on ``z ~ N(mu(h), v(h))`` of Z dimensions.

    ``mu = Linear(3 Z, Z)(relu(Linear(d, 3 Z)(h)))``, ``log v = log sigmoid(Linear(3 Z, Z)(relu(Linear(d, 3 Z)(h))))``,
    so no variance exceeds 1; logits ``Linear(Z, K)(z)``.

    In training, a forward pass draws one ``z = mu + sqrt(v) eps`` per row. In evaluation, the softmax is averaged over
    S draws, and the logits are its logarithm. The S vectors ``eps`` are fixed, shared by all rows and drawn once from a
    separately seeded generator, in pairs ``eps, -eps``: an exported network gives what a test gave, and a row's result
    depends on no other row, batch or process. Without the pairs, one direction would shift all rows alike.

    Args:
        in_features: d, the number of features.
        num_classes: K.
        width: Z.
        samples: S.

    Raises:
        ValueError: If ``width`` or ``samples`` is below 1.

    Example:
        >>> VTSTHead(96, 10).eval()(torch.zeros(2, 96)).exp().sum(dim=1).round(decimals=4)
        tensor([1., 1.], grad_fn=<RoundBackward1>)
    """

    noise: Tensor

    def __init__(self, in_features: int, num_classes: int, width: int = 128, samples: int = 100) -> None:
        super().__init__()
        if samples < 1:
            raise ValueError(f"samples is {samples}; it must be at least 1. 100 is enough for most data.")
        self.mean = bottleneck(in_features, width)
        self.deviation = bottleneck(in_features, width)
        self.classifier = nn.Linear(width, num_classes)
        generator = torch.Generator("cpu").manual_seed(_NOISE_SEED)
        # drawn on the CPU in float32, to be the same everywhere
        half = torch.randn((samples + 1) // 2, width, generator=generator, dtype=torch.float32, device="cpu")
        self.register_buffer("noise", torch.cat([half, -half])[:samples], persistent=False)

    def moments(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Means and logarithms of the variances, both ``(N, Z)``, for features ``(N, d)``."""
        return self.mean(features), F.logsigmoid(self.deviation(features))

    def sample(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``(N, K)`` of one draw per row from the global generator, with its `moments`."""
        mu, logvar = self.moments(features)
        logits: Tensor = self.classifier(mu + (0.5 * logvar).exp() * torch.randn_like(mu))
        return logits, mu, logvar

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(N, K)`` of features ``(N, d)``: one draw in training, the averaged softmax in evaluation."""
        if self.training:
            return self.sample(features)[0]
        mu, logvar = self.moments(features)
        draws = mu + (0.5 * logvar).exp() * self.noise.to(mu.dtype).unsqueeze(1)  # (S, N, Z)
        log_probs = at_least_float32(self.classifier(draws)).log_softmax(dim=-1)
        return log_probs.logsumexp(dim=0) - math.log(len(self.noise))


class VTST(ClassificationModule):
    """Variational two-stage training (Jordahn and Olmos, ICML 2024): a stochastic head on the frozen encoder.

    Paper: Jordahn and Olmos 2024.
    Mechanism: a new head that samples its features from a normal distribution.
    Extra cost: none; the second stage only needs the encoder's forward pass and five small layers.

    The second stage minimises ``cross-entropy + KL / Z`` over the weights of a `VTSTHead`, with one draw per row and
    the divergence `gaussian_kl`.

    Args:
        num_classes: K; the command line takes it from the data.
        switch: When and how the second stage is trained. Default: 40 more epochs, a `VTSTHead`, Adam with lr 1e-4,
            batches of 256. It has no criterion, since the loss needs more than logits.
        **options: See `ClassificationModule`; they apply to the first stage, which the authors train by ``recipe/tst``
            (Adam, lr 1e-4, 600 epochs): the defaults are those of the base. No batch transform.

    Attributes:
        switch: The switch to the second stage.

    Raises:
        TypeError: If ``switch`` is not a `StageSwitch` or builds another head.
        ValueError: If the switch has a criterion, or there is a batch transform.

    Deviations:
        Those of `TST`. Evaluation averages 100 draws that all rows share, in pairs of opposite sign; the authors'
        program draws anew for each row, once by default. That is their average over many draws, without its noise.
        Select the checkpoint by ``val/nll``, which is that of the average; the authors select by the loss of one draw,
        including the divergence.

    Example:
        >>> VTST(10, encoder="digits_cnn").switch.at_epoch
        -40
    """

    def __init__(self, num_classes: int, switch: StageSwitch | None = None, **options: Unpack[ModuleOptions]) -> None:
        if options.get("batch_transform") is not None:
            raise ValueError(
                "VTST does not support batch_transform: the loss of its second stage is not a criterion on logits that "
                "a transform could mix. Train the first stage with the transform in a separate run, and pass its "
                "checkpoint as StageSwitch(0, VTSTHead, init_from=...)."
            )
        super().__init__(num_classes, criterion=CrossEntropyLoss(), **options)
        if switch is None:
            training = StageTraining(lambda params: Adam(params, lr=1e-4), batch_size=256)
            switch = StageSwitch(-40, VTSTHead, training)
        self.switch = checked_switch(self, switch, VTSTHead)
        if switch.training.criterion is not None:
            raise ValueError(
                f"The switch of VTST has the criterion {switch.training.criterion!r}; it must have none, because the "
                "loss of the second stage is cross-entropy + KL / Z. Omit the criterion."
            )

    def configure_callbacks(self) -> list[Callback]:
        """Add the switch."""
        return own_switches(self, self.switch)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss (scalar) and logits ``(N, K)`` of one batch; in the second stage, those of one draw."""
        if not isinstance(self.head, VTSTHead):
            return super().loss(batch)
        logits, mu, logvar = self.head.sample(self.features(batch.image))
        return self.criterion_value(logits, batch.label) + gaussian_kl(mu, logvar), logits
