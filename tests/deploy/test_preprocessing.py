"""Preparation of images, against torchvision's transforms as timm puts them together."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from calib_lightning.data import DigitsDataModule
from calib_lightning.deploy import Preprocessing
from calib_lightning.deploy.images import read_batches
from calib_lightning.utils.images import Frame

# what undoes each orientation of the EXIF standard
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def picture(width, height, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode=mode)


@pytest.mark.parametrize("shape", [(50, 37), (37, 50), (24, 24), (9, 31), (200, 64)])
@pytest.mark.parametrize(
    "config",
    [
        {"crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic"},
        {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"},
        {"crop_pct": 0.9, "crop_mode": "squash", "interpolation": "lanczos"},
        {"crop_pct": 0.95, "crop_mode": "center", "interpolation": "bilinear"},
    ],
)
@pytest.mark.parametrize("size", [(24, 24), (24, 32)])
def test_images_are_prepared_as_by_timm(shape, config, size):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    expected = create_transform(input_size=(3, *size), mean=mean, std=std, **config)(picture(*shape))
    found = Preprocessing(size=size, mean=mean, std=std, **config)(picture(*shape))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_timm_models_say_it(name):
    model = timm.create_model(name, num_classes=3)
    expected = create_transform(**resolve_data_config(model=model))(picture(90, 70))
    torch.testing.assert_close(Preprocessing.from_timm(model)(picture(90, 70)), expected, rtol=0, atol=1e-6)


def test_data_modules_say_it():
    data = DigitsDataModule()
    data.setup()
    prepare = Preprocessing.from_data(data)
    assert prepare.shape == (1, 8, 8)
    batch = next(iter(data.evaluation_loader("test")))
    pixels = (batch.image[0, 0] * prepare.std[0] + prepare.mean[0]).mul(255).round().to(torch.uint8)
    torch.testing.assert_close(prepare(Image.fromarray(pixels.numpy())), batch.image[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_of_eight_bits_becomes_grey_or_rgb(mode):
    image = picture(12, 12).convert(mode)
    for channels in (1, 3):
        prepare = Preprocessing((12, 12), (0.0,) * channels, (1.0,) * channels)
        expected = np.array(image.convert("L" if channels == 1 else "RGB")).reshape(12, 12, channels) / 255
        np.testing.assert_allclose(prepare(image).permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_images_of_more_bits_and_endless_strips_are_refused():
    prepare = Preprocessing((8, 8), (0.5,), (0.5,))
    with pytest.raises(ValueError, match="mode I;16"):
        prepare(Image.fromarray(np.zeros((9, 9), dtype=np.uint16)))
    with pytest.raises(ValueError, match="30000000 x 1"):
        prepare(Image.new("L", (30_000_000, 1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (8,)}, "size is .*height and width"),
        ({"size": 8}, "size is 8; it must be a sequence of numbers"),
        ({"size": (8.5, 8)}, "must be a sequence of whole numbers"),
        ({"mean": (0.1, 0.2)}, "one value each for grey"),
        ({"mean": "ab"}, "mean is 'ab'; it must be a sequence"),
        ({"mean": (float("nan"),)}, "finite"),
        ({"std": (0.0,)}, "std above 0"),
        ({"crop_pct": 0}, r"crop_pct is 0; .*\(0, 1\]"),
        ({"crop_mode": "border"}, "crop_mode is 'border'; it must be one of center, squash"),
        ({"interpolation": "cubic"}, "interpolation is 'cubic'; it must be one of"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**{"size": (8, 8), "mean": (0.5,), "std": (0.5,), **options})


def test_a_network_that_does_not_say_it():
    with pytest.raises(ValueError, match="Linear has no pretrained_cfg"):
        Preprocessing.from_timm(torch.nn.Linear(2, 2))


def test_records_come_back():
    prepare = Preprocessing((24, 32), (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), 0.9, "squash", "lanczos")
    assert Preprocessing.from_record(prepare.record) == prepare
    with pytest.raises(ValueError, match=r"the preprocessing is .* must have the entries"):
        Preprocessing.from_record({**prepare.record, "more": 1})
    with pytest.raises(ValueError, match="the preprocessing is 'squash'; it must have the entries"):
        Preprocessing.from_record("squash")


def test_a_frame_of_a_data_module_says_how_its_files_are_cut():
    class Files:
        mean, std = (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)
        frame = Frame((24, 32), crop_pct=0.9, crop_mode="squash", interpolation="lanczos")

    prepare = Preprocessing.from_data(Files())
    assert prepare == Preprocessing((24, 32), Files.mean, Files.std, 0.9, "squash", "lanczos")
    expected = (Files.frame(picture(50, 37)) / 255 - torch.tensor(Files.mean).view(3, 1, 1)) / torch.tensor(
        Files.std
    ).view(3, 1, 1)
    torch.testing.assert_close(prepare(picture(50, 37)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright_as_the_camera_has_noted(orientation, tmp_path):
    image = picture(20, 12)
    notes = Image.Exif()
    notes[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=notes)
    expected = np.array(image.transpose(TURNS[orientation]) if orientation in TURNS else image)
    height, width = expected.shape[:2]
    prepare = Preprocessing((height, width), (0.0,) * 3, (1.0,) * 3)
    with Image.open(tmp_path / "turned.png") as lazy:
        from_memory = prepare(lazy)
    (batch,) = read_batches([tmp_path / "turned.png"], prepare, 1)
    for found in (from_memory, batch.image[0]):  # never turned twice
        np.testing.assert_array_equal(found.mul(255).round().permute(1, 2, 0).numpy(), expected)
