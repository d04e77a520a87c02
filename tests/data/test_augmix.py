import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import autocontrast, equalize

from calib_lightning.data import Normalize
from calib_lightning.data.augmix import OPERATIONS, AugMixViews, affine, geometric_matrix, posterize, solarize
from calib_lightning.utils.seeding import derive_seed, row_uniform

COUNT = 40
INDEX = torch.arange(COUNT) * 7 + 3


def random_images(channels, size=(12, 10), count=COUNT, seed=0):
    """Random images with some smoothness, a range short of 0..255, and one of a single colour."""
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 80, size=(count, channels, 1, 1))
    coarse = rng.integers(0, 90, size=(count, channels, -(-size[0] // 3), -(-size[1] // 3)))
    image = low + coarse.repeat(3, axis=2).repeat(3, axis=3)[:, :, : size[0], : size[1]]
    image = image + rng.integers(0, 50, size=(count, channels, *size))
    image[0] = 77
    return torch.from_numpy(image.astype(np.uint8))


def pictures(image):
    return [Image.fromarray((x[0] if len(x) == 1 else x.permute(1, 2, 0)).numpy()) for x in image]


def pixels(found):
    stack = np.stack([np.atleast_3d(np.asarray(picture)) for picture in found])
    return torch.from_numpy(stack).permute(0, 3, 1, 2)


def pil_operation(picture, name, level):
    """An operation as the authors have it: PIL, whole-numbered settings."""

    def whole(most):
        return int(level * most / 10)

    width, height = picture.size
    matrices = {
        "shear_x": (1, level * 0.3 / 10, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, level * 0.3 / 10, 1, 0),
        "translate_x": (1, 0, whole(width / 3), 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, whole(height / 3)),
    }
    if name in matrices:
        return picture.transform((width, height), Image.Transform.AFFINE, matrices[name], Image.Resampling.BILINEAR)
    if name == "rotate":
        return picture.rotate(whole(30), resample=Image.Resampling.BILINEAR)
    level = abs(level)
    if name == "posterize":
        return ImageOps.posterize(picture, 4 - whole(4))
    if name == "solarize":
        return ImageOps.solarize(picture, 256 - whole(256))
    return {"autocontrast": ImageOps.autocontrast, "equalize": ImageOps.equalize}[name](picture)


def our_operation(image, name, level):
    operation = torch.full((len(image),), OPERATIONS.index(name))
    return {
        "autocontrast": lambda: autocontrast(image),
        "equalize": lambda: equalize(image),
        "posterize": lambda: posterize(image, level.abs()),
        "solarize": lambda: solarize(image, level.abs()),
    }.get(name, lambda: affine(image, geometric_matrix(operation, level, *image.shape[2:])))()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(12, 10), (32, 32), (9, 15)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_pillow(name, size, channels):
    image = random_images(channels, size)
    level = torch.linspace(-9.99, 9.99, COUNT, dtype=torch.float64)
    found = our_operation(image, name, level)
    expected = pixels(
        [pil_operation(picture, name, float(x)) for picture, x in zip(pictures(image), level, strict=True)]
    )
    difference = (found.int() - expected.int()).abs()
    assert found.dtype == torch.uint8
    if name in ("autocontrast", "rotate", "shear_x", "shear_y"):
        # both cut a product of floats to a whole number, each with its own rounding
        assert difference.max() <= 1
        assert (difference > 0).double().mean() < 0.05
    else:
        assert difference.max() == 0
    if name != "equalize":  # of 120 pixels Pillow equalises nothing
        assert (found != image).double().mean() > 0.05


def test_operations_cover_the_whole_range_of_levels():
    image = random_images(3, count=2)
    ends = torch.tensor([0.0, 10.0], dtype=torch.float64)
    assert torch.equal(posterize(image, ends), torch.stack([image[0] & 0b11110000, torch.zeros_like(image[1])]))
    assert torch.equal(solarize(image, ends), torch.stack([image[0], 255 - image[1]]))


def naive_view(picture, draw, normalize, severity, width):
    """One mixed view by PIL and float64, from the row's numbers."""
    numbers = iter(draw.tolist())
    share = next(numbers)
    cuts = sorted(next(numbers) for _ in range(width - 1))
    weights = np.diff([0, *cuts, 1])
    mixture = (1 - share) * normalize(picture)
    for weight in weights:
        depth, changed = int(next(numbers) * 3) + 1, picture
        for step in range(3):
            name, level, side = OPERATIONS[int(next(numbers) * 9)], next(numbers), next(numbers)
            level = 0.1 + level * (severity - 0.1)
            if step < depth:
                changed = pil_operation(changed, name, level if side < 0.5 else -level)
        mixture = mixture + share * weight * normalize(changed)
    return mixture


@pytest.mark.parametrize(("channels", "severity", "width"), [(3, 3, 3), (1, 3, 3), (3, 10, 2), (3, 1, 1)])
def test_views_equal_a_loop_over_images_with_pillow(channels, severity, width):
    image, mean, std = random_images(channels, (32, 32)), 0.4, 0.25
    transform = AugMixViews(Normalize((mean,) * channels, (std,) * channels), severity, width, seed=5)
    found = transform(image, INDEX, 4)
    assert found.shape == (COUNT, 3, channels, 32, 32)
    assert found.dtype == torch.float32

    def normalize(picture):
        return (pixels([picture])[0].double().numpy() / 255 - mean) / std

    each = width + width * 10
    draws = row_uniform(INDEX, 2 * each, seed=derive_seed(5, 4, 2)).view(COUNT, 2, each)
    expected = np.stack(
        [
            [naive_view(picture, draw, normalize, severity, width) for draw in draws[row]]
            for row, picture in enumerate(pictures(image))
        ]
    )
    # in grey levels; an operation may turn a difference of one level into more, so a few pixels may differ by more
    difference = np.abs(found[:, 1:].double().numpy() - expected) * std * 255
    assert np.quantile(difference, 0.98) < 1
    assert difference.mean() < 0.1
    if width == 3:
        assert difference.max() < 60


def test_the_first_view_is_the_normalised_image():
    image = random_images(3)
    untouched, normalize = image.clone(), Normalize((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    assert torch.equal(AugMixViews(normalize)(image, INDEX, 1)[:, 0], normalize(image, INDEX, 1))
    assert torch.equal(image, untouched)


def make(channels=3, **options):
    return AugMixViews(Normalize((0.5,) * channels, (0.2,) * channels), **options)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_row_has_the_same_views_bit_for_bit_in_any_batch(channels):
    # an odd number of odd-sized images: vectorised loops end somewhere else in every batch
    image, transform = random_images(channels, (11, 7)), make(channels, seed=2)
    whole = transform(image, INDEX, 5)
    for rows in ([4], [30, 2, 17], list(range(1, COUNT)), torch.randperm(COUNT).tolist()):
        assert torch.equal(transform(image[rows], INDEX[rows], 5), whole[rows])


def test_epoch_seed_row_and_view_each_change_the_mixtures():
    image = random_images(3)[1:2].repeat(COUNT, 1, 1, 1)
    base = make(seed=0)(image, INDEX, 0)
    others = [
        make(seed=1)(image, INDEX, 0)[:, 1:],
        make(seed=0)(image, INDEX, 1)[:, 1:],
        make(seed=0)(image, INDEX + 1000, 0)[:, 1:],
        base[:, [2, 1]],
    ]
    for other in others:
        assert (base[:, 1:] != other).flatten(2).any(2).all()


def test_global_generator_is_left_alone():
    before = torch.get_rng_state()
    make()(random_images(3), INDEX, 0)
    assert torch.equal(torch.get_rng_state(), before)


class Marked(torch.nn.Module):
    """Gives an unchanged image 0 and the chain called so 1, whatever the pixels are."""

    def __init__(self, chain):
        super().__init__()
        self.chain, self.calls = chain, 0

    def forward(self, image, index, epoch):
        self.calls += 1
        # call 1 is the clean image; then the chains of the first view, then of the second
        return torch.full(image.shape, float(self.calls - 2 == self.chain))


def test_weights_are_dirichlet_and_beta():
    count = 20000
    image, index = torch.zeros(count, 1, 1, 1, dtype=torch.uint8), torch.arange(count)
    weight = torch.stack([AugMixViews(Marked(i), seed=3)(image, index, 0)[:, 1, 0, 0, 0] for i in range(3)], dim=1)
    share = weight.double().sum(1)
    part = weight.double() / share[:, None]
    # Beta(1, 1): mean 1/2, variance 1/12; Dirichlet(1, 1, 1): means 1/3, variances 1/18, covariances -1/36
    assert share.mean().item() == pytest.approx(1 / 2, abs=5 * (1 / 12 / count) ** 0.5)
    assert share.var().item() == pytest.approx(1 / 12, rel=0.04)
    np.testing.assert_allclose(part.mean(0), np.full(3, 1 / 3), atol=5 * (1 / 18 / count) ** 0.5)
    np.testing.assert_allclose(torch.cov(part.T), np.where(np.eye(3), 1 / 18, -1 / 36), atol=0.002)
    assert np.corrcoef(share, part[:, 0])[0, 1] == pytest.approx(0, abs=5 / count**0.5)
    # the second view has weights of its own
    other = AugMixViews(Marked(3), seed=3)(image, index, 0)[:, 2, 0, 0, 0].double()
    assert other.mean().item() == pytest.approx(1 / 6, abs=0.01)
    assert np.corrcoef(other, weight[:, 0])[0, 1] == pytest.approx(0, abs=5 / count**0.5)


def test_mixtures_are_convex():
    image = torch.full((COUNT, 1, 4, 4), 240, dtype=torch.uint8)
    bounds = make(1)(image, INDEX, 0)
    assert bounds.min() >= (0 - 0.5) / 0.2 - 1e-5
    assert bounds.max() <= (1 - 0.5) / 0.2 + 1e-5


def test_the_least_severity_moves_nothing():
    # at level 0.1 rotation and translation are whole numbers below one, and a shear by 0.003 moves no pixel's colour
    # in an image of one colour; what is left does not touch a bright image with two levels
    image = torch.full((COUNT, 3, 8, 8), 240, dtype=torch.uint8)
    image[:, :, :, 2:6] = 0
    level = torch.full((COUNT,), 0.1, dtype=torch.float64)
    for name in ("posterize", "solarize", "rotate", "translate_x", "translate_y"):
        assert torch.equal(our_operation(image, name, level), image)
        assert torch.equal(our_operation(image, name, -level), image)
    flat = torch.full((COUNT, 3, 8, 8), 240, dtype=torch.uint8)
    found = make(severity=0.1)(flat, INDEX, 0)
    # a shear blackens at most what it brings in from outside: the pixel centres stay inside
    torch.testing.assert_close(found, found[:, :1].expand_as(found), rtol=0, atol=1e-5)
    assert not torch.equal(make(severity=10)(flat, INDEX, 0), found)


@pytest.mark.parametrize("count", [0, 1])
def test_small_batches(count):
    found = make()(random_images(3)[1 : 1 + count], INDEX[:count], 0)
    assert found.shape == (count, 3, 3, 12, 10)
    assert found.isfinite().all()


@pytest.mark.parametrize("severity", [0, 0.05, 10.5, -3, float("nan")])
def test_impossible_severity(severity):
    with pytest.raises(ValueError, match=rf"severity is {severity}; it must be in \[0.1, 10\]"):
        make(severity=severity)


def test_impossible_width():
    with pytest.raises(ValueError, match="width is 0; it must be at least 1"):
        make(width=0)


@pytest.mark.parametrize(
    ("image", "named"),
    [
        (torch.zeros(2, 3, 8, 8), r"images are torch.float32 of shape \(2, 3, 8, 8\)"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"shape \(3, 8, 8\)"),
        (torch.zeros(2, 4, 8, 8, dtype=torch.uint8), r"shape \(2, 4, 8, 8\)"),
    ],
)
def test_images_that_it_cannot_take(image, named):
    with pytest.raises(ValueError, match=named):
        make()(image, torch.arange(len(image)), 0)


@pytest.mark.gpu
def test_the_same_on_a_gpu():
    image, transform = random_images(3, (32, 32)), make(seed=4)
    expected = transform(image, INDEX, 2)
    found = transform.to("cuda")(image.cuda(), INDEX.cuda(), 2)
    difference = (found.cpu() - expected).abs() * 0.2 * 255
    assert difference.quantile(0.98) < 1
