"""Neural Clamping on two processes ends where one process with all rows does."""

import warnings

import numpy as np
import pytest

from tests.ddp import clamping_cases as cases


def alone(kind):
    image, label = cases.all_rows()
    clamping = cases.method(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cases.plain(clamping.fit(network=cases.network(), images=image, labels=label, progress=False))


@pytest.mark.parametrize(
    ("kind", "sizes", "loader"),
    [
        ("random", [45, 45], False),
        ("data", [61, 29], False),
        ("data", [61, 29], True),
        ("data", [90, 0], False),
        ("exact", [61, 29], True),
        ("exact", [0, 90], False),
    ],
)
def test_full_batches_end_where_one_process_does(pool2, kind, sizes, loader):
    first, second = pool2.run(cases.case_fit, kind, sizes, loader, 200)
    assert first == second, "the processes differ"
    expected = alone(kind)
    assert first["report"]["rows"] == first["search"]["rows"] == cases.TOTAL
    assert first["classes"] == 4, "a process without rows knows K all the same"
    np.testing.assert_allclose(first["delta"], expected["delta"], atol=1e-9)
    assert first["log_t"] == pytest.approx(expected["log_t"], abs=1e-9)
    assert first["log_t"] != 0.0
    assert first["search"]["start_moved"] == expected["search"]["start_moved"]
    for ours, theirs in zip(first["search"]["candidates"], expected["search"]["candidates"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-9)
    for name in ("nll_before", "nll_after", "ece_before", "ece_after", "accuracy_change", "gradient_norm"):
        assert first["report"][name] == pytest.approx(expected["report"][name], rel=1e-9, abs=1e-9), name


@pytest.mark.parametrize("loader", [False, True])
def test_mini_batches_of_different_numbers_end_equal(pool2, loader):
    first, second = pool2.run(cases.case_fit, "data", [70, 20], loader, 16)
    assert first == second
    assert first["log_t"] != 0.0


def test_a_fault_of_one_process_is_told_on_both(pool2):
    other, faulty = pool2.run(cases.case_fault)
    assert "label 9" in faulty
    assert "1 of the other processes found invalid rows" in other


def test_only_the_first_process_has_a_bar(pool2):
    first, second = pool2.run(cases.case_bar)
    assert "Neural Clamping: 100%" in first
    assert second == ""
