import math

import pytest

from calib_lightning.metrics import families, mean_values, means_of_families, values_by_severity
from calib_lightning.plots import robustness_curves

NAMES = [
    *("test", "calibration", "shift/cifar10_1_v6", "shift/svhn"),
    *(
        f"shift/{name}/{kind}_{severity}"
        for name in ("cifar10_c", "generated")
        for kind in ("fog", "jpeg_compression")
        for severity in (1, 2, 5)
    ),
    *("ood/svhn", "ood/my_set_3"),
]


def test_corruptions_of_one_benchmark_are_a_family_and_so_are_other_sets():
    corrupted, generated, others = families(NAMES)
    assert (corrupted.name, generated.name, others.name) == ("shift/cifar10_c", "shift/generated", "ood")
    assert generated.severities == [1, 2, 5]
    assert generated.of_severity(2) == ["shift/generated/fog_2", "shift/generated/jpeg_compression_2"]
    assert corrupted.members["shift/cifar10_c/jpeg_compression_5"] == ("jpeg_compression", 5)
    assert others.severities == []
    assert list(others.members) == ["ood/svhn", "ood/my_set_3"]
    assert families(["test", "ood/svhn", "shift/cifar10_1_v6", "shift/a/fog_6", "shift/a/b/fog_1"]) == [
        (("shift/a"), {"shift/a/b/fog_1": ("b/fog", 1)})
    ]


def test_means_have_equal_weights_and_say_how_many_sets_they_are_over():
    values = {"shift/c/fog_1": {"ece": 0.1, "n": 10}, "shift/c/snow_1": {"ece": 0.5, "n": 1000}, "test": {"ece": 0}}
    assert means_of_families(values) == {"shift/c": {"ece": pytest.approx(0.3), "n": 505, "sets": 2}}
    assert mean_values([{"a": 1.0, "b": 2.0}, {"a": math.nan}]) == {"a": pytest.approx(math.nan, nan_ok=True)}
    assert mean_values([]) == {}
    (family,) = families(values)
    assert values_by_severity(family, values) == {0: [values["test"]], 1: list(values.values())[:2]}


def test_the_curve_is_the_mean_over_corruptions():
    kinds = {0: [0.02], 1: [0.05, 0.1, 0.3], 3: [0.1, 0.2, 0.6]}
    values = {severity: [{"ece": each, "nll": 10 * each} for each in found] for severity, found in kinds.items()}
    figure = robustness_curves(values, metrics=("ece", "nll", "ece"), title="run")
    ece, nll, _, spare = figure.axes
    assert ece.lines[0].get_xdata().tolist() == [0, 1, 3]
    assert ece.lines[0].get_ydata() == pytest.approx([2, 15, 30])
    assert nll.lines[0].get_ydata() == pytest.approx([0.2, 1.5, 3])
    assert ece.collections[1].get_paths()[0].vertices[:, 1].max() == pytest.approx(60)
    assert not spare.axison
    assert ece.get_title(loc="left") == "3 corruptions, 0: whole test set"
    with pytest.raises(ValueError, match="metrics has 'nll', missing at severity 0"):
        robustness_curves({0: [{"ece": 0.1}]}, metrics=("nll",))
    with pytest.raises(ValueError, match="a severity has no sets"):
        robustness_curves({1: []})
