"""Views of whole batches against torchvision, image by image."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from calib_lightning.data import CropFlip, DigitsDataModule, Normalize
from calib_lightning.data.views import (
    CleanViews,
    ContrastiveViews,
    ResizedCropFlip,
    adjust,
    crop_boxes,
    gray,
    resized_crop,
)
from calib_lightning.utils.seeding import derive_seed, row_uniform

INDEX = torch.tensor([7, 0, 123456, 3, 44, 9, 17, 1000003])
SCALE = (0.2, 1.0)


class Bytes(torch.nn.Module):
    """In the place of the normalisation: what it would get."""

    def forward(self, image, index, epoch):
        assert image.dtype == torch.uint8
        assert len(image) == len(index)
        return image


def pictures(count=8, channels=3, height=12, width=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # smooth, saturated and grey pixels
    image = torch.randint(0, 256, (count, channels, height, width), generator=generator).double()
    image[:, :, : height // 2] = image[:, :, : height // 2].cumsum(-1) % 256
    image[:, :, -1] = image[:, :1, -1]
    return image.to(torch.uint8)


def naive_box(draw, height, width, scale):
    """torchvision's loop, with numbers that are drawn already."""
    for area, ratio in zip(draw[:10], draw[10:20], strict=True):
        area = height * width * (scale[0] + area * (scale[1] - scale[0]))
        ratio = math.exp(math.log(3 / 4) + ratio * (math.log(4 / 3) - math.log(3 / 4)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draw[20] * (height - h + 1)), int(draw[21] * (width - w + 1)), h, w
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * (4 / 3)), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def naive_crop(picture, draw, scale, flip):
    _, height, width = picture.shape
    crop = tv.resized_crop(picture.float() / 255, *naive_box(draw, height, width, scale), [height, width])
    return tv.horizontal_flip(crop) if flip and draw[22] < 0.5 else crop


CHANGES = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


def naive_view(picture, draw, scale, jitter, flip):
    view = naive_crop(picture, draw, scale, flip)
    changes = 4 if len(picture) == 3 else 2
    if draw[31] < 0.8:
        for number in np.argsort(draw[27 : 27 + changes]):
            centre = 0 if number == 3 else 1
            view = CHANGES[number](view, centre + (2 * draw[23 + number] - 1) * jitter[number])
    if len(picture) == 3 and draw[32] < 0.2:
        view = tv.rgb_to_grayscale(view, num_output_channels=3)
    return view


# --- crops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 8), (40, 25), (20, 60), (8, 64), (64, 8), (1, 1)])
@pytest.mark.parametrize("scale", [SCALE, (0.9, 1.0), (1.0, 1.0)])
def test_boxes_equal_torchvision_s_loop(height, width, scale):
    draw = row_uniform(torch.arange(500), 22, seed=4)
    expected = [naive_box(row, height, width, scale) for row in draw.tolist()]
    assert crop_boxes(draw, height, width, scale).tolist() == [list(box) for box in expected]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 8), (40, 25)])
def test_boxes_are_distributed_as_torchvision_s(height, width):
    torch.manual_seed(1)
    image = torch.empty(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, SCALE, (3 / 4, 4 / 3)) for _ in range(4000)])
    ours = crop_boxes(row_uniform(torch.arange(4000), 22, seed=1), height, width, SCALE).numpy()
    for feature in (
        lambda box: box[:, 0],
        lambda box: box[:, 1],
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
    ):
        assert ks_2samp(feature(theirs), feature(ours)).pvalue > 1e-3


def test_a_box_that_never_fits_is_torchvision_s_middle_one():
    for height, width in ((8, 64), (64, 8)):
        theirs = RandomResizedCrop.get_params(torch.empty(1, height, width), [1.0, 1.0], [3 / 4, 4 / 3])
        ours = crop_boxes(row_uniform(torch.arange(3), 22, seed=0), height, width, (1.0, 1.0))
        assert ours.tolist() == [list(theirs)] * 3


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("mirrored", [False, True])
def test_resized_crop_equals_torchvision_s_with_its_anti_aliasing(channels, mirrored):
    image = pictures(channels=channels)
    boxes = torch.tensor(
        [
            [0, 0, 12, 10],
            [2, 3, 5, 4],
            [11, 9, 1, 1],
            [0, 5, 12, 5],
            [4, 0, 3, 10],
            [1, 1, 11, 9],
            [6, 6, 6, 4],
            [0, 0, 1, 10],
        ]
    )
    found = resized_crop(image, boxes, torch.full((8,), mirrored))
    for picture, box, view in zip(image, boxes.tolist(), found, strict=True):
        expected = tv.resized_crop(picture.float(), *box, [12, 10], antialias=True)
        torch.testing.assert_close(view.flip(-1) if mirrored else view, expected, rtol=0, atol=1e-3)


def test_the_whole_image_stays_as_it_is():
    image = pictures()
    found = resized_crop(image, torch.tensor([[0, 0, 12, 10]] * 8), torch.zeros(8, dtype=torch.bool))
    assert torch.equal(found.round().to(torch.uint8), image)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_resized_crop_flip_equals_a_loop_over_rows(flip, channels):
    image = pictures(channels=channels)
    found = ResizedCropFlip((0.3, 0.9), flip).transform(Bytes(), CropFlip(), 11)(image, INDEX, 5)
    draw = row_uniform(INDEX, 23, seed=derive_seed(11, 5, 3, 0)).tolist()
    expected = [naive_crop(picture, row, (0.3, 0.9), flip) for picture, row in zip(image, draw, strict=True)]
    close_to_bytes(found, torch.stack(expected))


def close_to_bytes(found, expected):
    """Rounded to bytes; at a tie the last bit of the product decides."""
    assert found.dtype == torch.uint8
    assert (found.float() - 255 * expected).abs().max() < 0.5 + 2e-3


# --- colours ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "operation"), list(enumerate(["brightness", "contrast", "saturation", "hue"])))
def test_changes_of_colour_equal_torchvision_s(number, operation):
    image = pictures(count=9).float()
    amount = torch.linspace(-0.5, 0.5, 9) if operation == "hue" else torch.linspace(0, 2, 9)
    found = adjust(image, operation, amount.double())
    for picture, own, view in zip(image, amount.tolist(), found, strict=True):
        expected = CHANGES[number](picture / 255, own)
        torch.testing.assert_close(view / 255, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("number", "operation"), list(enumerate(["brightness", "contrast"])))
def test_changes_of_grey_images_equal_torchvision_s(number, operation):
    image = pictures(channels=1).float()
    found = adjust(image, operation, torch.full((8,), 1.3))
    expected = torch.stack([CHANGES[number](picture / 255, 1.3) for picture in image])
    torch.testing.assert_close(found / 255, expected, rtol=0, atol=2e-6)


def test_gray_equals_torchvision_s():
    image = pictures().float()
    torch.testing.assert_close(gray(image), tv.rgb_to_grayscale(image), rtol=0, atol=1e-3)
    assert torch.equal(gray(image[:, :1]), image[:, :1])


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("flip", [True, False])
def test_contrastive_views_equal_a_loop_over_rows(channels, flip):
    count, jitter = 60, (0.4, 0.3, 0.5, 0.1)
    image, index = pictures(count, channels), torch.arange(1000, 1000 + count)
    found = ContrastiveViews((0.2, 0.9), jitter, flip).transform(Bytes(), CropFlip(), 11)(image, index, 5)
    assert found.shape == (count, 2, channels, 12, 10)
    for view in range(2):
        draw = row_uniform(index, 33, seed=derive_seed(11, 5, 4, view)).tolist()
        rows = zip(image, draw, strict=True)
        expected = torch.stack([naive_view(picture, row, (0.2, 0.9), jitter, flip) for picture, row in rows])
        close_to_bytes(found[:, view], expected)


def test_shares_of_views_with_a_change_and_in_grey():
    count = 4000
    colour = torch.tensor([200, 100, 50], dtype=torch.uint8).view(1, 3, 1, 1).expand(count, 3, 2, 2)
    found = ContrastiveViews().transform(Bytes(), None, 0)(colour, torch.arange(count), 0).flatten(0, 1)
    is_grey = (found == found[:, :1]).flatten(1).all(1)
    as_before = (found == colour[:1]).flatten(1).all(1)
    # 8,000 views; five standard deviations
    assert is_grey.double().mean() == pytest.approx(0.2, abs=0.023)
    assert as_before.double().mean() == pytest.approx(0.2 * 0.8, abs=0.021)
    # a jitter of no strength changes nothing
    still = ContrastiveViews(jitter=(0, 0, 0, 0)).transform(Bytes(), None, 0)(colour, torch.arange(count), 0)
    assert (still.flatten(0, 1) == colour[:1]).flatten(1).all(1).double().mean() == pytest.approx(0.8, abs=0.023)


# --- both ------------------------------------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize("views", [ResizedCropFlip(), ContrastiveViews()], ids=lambda views: type(views).__name__)


@BOTH
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 8), (3, 7)])
def test_a_row_has_the_same_views_in_any_batch(views, channels, size):
    image, index = pictures(50, channels, size, size), torch.arange(100, 150)
    transform = views.transform(Normalize((0.5,) * channels, (0.2,) * channels), None, 2)
    whole = transform(image, index, 5)
    for rows in ([4], [2, 4, 0], list(range(49, 0, -3))):
        assert torch.equal(transform(image[rows], index[rows], 5), whole[rows])


@BOTH
def test_epoch_seed_row_and_view_each_change_the_draw(views):
    image, index = pictures(1).expand(40, -1, -1, -1), torch.arange(40)
    base = views.transform(Bytes(), None, 0)(image, index, 0)
    others = [
        views.transform(Bytes(), None, 1)(image, index, 0),
        views.transform(Bytes(), None, 0)(image, index, 1),
        views.transform(Bytes(), None, 0)(image, index + 40, 0),
    ]
    if base.ndim == 5:
        others.append(base.flip(1))
    for other in others:
        assert (base != other).flatten(1).any(1).sum() >= 38


@BOTH
def test_normalisation_comes_last_and_gets_each_row_s_own_number(views):
    image = pictures()
    normalize = Normalize((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    found = views.transform(normalize, None, 2)(image, INDEX, 1)
    raw = views.transform(Bytes(), None, 2)(image, INDEX, 1)
    expected = normalize(raw.flatten(0, -4), INDEX, 1).view(raw.shape)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@BOTH
def test_no_state_is_used_and_inputs_stay(views):
    image = pictures()
    untouched, before = image.clone(), torch.get_rng_state()
    views.transform(Bytes(), None, 0)(image, INDEX, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(image, untouched)


@BOTH
def test_they_take_an_empty_batch_and_refuse_all_but_bytes(views):
    transform = views.transform(Normalize((0.5,) * 3, (0.2,) * 3), None, 0)
    found = transform(pictures()[:0], INDEX[:0], 0)
    assert found.shape == (0, *(() if found.ndim == 4 else (2,)), 3, 12, 10)
    with pytest.raises(ValueError, match=r"The images are torch.float32 of shape \(8, 3, 12, 10\)"):
        transform(pictures().float(), INDEX, 0)
    with pytest.raises(ValueError, match=r"torch.uint8 of shape \(3, 12, 10\)"):
        transform(pictures()[0], INDEX, 0)


def test_clean_views_are_the_normalisation_alone():
    image, normalize = pictures(), Normalize((0.5,) * 3, (0.2,) * 3)
    assert torch.equal(CleanViews().transform(normalize, CropFlip(), 3)(image, INDEX, 1), normalize(image, INDEX, 1))


@pytest.mark.parametrize("views", [ResizedCropFlip, ContrastiveViews])
@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.5, 0.4), (0.5, 1.1), (math.nan, 1.0), (0.5,)])
def test_a_bad_scale_is_refused(views, scale):
    with pytest.raises(ValueError, match="must hold the smallest and the largest area"):
        views(scale=scale)


@pytest.mark.parametrize(
    "jitter", [(0.4, 0.4, 0.4), (1.1, 0, 0, 0), (0, -0.1, 0, 0), (0, 0, math.nan, 0), (0, 0, 0, 0.6)]
)
def test_a_bad_jitter_is_refused(jitter):
    with pytest.raises(ValueError, match="must hold four strengths"):
        ContrastiveViews(jitter=jitter)


def test_other_channels_have_no_colours_to_change():
    with pytest.raises(ValueError, match=r"\(8, 2, 12, 10\); ContrastiveViews changes colours and needs C = 1 or 3"):
        ContrastiveViews().transform(Bytes(), None, 0)(pictures(channels=2), INDEX, 0)


def test_workers_make_the_same_views_of_digits():
    batches = []
    for workers in (0, 2):
        data = DigitsDataModule(batch_size=300, num_workers=workers)
        data.setup("fit")
        data.stage_views = ContrastiveViews((0.5, 1.0), flip=False)
        data.trainer = None
        batches.append(list(data.train_dataloader()))
    for alone, apart in zip(*batches, strict=True):
        assert alone.image.shape[1:] == (2, 1, 8, 8)
        assert torch.equal(alone.image, apart.image)
        assert torch.equal(alone.index, apart.index)


@pytest.mark.gpu
@BOTH
def test_the_same_on_a_gpu(views):
    image = pictures()
    expected = views.transform(Bytes(), None, 2)(image, INDEX, 1)
    found = views.transform(Bytes(), None, 2).to("cuda")(image.cuda(), INDEX.cuda(), 1)
    # a tie between two bytes may be decided otherwise
    assert (found.cpu().int() - expected.int()).abs().max() <= 1
