"""A signal to one of two ranks makes both save and leave, and the resumed run ends in the same bits."""

from pathlib import Path
from typing import Any

import pytest

from calib_lightning.core.preemption import Preempted
from tests.core.test_preemption import MOMENTS, SignalAt, fit, state
from tests.ddp.pool import ProcessPool


def _fit_in_pool(rank: int, world: int, folder: Path, signalled: list[int], moment: str) -> dict[str, Any]:
    hook, step, _, options = MOMENTS[moment]
    options = {**options, "devices": world, "strategy": "ddp"}
    whole = fit(folder / "whole", **options)
    extra = [SignalAt(hook, step)] if rank in signalled else []
    code = 0
    try:
        fit(folder / "cut", *extra, **options)
    except Preempted as left:
        code = left.code
    resumed = fit(folder / "cut", ckpt_path=folder / "cut" / "last.ckpt", **options)
    return {"code": code, "whole": state(whole), "resumed": state(resumed)}


@pytest.mark.parametrize("signalled", [[0], [1], [0, 1]], ids=["rank 0", "rank 1", "both"])
@pytest.mark.parametrize("moment", ["middle", "last step of an epoch", "validation", "last step of all"])
def test_two_ranks_agree_and_resume_in_the_same_bits(
    signalled: list[int], moment: str, tmp_path: Path, pool2: ProcessPool
) -> None:
    first, second = pool2.run(_fit_in_pool, tmp_path, signalled, moment)
    assert first["code"] == second["code"] == 143
    assert first["resumed"] == first["whole"]
    weights = [name for name in first["whole"] if name.startswith("layers")]
    for name in weights:  # sums over an epoch are each rank's own; the file holds those of rank 0
        assert second["resumed"][name] == second["whole"][name] == first["whole"][name]
