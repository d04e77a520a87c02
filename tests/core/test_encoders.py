"""Encoders: blocks that are the encoder, options, names; what our networks are is in test_networks.py."""

import copy
import importlib.util
import pickle
import sys

import numpy as np
import pytest
import timm
import torch
from sklearn.datasets import load_digits
from torch import nn

from calib_lightning.core.encoders import NoBlocksError, build_encoder, encoder_names
from calib_lightning.core.heads import LinearHead

# one of each builder of ours, with the smallest image that leaves more than a pixel before its pooling
OWN = {
    "digits_cnn": 8,
    "resnet18_cifar": 16,
    "resnet20_classic": 8,
    "resnet50_tiny_imagenet": 24,
    "wrn40_2": 8,
    "densenet_bc100": 8,
    "vgg16_bn_cifar": 64,
}
# timm's small networks, one of each way in which a model lays out its stages
WITH_BLOCKS = [
    "test_resnet",
    "test_convnext",
    "test_efficientnet",
    "mobilenetv3_small_050",
    "densenet121",
    "regnetx_002",
]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def randomise(module: nn.Module) -> None:
    """Give every norm its own scale and shift, so that a norm left out or exchanged shows."""
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d | nn.LayerNorm) and part.weight is not None:
            for tensor in (part.weight.data, part.bias.data):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)


def test_encoder_names_are_ours():
    assert set(OWN) < set(encoder_names())
    # a name of timm's would hide its model
    assert not set(encoder_names()) & set(timm.list_models())


def test_digits_cnn_is_small():
    encoder = build_encoder("digits_cnn")
    assert 30_000 < count(encoder) < 100_000
    assert encoder.in_channels == 1


@pytest.mark.parametrize("name", OWN)
def test_own_encoders_are_their_blocks(name):
    torch.manual_seed(0)
    encoder = build_encoder(name)
    image = torch.randn(4, encoder.in_channels, OWN[name], OWN[name], requires_grad=True)
    x = image
    for block in encoder.blocks:
        x = block(x)
    features = encoder(image)
    assert features.shape == (4, encoder.num_features)
    torch.testing.assert_close(x.flatten(1), features, rtol=0, atol=0)
    features.square().sum().backward()
    assert image.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


@pytest.mark.parametrize("name", [*OWN, "test_resnet"])
@pytest.mark.parametrize("in_channels", [1, 2])
def test_in_channels_is_what_the_encoder_takes(name, in_channels):
    encoder = build_encoder({"name": name, "in_channels": in_channels}).eval()
    assert encoder(torch.zeros(2, in_channels, 32, 32)).shape == (2, encoder.num_features)
    message = rf"4 channels.*{name}.*\(N, {in_channels}, H, W\).*encoder: {{name: {name}, in_channels: 4}}"
    with pytest.raises(ValueError, match=message):
        encoder(torch.zeros(2, 4, 32, 32))
    with pytest.raises(ValueError, match="3 dimensions"):
        encoder(torch.zeros(in_channels, 32, 32))


# --- timm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_timm_blocks_are_the_model(name):
    encoder = build_encoder(name)
    randomise(encoder)
    names = list(encoder.state_dict())
    encoder.blocks  # noqa: B018  asked for once, so that the comparisons below see its traces
    assert list(encoder.state_dict()) == names
    assert len(list(encoder.parameters())) == len(set(encoder.parameters()))
    assert set(encoder.blocks.parameters()) == set(encoder.parameters())
    assert len(encoder.blocks) >= 5
    image = torch.randn(2, 3, 64, 64)
    encoder.eval()
    # the same weights in a model that timm made and ours never touched
    reference = timm.create_model(name, num_classes=0).eval()
    reference.load_state_dict(encoder.network.state_dict())
    with torch.no_grad():
        features = encoder(image)
        torch.testing.assert_close(features, reference(image), rtol=0, atol=0)
        torch.testing.assert_close(encoder.blocks(image).flatten(1), features, rtol=1e-6, atol=1e-6)
    assert features.shape == (2, encoder.num_features)


def test_timm_blocks_share_modules_and_follow_them():
    encoder = build_encoder("test_resnet")
    encoder.blocks[1].requires_grad_(False)
    encoder.blocks[1].eval()
    frozen = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(name.startswith("network.layer1.") for name in frozen)
    assert not any(m.training for m in encoder.network.layer1.modules())
    assert encoder.network.layer2.training
    assert encoder.train() is encoder
    assert all(m.training for m in encoder.blocks.modules())
    encoder.eval()
    assert not any(m.training for m in encoder.blocks.modules())
    # a module that is replaced after the first use, as for synchronised batch norm, is replaced in the blocks
    encoder.network.bn1 = nn.BatchNorm2d(encoder.network.bn1.num_features)
    assert any(m is encoder.network.bn1 for m in encoder.blocks.modules())


def test_asking_for_timm_blocks_changes_nothing():
    encoder = build_encoder("test_resnet")
    encoder.network.layer1.eval()
    before = copy.deepcopy(encoder.state_dict())
    modes = [m.training for m in encoder.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    encoder.blocks  # noqa: B018
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert [m.training for m in encoder.modules()] == modes
    for name, tensor in encoder.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("test_vit", "parameter cls_token"), ("mixer_s32_224", r"in sequence return \(2, 25088\), the model \(2, 512\)")],
)
def test_timm_models_that_are_no_sequence_say_so_and_still_train(name, reason):
    encoder = build_encoder(name)
    with pytest.raises(NoBlocksError, match=f"{name}.*{reason}") as error:
        encoder.blocks  # noqa: B018
    assert isinstance(error.value, RuntimeError)
    assert encoder.training
    size = encoder.network.pretrained_cfg["input_size"][1]
    features = encoder(torch.randn(2, 3, size, size))
    assert features.shape == (2, encoder.num_features)
    features.square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: setattr(model, "feature_info", []), "does not name its stages"),
        (lambda model: setattr(model, "feature_info", [{"module": "layer1"}, {"module": "layer1.0.conv1"}]), None),
        (lambda model: setattr(model, "global_pool", nn.Linear(7, 3)), "parts do not run in sequence"),
        (lambda model: model.register_forward_hook(lambda m, x, y: 1.001 * y), "differ from the model"),
        (lambda model: model.register_parameter("shift", nn.Parameter(torch.zeros(1))), "parameter shift"),
    ],
)
def test_every_reason_for_having_no_blocks(change, reason):
    encoder = build_encoder("test_resnet")
    change(encoder.network)
    if reason is None:
        assert encoder.blocks
        return
    with pytest.raises(NoBlocksError, match=reason):
        encoder.blocks  # noqa: B018


def test_a_timm_model_that_does_not_pool_is_refused(monkeypatch):
    encoder = build_encoder("test_resnet")
    encoder.network.global_pool = nn.Identity()
    with pytest.raises(ValueError, match=r"must return its .* pooled features"):
        encoder.eval()(torch.zeros(1, 3, 64, 64))


# --- copies, specs, names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits_cnn", "test_resnet"])
def test_copies_are_complete_and_independent(name):
    encoder = build_encoder(name)
    encoder.blocks  # noqa: B018
    image = torch.randn(2, encoder.in_channels, 64, 64)
    expected = encoder.eval()(image)
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert other.spec == encoder.spec
        assert set(other.blocks.parameters()) == set(other.parameters())
        assert not set(other.parameters()) & set(encoder.parameters())
        torch.testing.assert_close(other(image), expected, rtol=0, atol=0)
        with torch.no_grad():
            next(other.blocks.parameters()).zero_()
        assert not torch.equal(other(image), expected)
        torch.testing.assert_close(encoder(image), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("given", "spec"),
    [
        ("digits_cnn", {"name": "digits_cnn", "in_channels": 1}),
        ({"name": "digits_cnn", "in_channels": 3, "pretrained": False}, {"name": "digits_cnn", "in_channels": 3}),
        ("test_resnet", {"name": "test_resnet", "in_channels": 3, "pretrained": False}),
        (
            {"name": "test_resnet.r160_in1k", "in_channels": 1},
            {"name": "test_resnet.r160_in1k", "in_channels": 1, "pretrained": False},
        ),
    ],
)
def test_spec_round_trip(given, spec):
    encoder = build_encoder(given)
    assert encoder.spec == spec
    again = build_encoder(encoder.spec)
    assert again.spec == spec
    again.load_state_dict(encoder.state_dict())


@pytest.fixture
def made(monkeypatch):
    """What timm was asked for and what it made, without downloading: (pretrained, model)."""
    calls, create = [], timm.create_model

    def spy(name, pretrained=False, **kwargs):
        model = create(name, pretrained=False, **kwargs)
        calls.append((pretrained, model))
        return model

    monkeypatch.setattr(timm, "create_model", spy)
    return calls


def test_pretrained_reaches_timm_unless_overridden(made):
    spec = {"name": "test_resnet", "pretrained": True}
    for options, expected in ((spec, True), ("test_resnet", False)):
        made.clear()
        assert build_encoder(options).spec["pretrained"] is expected
        assert {pretrained for pretrained, _ in made} == {expected}
    made.clear()
    assert build_encoder(spec, pretrained=False).spec["pretrained"] is False
    assert {pretrained for pretrained, _ in made} == {False}
    assert spec == {"name": "test_resnet", "pretrained": True}


def test_pretrained_classifiers_go_to_a_layer_of_their_size_once(made):
    spec = {"name": "test_resnet", "pretrained": True}
    encoder = build_encoder(spec)
    linear = nn.Linear(encoder.num_features, 1000)
    (classifier,) = [m for _, model in made for m in model.modules() if isinstance(m, nn.Linear)]
    assert list(encoder.state_dict()) == list(build_encoder("test_resnet").state_dict())
    assert encoder.hand_over_classifier(linear)
    assert torch.equal(linear.weight, classifier.weight)
    assert torch.equal(linear.bias, classifier.bias)
    for other, size in ((encoder, 1000), (build_encoder(spec), 10), (build_encoder("test_resnet"), 1000)):
        linear = nn.Linear(encoder.num_features, size)
        before = copy.deepcopy(linear.state_dict())
        assert not other.hand_over_classifier(linear)
        assert torch.equal(linear.weight, before["weight"])


def test_own_encoders_have_no_pretrained_weights():
    with pytest.raises(ValueError, match=r"'digits_cnn' has no pretrained weights"):
        build_encoder({"name": "digits_cnn", "pretrained": True})
    assert build_encoder({"name": "digits_cnn", "pretrained": True}, pretrained=False).spec["name"] == "digits_cnn"


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("resnet50_cifra", ValueError, "Did you mean resnet50_cifar"),
        ("resnet50x", ValueError, r"Did you mean .*resnet50\b"),
        ("resnet18.nonsense", ValueError, "encoder is 'resnet18.nonsense', which does not exist"),
        ("hf-hub:someone/model", ValueError, "encoder is 'hf-hub:someone/model', which does not exist"),
        ("local-dir:/tmp/model", ValueError, "which does not exist"),
        ("", ValueError, "encoder is '', which does not exist"),
        ({"name": "digits_cnn", "width": 3}, TypeError, r"no option 'width'; allowed options are name, in_channels"),
        ({"name": "test_resnet", "scriptable": True}, TypeError, "no option 'scriptable'"),
        ({"name": "digits_cnn", "in_channels": 0}, ValueError, "in_channels of the encoder is 0"),
        ({"name": "digits_cnn", "in_channels": "3"}, TypeError, "in_channels of the encoder is '3'"),
        ({"name": "digits_cnn", "in_channels": True}, TypeError, "in_channels of the encoder is True"),
        ({"name": "test_resnet", "pretrained": "no"}, TypeError, "pretrained of the encoder is 'no'"),
        ({"in_channels": 3}, TypeError, "it must be a name or"),
        (None, TypeError, "it must be a name or"),
    ],
)
def test_bad_specs_say_what_is_allowed(spec, error, message):
    with pytest.raises(error, match=message):
        build_encoder(spec)


def test_small_encoders_need_neither_timm_nor_torchvision(monkeypatch):
    # None in sys.modules makes an import fail; fresh copies of the modules show what they import at the top
    for name in (*sys.modules, "timm", "torchvision"):
        if name.partition(".")[0] in ("timm", "torchvision"):
            monkeypatch.setitem(sys.modules, name, None)
    fresh = {}
    for name in ("networks", "encoders"):
        spec = importlib.util.find_spec(f"calib_lightning.core.{name}")
        fresh[name] = importlib.util.module_from_spec(spec)
        # encoders take the fresh networks
        monkeypatch.setitem(sys.modules, spec.name, fresh[name])
        spec.loader.exec_module(fresh[name])
    build = fresh["encoders"].build_encoder
    assert {name: build(name).num_features for name in ("digits_cnn", "wrn40_2", "vgg16_bn_cifar")} == {
        "digits_cnn": 96,
        "wrn40_2": 128,
        "vgg16_bn_cifar": 512,
    }
    for name in ("resnet18_cifar", "densenet_bc100", "resnet18"):
        with pytest.raises(ImportError):
            build(name)


def test_digits_cnn_learns_long_tailed_digits():
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    rows = [rng.permutation(np.flatnonzero(labels == k)) for k in range(10)]
    test = np.concatenate([row[:40] for row in rows])
    train = np.concatenate([row[70:][: int(100 * 0.1 ** (k / 9))] for k, row in enumerate(rows)])
    image, label = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)
    torch.manual_seed(0)
    encoder = build_encoder("digits_cnn")
    model = nn.Sequential(encoder, LinearHead(encoder.num_features, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for _ in range(20):
        for batch in torch.from_numpy(rng.permutation(train)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(image[batch]), label[batch]).backward()
            optimizer.step()
        scheduler.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(image[test]).argmax(1) == label[test]).float().mean().item()
    assert accuracy >= 0.93
