"""Networks for small images, each a sequence of blocks: stem, stages, pool.

Every family has one builder. The blocks of ResNets, DenseNets and VGG are torchvision's; only the stem differs, which
keeps the full resolution of images of 28 to 64 pixels. Pre-activation networks, including wide ResNets, use
`PreActBlock`. Convolutions are initialised as in He et al. (ICCV 2015) with fan-out; `digits_cnn` uses PyTorch's
default.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F


class Network(NamedTuple):
    """Builder and feature size of one of our networks."""

    build: Callable[[int], nn.Sequential]
    num_features: int
    in_channels: int = 3


def _he(network: nn.Sequential) -> nn.Sequential:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


def _digits_cnn(in_channels: int) -> nn.Sequential:
    def convolution(inputs: int, outputs: int, *more: nn.Module) -> nn.Sequential:
        layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU(), *more)

    return nn.Sequential(
        OrderedDict(
            stem=convolution(in_channels, 24),
            stage1=convolution(24, 48, nn.MaxPool2d(2)),
            stage2=convolution(48, 96, nn.MaxPool2d(2)),
            pool=nn.AdaptiveAvgPool2d(1),
        )
    )


# --- residual networks (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016) -------------------------


class PadShortcut(nn.Module):
    """A shortcut without parameters ("option A"): every other pixel, padded with ``channels`` zero channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, C + channels, H/2, W/2)``, rounded up."""
        before = self.channels // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.channels - before))


def _resnet(
    in_channels: int, *, bottleneck: bool = False, depths: Sequence[int], widths: Sequence[int], padded: bool = False,
    pool: int = 1,
) -> nn.Sequential:  # fmt: skip
    """Torchvision's residual blocks after a 3x3 stem of stride 1, without max-pooling."""
    from torchvision.models.resnet import BasicBlock, Bottleneck

    block: Any = Bottleneck if bottleneck else BasicBlock
    stem = 64 if len(widths) == 4 else 16
    blocks = OrderedDict[str, nn.Module](
        stem=nn.Sequential(
            nn.Conv2d(in_channels, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU(inplace=True)
        )
    )
    inputs = stem
    for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        outputs, layers = width * block.expansion, []
        for stride in [1 if i == 0 else 2, *[1] * (depth - 1)]:
            shortcut: nn.Module | None = None
            if stride != 1 or inputs != outputs:
                shortcut = PadShortcut(outputs - inputs) if padded else _projection(inputs, outputs, stride)
            layers.append(block(inputs, width, stride, shortcut))
            inputs = outputs
        blocks[f"stage{i + 1}"] = nn.Sequential(*layers)
    blocks["pool"] = nn.AdaptiveAvgPool2d(pool)
    return _he(nn.Sequential(blocks))


def _projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


# --- pre-activation networks (He et al., ECCV 2016; Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016) -----


class PreActBlock(nn.Module):
    """Norm, ReLU and convolution, twice; where the shape changes, the shortcut is a 1x1 convolution.

    ``dropout`` acts between the convolutions; with ``activated``, a 1x1 shortcut starts after the first ReLU, as in the
    authors' code.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, bias: bool = False, dropout: float = 0.0, activated: bool = True
    ) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=bias)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=bias)
        self.activated = activated and not same

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, inputs, H, W)`` to ``(N, outputs, H/stride, W/stride)``, rounded up."""
        active = F.relu(self.norm1(x), inplace=True)
        inner = self.dropout(F.relu(self.norm2(self.conv1(active)), inplace=True))
        added: Tensor = self.shortcut(active if self.activated else x) + self.conv2(inner)
        return added


def _preact(
    in_channels: int, *, stem: int, depths: Sequence[int], widths: Sequence[int], **variant: Any
) -> nn.Sequential:
    first = nn.Conv2d(in_channels, stem, 3, padding=1, bias=variant.get("bias", False))
    blocks, inputs = OrderedDict[str, nn.Module](stem=first), stem
    for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        layers = [PreActBlock(inputs, width, 1 if i == 0 else 2, **variant)]
        layers += [PreActBlock(width, width, 1, **variant) for _ in range(depth - 1)]
        blocks[f"stage{i + 1}"] = nn.Sequential(*layers)
        inputs = width
    blocks["pool"] = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1))
    return _he(nn.Sequential(blocks))


# --- densely connected networks (Huang et al., CVPR 2017) -------------------------------------------------------------


def _densenet(in_channels: int, *, growth: int, depths: Sequence[int]) -> nn.Sequential:
    """Torchvision's dense blocks and transitions after a 3x3 convolution of stride 1."""
    from torchvision.models.densenet import DenseNet

    sizes: Any = tuple(depths)  # torchvision's annotation asks for four
    parts: Any = DenseNet(growth_rate=growth, block_config=sizes, num_init_features=2 * growth).features
    blocks = OrderedDict[str, nn.Module](stem=nn.Conv2d(in_channels, 2 * growth, 3, padding=1, bias=False))
    for i in range(1, len(depths)):
        blocks[f"stage{i}"] = nn.Sequential(getattr(parts, f"denseblock{i}"), getattr(parts, f"transition{i}"))
    blocks[f"stage{len(depths)}"] = nn.Sequential(getattr(parts, f"denseblock{len(depths)}"))
    blocks["pool"] = nn.Sequential(parts.norm5, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1))
    return _he(nn.Sequential(blocks))


# --- VGG (Simonyan and Zisserman, ICLR 2015), with batch norm ---------------------------------------------------------


def _vgg16_bn(in_channels: int) -> nn.Sequential:
    blocks, inputs = OrderedDict[str, nn.Module](), in_channels
    for i, (depth, width) in enumerate(zip((2, 2, 3, 3, 3), (64, 128, 256, 512, 512), strict=True)):
        layers: list[nn.Module] = []
        for _ in range(depth):
            convolution = nn.Conv2d(inputs, width, 3, padding=1)
            layers.append(nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)))
            inputs = width
        blocks["stem" if i == 0 else f"stage{i}"] = nn.Sequential(*layers, nn.MaxPool2d(2))
    blocks["pool"] = nn.AdaptiveAvgPool2d(1)
    return _he(nn.Sequential(blocks))


# --- the names --------------------------------------------------------------------------------------------------------


def _wide(depth: int, width: int, **variant: Any) -> Network:
    widths = [16 * width, 32 * width, 64 * width]
    return Network(partial(_preact, stem=16, depths=[(depth - 4) // 6] * 3, widths=widths, **variant), widths[-1])


_FOUR = [64, 128, 256, 512]
_THREE = [16, 32, 64]


def _deep(depths: Sequence[int], bottleneck: bool, pool: int = 1) -> Network:
    features = (2048 if bottleneck else 512) * pool**2
    return Network(partial(_resnet, bottleneck=bottleneck, depths=depths, widths=_FOUR, pool=pool), features)


def _classic(depth: int) -> Network:
    return Network(partial(_resnet, depths=[(depth - 2) // 6] * 3, widths=_THREE, padded=True), 64)


NETWORKS = {
    "digits_cnn": Network(_digits_cnn, 96, in_channels=1),
    "resnet18_cifar": _deep([2, 2, 2, 2], bottleneck=False),
    "resnet34_cifar": _deep([3, 4, 6, 3], bottleneck=False),
    "resnet50_cifar": _deep([3, 4, 6, 3], bottleneck=True),
    "resnet101_cifar": _deep([3, 4, 23, 3], bottleneck=True),
    "resnet110_bottleneck": _deep([3, 4, 26, 3], bottleneck=True),
    "resnet50_tiny_imagenet": _deep([3, 4, 6, 3], bottleneck=True, pool=2),
    **{f"resnet{depth}_classic": _classic(depth) for depth in (20, 32, 44, 56, 110)},
    "preact_resnet18": Network(partial(_preact, stem=64, depths=[2, 2, 2, 2], widths=_FOUR), 512),
    "preact_resnet110": Network(partial(_preact, stem=16, depths=[18, 18, 18], widths=_THREE), 64),
    "wrn26_10": Network(partial(_resnet, depths=[4, 4, 4], widths=[160, 320, 640]), 640),
    "wrn28_10": _wide(28, 10),
    "wrn40_2": _wide(40, 2),
    # as trained by the authors of Neural Clamping
    "wrn40_10": _wide(40, 10, bias=True, dropout=0.5, activated=False),
    "densenet121_cifar": Network(partial(_densenet, growth=32, depths=[6, 12, 24, 16]), 1024),
    "densenet_bc100": Network(partial(_densenet, growth=12, depths=[16, 16, 16]), 342),
    "vgg16_bn_cifar": Network(_vgg16_bn, 512),
}
