"""Our networks: published sizes, outputs equal to independent definitions, blocks that methods can use."""

import copy
import functools
import re
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, create_conv2d
from timm.models.resnetv2 import ResNetV2
from torch import nn
from torchvision.models import densenet121, vgg16_bn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from calib_lightning.core import ClassificationModule, LinearHead, build_encoder
from calib_lightning.core.encoders import encoder_names
from calib_lightning.core.networks import NETWORKS
from calib_lightning.methods import PLP, BalCAL, MITATransform
from calib_lightning.methods.plp import PUBLISHED_CUTS, block_cuts
from calib_lightning.types import Batch

DOCS = Path(__file__).resolve().parents[2] / "docs" / "networks.md"

RESIDUAL = {  # blocks of each stage
    "resnet18_cifar": [2, 2, 2, 2],
    "resnet34_cifar": [3, 4, 6, 3],
    "resnet50_cifar": [3, 4, 6, 3],
    "resnet101_cifar": [3, 4, 23, 3],
    "resnet110_bottleneck": [3, 4, 26, 3],
    "resnet50_tiny_imagenet": [3, 4, 6, 3],
    "resnet20_classic": [3, 3, 3],
    "resnet32_classic": [5, 5, 5],
    "resnet44_classic": [7, 7, 7],
    "resnet56_classic": [9, 9, 9],
    "resnet110_classic": [18, 18, 18],
    "wrn26_10": [4, 4, 4],
    "preact_resnet18": [2, 2, 2, 2],
    "preact_resnet110": [18, 18, 18],
    "wrn28_10": [4, 4, 4],
    "wrn40_2": [6, 6, 6],
    "wrn40_10": [6, 6, 6],
}
DENSE = {"densenet121_cifar": (32, [6, 12, 24, 16]), "densenet_bc100": (12, [16, 16, 16])}
NAMES = [*RESIDUAL, *DENSE, "vgg16_bn_cifar", "digits_cnn"]
PREACT = ("preact_resnet18", "preact_resnet110", "wrn28_10", "wrn40_2", "wrn40_10")
BOTTLENECKS = ("resnet50_cifar", "resnet101_cifar", "resnet110_bottleneck", "resnet50_tiny_imagenet")


def widths(name):
    """Stem and stages, as the papers print them."""
    if len(RESIDUAL[name]) == 4:
        return [64, 64, 128, 256, 512]
    k = int(name.rpartition("_")[2]) if name.startswith("wrn") else 1
    return [16, 16 * k, 32 * k, 64 * k]


@functools.cache
def on_meta(name, **options):
    """The network without values, not to be changed: shapes, names and errors are the same, and it costs nothing."""
    with torch.device("meta"):
        return build_encoder({"name": name, **options}).eval().requires_grad_(False)


def count(module):
    return sum(p.numel() for p in module.parameters())


def tensors(module):
    return len(list(module.parameters()))


def test_every_network_of_ours_is_tested():
    assert sorted(NAMES) == encoder_names() == sorted(NETWORKS)


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "num_classes", "expected"),
    [
        ("resnet50_cifar", 10, 23_520_842),
        ("resnet50_cifar", 100, 23_705_252),
        ("resnet110_bottleneck", 10, 45_864_522),
        ("resnet110_bottleneck", 100, 46_048_932),
        ("resnet110_classic", 10, 1_727_962),
        ("resnet110_classic", 100, 1_733_812),
        ("resnet32_classic", 10, 464_154),
        ("resnet32_classic", 100, 470_004),
        ("wrn26_10", 10, 36_481_434),
        ("wrn26_10", 100, 36_539_124),
        ("wrn40_10", 100, 55_914_020),
        ("densenet121_cifar", 10, 6_956_298),
        ("densenet121_cifar", 100, 7_048_548),
        ("resnet50_tiny_imagenet", 200, 25_138_952),
        ("vgg16_bn_cifar", 10, 14_723_136 + 5_130),
        ("vgg16_bn_cifar", 100, 14_723_136 + 51_300),
        # timm's, with the tags that docs/networks.md names
        ("resnet50.tv_in1k", 1000, 25_557_032),
        ("resnet101.tv_in1k", 1000, 44_549_160),
        ("vit_small_patch16_224.augreg_in21k_ft_in1k", 1000, 22_050_664),
        ("mixer_b16_224.goog_in21k_ft_in1k", 1000, 59_880_472),
    ],
)
def test_published_parameter_counts(name, num_classes, expected):
    encoder = on_meta(name)
    assert count(encoder) + count(LinearHead(encoder.num_features, num_classes)) == expected


@pytest.mark.parametrize(
    ("depth", "expected"), [(18, 11_497_152), (34, 21_605_312), (50, 27_958_976), (101, 46_951_104)]
)
def test_parameter_counts_with_the_projection_of_supervised_contrast(depth, expected):
    encoder = on_meta(f"resnet{depth}_cifar")
    d = encoder.num_features
    assert count(encoder) + count(nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, 128))) == expected


def _size_of_residual(name):
    """Counted by hand: 3x3 convolutions and norms of basic blocks, shortcuts where the width changes."""
    preact, biased = name in PREACT, name == "wrn40_10"
    stem, *stages = widths(name)
    total, inputs = 27 * stem + (0 if preact else 2 * stem) + biased * stem, stem
    for width, depth in zip(stages, RESIDUAL[name], strict=True):
        total += 9 * (inputs * width + (2 * depth - 1) * width**2) + biased * 2 * depth * width
        total += 2 * (inputs + (2 * depth - 1) * width if preact else 2 * depth * width)
        if inputs != width and not name.endswith("classic"):
            total += inputs * width + (0 if preact else 2 * width) + biased * width
        inputs = width
    return total + (2 * inputs if preact else 0)


def _size_of_dense(name):
    k, depths = DENSE[name]
    total, channels = 27 * 2 * k, 2 * k
    for i, depth in enumerate(depths):
        if i > 0:
            total += 2 * channels + channels * (channels // 2)
            channels //= 2
        for _ in range(depth):
            total += 2 * channels + channels * 4 * k + 2 * 4 * k + 9 * 4 * k * k
            channels += k
    return total + 2 * channels


@pytest.mark.parametrize("name", [name for name in RESIDUAL if name not in BOTTLENECKS])
def test_parameter_counts_of_residual_networks_are_those_of_their_layers(name):
    assert count(on_meta(name)) == _size_of_residual(name)


@pytest.mark.parametrize("name", DENSE)
def test_parameter_counts_of_dense_networks_are_those_of_their_layers(name):
    assert count(on_meta(name)) == _size_of_dense(name)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        # He et al. (2016), table 6; Zagoruyko and Komodakis (2016), tables 4 and 5; Huang et al. (2017), table 2
        *zip([f"resnet{depth}_classic" for depth in (20, 32, 44, 56, 110)], (0.27, 0.46, 0.66, 0.85, 1.7), strict=True),
        ("wrn28_10", 36.5),
        ("wrn40_2", 2.2),
        ("densenet_bc100", 0.8),
        # He et al. (ECCV 2016) print none; the network differs from the classic one by its norms and shortcuts
        ("preact_resnet110", 1.7),
    ],
)
def test_parameter_counts_round_to_those_of_the_papers(name, millions):
    encoder = on_meta(name)
    found = (count(encoder) + count(LinearHead(encoder.num_features, 10))) / 1e6
    assert round(found, 2 if millions < 1 and name != "densenet_bc100" else 1) == millions


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_the_docs_has_its_size(name):
    encoder = on_meta(name)
    (row,) = re.findall(rf"^\| `{name}` \| ([\d,]+) \| ([\d,]+) \|", DOCS.read_text(), re.MULTILINE)
    parameters, features = (int(number.replace(",", "")) for number in row)
    assert parameters == count(encoder) + count(LinearHead(encoder.num_features, 10))
    assert features == encoder.num_features


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("in_channels", "size"), [(1, 28), (3, 33)])
@pytest.mark.parametrize("name", NAMES)
def test_num_features_is_the_width_whatever_the_image(name, in_channels, size):
    encoder = on_meta(name, in_channels=in_channels)
    assert encoder.in_channels == in_channels
    image = torch.empty(2, in_channels, size, size, device="meta")
    if name == "vgg16_bn_cifar" and size < 32:
        with pytest.raises(RuntimeError, match="too small"):
            encoder(image)
    else:
        assert encoder(image).shape == (2, encoder.num_features)


@pytest.mark.parametrize("name", NAMES)
def test_stem_keeps_and_stages_halve_the_resolution(name):
    stem, *stages, _ = on_meta(name).blocks
    x = stem(torch.empty(2, NETWORKS[name].in_channels, 32, 32, device="meta"))
    sizes = [x.shape[-1]]
    for stage in stages:
        x = stage(x)
        sizes.append(x.shape[-1])
    if name == "vgg16_bn_cifar":
        assert sizes == [16, 8, 4, 2, 1]
    elif name == "digits_cnn":
        assert sizes == [32, 16, 8]
    elif name in DENSE:
        # the pooling between two dense blocks ends a stage
        assert sizes == [32, *[32 // 2**i for i in range(1, len(stages))], 32 // 2 ** (len(stages) - 1)]
    else:
        assert sizes == [32, *[32 // 2**i for i in range(len(stages))]]


# --- equal to independent definitions ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=NAMES)
def fresh(request):
    """Name and network as it is built; not to be changed."""
    torch.manual_seed(0)
    return request.param, build_encoder(request.param)


def test_initial_weights(fresh):
    name, encoder = fresh
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
        elif isinstance(module, nn.Conv2d) and name != "digits_cnn":
            weight = module.weight.detach().double()
            outputs, _, height, _ = weight.shape
            expected, n = (2 / (outputs * height**2)) ** 0.5, weight.numel()
            # both within five standard errors
            assert abs(weight.std().item() / expected - 1) < 5 / (2 * n) ** 0.5
            assert abs(weight.mean().item()) < 5 * expected / n**0.5
            assert module.bias is None or (module.bias == 0).all()


def randomised(encoder):
    """A copy in float64 whose norms and biases are all different, so that one left out or exchanged shows."""
    encoder = copy.deepcopy(encoder).double()
    generator = torch.Generator().manual_seed(1)

    def fill(tensor, low, high):
        tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))

    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                fill(module.weight, 0.5, 1.5)
                fill(module.bias, -0.5, 0.5)
                fill(module.running_mean, -0.5, 0.5)
                fill(module.running_var, 0.5, 1.5)
            elif isinstance(module, nn.Conv2d) and module.bias is not None:
                fill(module.bias, -0.5, 0.5)
    return encoder


def in_place_of(reference, encoder, *renamings):
    """The reference with our tensors, whose names are translated; all of them, and no others."""
    state = {}
    for name, tensor in encoder.network.state_dict().items():
        for pattern, replacement in renamings:
            name = re.sub(pattern, replacement, name)
        state[name] = tensor
    reference.load_state_dict(state, assign=True)
    return reference


class Layers:
    """Convolutions and norms of a network, given out in their order to a definition that says their shapes."""

    def __init__(self, encoder):
        self.left = [m for m in encoder.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]

    def conv(self, x, width, kernel=3, stride=1, biased=False):
        layer = self.left.pop(0)
        assert layer.weight.shape == (width, x.shape[1], kernel, kernel)
        assert (layer.bias is not None) == biased
        return F.conv2d(x, layer.weight, layer.bias, stride, kernel // 2)

    def norm(self, x):
        layer = self.left.pop(0)
        # a training pass has the statistics of the batch, and leaves ours as they are
        statistics = (None, None) if layer.training else (layer.running_mean, layer.running_var)
        return F.batch_norm(x, *statistics, layer.weight, layer.bias, layer.training, eps=1e-5)


def _torchvision_resnet(encoder, x):
    name, block = encoder.name, Bottleneck if encoder.name in BOTTLENECKS else BasicBlock
    with torch.device("meta"):
        reference = ResNet(block, RESIDUAL[name])
        reference.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    reference.maxpool = reference.fc = nn.Identity()
    if name == "resnet50_tiny_imagenet":
        reference.avgpool = nn.AdaptiveAvgPool2d(2)
    in_place_of(reference, encoder, (r"^stem\.0", "conv1"), (r"^stem\.1", "bn1"), (r"^stage", "layer"))
    return reference.eval()(x)


def _timm_preact_resnet(encoder, x):
    stem, *stages = widths(encoder.name)
    norm = functools.partial(BatchNormAct2d, eps=1e-5)
    with torch.device("meta"):
        reference = ResNetV2(
            RESIDUAL[encoder.name], tuple(stages), num_classes=0, stem_chs=stem, preact=True, basic=True,
            bottle_ratio=1.0, norm_layer=norm, conv_layer=create_conv2d,
        )  # fmt: skip
        reference.stem = nn.Conv2d(3, stem, 3, padding=1, bias=False)
    for i, module in enumerate(reference.stages):
        # made for ImageNet, it may thin out in other stages than we do
        strides = {m.stride for m in module.modules() if isinstance(m, nn.Conv2d)}
        assert strides == ({(1, 1)} if i == 0 else {(1, 1), (2, 2)})
    stage = (r"^stage(\d)\.(\d+)", lambda found: f"stages.{int(found[1]) - 1}.blocks.{found[2]}")
    in_place_of(reference, encoder, stage, (r"shortcut\.", "downsample.conv."), (r"^pool\.0", "norm"))
    return reference.eval()(x)


def _torchvision_densenet(encoder, x):
    with torch.device("meta"):
        reference = densenet121()
        reference.features.conv0 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    features = reference.features
    features.norm0 = features.relu0 = features.pool0 = reference.classifier = nn.Identity()
    in_place_of(
        reference, encoder,
        (r"^stem", "features.conv0"), (r"^stage(\d)\.0", r"features.denseblock\1"),
        (r"^stage(\d)\.1", r"features.transition\1"), (r"^pool\.0", "features.norm5"),
    )  # fmt: skip
    return reference.eval()(x)


def _torchvision_vgg(encoder, x):
    with torch.device("meta"):
        reference = vgg16_bn().features
    ours = encoder.network.state_dict().values()
    reference.load_state_dict(dict(zip(reference.state_dict(), ours, strict=True)), assign=True)
    return reference.eval()(x).mean(dim=(2, 3))


def _post_activation(encoder, x):
    """He et al. (CVPR 2016), section 4.2; a wide one has projections where the classic one has zeros ("option A")."""
    layers, (stem, *stages) = Layers(encoder), widths(encoder.name)
    x = F.relu(layers.norm(layers.conv(x, stem)))
    for i, (width, depth) in enumerate(zip(stages, RESIDUAL[encoder.name], strict=True)):
        for j in range(depth):
            stride = 2 if i > 0 and j == 0 else 1
            y = F.relu(layers.norm(layers.conv(x, width, stride=stride)))
            y = layers.norm(layers.conv(y, width))
            if x.shape[1] == width:
                shortcut = x
            elif encoder.name.startswith("wrn"):
                shortcut = layers.norm(layers.conv(x, width, kernel=1, stride=stride))
            else:
                zeros = torch.zeros(len(x), (width - x.shape[1]) // 2, *y.shape[2:], dtype=x.dtype)
                shortcut = torch.cat([zeros, F.max_pool2d(x, 1, stride=2), zeros], dim=1)
            x = F.relu(y + shortcut)
    assert not layers.left
    return x.mean(dim=(2, 3))


def _neural_clamping(encoder, x):
    """WRN-40-10 of Neural Clamping: biased convolutions, shortcuts from the raw input, dropout between convolutions."""
    layers, (stem, *stages) = Layers(encoder), widths(encoder.name)
    x = layers.conv(x, stem, biased=True)
    for i, (width, depth) in enumerate(zip(stages, RESIDUAL[encoder.name], strict=True)):
        for j in range(depth):
            stride = 2 if i > 0 and j == 0 else 1
            y = layers.conv(F.relu(layers.norm(x)), width, stride=stride, biased=True)
            y = F.dropout(F.relu(layers.norm(y)), 0.5, training=encoder.training)
            y = layers.conv(y, width, biased=True)
            x = y + (x if x.shape[1] == width else layers.conv(x, width, kernel=1, stride=stride, biased=True))
    x = F.relu(layers.norm(x))
    assert not layers.left
    return x.mean(dim=(2, 3))


def _densenet_bc(encoder, x):
    """Huang et al. (2017), section 3: all maps before are the input of a layer; half the channels pass a transition."""
    (k, depths), layers = DENSE[encoder.name], Layers(encoder)
    x = layers.conv(x, 2 * k)
    for i, depth in enumerate(depths):
        if i > 0:
            x = F.avg_pool2d(layers.conv(F.relu(layers.norm(x)), x.shape[1] // 2, kernel=1), 2)
        for _ in range(depth):
            y = layers.conv(F.relu(layers.norm(x)), 4 * k, kernel=1)
            x = torch.cat([x, layers.conv(F.relu(layers.norm(y)), k)], dim=1)
    x = F.relu(layers.norm(x))
    assert not layers.left
    return x.mean(dim=(2, 3))


def _digits_cnn(encoder, x):
    layers = Layers(encoder)
    x = F.relu(layers.norm(layers.conv(x, 24)))
    for width in (48, 96):
        x = F.max_pool2d(F.relu(layers.norm(layers.conv(x, width))), 2)
    assert not layers.left
    return x.mean(dim=(2, 3))


def definition_of(name):
    if name == "wrn40_10":
        return _neural_clamping
    if name in PREACT:
        return _timm_preact_resnet
    if name == "wrn26_10" or name.endswith("_classic"):
        return _post_activation
    others = {
        "densenet121_cifar": _torchvision_densenet,
        "densenet_bc100": _densenet_bc,
        "vgg16_bn_cifar": _torchvision_vgg,
        "digits_cnn": _digits_cnn,
    }
    return others.get(name, _torchvision_resnet)


def equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


def test_outputs_equal_an_independent_definition(fresh):
    name, encoder = fresh
    encoder = randomised(encoder).eval()
    # odd, so that the way in which sizes are halved shows
    size = {"vgg16_bn_cifar": 33, "resnet50_tiny_imagenet": 17}.get(name, 9)
    image = torch.randn(2, encoder.in_channels, size, size, dtype=torch.float64)
    with torch.no_grad():
        features = encoder(image)
        assert features.shape == (2, encoder.num_features)
        # the images are told apart, and much of the width is in use
        assert ((features[0] - features[1]).abs() > 1e-3 * features.abs().max()).double().mean() > 0.3
        equal(features, definition_of(name)(encoder, image))
        blockwise = image
        for block in encoder.blocks:
            blockwise = block(blockwise)
        assert torch.equal(blockwise.flatten(1), features)
        assert torch.equal(encoder.blocks(image).flatten(1), features)


@pytest.mark.parametrize("fresh", ["wrn40_10"], indirect=True)
def test_dropout_stands_between_the_convolutions_of_wrn40_10(fresh):
    encoder = randomised(fresh[1]).train()
    image = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        torch.manual_seed(4)
        expected = _neural_clamping(encoder, image)
        torch.manual_seed(4)
        equal(encoder(image), expected)
    others = [on_meta(name) for name in NAMES if name != "wrn40_10"]
    assert not any(isinstance(m, nn.Dropout) for other in others for m in other.modules())


# --- blocks in methods ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_groups_of_plp_end_where_blocks_end(name):
    with torch.device("meta"):
        module = PLP(10, encoder=name)
    encoder, cuts = module.encoder, block_cuts(module.encoder, module.head)
    assert module.cuts == PUBLISHED_CUTS.get(name, cuts)
    assert cuts == sorted(set(cuts))
    assert cuts[-1] == tensors(encoder) + 2
    ends, seen = [], 0
    for block in encoder.blocks:
        seen += tensors(block)
        ends.append(seen)
    assert set(ends) <= set(cuts)
    # every stage has parameters, so each has a group of its own
    assert len(set(ends[:-1])) == len(encoder.blocks) - 1
    if name in RESIDUAL:
        assert len(cuts) == 1 + sum(RESIDUAL[name]) + (name in PREACT) + 1
    elif name in DENSE:
        # stem, dense blocks with the transitions between them, last norm, classifier
        assert len(cuts) == 1 + (2 * len(DENSE[name][1]) - 1) + 1 + 1


SLOW = ("resnet101_cifar", "resnet110_bottleneck", "resnet50_tiny_imagenet", "wrn26_10", "wrn28_10", "wrn40_10")
FAMILIES = [
    *("digits_cnn", "resnet18_cifar", "resnet50_cifar", "resnet20_classic", "preact_resnet18", "wrn40_2"),
    *("densenet121_cifar", "densenet_bc100", "vgg16_bn_cifar"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
]


def _batch(encoder):
    size = 32 if encoder.name == "vgg16_bn_cifar" else 8
    image = torch.randn(4, encoder.in_channels, size, size)
    return Batch(image, torch.tensor([0, 1, 2, 1]), torch.arange(4))


def _trains(module, batch):
    """A finite loss that reaches every parameter."""
    loss, logits = module.loss(batch)
    assert logits.shape == (4, 10)
    assert loss.isfinite()
    loss.backward()
    missed = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missed
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_mit_a_trains_on_the_blocks(name):
    torch.manual_seed(0)
    module = ClassificationModule(10, encoder=name, batch_transform=MITATransform())
    _trains(module, _batch(module.encoder))


@pytest.mark.parametrize("name", FAMILIES)
def test_balcal_trains_on_the_last_feature_map(name):
    torch.manual_seed(0)
    module = BalCAL(10, encoder=name)
    channels = {"resnet50_tiny_imagenet": 2048}.get(name, module.encoder.num_features)
    assert module.etf_branch.etf.shape == (channels, 10)
    _trains(module, _batch(module.encoder))


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_good_images_pass_and_others_are_refused(name):
    encoder = on_meta(name)
    channels = encoder.in_channels
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in ((32, 32), (33, 47)):
            encoder.check_images((channels, *size))
    with pytest.raises(ValueError, match=rf"with 4 channels; the encoder '{name}' expects \(N, {channels}, H, W\)"):
        encoder.check_images((4, 32, 32))
    if name == "vgg16_bn_cifar":
        with pytest.raises(ValueError, match=r"'vgg16_bn_cifar' cannot process images of 28 x 28 pixels \(.*too small"):
            encoder.check_images((3, 28, 28))
    else:
        encoder.check_images((channels, 28, 28))


@pytest.mark.parametrize(("name", "too_small"), [("densenet_bc100", 3), ("densenet121_cifar", 7), ("digits_cnn", 3)])
def test_images_of_which_nothing_would_be_left_are_refused(name, too_small):
    encoder = on_meta(name)
    encoder.check_images((encoder.in_channels, too_small + 1, too_small + 1))
    with pytest.raises(ValueError, match=f"{name}.* {too_small + 1} x {too_small} pixels"):
        encoder.check_images((encoder.in_channels, too_small + 1, too_small))


@pytest.mark.parametrize(
    ("name", "shape", "fits"),
    [
        ("resnet20_classic", (3, 28, 28), True),
        ("resnet20_classic", (1, 28, 28), False),
        ("densenet_bc100", (3, 3, 3), False),
        ("wrn40_2", (3, 32, 32), True),
        ("test_resnet", (3, 96, 96), True),
        ("test_resnet", (1, 96, 96), False),
    ],
)
def test_checking_images_changes_nothing(name, shape, fits):
    encoder = build_encoder(name).train()
    part = next(m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d))
    part.eval()  # as a stage would leave it
    part.weight.requires_grad_(False)
    held = dict(encoder.named_parameters()) | dict(encoder.named_buffers())
    before, modes = copy.deepcopy(encoder.state_dict()), [m.training for m in encoder.modules()]
    random = torch.get_rng_state()
    with nullcontext() if fits else pytest.raises(ValueError, match=f"(?=.*{name}).*{shape[-1]}"):
        encoder.check_images(shape)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in encoder.modules()] == modes
    now = dict(encoder.named_parameters()) | dict(encoder.named_buffers())
    assert list(now) == list(held)
    assert all(now[key] is held[key] for key in held)
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.state_dict().items())
    assert not part.weight.requires_grad


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("vgg16_bn", "vgg16_bn_cifar"),
        ("densenet121", "densenet121_cifar"),
        ("resnet50", "resnet50_cifar"),
        ("resnet101.tv_in1k", "resnet101_cifar"),
    ],
)
def test_networks_for_large_images_warn_of_small_ones(name, ours):
    encoder = on_meta(name)
    with pytest.warns(UserWarning, match=rf"have 32 pixels, but timm's {name} is designed for 224: .*encoder={ours}\."):
        encoder.check_images((3, 32, 32))
    # the smaller side counts
    with pytest.warns(UserWarning, match="have 48 pixels"):
        encoder.check_images((3, 48, 224))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.check_images((3, 224, 224))
        encoder.check_images((3, 112, 112))


def test_a_network_that_we_have_no_variant_of_names_all_of_ours():
    with pytest.warns(UserWarning, match=f"Our encoders are {', '.join(encoder_names())}"):
        on_meta("convnext_atto").check_images((3, 32, 32))


def test_networks_of_one_size_refuse_others():
    encoder = on_meta("vit_small_patch16_224")
    encoder.check_images((3, 224, 224))
    with pytest.raises(ValueError, match=r"'vit_small_patch16_224' cannot process images of 32 x 32 pixels \(.*224"):
        encoder.check_images((3, 32, 32))
    with pytest.raises(ValueError, match="with 1 channels"):
        encoder.check_images((1, 224, 224))


def test_an_error_without_words_is_named():
    encoder = build_encoder("digits_cnn")

    class Silent(nn.Module):
        def forward(self, x):
            raise AssertionError

    encoder.network.stem = Silent()
    with pytest.raises(ValueError, match=r"8 x 8 pixels \(AssertionError\)"):
        encoder.check_images((1, 8, 8))


def test_images_are_checked_in_evaluation_and_without_values():
    encoder, seen = build_encoder("resnet20_classic").train(), []
    encoder.blocks[1].register_forward_hook(lambda module, x, y: seen.append((module.training, y.device.type)))
    encoder.check_images((3, 32, 32))
    assert seen == [(False, "meta")]


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("resnet110", ["resnet110_bottleneck", "resnet110_classic"]),
        ("resnet20", ["resnet20_classic"]),
        ("resnet56", ["resnet56_classic"]),
        ("wrn_28_10", ["wrn28_10"]),
        ("densenet121_cifr", ["densenet121_cifar"]),
    ],
)
def test_unknown_names_are_answered_with_ours(name, meant):
    with pytest.raises(ValueError, match=f"encoder is '{name}', which does not exist") as error:
        build_encoder(name)
    suggestion, _, rest = str(error.value).partition("?")
    assert suggestion.partition("Did you mean ")[2].split(" or ")[: len(meant)] == meant
    assert f"Our encoders are {', '.join(encoder_names())};" in rest
