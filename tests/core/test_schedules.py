"""Schedules against their closed forms, and their resume."""

import math

import pytest
import torch
from torch.optim import SGD

from calib_lightning.core.schedules import CosineToEnd, WarmupCosine, WarmupMultiStep


def optimizer(*rates):
    return SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates])


def run(steps, *rates, **options):
    opt = optimizer(*rates)
    schedule = WarmupCosine(opt, **options)
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in opt.param_groups])
        opt.step()
        schedule.step()
    return found


def cosine(rate, epoch, epochs, decay):
    """Epoch counted from 1, as the authors do."""
    least = rate * decay**3
    return least + (rate - least) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def authors(rate, epochs, warmup, start, decay, batches):
    """Mean rate of each epoch of the authors' loop, which sets it epoch by epoch and, in the warm-up, step by step."""
    means = []
    for epoch in range(1, epochs + 1):
        rates = []
        for batch in range(batches):
            value = cosine(rate, epoch, epochs, decay)
            if epoch <= warmup:
                done = (batch + (epoch - 1) * batches) / (warmup * batches)
                value = start + done * (cosine(rate, warmup, epochs, decay) - start)
            rates.append(value)
        means.append(sum(rates) / batches)
    return means


@pytest.mark.parametrize(
    ("epochs", "warmup"), [pytest.param(1000, 10, marks=pytest.mark.slow), (30, 10), (7, 0), (1, 0), (2, 1)]
)
def test_it_is_the_mean_rate_of_the_step_by_step_schedule(epochs, warmup):
    options = {"epochs": epochs, "warmup_epochs": warmup}
    found = [rates[0] for rates in run(epochs, 0.5, **options)]
    # with ever more steps in an epoch the mean of the ramp tends to its middle
    assert found == pytest.approx(authors(0.5, epochs, warmup, 0.01, 0.1, batches=20000), abs=2e-5)


def test_values_of_the_paper_s_run():
    found = [rates[0] for rates in run(1000, 0.5, epochs=1000)]
    # 0.49988 is where the warm-up of ten epochs ends
    assert found[0] == pytest.approx(0.01 + 0.05 * (0.49988 - 0.01), abs=1e-6)
    assert found[9] == pytest.approx(0.01 + 0.95 * (0.49988 - 0.01), abs=1e-5)
    assert found[499] == pytest.approx((0.5 + 5e-4) / 2)
    assert found[999] == pytest.approx(5e-4)


def test_without_a_warm_up_it_is_torch_s_cosine_one_epoch_ahead():
    found = run(12, 0.3, epochs=12, warmup_epochs=0)
    opt = optimizer(0.3)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=12, eta_min=0.3e-3)
    for rates in found:
        opt.step()
        reference.step()
        assert rates == pytest.approx([group["lr"] for group in opt.param_groups])


def test_each_group_has_its_own_rate_and_the_end_is_kept():
    found = run(15, 0.5, 0.1, epochs=8, warmup_epochs=2, warmup_start=0.05, decay=0.5)
    assert found[4] == pytest.approx([cosine(rate, 5, 8, 0.5) for rate in (0.5, 0.1)])
    assert found[7:] == [pytest.approx([0.0625, 0.0125])] * 8


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 9])
def test_resumed_schedule_gives_the_same_rates_bit_for_bit(stop):
    options = {"epochs": 12, "warmup_epochs": 4}
    whole = run(12, 0.5, 0.2, **options)
    first = optimizer(0.5, 0.2)
    schedule = WarmupCosine(first, **options)
    for _ in range(stop):
        first.step()
        schedule.step()
    saved = {"optimizer": first.state_dict(), "schedule": schedule.state_dict()}
    second = optimizer(0.5, 0.2)
    resumed = WarmupCosine(second, **options)
    second.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["schedule"])
    found = []
    for _ in range(12 - stop):
        found.append([group["lr"] for group in second.param_groups])
        second.step()
        resumed.step()
    assert found == whole[stop:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"epochs": 10}, r"warmup_epochs is 10; it must be at least 0 and less than epochs \(10\)"),
        ({"epochs": 10, "warmup_epochs": -1}, "warmup_epochs is -1"),
        ({"epochs": 20, "warmup_start": -0.1}, "warmup_start is -0.1"),
        ({"epochs": 20, "warmup_start": math.nan}, "warmup_start is nan"),
        ({"epochs": 20, "warmup_start": 0.6}, r"warmup_start is 0.6; it must be at most the learning rate \(0.5\)"),
        ({"epochs": 20, "decay": 0.0}, r"decay is 0.0; it must be in \(0, 1\]"),
        ({"epochs": 20, "decay": math.nan}, "decay is nan"),
    ],
)
def test_bad_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        WarmupCosine(optimizer(0.5), **options)


# --- a cosine that learns its end ------------------------------------------------------------------------------------


def to_end(epochs, state=None, steps=None):
    opt = optimizer(0.4)
    schedule = CosineToEnd(opt, eta_min=0.01)
    schedule.set_epochs(epochs)
    if state is not None:
        schedule.load_state_dict(state)
    found = []
    for _ in range(epochs if steps is None else steps):
        found.append(opt.param_groups[0]["lr"])
        opt.step()
        schedule.step()
    return found, schedule.state_dict()


def test_a_cosine_to_the_end_is_that_of_torch():
    opt = optimizer(0.4)
    theirs, expected = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 7, eta_min=0.01), []
    for _ in range(7):
        expected.append(opt.param_groups[0]["lr"])
        opt.step()
        theirs.step()
    assert to_end(7)[0] == pytest.approx(expected, rel=1e-12)


def test_a_run_that_is_resumed_for_longer_has_another_end():
    _, state = to_end(4)
    assert to_end(8, state, steps=4)[0][1:] == pytest.approx(to_end(8)[0][5:], rel=1e-12)


def test_a_cosine_without_an_end_is_refused():
    opt = optimizer(0.4)
    schedule = CosineToEnd(opt)
    opt.step()
    with pytest.raises(RuntimeError, match="Call set_epochs"):
        schedule.step()
    with pytest.raises(ValueError, match="max_epochs is -1"):
        schedule.set_epochs(-1)
    with pytest.raises(ValueError, match="eta_min is nan"):
        CosineToEnd(opt, eta_min=math.nan)


# --- steps behind a warm-up ------------------------------------------------------------------------------------------


def ldam(rate, epoch):
    """As the authors of LDAM set the rate; epoch counted from 1."""
    if epoch <= 5:
        return rate * epoch / 5
    if epoch > 180:
        return rate * 1e-4
    return rate * 0.01 if epoch > 160 else rate


def steps(opt, schedule, epochs):
    found = []
    for _ in range(epochs):
        found.append([group["lr"] for group in opt.param_groups])
        opt.step()
        schedule.step()
    return found


def test_the_steps_of_ldam_over_its_two_hundred_epochs():
    opt = optimizer(0.1, 0.3)
    found = steps(opt, WarmupMultiStep(opt, milestones=[160, 180], gamma=0.01), 200)
    expected = [[ldam(rate, epoch) for rate in (0.1, 0.3)] for epoch in range(1, 201)]
    for epoch, (one, other) in enumerate(zip(found, expected, strict=True), start=1):
        assert one == pytest.approx(other, rel=1e-12), epoch


def test_without_a_warm_up_the_steps_are_those_of_torch():
    opt, other = optimizer(0.4), optimizer(0.4)
    theirs = torch.optim.lr_scheduler.MultiStepLR(other, [3, 4, 7], gamma=0.1)
    found = steps(opt, WarmupMultiStep(opt, (3, 4, 7), warmup_epochs=0), 9)
    expected = steps(other, theirs, 9)
    assert [rates[0] for rates in found] == pytest.approx([rates[0] for rates in expected], rel=1e-12)


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 8, 9, 11])
def test_resumed_steps_are_the_same_bit_for_bit(stop):
    options = {"milestones": [8, 11], "gamma": 0.1, "warmup_epochs": 5}
    opt = optimizer(0.5, 0.2)
    whole = steps(opt, WarmupMultiStep(opt, **options), 13)
    first = optimizer(0.5, 0.2)
    schedule = WarmupMultiStep(first, **options)
    assert steps(first, schedule, stop) == whole[:stop]
    second = optimizer(0.5, 0.2)
    resumed = WarmupMultiStep(second, **options)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    assert steps(second, resumed, 13 - stop) == whole[stop:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"milestones": []}, r"milestones is \[\]; it must hold ascending"),
        ({"milestones": [180, 160]}, r"milestones is \[180, 160\]; it must hold ascending"),
        ({"milestones": [160, 160]}, r"milestones is \[160, 160\]"),
        ({"milestones": [0, 160], "warmup_epochs": 0}, r"milestones is \[0, 160\]; it must hold ascending epochs"),
        ({"gamma": 0.0}, r"gamma is 0.0; it must be in \(0, 1\]"),
        ({"gamma": 1.5}, "gamma is 1.5"),
        ({"gamma": math.nan}, "gamma is nan"),
        ({"warmup_epochs": -1}, "warmup_epochs is -1; it must be between 0 and the first milestone"),
        ({"warmup_epochs": 161}, r"warmup_epochs is 161; it must be between 0 and the first milestone \(160\)"),
    ],
)
def test_bad_numbers_of_steps_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        WarmupMultiStep(optimizer(0.1), **{"milestones": [160, 180], **options})
