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
"""Networks of which this package has a variant for small images."""


class TimmEncoder(Encoder):
    """A timm model without its classifier; timm adapts pretrained weights to ``in_channels``."""

    def __init__(self, name: str, in_channels: int = 3, pretrained: bool = False) -> None:
        import timm  # imported here: it takes seconds, and most runs use one of our own encoders

        if name not in timm.list_models() and name not in timm.list_pretrained():
            # timm would also accept "hf-hub:..." and paths, and load anyone's code and weights
            raise _unknown(name, [*timm.list_models(), *timm.list_pretrained()])
        model: Any = timm.create_model(name, pretrained=pretrained, num_classes=0, in_chans=in_channels)
        # head_hidden_size is the width of a layer between pooling and classifier
        num_features = getattr(model, "head_hidden_size", None) or model.num_features
        super().__init__(model, name=name, num_features=num_features, in_channels=in_channels)
        self.pretrained = pretrained
        self._classifiers: list[nn.Linear] = []
        if pretrained:
            whole: Any = timm.create_model(name, pretrained=True, in_chans=in_channels)
            classifier = whole.get_classifier()
            # in a list: a submodule would be trained and saved
            self._classifiers = [classifier] if isinstance(classifier, nn.Linear) else []
        self._blocks_verified = False

    @property
    def spec(self) -> dict[str, Any]:
        """Arguments for `build_encoder` that rebuild this encoder; plain data, safe to change."""
        return {**super().spec, "pretrained": self.pretrained}

    @property
    def blocks(self) -> nn.Sequential:
        """Blocks cut after the stages that timm names; compared once, on first use, with the model's own forward.

        The first block holds the stem (and the first stage, if timm does not name the stem), the last everything after
        the last stage. The containers are new on each access; only their contents belong to the encoder.
        """
        # not stored: a submodule would list every parameter twice, anything else would miss replaced modules
        blocks = nn.Sequential(*(nn.Sequential(*block) for block in self._cut()))
        if not self._blocks_verified:
            self._verify(blocks)
            self._blocks_verified = True
        for container in (blocks, *blocks):
            container.training = self.training
        return blocks

    def forward(self, image: Tensor) -> Tensor:
        """Pooled features ``(N, d)`` of images ``(N, C, H, W)``: timm's own forward."""
        features = super().forward(image)
        if features.shape[1] != self.num_features:
            raise ValueError(
                f"The timm model {self.name!r} returns {features.shape[1]} values per image; it must return its "
                f"{self.num_features} pooled features. Choose a model that ends in a pooling layer."
            )
        return features

    def check_images(self, shape: Sequence[int]) -> None:
        """Check that the encoder accepts images ``(C, H, W)``; warn if the network is for much larger ones."""
        super().check_images(shape)
        config: Any = getattr(self.network, "pretrained_cfg", None) or {}
        made_for = config.get("input_size", (3, 224, 224))[-1]
        given = min(shape[1:])
        if 2 * given < made_for:
            ours = OURS_OF_TIMM.get(self.name.partition(".")[0])
            rank_zero_warn(
                f"The images have {given} pixels, but timm's {self.name} is designed for {made_for}: its stem reduces "
                f"them to almost nothing. Papers on small images use {ours or 'another network'}. "
                f"{'Use --model.encoder=' + ours if ours else 'Our encoders are ' + ', '.join(sorted(NETWORKS))}."
            )

    @torch.no_grad()
    def hand_over_classifier(self, linear: nn.Linear) -> bool:
        """Move the pretrained classifier's weights into a layer of the same size; return whether there were any."""
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
        # comparing outputs alone would miss a position embedding that is initialised to zero
        outside = [name for name, p in self.network.named_parameters() if id(p) not in inside]
        if outside:
            raise self._no_blocks(f"its parameter {outside[0]} belongs to the model itself, not to a stage")
        reference = next(self.network.parameters())
        config: Any = getattr(self.network, "pretrained_cfg", {})
        size = config.get("input_size", (3, 224, 224))[1:]
        # a separate generator: accessing the blocks must not change the run's random numbers
        image = torch.randn(2, self.in_channels, *size, generator=torch.Generator().manual_seed(0)).to(reference)
        try:
            with evaluating(self.network):
                expected = self.network(image)
                found = blocks(image).flatten(1)
        except Exception as error:
            raise self._no_blocks(f"its parts do not run in sequence ({type(error).__name__}: {error})") from error
        if found.shape != expected.shape:
            raise self._no_blocks(
                f"its parts in sequence return {tuple(found.shape)}, the model {tuple(expected.shape)}"
            )
        difference, scale = (found - expected).abs().max().item(), expected.abs().max().item()
        if not difference <= 1e-6 * scale or scale == 0:
            raise self._no_blocks(
                f"its parts in sequence differ from the model by {difference:g} in outputs of {scale:g}"
            )

    def _no_blocks(self, reason: str) -> NoBlocksError:
        return NoBlocksError(
            f"The timm model {self.name!r} cannot be split into blocks: {reason}. It can be trained as it is; for a "
            "method that works between blocks, choose a convolutional network such as resnet18_cifar, resnet50 or "
            "convnext_tiny."
        )


def _unknown(name: str, names: list[str]) -> ValueError:
    # prefixes first: "resnet110" is a prefix of two of our networks, but closer to timm's resnet101
    longer = [own for own in sorted(NETWORKS) if own.startswith(f"{name}_")]
    near = longer or difflib.get_close_matches(name, [*NETWORKS, *names], n=3)
    suggestion = f" Did you mean {' or '.join(near)}?" if near else ""
    return ValueError(
        f"encoder is {name!r}, which does not exist.{suggestion} Our encoders are {', '.join(sorted(NETWORKS))}; "
        "timm.list_models() lists the others."
    )


def _parts(module: nn.Module, stages: list[str], prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The module's children in order, with those that contain a stage replaced by their own children."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if path not in stages and any(stage.startswith(f"{path}.") for stage in stages):
            yield from _parts(child, stages, f"{path}.")
        else:
            yield path, child
