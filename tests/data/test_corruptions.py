"""Generated corruptions: seeded by row, any size and channels, named errors, constants as published."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import calib_lightning.data.corruptions.photographs as photographs_module
from calib_lightning.data.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    check_corruption,
    corrupt,
    frost_photographs,
    table_for,
    unavailable,
)

DETERMINISTIC = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"} | {
    *("gaussian_blur", "saturate")
}


def pictures(count, channels=3, height=32, width=32, seed=0):
    """Smooth colours with edges and noise, which no corruption leaves as they are."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
    phase, wave = rng.uniform(0, 6, (2, count, channels, 1, 1))
    smooth = 110 + 90 * np.sin(wave * (x + 2 * y) + phase) + 40 * (x > y) + rng.normal(0, 4, (count, 1, height, width))
    return torch.from_numpy(np.clip(smooth, 0, 255).astype(np.uint8))


def photographs(height=300, width=400):
    rng = np.random.default_rng(5)
    return [rng.integers(0, 256, (height + 10 * i, width, 3), dtype=np.uint8) for i in range(5)]


def made(image, corruption, severity=3, rows=None, table="cifar", seed=0):
    rows = torch.arange(len(image)) if rows is None else rows
    return corrupt(image, corruption, severity, rows, table=table, seed=seed, frost=photographs())


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_row_is_the_same_in_any_batch_order_and_number_of_threads(corruption):
    image, rows = pictures(700), torch.arange(700) * 3 + 5
    whole = made(image, corruption, rows=rows)
    some = torch.tensor([640, 3, 341, 342])
    torch.testing.assert_close(made(image[some], corruption, rows=rows[some]), whole[some], rtol=0, atol=0)
    for row in (3, 640):
        alone = made(image[row : row + 1], corruption, rows=rows[row : row + 1])
        torch.testing.assert_close(alone[0], whole[row], rtol=0, atol=0)
    torch.set_num_threads(2)
    try:
        torch.testing.assert_close(made(image, corruption, rows=rows), whole, rtol=0, atol=0)
    finally:
        torch.set_num_threads(1)
    assert (made(image, corruption, rows=rows) == whole).all()
    assert whole.shape == image.shape
    assert whole.dtype == torch.uint8
    assert (whole != image).flatten(1).any(dim=1).float().mean() > 0.9


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_seed_row_and_severity_change_the_random_ones_alone(corruption):
    image, rows = pictures(1).expand(8, -1, -1, -1), torch.arange(8)
    first = made(image, corruption)
    others = (made(image, corruption, seed=1), made(image, corruption, rows=rows + 8), first.roll(1, 0))
    for other in others:
        same = bool((other == first).all())
        assert same == (corruption in DETERMINISTIC)
    assert (made(image, corruption, severity=4) != first).any()


@pytest.mark.slow  # another process imports everything
def test_a_row_is_the_same_in_another_process():
    code = (
        "import torch; from calib_lightning.data.corruptions import corrupt; from tests.data.test_corruptions import *;"
        "print([made(pictures(3), name, rows=torch.tensor([4, 9, 2])).long().sum().item() for name in CORRUPTIONS])"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    rows = torch.tensor([4, 9, 2])
    here = [made(pictures(3), name, rows=rows).long().sum().item() for name in CORRUPTIONS]
    assert run.stdout.strip() == str(here)


@pytest.mark.parametrize("size", [(28, 28), (64, 64), (20, 45), (3, 5)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("table", ["cifar", "imagenet"])
def test_every_size_and_channel_keeps_its_shape(size, channels, table):
    image = pictures(2, channels, *size)
    for corruption in CORRUPTIONS:
        for severity in SEVERITIES:
            assert made(image, corruption, severity, table=table).shape == image.shape


@pytest.mark.parametrize("corruption", sorted(set(CORRUPTIONS) - {"frost", "saturate", "spatter"}))
def test_a_grey_image_is_corrupted_as_one_channel_of_colour(corruption):
    # operations on each channel, or on a grey value: equal channels give what one channel gives
    grey = pictures(4, 1)
    colour = grey.expand(-1, 3, -1, -1)
    if "noise" in corruption:  # each channel has its own draws; the first are those of one channel
        assert (made(grey, corruption) - grey.float()).abs().mean() == pytest.approx(
            (made(colour, corruption) - colour.float()).abs().mean().item(), rel=0.1
        )
    else:
        off = (made(grey, corruption).int() - made(colour, corruption)[:, :1].int()).abs()
        assert off.max() <= (0 if corruption != "jpeg_compression" else 2)


def test_what_colours_a_grey_image_comes_back_as_its_luminance():
    grey = torch.full((2, 1, 8, 8), 200, dtype=torch.uint8)
    # severity 5: saturation 0 x 2.5 + 0.2 with the hue of red, so (V, 0.8 V, 0.8 V)
    expected = int(200 * (0.299 + 0.8 * (0.587 + 0.114)) + 1e-3)
    assert (made(grey, "saturate", 5) == expected).all()
    photographs = [np.full((40, 40, 3), (10, 100, 250), dtype=np.uint8)] * 5
    frosted = corrupt(grey, "frost", 5, torch.arange(2), table="imagenet", frost=photographs)
    parts = [min(0.6 * 200 + 0.75 * value, 255) for value in (10, 100, 250)]
    assert (frosted == int(np.dot(parts, [0.299, 0.587, 0.114]))).all()


def test_frost_crops_the_photographs_of_both_tables(tmp_path):
    for i in range(5):
        ramp = np.broadcast_to(np.arange(100, dtype=np.uint8)[:, None, None], (100, 120, 3)) + 20 * i
        Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / f"{i}.png")
    found = frost_photographs(tmp_path)
    assert [one[0, 0, 0] for one in found] == [0, 20, 40, 60, 80]
    black = torch.zeros(40, 3, 4, 4, dtype=torch.uint8)
    steps = {}
    for table, weight in (("cifar", 0.45), ("imagenet", 0.75)):
        drawn = corrupt(black, "frost", 5, torch.arange(40), table=table, frost=found)
        steps[table] = (drawn[:, 0, 3, 0].float() - drawn[:, 0, 0, 0].float()).mean().item() / (3 * weight)
        assert drawn[:, 0, 0, 0].unique().numel() > 10
    assert steps == pytest.approx({"cifar": 5, "imagenet": 1}, rel=0.05)
    large = corrupt(
        torch.zeros(1, 3, 300, 150, dtype=torch.uint8), "frost", 1, torch.tensor([0]), table="imagenet", frost=found
    )
    assert large.shape == (1, 3, 300, 150)


def test_table_for_takes_the_smaller_side():
    assert [table_for(*size) for size in ((28, 28), (64, 300), (65, 65), (224, 224))] == [
        *("cifar", "cifar", "imagenet", "imagenet")
    ]


def test_bad_names_and_images_are_named():
    image, rows = pictures(2), torch.arange(2)
    for arguments, message in [
        ((image, "fogg", 1, rows, "cifar"), r"corruption is 'fogg'; it must be one of .* Did you mean fog\?"),
        ((image, "fog", 6, rows, "cifar"), "severity is 6; it must be one of 1, 2, 3, 4, 5"),
        ((image, "fog", True, rows, "cifar"), "severity is True"),
        ((image, "fog", 2.0, rows, "cifar"), "severity is 2.0"),
        ((image, "fog", 1, rows, "imagnet"), r"table is 'imagnet'; .* Did you mean imagenet\?"),
        ((image.float(), "fog", 1, rows, "cifar"), "image is torch.float32"),
        ((image[:, :2], "fog", 1, rows, "cifar"), "of 1 or 3 channels"),
        ((image[0], "fog", 1, rows, "cifar"), r"image is torch.uint8 \(3, 32, 32\)"),
        ((image[:, :, :2], "fog", 1, rows, "cifar"), "2 x 32 pixels; it must have at least 3"),
        ((image, "fog", 1, rows[:1], "cifar"), r"rows is torch.int64 \(1,\); it must be int64 \(2,\)"),
        ((image, "fog", 1, rows.int(), "cifar"), "rows is torch.int32"),
        ((image, "fog", 1, rows - 1, "cifar"), "rows has -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            corrupt(*arguments[:4], table=arguments[4])
    with pytest.raises(ValueError, match="seed is -1"):
        corrupt(image, "fog", 1, rows, table="cifar", seed=-1)
    with pytest.raises(ValueError, match="frost must be one or more uint8 photographs"):
        corrupt(image, "frost", 1, rows, table="cifar", frost=[])
    assert corrupt(image[:0], "fog", 1, rows[:0], table="cifar").shape == (0, 3, 32, 32)
    check_corruption("fog", 5, "imagenet")


def test_what_cannot_be_generated_is_said_before(tmp_path, monkeypatch):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    reasons = unavailable(["fog", "frost"], tmp_path)
    assert list(reasons) == ["frost"]
    assert "has 2 images; it must have at least 5" in reasons["frost"]
    for name in ("c.png", "d.png", "e.png"):
        (tmp_path / name).write_bytes(b"no image")
    assert "c.png cannot be read" in unavailable(["frost"], tmp_path)["frost"]
    assert "must be a folder" in unavailable(["frost"], tmp_path / "none")["frost"]
    with pytest.raises(ValueError, match="corruption is 'rain'"):
        unavailable(["rain"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    photographs_module._of_package.cache_clear()
    missing = unavailable(CORRUPTIONS)
    assert list(missing) == ["frost"]
    assert "`pip install 'calib-lightning[corruptions]'`" in missing["frost"]
    assert "Give a folder of frost photographs" in missing["frost"]
    with pytest.raises(FileNotFoundError, match="no photographs of frost"):
        corrupt(pictures(1), "frost", 1, torch.arange(1), table="cifar")


def test_the_package_gives_its_photographs_without_being_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "imagecorruptions", raising=False)
    photographs_module._of_package.cache_clear()
    if "frost" in unavailable(["frost"]):
        pytest.skip("needs the extra corruptions")
    found = frost_photographs()
    assert [one.dtype for one in found] == [np.uint8] * 5
    assert all(one.ndim == 3 and one.shape[2] == 3 and min(one.shape[:2]) > 32 * 5 for one in found)
    assert "imagecorruptions" not in sys.modules
