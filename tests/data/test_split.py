from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from calib_lightning.data import SplitSpec, long_tail_counts, long_tail_rows
from calib_lightning.data.split import cut_balanced

# file order mixed, 5000 of each of 10 classes and 500 of each of 100
CIFAR10 = np.random.RandomState(3).permutation(np.repeat(np.arange(10), 5000))
CIFAR100 = np.random.RandomState(4).permutation(np.repeat(np.arange(100), 500))


def official_rows(labels, counts, seed):
    """The published loop, written out with numpy's global generator."""
    state = np.random.get_state()
    np.random.seed(seed)
    rows = []
    for label in np.unique(labels):
        index = np.where(labels == label)[0]
        np.random.shuffle(index)
        rows += index[: counts[label]].tolist()
    np.random.set_state(state)
    return rows


@pytest.mark.parametrize(
    ("labels", "imbalance", "total"),
    [
        (CIFAR10, 0.1, 20431),
        (CIFAR10, 0.02, 13996),
        (CIFAR10, 0.01, 12406),
        (CIFAR10, 0.005, 11203),
        (CIFAR100, 0.1, 19573),
        (CIFAR100, 0.02, 12608),
        (CIFAR100, 0.01, 10847),
        (CIFAR100, 0.005, 9502),
    ],
)
def test_total_of_exponential_profile(labels, imbalance, total):
    splits = SplitSpec(imbalance=imbalance).draw(labels, labels.max() + 1)
    assert len(splits["train"]) == total
    assert not len(splits["val"])
    assert not len(splits["calibration"])


@pytest.mark.parametrize(
    ("labels", "imbalance", "total"),
    [(CIFAR10, 0.1, 18388), (CIFAR10, 0.01, 11165), (CIFAR100, 0.1, 17614), (CIFAR100, 0.01, 9754)],
)
@pytest.mark.parametrize("held_out", [{"val": 5000}, {"calibration": 5000}, {"val": 2000, "calibration": 3000}])
def test_total_with_5000_held_out(labels, imbalance, total, held_out):
    classes = labels.max() + 1
    splits = SplitSpec(imbalance=imbalance, **held_out).draw(labels, classes)
    assert len(splits["train"]) == total
    for name, size in held_out.items():
        assert (np.bincount(labels[splits[name]], minlength=classes) == size // classes).all()


@pytest.mark.parametrize(("labels", "imbalance", "total"), [(CIFAR10, 0.1, 27500), (CIFAR100, 0.01, 25250)])
def test_step_profile(labels, imbalance, total):
    classes = labels.max() + 1
    train = SplitSpec(imbalance=imbalance, profile="step").draw(labels, classes)["train"]
    counts = np.bincount(labels[train])
    assert len(train) == total
    assert (counts[: classes // 2] == len(labels) // classes).all()
    assert (counts[classes // 2 :] == imbalance * len(labels) // classes).all()


def test_step_profile_keeps_the_last_class_of_an_odd_number():
    assert long_tail_counts([10] * 5, 0.2, "step") == [10, 10, 2, 2, 2]


def test_published_class_sizes():
    assert long_tail_counts([5000] * 10, 0.1) == [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500]
    assert long_tail_counts([5000] * 10, 0.01) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    hundred = long_tail_counts([500] * 100, 0.1)
    assert hundred[:5] == [500, 488, 477, 466, 455]
    assert hundred[-5:] == [54, 53, 52, 51, 50]
    assert min(long_tail_counts([450] * 100, 0.01)) == 4
    assert sum(long_tail_counts([500] * 200, 0.1)) == 39072
    assert sum(long_tail_counts([500] * 200, 0.01)) == 21549


def test_sizes_are_capped_by_what_a_class_has():
    assert long_tail_counts([100, 20, 100], 0.25) == [100, 20, 25]
    assert long_tail_counts([7], 0.5) == [7]


@pytest.mark.parametrize("seed", [0, 1234])
def test_rows_are_those_of_the_official_code(seed):
    counts = long_tail_counts([5000] * 10, 0.1)
    rows = SplitSpec(imbalance=0.1, seed=seed).draw(CIFAR10, 10)["train"]
    np.testing.assert_array_equal(rows, np.sort(official_rows(CIFAR10, counts, seed)))
    np.testing.assert_array_equal(rows, long_tail_rows(CIFAR10, counts, seed))


def test_no_imbalance_keeps_every_image():
    labels = np.array([0, 1, 1, 2, 1, 0])
    np.testing.assert_array_equal(SplitSpec().draw(labels, 3)["train"], np.arange(6))


def test_same_spec_same_rows_other_seed_other_rows():
    spec = SplitSpec(val=100, calibration=50, imbalance=0.5, subset=1000, seed=5)
    first, again = spec.draw(CIFAR10, 10), spec.draw(CIFAR10, 10)
    other = SplitSpec(val=100, calibration=50, imbalance=0.5, subset=1000, seed=6).draw(CIFAR10, 10)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        assert not np.array_equal(first[name], other[name])


def test_rows_of_a_seed_never_change():
    labels = np.tile(np.arange(3), 8)
    splits = SplitSpec(val=4, calibration=4, imbalance=0.5, subset=6, seed=9).draw(labels, 3)
    assert {name: rows.tolist() for name, rows in splits.items()} == {
        "train": [3, 8, 12, 13, 15, 22],
        "val": [7, 9, 17, 19],
        "calibration": [0, 1, 6, 14],
    }


def test_held_out_sets_do_not_depend_on_the_training_settings():
    plain = SplitSpec(val=100, calibration=50).draw(CIFAR10, 10)
    thin = SplitSpec(val=100, calibration=50, imbalance=0.01, profile="step", subset=500).draw(CIFAR10, 10)
    np.testing.assert_array_equal(plain["val"], thin["val"])
    np.testing.assert_array_equal(plain["calibration"], thin["calibration"])
    assert set(thin["train"]) < set(plain["train"])


def test_validation_set_does_not_depend_on_the_calibration_set():
    with_calibration = SplitSpec(val=100, calibration=500).draw(CIFAR10, 10)["val"]
    np.testing.assert_array_equal(with_calibration, SplitSpec(val=100).draw(CIFAR10, 10)["val"])


def test_subset_keeps_proportions_by_largest_remainder():
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    train = SplitSpec(subset=7).draw(labels, 3)["train"]
    # quotas 3.5, 2.1, 1.4: whole parts 3, 2, 1, and the one left over goes to class 0
    assert np.bincount(labels[train]).tolist() == [4, 2, 1]
    # quotas 2.5, 1.5, 1.0: the remainders are equal, the lower class wins
    assert np.bincount(labels[SplitSpec(subset=5).draw(labels, 3)["train"]]).tolist() == [3, 1, 1]
    np.testing.assert_array_equal(SplitSpec(subset=100).draw(labels, 3)["train"], np.arange(100))


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(8, 30), min_size=1, max_size=6),
    val=st.integers(0, 20),
    calibration=st.integers(0, 20),
    imbalance=st.floats(0.3, 1.0),
    profile=st.sampled_from(["exponential", "step"]),
    part=st.none() | st.floats(0.0, 1.0),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_possible_request(sizes, val, calibration, imbalance, profile, part, seed):
    classes = len(sizes)
    labels = np.random.RandomState(1).permutation(np.repeat(np.arange(classes), sizes))
    spec = SplitSpec(val=val, calibration=calibration, imbalance=imbalance, profile=profile, seed=seed)
    # enough is left of every class for the long tail to keep some
    assume(-(-(val + calibration) // classes) + 4 <= min(sizes))
    splits = spec.draw(labels, classes)
    if part is not None:
        subset = max(1, int(part * len(splits["train"])))
        before, splits = splits, replace(spec, subset=subset).draw(labels, classes)
        assert len(splits["train"]) == subset
        assert set(splits["train"]) <= set(before["train"])
        exact = subset * np.bincount(labels[before["train"]], minlength=classes) / len(before["train"])
        assert (abs(np.bincount(labels[splits["train"]], minlength=classes) - exact) < 1).all()
    every = np.concatenate(list(splits.values()))
    assert len(np.unique(every)) == len(every)
    assert set(every) <= set(range(len(labels)))
    assert [len(splits["val"]), len(splits["calibration"])] == [val, calibration]
    for rows in splits.values():
        assert rows.dtype == np.int64
        assert (np.diff(rows) > 0).all()
    held_out = [np.bincount(labels[splits[name]], minlength=classes) for name in ("val", "calibration")]
    for counts in (*held_out, sum(held_out)):
        assert counts.max() - counts.min() <= 1


def test_left_over_held_out_images_go_to_seeded_classes():
    labels = np.repeat(np.arange(10), 5)
    chosen = {
        tuple(labels[cut_balanced(labels, {"a": 3}, num_classes=10, seed=seed)[0]].tolist()) for seed in range(20)
    }
    assert len(chosen) > 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val": -1}, r"val is -1; it must be at least 0"),
        ({"calibration": -5}, r"calibration is -5; it must be at least 0"),
        ({"imbalance": 0.0}, r"imbalance is 0.0; it must be in \(0, 1\]"),
        ({"imbalance": 10}, r"imbalance is 10; it must be in \(0, 1\]"),
        ({"imbalance": float("nan")}, r"imbalance is nan"),
        ({"profile": "linear"}, r"profile is 'linear'; it must be one of exponential, step"),
        ({"seed": -1}, r"seed is -1"),
        ({"seed": 2**32}, r"seed is 4294967296"),
        ({"subset": 0}, r"subset is 0; it must be at least 1"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SplitSpec(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val": 15}, r"val=15 takes 5 of the 5 images of class 0 .* Hold out fewer than 15 images"),
        ({"val": 6, "calibration": 9}, r"val=6 \+ calibration=9 takes 5 of the 5 images of class 0"),
        ({"subset": 16}, r"subset is 16; it must be at most 15, the training images"),
        ({"val": 3, "subset": 13}, r"subset is 13; it must be at most 12, the training images"),
        ({"imbalance": 0.1}, r"imbalance is 0.1, which keeps no image of class 2; .* must be at least 0.2"),
    ],
)
def test_requests_too_large_for_the_file(settings, message):
    with pytest.raises(ValueError, match=message):
        SplitSpec(**settings).draw(np.repeat([0, 1, 2], 5), 3)


# --- files, shares and other ways to choose --------------------------------------------------------------------------

UNEVEN = np.random.RandomState(5).permutation(np.repeat(np.arange(3), (700, 200, 100)))


def divide(spec, **labels):
    return spec.divide({name: np.asarray(label) for name, label in labels.items()}, 3)


def sizes(parts):
    return {name: (part.file, len(part.rows)) for name, part in parts.items()}


def test_official_validation_file_and_calibration_from_each_file():
    files = {"train": UNEVEN, "val": UNEVEN[:300], "test": UNEVEN[300:700]}
    whole = {"train": ("train", 1000), "val": ("val", 300), "test": ("test", 400)}
    assert sizes(divide(SplitSpec(), **files)) == whole
    for file, left in (("train", 940), ("val", 240), ("test", 340)):
        spec = SplitSpec(calibration=60, calibration_from=file, choose="proportional")
        parts = divide(spec, **files)
        assert sizes(parts) == whole | {file: (file, left), "calibration": (file, 60)}
        assert not set(parts[file].rows) & set(parts["calibration"].rows)
        assert sorted([*parts[file].rows, *parts["calibration"].rows]) == list(range(len(files[file])))
    assert list(parts) == ["train", "val", "calibration", "test"]


def test_a_test_file_cut_in_halves_is_balanced_in_both():
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(3), 50))
    spec = SplitSpec(calibration=75, calibration_from="test")
    parts = divide(spec, test=labels)  # no training file: evaluation only
    assert sizes(parts) == {"calibration": ("test", 75), "test": ("test", 75)}
    for part in parts.values():
        assert np.bincount(labels[part.rows]).tolist() == [25, 25, 25]
    again = divide(SplitSpec(calibration=75, calibration_from="test"), test=labels)
    np.testing.assert_array_equal(parts["calibration"].rows, again["calibration"].rows)
    other = divide(SplitSpec(calibration=75, calibration_from="test", seed=1), test=labels)
    assert set(parts["calibration"].rows) != set(other["calibration"].rows)


def test_shared_sets_are_the_same_rows():
    parts = divide(SplitSpec(val=30, share=True), train=UNEVEN)
    np.testing.assert_array_equal(parts["val"].rows, parts["calibration"].rows)
    assert len(parts["train"].rows) == 970
    parts = divide(SplitSpec(share=True), train=UNEVEN, val=UNEVEN[:50])
    assert parts["val"] is parts["calibration"]


def test_proportional_sets_keep_the_proportions():
    parts = divide(SplitSpec(val=0.1, calibration=0.1, test=0.2, choose="proportional"), train=UNEVEN)
    counts = {name: np.bincount(UNEVEN[part.rows]).tolist() for name, part in parts.items()}
    assert counts == {
        "train": [420, 120, 60],
        "val": [70, 20, 10],
        "calibration": [70, 20, 10],
        "test": [140, 40, 20],
    }
    rows = np.concatenate([part.rows for part in parts.values()])
    assert sorted(rows) == list(range(1000))


@pytest.mark.parametrize("seed", range(4))
def test_a_class_keeps_its_last_training_image(seed):
    labels = np.repeat([0, 1], [99, 1])
    spec = SplitSpec(val=0.5, choose="proportional", seed=seed)
    assert np.bincount(labels[spec.draw(labels, 2)["train"]], minlength=2).tolist() == [49, 1]


def test_shuffled_is_the_official_code_of_the_focal_losses():
    indices = list(range(1000))
    np.random.seed(1)
    np.random.shuffle(indices)
    parts = divide(SplitSpec(val=100, seed=1, choose="shuffled"), train=UNEVEN)
    np.testing.assert_array_equal(parts["val"].rows, np.sort(indices[:100]))
    np.testing.assert_array_equal(parts["train"].rows, np.sort(indices[100:]))


def test_last_is_the_end_of_the_file():
    parts = divide(SplitSpec(val=50, calibration=20, choose="last"), train=UNEVEN)
    assert parts["val"].rows.tolist() == list(range(950, 1000))
    assert parts["calibration"].rows.tolist() == list(range(930, 950))
    assert parts["train"].rows.tolist() == list(range(930))


def test_another_set_does_not_change_the_rows_of_the_balanced_ones():
    one = divide(SplitSpec(val=30, calibration=30), train=UNEVEN)
    two = divide(SplitSpec(val=30, calibration=30, test=60), train=UNEVEN)
    np.testing.assert_array_equal(one["val"].rows, two["val"].rows)
    np.testing.assert_array_equal(one["calibration"].rows, two["calibration"].rows)


def test_everything_is_test():
    assert sizes(divide(SplitSpec(test=1.0), train=UNEVEN)) == {"test": ("train", 1000)}
    with pytest.raises(ValueError, match=r"test is 1.0, but the data already has .* test images"):
        divide(SplitSpec(test=1.0), train=UNEVEN, test=UNEVEN)


def test_what_is_asked_of_a_missing_training_file_is_left_out():
    assert sizes(divide(SplitSpec(val=30, calibration=30, imbalance=0.1), test=UNEVEN)) == {"test": ("test", 1000)}


def test_sizes_of_sets_with_a_file_are_dropped():
    spec = SplitSpec(val=0.1, calibration=0.1, test=0.2)
    own = replace(spec, choose="proportional")
    assert spec.for_files({"train"}) == own
    assert spec.for_files({"train", "test"}) == replace(own, test=0)
    assert spec.for_files({"train", "val", "test"}) == replace(own, val=0, test=0)
    assert replace(spec, choose="last").for_files({"train"}).choose == "last"
    assert spec.for_files({"test"}) == replace(own, val=0, test=0)


@pytest.mark.parametrize(
    ("settings", "files", "message"),
    [
        ({"val": 10}, "train val", r"val is 10, but the data already has 1000 val images. Leave split.val at 0"),
        ({"test": 0.5}, "train test", "test is 0.5, but the data already has .* test images"),
        ({"calibration": 5, "calibration_from": "val"}, "train", "is 'val'; it must be one of the data's files: train"),
        ({"share": True}, "train", "no validation images. Set split.val above 0"),
        ({"val": 600, "calibration": 400, "choose": "last"}, "train", "takes 1000 of 1000 images and leaves none"),
        ({"val": 0.6, "test": 0.4, "choose": "proportional"}, "train", "takes 1000 of 1000 images"),
        ({"val": 998, "choose": "proportional"}, "train", "without images. Hold out at most 997 in total"),
    ],
)
def test_files_and_settings_that_do_not_fit_together(settings, files, message):
    with pytest.raises(ValueError, match=message):
        divide(SplitSpec(**settings), **dict.fromkeys(files.split(), UNEVEN))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val": 1.0}, "val is 1.0; it must be an integer"),
        ({"test": 5000.0}, "test is 5000.0; it must be an integer"),
        (
            {"val": 10, "calibration": 20, "share": True},
            "share is true, calibration is .* the validation set is also the calibration set",
        ),
        ({"choose": "first"}, "choose is 'first'; it must be one of balanced, proportional, shuffled, last"),
        ({"calibration_from": "extra"}, "calibration_from is 'extra'; it must be one of train, val, test"),
    ],
)
def test_values_outside_their_range(settings, message):
    with pytest.raises(ValueError, match=message):
        SplitSpec(**settings)
