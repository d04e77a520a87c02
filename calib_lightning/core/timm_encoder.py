"""Every timm model as an encoder."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from calib_lightning.core.encoder_base import Encoder, NoBlocksError
from calib_lightning.core.networks import NETWORKS
from calib_lightning.core.submodules import evaluating

OURS_OF_TIMM = {
    "densenet121": "densenet121_cifar",
    "resnet18": "resnet18_cifar",
    "resnet34": "resnet34_cifar",
    "resnet50": "resnet50_cifar",
    "resnet101": "resnet101_cifar",
    "vgg16_bn": "vgg16_bn_cifar",
}
"""Networks that have a variant for small images here."""


class TimmEncoder(Encoder):
    """A timm model without its classifier; ``forward`` is timm's own and gives its pooled features.

    Args:
        name: A timm model, with or without a tag of pretrained weights (``resnet18``, ``resnet18.a1_in1k``).
        in_channels: C; timm adapts the first convolution of pretrained weights to it.
        pretrained: Whether to download timm's weights.

    Raises:
        ValueError: If timm has no such model or tag.

    Example:
        >>> TimmEncoder("resnet18")(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 512])
    """

    def __init__(self, name: str, in_channels: int = 3, pretrained: bool = False) -> None:
        import timm  # here: it takes seconds, and most runs use an encoder of our own

        if name not in timm.list_models() and name not in timm.list_pretrained():
            # timm itself would also take "hf-hub:..." and paths, from which it reads code and weights of anyone
            raise _unknown(name, [*timm.list_models(), *timm.list_pretrained()])
        model: Any = timm.create_model(name, pretrained=pretrained, num_classes=0, in_chans=in_channels)
        # where there is a layer between pooling and classifier, its width is called head_hidden_size
        num_features = getattr(model, "head_hidden_size", None) or model.num_features
        super().__init__(model, name=name, num_features=num_features, in_channels=in_channels)
        self.pretrained = pretrained
        self._classifiers: list[nn.Linear] = []
        if pretrained:
            whole: Any = timm.create_model(name, pretrained=True, in_chans=in_channels)
            classifier = whole.get_classifier()
            # in a list: as a submodule it would be trained and saved
            self._classifiers = [classifier] if isinstance(classifier, nn.Linear) else []
        self._blocks_verified = False

    @property
    def spec(self) -> dict[str, Any]:
        """How to build this encoder again, with `build_encoder`; plain data, safe to change."""
        return {**super().spec, "pretrained": self.pretrained}

    @property
    def blocks(self) -> nn.Sequential:
        """Blocks cut after the stages that timm names; checked once, on first use, against the model's own forward.

        The first block holds the stem (and, where timm does not name the stem, the first stage), the last one all
        that follows the last stage: final convolution and norm, pooling. The containers are new on each use, only what
        is in them belongs to the encoder.

        Raises:
            NoBlocksError: If timm names no stages, if a parameter is in none of the blocks, or if running them in order
                does not give what the model gives.
        """
        # not kept: as a submodule it would list every parameter twice, elsewhere it would miss replaced modules
        blocks = nn.Sequential(*(nn.Sequential(*block) for block in self._cut()))
        if not self._blocks_verified:
            self._verify(blocks)
            self._blocks_verified = True
        for container in (blocks, *blocks):
            container.training = self.training
        return blocks

    def forward(self, image: Tensor) -> Tensor:
        """Features ``(N, d)`` of images ``(N, C, H, W)``: timm's own forward.

        Raises:
            ValueError: If the images do not have `in_channels` channels, or the model does not pool its features.
        """
        features = super().forward(image)
        if features.shape[1] != self.num_features:
            raise ValueError(
                f"The timm model {self.name!r} gives {features.shape[1]} numbers for each image and not its "
                f"{self.num_features} features: it does not pool them. Choose a model that ends in a pooling layer."
            )
        return features

    def check_images(self, shape: Sequence[int]) -> None:
        """Find out whether the encoder takes images of a shape, and warn of a network for much larger ones.

        Args:
            shape: ``(C, H, W)``.

        Raises:
            ValueError: If it does not.
        """
        super().check_images(shape)
        config: Any = getattr(self.network, "pretrained_cfg", None) or {}
        made_for = config.get("input_size", (3, 224, 224))[-1]
        given = min(shape[1:])
        if 2 * given < made_for:
            ours = OURS_OF_TIMM.get(self.name.partition(".")[0])
            rank_zero_warn(
                f"timm's {self.name} is made for images of {made_for} pixels and gets {given}: its stem shrinks "
                f"them until little is left. The network of the papers on small images is {ours or 'another'}. "
                f"{'Use --model.encoder=' + ours if ours else 'Ours are ' + ', '.join(sorted(NETWORKS))}."
            )

    @torch.no_grad()
    def hand_over_classifier(self, linear: nn.Linear) -> bool:
        """Give the pretrained weights of the classifier to a layer of the same size, and forget them.

        Args:
            linear: Maps features to K classes; K must be that of the weights, as 1,000 for ImageNet.

        Returns:
            Whether there were such weights.
        """
        found = self._classifiers.pop() if self._classifiers else None
        if found is None or found.weight.shape != linear.weight.shape or found.bias is None:
            return False
        linear.load_state_dict(found.state_dict())
        return True

    def _cut(self) -> Iterator[list[nn.Module]]:
        try:
            stages = [stage["module"] for stage in getattr(self.network, "feature_info", ())]
        except (KeyError, TypeError):
            stages = []
        if not stages:
            raise self._no_blocks("timm does not name its stages")
        block: list[nn.Module] = []
        for path, module in _parts(self.network, stages):
            block.append(module)
            if path in stages:
                yield block
                block = []
        yield block

    @torch.no_grad()
    def _verify(self, blocks: nn.Sequential) -> None:
        inside = {id(p) for p in blocks.parameters()}
        # a check on random weights alone would miss a position embedding that starts at zero
        outside = [name for name, p in self.network.named_parameters() if id(p) not in inside]
        if outside:
            raise self._no_blocks(f"its parameter {outside[0]} belongs to the model itself and not to a stage")
        reference = next(self.network.parameters())
        config: Any = getattr(self.network, "pretrained_cfg", {})
        size = config.get("input_size", (3, 224, 224))[1:]
        # its own generator: asking for the blocks must not change the run's random numbers
        image = torch.randn(2, self.in_channels, *size, generator=torch.Generator().manual_seed(0)).to(reference)
        try:
            with evaluating(self.network):
                expected = self.network(image)
                found = blocks(image).flatten(1)
        except Exception as error:
            raise self._no_blocks(f"its parts do not run in order ({type(error).__name__}: {error})") from error
        if found.shape != expected.shape:
            raise self._no_blocks(f"its parts in order give {tuple(found.shape)}, the model {tuple(expected.shape)}")
        difference, scale = (found - expected).abs().max().item(), expected.abs().max().item()
        if not difference <= 1e-6 * scale or scale == 0:
            raise self._no_blocks(f"its parts in order differ from the model by {difference:g} in outputs of {scale:g}")

    def _no_blocks(self, reason: str) -> NoBlocksError:
        return NoBlocksError(
            f"The timm model {self.name!r} cannot be cut into blocks: {reason}. It trains as it is; for a method that "
            "works between blocks choose a convolutional network, such as resnet18_cifar, resnet50 or convnext_tiny."
        )


def _unknown(name: str, names: list[str]) -> ValueError:
    # those with more to their name first: "resnet110" is two networks of ours, but closer to resnet101 of timm
    longer = [own for own in sorted(NETWORKS) if own.startswith(f"{name}_")]
    near = longer or difflib.get_close_matches(name, [*NETWORKS, *names], n=3)
    suggestion = f" Did you mean {' or '.join(near)}?" if near else ""
    return ValueError(
        f"There is no encoder called {name!r}.{suggestion} Ours are {', '.join(sorted(NETWORKS))}; the others are the "
        "names in timm.list_models()."
    )


def _parts(module: nn.Module, stages: list[str], prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The module's children in order, with those that contain a stage replaced by their own children."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if path not in stages and any(stage.startswith(f"{path}.") for stage in stages):
            yield from _parts(child, stages, f"{path}.")
        else:
            yield path, child
