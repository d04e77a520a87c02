"""Metrics over two and three processes equal those of one that saw all rows."""

import math

import pytest

from calib_lightning.metrics import METRICS
from tests.metrics import ddp_cases

# Read from counts or from sorted rows, which no split can change.
EXACT = {
    *(key for key, row in METRICS.items() if row.parts == ("ranks",)),
    *("accuracy", "top5_accuracy", "ovo_auroc", *ddp_cases.OOD),
}
HISTOGRAM_EXACT = {"accuracy", "top5_accuracy", "correctness_auroc", "aupr_success", "aupr_error", "fpr95", "augrc"}


@pytest.fixture(params=[2, 3])
def pool(request):
    return request.getfixturevalue(f"pool{request.param}")


@pytest.mark.parametrize(
    "case", [ddp_cases.case_uneven_shards, ddp_cases.case_empty_rank, ddp_cases.case_float64_scores]
)
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_all_ranks_read_what_one_process_reads(pool, case):
    for result in pool.run(case):
        assert result["ours"] == pytest.approx(result["alone"], rel=1e-13, abs=1e-13)
        assert result["count_after"] == result["local"], "compute must leave the rank's own rows behind"


def test_no_rows_on_any_rank(pool):
    for values in pool.run(ddp_cases.case_no_rows_anywhere):
        assert all(math.isnan(value) for value in values.values())


def test_single_metrics_over_two_epochs(pool):
    for values in pool.run(ddp_cases.case_single_metrics):
        for key in ("ece", "correctness_auroc"):
            assert values[key] == pytest.approx(values[f"alone_{key}"], rel=1e-13)


def test_a_fault_on_one_rank_is_told_on_all(pool):
    results = pool.run(ddp_cases.case_deferred_fault)
    for result in results:
        assert len(result["messages"]) == 2
        assert all("1 with invalid logits" in message for message in result["messages"])
        assert result["local"] == 24
    assert all(result["after_reset"] == results[0]["after_reset"] for result in results)


@pytest.mark.parametrize("shares", [*ddp_cases.SHARES_OF_ALL, *ddp_cases.SHARES])
def test_every_class_reads_what_one_process_reads(pool, shares):
    results = pool.run(ddp_cases.case_every_metric, shares, shares not in ddp_cases.SHARES_OF_ALL)
    alone = results[0]
    for rank, result in enumerate(results):
        for name, found in result.items():
            assert found["intact"], f"{name}: rank {rank} did not get its own rows back"
            expected = alone[name]["alone"]
            assert found["ours"] == pytest.approx(expected, rel=1e-12, abs=1e-15, nan_ok=True), (rank, name)
            exact = EXACT if name != "histogram" else HISTOGRAM_EXACT
            for key in exact & expected.keys():
                same = found["ours"][key] == expected[key] or math.isnan(expected[key])
                assert same, f"{name}, {key}: rank {rank} has {found['ours'][key]!r}, not {expected[key]!r}"
        assert result["details"]["rows"] == alone["details"]["alone_rows"]
    undefined = {math.isnan(value) for found in alone.values() for value in found["alone"].values()}
    assert undefined == {shares.startswith("nobody")}


def test_ranks_of_different_numbers_of_classes_are_told_everywhere(pool):
    for result in pool.run(ddp_cases.case_other_classes):
        for name, found in result.items():
            assert "the processes saw [5, 7] classes" in found["message"], name
            assert found["intact"], name
            assert found["ours"] == pytest.approx(found["alone"], rel=1e-12, abs=1e-15), name


def test_a_fault_of_any_rank_is_told_by_every_class_on_all(pool):
    for faulty in (0, pool.world - 1):
        for result in pool.run(ddp_cases.case_fault_of_any_rank, faulty):
            for name, (who, message) in result.items():
                kind = "scores" if name in ddp_cases.OOD else "logits"
                told = f"{who}: 1 with invalid {kind} among {40 * pool.world} rows, the first in batch 3 "
                assert message.startswith(told)


def test_figures_show_all_rows_and_local_intervals_their_own(pool):
    results = pool.run(ddp_cases.case_figures_and_local_intervals)
    total = sum(100 + rank for rank in range(1, len(results)))
    for rank, result in enumerate(results):
        assert f"N {total}" in result["text"]
        assert result["left"] == (0 if rank == 0 else 100 + rank)
        assert result["value"] == result["own"]
        assert result["held"]
