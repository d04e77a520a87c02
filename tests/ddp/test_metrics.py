"""Metrics over two and three processes equal those of one that saw all rows."""

import math

import pytest

from tests.metrics import ddp_cases


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
