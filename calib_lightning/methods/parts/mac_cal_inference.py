"""Masked inference: what random masks do to a trained classifier that was never trained with any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from calib_lightning.methods.parts.mac_cal_head import MaskedLinear
from calib_lightning.utils.seeding import derive_seed


@contextmanager
def masked_inference(classifier: nn.Module, keep: float, seed: int = 0) -> Iterator[None]:
    """Mask a trained classifier at random while the context lasts, without retraining it (Ni et al., 2025, Fig. 1).

    Each weight matrix of its linear layers becomes ``M * W``, ``M ~ Bernoulli(keep)``, and is restored at the end. The
    masks are a function of the seed and the same for all images; evaluate with several seeds to see the spread. Biases
    are not masked, and nothing is scaled: of a classifier of `MaskedClassifier`, ``W`` are the weights as deployed.

    Args:
        classifier: The head of any network, such as ``module.head``; evaluate without ``ckpt_path``, which would load
            other weights.
        keep: Keep rate, in ``[0, 1]``; the paper's masking ratio is ``1 - keep``.
        seed: Seed of the masks.

    Yields:
        Nothing.

    Raises:
        ValueError: If ``keep`` is out of range, or the classifier has no linear layer, or one whose weight is computed
            from others, as by ``weight_norm``.

    Deviations:
        The paper does not say how often masks are drawn; here, once for a whole evaluation.

    Example:
        >>> head = nn.Linear(4, 2, bias=False)
        >>> with masked_inference(head, keep=0.0):
        ...     head(torch.ones(1, 4)).tolist()
        [[0.0, 0.0]]
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep is {keep}; it must be in [0, 1], the share of weights that is kept.")
    layers = [layer for layer in classifier.modules() if isinstance(layer, nn.Linear | MaskedLinear)]
    if not layers:
        raise ValueError(
            f"The classifier is a {type(classifier).__name__} without a linear layer; it must have one to be masked. "
            "Pass the head of the network, such as module.head."
        )
    if computed := [layer for layer in layers if "weight" not in layer.state_dict()]:
        raise ValueError(
            f"The weight of a {type(computed[0]).__name__} is computed from others (weight_norm or another "
            "parametrization); it must be a parameter, or the next forward pass would undo the mask. First call "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') or remove_weight_norm(layer)."
        )
    kept = [layer.weight.detach().clone() for layer in layers]
    try:
        with torch.no_grad():
            for number, layer in enumerate(layers):
                generator = torch.Generator().manual_seed(derive_seed(seed, number))  # on the CPU: for any device
                mask = torch.rand(layer.weight.shape, generator=generator) < keep
                layer.weight.mul_(mask.to(layer.weight.device))
        yield
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers, kept, strict=True):
                layer.weight.copy_(weight)
