import numpy as np
import pytest
import torch
from torchvision import transforms

from calib_lightning.data import Compose, CropFlip, Normalize
from calib_lightning.utils.seeding import derive_seed, row_uniform

INDEX = torch.tensor([7, 0, 123456, 3, 44, 9])


@pytest.fixture
def image():
    return torch.randint(0, 256, (6, 3, 12, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def naive_crop_flip(image, index, *, padding, flip, seed, epoch):
    out = []
    for row, picture in zip(index, image, strict=True):
        down, right, coin = row_uniform(row[None], 3, seed=derive_seed(seed, epoch, 1))[0].tolist()
        _, height, width = picture.shape
        canvas = np.zeros((3, height + 2 * padding, width + 2 * padding), dtype=np.uint8)
        canvas[:, padding : padding + height, padding : padding + width] = picture.numpy()
        top, left = int(down * (2 * padding + 1)), int(right * (2 * padding + 1))
        crop = canvas[:, top : top + height, left : left + width]
        out.append(crop[:, :, ::-1] if flip and coin < 0.5 else crop)
    return torch.from_numpy(np.stack(out))


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("epoch", [0, 3])
def test_crop_flip_equals_a_loop_over_rows(image, padding, flip, epoch):
    found = CropFlip(padding, flip, seed=11)(image, INDEX, epoch)
    torch.testing.assert_close(found, naive_crop_flip(image, INDEX, padding=padding, flip=flip, seed=11, epoch=epoch))


def test_a_row_is_augmented_alike_in_any_batch(image):
    transform = CropFlip(seed=2)
    whole, order = transform(image, INDEX, 5), torch.tensor([4, 2, 0])
    assert torch.equal(transform(image[order], INDEX[order], 5), whole[order])


def test_epoch_seed_and_row_each_change_the_augmentation():
    image = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).repeat(50, 1, 1, 1)
    index = torch.arange(50)
    base = CropFlip(seed=0)(image, index, 0)
    for other in (
        CropFlip(seed=1)(image, index, 0),
        CropFlip(seed=0)(image, index, 1),
        CropFlip(seed=0)(image, index + 50, 0),
    ):
        assert (base != other).flatten(1).any(1).sum() > 40


def test_offsets_and_flips_are_uniform():
    count = 40000
    pixel = torch.zeros(count, 1, 9, 9, dtype=torch.uint8)
    pixel[:, :, 4, 4] = 1  # only moves, a flip keeps the set of positions
    places = CropFlip(padding=2, seed=3)(pixel, torch.arange(count), 0).sum(0)[0]
    assert places[2:7, 2:7].sum() == count
    # 25 places, 1600 each; five standard deviations are 196
    assert (places[2:7, 2:7].double() - count / 25).abs().max() < 196
    ramp = torch.arange(3, dtype=torch.uint8).view(1, 1, 1, 3).repeat(count, 1, 1, 1)
    flipped = (CropFlip(padding=0, seed=3)(ramp, torch.arange(count), 0)[:, 0, 0, 0] == 2).sum()
    assert abs(flipped - count / 2) < 500


def test_global_generator_is_left_alone(image):
    before = torch.get_rng_state()
    CropFlip()(image, INDEX, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_normalize_equals_torchvision_bit_for_bit(image):
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    untouched = image.clone()
    found = Normalize(mean, std)(image, INDEX, 0)
    reference = transforms.Compose([transforms.ConvertImageDtype(torch.float32), transforms.Normalize(mean, std)])
    assert found.dtype == torch.float32
    assert torch.equal(found, reference(image))
    assert torch.equal(image, untouched)


def test_compose_applies_in_order(image):
    crop, scale = CropFlip(seed=4), Normalize((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    assert torch.equal(Compose(crop, scale)(image, INDEX, 2), scale(crop(image, INDEX, 2), INDEX, 2))


def test_transforms_take_an_empty_batch(image):
    found = Compose(CropFlip(), Normalize((0.5,) * 3, (0.2,) * 3))(image[:0], INDEX[:0], 0)
    assert found.shape == (0, 3, 12, 10)
    assert found.dtype == torch.float32


def test_negative_padding():
    with pytest.raises(ValueError, match="padding is -1; it must be at least 0"):
        CropFlip(padding=-1)


@pytest.mark.gpu
def test_the_same_on_a_gpu(image):
    transform = Compose(CropFlip(seed=4), Normalize((0.5, 0.4, 0.3), (0.2, 0.2, 0.1)))
    expected = transform(image, INDEX, 2)
    found = transform.to("cuda")(image.cuda(), INDEX.cuda(), 2)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-6)
