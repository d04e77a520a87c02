"""Neural Clamping against finite differences, random search, explicit loops and a real network."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from calib_lightning.metrics.functional import ece
from calib_lightning.metrics.functional.temperature import optimal_inverse_temperature
from calib_lightning.posthoc.clamping_descent import ClampDescent, FixedWeight, RelativeWeight, TermWeight
from calib_lightning.posthoc.clamping_objective import focal_rows
from calib_lightning.posthoc.clamping_rows import ClampRows
from calib_lightning.posthoc.clamping_start import DataDrivenStart, RandomStart
from calib_lightning.posthoc.neural_clamping import NeuralClamping
from calib_lightning.utils.described import build, parse

SHAPE = (2, 3, 3)
FEW = ClampDescent(epochs=5, lr=0.05)
pytestmark = pytest.mark.filterwarnings("ignore:NeuralClamping.fit")


def network(classes=4, dtype=torch.float64, seed=0, scale=6.0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 5, 2), nn.BatchNorm2d(5), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(20, classes)
    )
    net[-1].weight.data *= scale
    return net.to(dtype)


def images(n=60, dtype=torch.float64, seed=1):
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rows(n=60, dtype=torch.float64, seed=1, wrong=0.3):
    """Images, and labels that are mostly what `network` says."""
    generator = torch.Generator().manual_seed(seed + 100)
    net, image = network(dtype=dtype).eval(), images(n, dtype, seed)
    with torch.no_grad():
        said = net(image).argmax(1)
    other = torch.randint(4, (n,), generator=generator)
    return image, torch.where(torch.rand(n, generator=generator) < wrong, other, said)


def predicted(clamping, net, image):
    """Log-probabilities of a clamped network."""
    with torch.no_grad():
        return clamping.predict(network=net, images=image).logits


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def objective(net, image, label, delta, log_t, gamma, weight, penalty):
    """The equation in numpy."""
    with torch.no_grad():
        p = softmax(net(image + delta).numpy() / math.exp(log_t))[np.arange(len(label)), label.numpy()]
    size = np.sqrt((delta.numpy() ** 2).sum())
    return float((-((1 - p) ** gamma) * np.log(p)).mean() + weight * (size**2 if penalty == "l2sq" else size))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("penalty", ["l2sq", "l2"])
def test_first_step_goes_down_the_slope_of_the_equation(gamma, penalty):
    net, (image, label) = network().eval(), rows()
    clamping = NeuralClamping(
        (gamma,), FixedWeight(0.7), RandomStart(0.3), ClampDescent(epochs=1, lr=1e-3), penalty, batch_size=100
    )
    clamping.fit(network=net, images=image, labels=label, progress=False)
    start = RandomStart(0.3).delta(None, torch.zeros(SHAPE, dtype=torch.float64))

    def at(delta, log_t):
        return objective(net, image, label, delta, log_t, gamma, 0.7, penalty)

    small = 1e-5
    slope = (at(start, small) - at(start, -small)) / (2 * small)
    assert float(clamping.log_temperature) == pytest.approx(-1e-3 * slope, rel=1e-5)
    moved = clamping.delta - start
    for place in [(0, 0, 0), (1, 2, 1), (0, 1, 2)]:
        nudge = torch.zeros_like(start)
        nudge[place] = small
        slope = (at(start + nudge, 0.0) - at(start - nudge, 0.0)) / (2 * small)
        assert float(moved[place]) == pytest.approx(-1e-3 * slope, rel=1e-5)
    run = clamping.search.chosen
    assert run.loss_start == pytest.approx(at(start, 0.0), rel=1e-12)
    assert run.loss_end == pytest.approx(at(clamping.delta, float(clamping.log_temperature)), rel=1e-12)


def test_penalty_has_no_slope_at_zero():
    image, label = rows()
    clamping = NeuralClamping((1.0,), weights=FixedWeight(1.0), start=RandomStart(0.0), descent=FEW, penalty="l2")
    clamping.fit(network=network(), images=image, labels=label, progress=False)
    assert bool(clamping.delta.isfinite().all())


def test_momentum_steps_as_written_out():
    net, (image, label) = network().eval(), rows()
    NeuralClamping()  # the default values can be constructed
    clamping = NeuralClamping(
        (1.0,), FixedWeight(0.2), RandomStart(0.1), ClampDescent(epochs=3, lr=0.01, momentum=0.9), batch_size=100
    )
    clamping.fit(network=net, images=image, labels=label, progress=False)
    delta = RandomStart(0.1).delta(None, torch.zeros(SHAPE, dtype=torch.float64)).requires_grad_()
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    speed = [torch.zeros_like(delta), torch.zeros_like(log_t)]
    for _ in range(3):
        p = (net(image + delta) / log_t.exp()).softmax(1)[torch.arange(60), label]
        loss = (-(1 - p) * p.log()).mean() + 0.2 * (delta**2).sum()
        slopes = torch.autograd.grad(loss, (delta, log_t))
        speed = [0.9 * s + g for s, g in zip(speed, slopes, strict=True)]
        with torch.no_grad():
            delta -= 0.01 * speed[0]
            log_t -= 0.01 * speed[1]
    torch.testing.assert_close(clamping.delta, delta.detach(), rtol=1e-9, atol=1e-12)
    assert clamping.temperature == pytest.approx(log_t.exp().item(), rel=1e-10)


# --- starts ----------------------------------------------------------------------------------------------------------


def entropy(net, image):
    with torch.no_grad():
        q = softmax(net(image).numpy())
    return -(q * np.log(q)).sum()


def test_data_driven_start_is_the_best_vertex_of_a_linear_model():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(18, 4)).double()
    image = torch.rand(40, *SHAPE, dtype=torch.float64) * 0.8 + 0.1
    low, high = torch.tensor([0.0, -0.2]), torch.tensor([1.0, 1.3])
    start = DataDrivenStart(low.tolist(), high.tolist())
    delta = start.delta(ClampRows(net, image, torch.zeros(40).long(), 7), torch.zeros(SHAPE, dtype=torch.float64))
    assert bool((delta != 0).all())
    room_below = image.amin(0) - low.double().view(2, 1, 1)
    room_above = high.double().view(2, 1, 1) - image.amax(0)
    assert bool((delta >= -room_below - 1e-6).all())
    assert bool((delta <= room_above + 1e-6).all())
    slope = torch.zeros(SHAPE, dtype=torch.float64)
    for place in itertools.product(*map(range, SHAPE)):  # of the entropy, by central differences
        nudge = torch.zeros_like(slope)
        nudge[place] = 1e-5
        slope[place] = (entropy(net, image + nudge) - entropy(net, image - nudge)) / 2e-5
    gain = float((slope * delta).sum())
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(3000, *SHAPE, generator=generator, dtype=torch.float64)
    share[:1000] = share[:1000].round()  # corners of the feasible box
    others = ((share * (room_below + room_above) - room_below) * slope).sum((1, 2, 3))
    assert gain >= float(others.max()) > 0
    # To first order it is what the entropy does.
    tiny = 1e-5
    assert entropy(net, image + tiny * delta) - entropy(net, image) == pytest.approx(tiny * gain, rel=1e-3)


def test_entropy_slope_by_logits_is_the_closed_form():
    torch.manual_seed(0)
    weight = torch.randn(4, 18, dtype=torch.float64)
    image = torch.rand(9, *SHAPE, dtype=torch.float64)
    net = lambda x: x.flatten(1) @ weight.T  # noqa: E731
    q = softmax(net(image).numpy())
    h = -(q * np.log(q)).sum(1, keepdims=True)
    slope = (-(q * (np.log(q) + h)) @ weight.numpy()).sum(0).reshape(SHAPE)
    delta = DataDrivenStart([-1, -1], [2, 2]).delta(
        ClampRows(net, image, torch.zeros(9).long(), 4), torch.zeros(SHAPE, dtype=torch.float64)
    )
    expected = np.where(slope > 0, 2 - image.amax(0).numpy(), -(image.amin(0).numpy() + 1))
    np.testing.assert_allclose(delta, expected, rtol=1e-12)


def test_images_that_touch_the_range_leave_no_room():
    image, label = rows(200)
    image = image.sigmoid()
    low, high = [-1.2, -0.9], [1.3, 2.0]
    scale = torch.tensor(high).sub(torch.tensor(low)).view(2, 1, 1)
    image[0], image[1] = 0.0, 1.0
    image = (image * scale + torch.tensor(low).view(2, 1, 1)).float()
    clamping = NeuralClamping((1.0,), start=DataDrivenStart(low, high), descent=None)
    clamping.fit(network=network(dtype=torch.float32), images=image, labels=label, progress=False)
    assert clamping.search.start_moved == 0.0
    assert clamping.search.chosen.delta_norm == 0.0
    with pytest.raises(ValueError, match="they must be in that range"):
        clamping.start.delta(ClampRows(network(dtype=torch.float32), image + 1, label, 9), image[0])
    with pytest.raises(ValueError, match="low has 1 channels; it must have 2"):
        DataDrivenStart([0.0], [1.0]).delta(ClampRows(network(), image, label, 9), image[0])


def test_random_start_has_the_norms_of_its_scale():
    like = torch.zeros(3, 32, 32)
    assert float(RandomStart(1e-3).delta(None, like).norm()) == pytest.approx(0.0554, rel=0.05)
    assert float(RandomStart(1e-2).delta(None, like).norm() ** 2) == pytest.approx(0.307, rel=0.1)
    assert torch.equal(RandomStart(seed=4).delta(None, like), RandomStart(seed=4).delta(None, like))
    assert not torch.equal(RandomStart(seed=4).delta(None, like), RandomStart(seed=5).delta(None, like))


# --- weights, gammas -------------------------------------------------------------------------------------------------


def test_weight_rules():
    image, label = rows()
    net = network().eval()
    start = RandomStart(0.3).delta(None, torch.zeros(SHAPE, dtype=torch.float64))
    with torch.no_grad():
        p = softmax(net(image + start).numpy())[np.arange(60), label.numpy()]
    loss = (-(1 - p) * np.log(p)).mean()
    size = float((start**2).sum())
    rules = (RelativeWeight(0.1), TermWeight(0.1), FixedWeight(0.25))
    clamping = NeuralClamping((1.0,), weights=rules, start=RandomStart(0.3), descent=FEW)
    clamping.fit(network=net, images=image, labels=label, progress=False)
    found = [run.weight for run in clamping.search.candidates]
    assert found == pytest.approx([0.1 * loss, 0.1 * loss / size, 0.25], rel=1e-12)
    with pytest.raises(ValueError, match="the start is zero"):
        NeuralClamping((1.0,), weights=TermWeight(), start=RandomStart(0.0)).fit(
            network=net, images=image, labels=label, progress=False
        )


def test_pool_chooses_what_an_explicit_loop_chooses():
    image, label = rows(300)
    gammas, weights = (0.0, 0.5, 1.0, 3.0), (FixedWeight(0.01), FixedWeight(1.0))
    descent = ClampDescent(epochs=20, lr=0.1)
    pool = NeuralClamping(gammas, weights, descent=descent).fit(
        network=network(), images=image, labels=label, progress=False
    )
    runs = []
    for gamma, weight in itertools.product(gammas, weights):
        alone = NeuralClamping((gamma,), weight, descent=descent).fit(
            network=network(), images=image, labels=label, progress=False
        )
        p = predicted(alone, network().eval(), image).exp().numpy()
        c, a = p.max(1), p.argmax(1) == label.numpy()
        m = np.clip(np.ceil(c * 15) - 1, 0, 14)
        error = sum(abs((a - c)[m == b].sum()) for b in range(15)) / 300
        assert alone.search.chosen.ece == pytest.approx(error, rel=1e-9)
        runs.append((error, alone))
    assert [run.ece for run in pool.search.candidates] == pytest.approx([error for error, _ in runs], rel=1e-12)
    best = min(runs, key=lambda run: run[0])[1]
    assert torch.equal(pool.delta, best.delta)
    assert pool.temperature == best.temperature
    assert pool.search.chosen == best.search.chosen
    assert len({error for error, _ in runs}) > 1


def test_focal_is_cross_entropy_at_gamma_zero():
    logits, labels = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 4
    ours = focal_rows(logits, labels, 0.0)
    torch.testing.assert_close(ours, nn.functional.cross_entropy(logits, labels, reduction="none"))
    torch.testing.assert_close(focal_rows(logits, labels, 1e-9), ours, rtol=1e-7, atol=0)


def test_focal_slope_is_finite_where_a_row_is_certain():
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    focal_rows(logits, torch.tensor([0]), 0.3).sum().backward()
    assert bool(logits.grad.isfinite().all())


# --- temperature alone -----------------------------------------------------------------------------------------------


def test_fixed_delta_of_zero_and_cross_entropy_is_temperature_scaling():
    image, label = rows(200)
    clamping = NeuralClamping((0.0,), start=RandomStart(0.0), descent=None).fit(
        network=network(), images=image, labels=label, progress=False
    )
    with torch.no_grad():
        logits = network().eval()(image)
    best = minimize_scalar(
        lambda u: nn.functional.cross_entropy(logits * math.exp(-u), label).item(),
        bounds=(-6, 6),
        options={"xatol": 1e-9},
    )
    assert math.log(clamping.temperature) == pytest.approx(best.x, abs=1e-6)
    assert clamping.temperature == pytest.approx(1 / optimal_inverse_temperature(logits, label).beta, rel=1e-9)
    assert clamping.search.chosen.nll <= clamping.report.nll_before
    assert clamping.search.chosen.accuracy_change == 0.0
    torch.testing.assert_close(
        predicted(clamping, network().eval(), image), (logits / clamping.temperature).log_softmax(1)
    )
    assert clamping.report.converged
    assert clamping.report.gradient_norm == 0.0


def test_temperature_by_focal_loss_is_the_best_of_a_fine_grid():
    image, label = rows(200)
    clamping = NeuralClamping((1.5,), start=RandomStart(0.2), descent=None).fit(
        network=network(), images=image, labels=label, progress=False
    )
    with torch.no_grad():
        logits = network().eval()(image + clamping.delta).numpy()

    def loss(log_t):
        p = softmax(logits / math.exp(log_t))[np.arange(200), label.numpy()]
        return (-((1 - p) ** 1.5) * np.log(p)).mean()

    grid = np.arange(-3, 3, 1e-3)
    best = grid[np.argmin([loss(log_t) for log_t in grid])]
    assert math.log(clamping.temperature) == pytest.approx(best, abs=2e-3)
    assert loss(math.log(clamping.temperature)) <= loss(best) + 1e-12


def test_a_temperature_without_end_is_told():
    image, _ = rows(50)
    with torch.no_grad():
        label = network().eval()(image).argmax(1)
    with pytest.warns(UserWarning, match="stopped at its bound"):
        NeuralClamping((0.0,), start=RandomStart(0.0), descent=None).fit(
            network=network(), images=image, labels=label, progress=False
        )


# --- the network -----------------------------------------------------------------------------------------------------


def test_network_is_left_as_it_was():
    image, label = rows()
    net = network().train()
    net[3].eval()
    net[0].weight.requires_grad_(False)
    net[-1].bias.grad = torch.ones_like(net[-1].bias)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    seen = []
    net[1].register_forward_hook(lambda module, *_: seen.append(module.training))
    NeuralClamping((1.0,), start=DataDrivenStart([-9, -9], [9, 9]), descent=FEW).fit(
        network=net, images=image, labels=label, progress=False
    )
    assert seen
    assert not any(seen), "batch normalisation was in training mode"
    assert [module.training for module in net] == [True, True, True, False, True, True]
    assert [p.requires_grad for p in net.parameters()] == [False, *[True] * 5]
    assert torch.equal(net[-1].bias.grad, torch.ones_like(net[-1].bias))
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    net[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        NeuralClamping((1.0,), descent=FEW).fit(network=net, images=image, labels=label, progress=False)
    assert net[0].training
    assert net[-1].weight.requires_grad


def test_same_seed_same_bits_other_order_other_bits():
    image, label = rows()

    def fit(seed):
        torch.manual_seed(seed + 7)  # must not matter
        descent = ClampDescent(epochs=3, lr=0.1, seed=seed)
        return NeuralClamping((1.0,), descent=descent, batch_size=16).fit(
            network=network(), images=image, labels=label, progress=False
        )

    first, again, other = fit(0), fit(0), fit(1)
    assert torch.equal(first.delta, again.delta)
    assert first.report == again.report
    assert not torch.equal(first.delta, other.delta)


def test_fit_leaves_the_global_generator_alone():
    image, label = rows()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    net = network()
    torch.set_rng_state(before)
    NeuralClamping((1.0,), descent=FEW).fit(network=net, images=image, labels=label, progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_give_what_a_tensor_gives():
    image, label = rows()
    index = torch.arange(60)
    whole = NeuralClamping((1.0,), descent=FEW, batch_size=60).fit(
        network=network(), images=image, labels=label, progress=False
    )
    loader = DataLoader(TensorDataset(image, label, index), batch_size=60)
    fitted = NeuralClamping((1.0,), descent=FEW).fit(network=network(), images=loader, progress=False)
    torch.testing.assert_close(fitted.delta, whole.delta, rtol=1e-9, atol=1e-12)
    assert fitted.report.rows == 60
    uneven = DataLoader(TensorDataset(image, label), batch_size=25)
    assert NeuralClamping((1.0,), descent=FEW).fit(network=network(), images=uneven, progress=False).report.rows == 60


def test_loss_falls_and_no_gradient_is_asked_for_outside():
    image, label = rows(200)
    clamping = NeuralClamping((1.0,), descent=ClampDescent(epochs=30, lr=0.1)).fit(
        network=network(), images=image, labels=label, progress=False
    )
    search = clamping.search
    assert search.chosen.loss_end < 0.97 * search.chosen.loss_start
    assert search.chosen.nll < search.nll_before
    assert search.start_moved == 1.0
    assert not clamping.delta.requires_grad
    with torch.no_grad():
        NeuralClamping((1.0,), descent=FEW).fit(network=network(), images=image, labels=label, progress=False)


def test_half_precision_network_and_images():
    image, label = rows(dtype=torch.float32)
    net = network(dtype=torch.bfloat16)
    clamping = NeuralClamping((1.0,), descent=FEW).fit(
        network=net, images=image.bfloat16(), labels=label, progress=False
    )
    assert clamping.delta.dtype == torch.float32
    assert clamping.perturb(image.bfloat16()).dtype == torch.bfloat16
    assert predicted(clamping, net.eval(), image.bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        mixed = NeuralClamping((1.0,), descent=FEW).fit(
            network=network(dtype=torch.float32), images=image, labels=label, progress=False
        )
    assert mixed.search.chosen.loss_end < mixed.search.chosen.loss_start


# --- use, checkpoints, bad input -------------------------------------------------------------------------------------


def test_ablations_keep_one_half():
    image, label = rows()
    net = network().eval()
    clamping = NeuralClamping((1.0,), start=RandomStart(0.3), descent=FEW).fit(
        network=net, images=image, labels=label, progress=False
    )
    with torch.no_grad():
        both = net(image + clamping.delta) / clamping.temperature
        torch.testing.assert_close(predicted(clamping, net, image), both.log_softmax(1))
        torch.testing.assert_close(clamping.transform(net(clamping.perturb(image)), None), both.log_softmax(1))
        moved, cooled = net(image + clamping.delta), net(image) / clamping.temperature
        torch.testing.assert_close(predicted(clamping.input_only(), net, image), moved.log_softmax(1))
        torch.testing.assert_close(predicted(clamping.output_only(), net, image), cooled.log_softmax(1))
    assert clamping.input_only().temperature == 1.0
    assert clamping.temperature != 1.0
    assert clamping.report is not None
    assert clamping.input_only().report is None
    with pytest.raises(RuntimeError, match="not fitted"):
        NeuralClamping().input_only()


def test_travels_as_spec_and_state():
    image, label = rows()
    clamping = NeuralClamping(
        (0.0, 1.0), [FixedWeight(0.1), TermWeight()], DataDrivenStart([-9, -9], [9, 9]), FEW, "l2", 32
    )
    clamping.fit(network=network(), images=image, labels=label, progress=False)
    again = build(clamping.spec, NeuralClamping)
    again.load_state_dict(clamping.state_dict())
    assert again.spec == clamping.spec
    assert again.report == clamping.report
    assert again.search == clamping.search
    assert torch.equal(again.perturb(image), clamping.perturb(image))
    assert torch.equal(predicted(again, network().eval(), image), predicted(clamping, network().eval(), image))
    assert parse(clamping.name, NeuralClamping).spec == clamping.spec
    assert parse("NeuralClamping(descent=None)", NeuralClamping).descent is None
    assert NeuralClamping().name == "NeuralClamping"
    for damaged in ({"report": {"rows": 3}}, {"search": None}, {"num_classes": 4, "report": None, "search": 3}, None):
        with pytest.raises(ValueError, match="damaged"):
            again.set_extra_state(damaged)


def test_report_is_that_of_the_chosen_run():
    image, label = rows()
    clamping = NeuralClamping((0.0, 2.0), (FixedWeight(0.0), FixedWeight(1.0)), descent=FEW)
    with pytest.warns(UserWarning, match="NeuralClamping.fit"):
        clamping.fit(network=network(), images=image, labels=label, progress=False)
    report, search = clamping.report, clamping.search
    with torch.no_grad():
        before, after = network().eval()(image), predicted(clamping, network().eval(), image)
    assert report.calibrator == clamping.name
    assert report.rows == search.rows == 60
    assert report.passes == 4 * FEW.epochs
    assert report.nll_before == pytest.approx(nn.functional.cross_entropy(before, label).item())
    assert report.nll_after == pytest.approx(nn.functional.nll_loss(after, label).item()) == search.chosen.nll
    assert report.ece_before == pytest.approx(float(ece(before, label)))
    assert report.ece_after == pytest.approx(float(ece(after, label))) == search.chosen.ece
    gained = (after.argmax(1) == label).double().mean() - (before.argmax(1) == label).double().mean()
    assert report.accuracy_change == pytest.approx(float(gained))
    assert not report.converged
    assert report.gradient_norm > 1e-2
    assert report.notes == search.notes
    assert report.problems[0] == report.notes[0]
    assert clamping.details["chosen"] == search.chosen._asdict()
    assert [run["gamma"] for run in clamping.details["candidates"]] == [0.0, 0.0, 2.0, 2.0]
    assert NeuralClamping().details == {}
    assert json.loads(json.dumps(clamping.details)) == clamping.details


def test_large_sets_are_seen_a_batch_at_a_time():
    image, label = rows()
    clamping = NeuralClamping((1.0,), descent=FEW, batch_size=60)
    clamping.fit(network=network(), images=image, labels=label, progress=False)
    net = network().eval()
    whole = predicted(clamping, net, image)
    sizes = []
    net.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    clamping.batch_size = 25
    torch.testing.assert_close(predicted(clamping, net, image), whole)
    assert sizes == [25, 25, 10]
    loader = DataLoader(TensorDataset(image, label), batch_size=40)
    torch.testing.assert_close(predicted(clamping, net, loader), whole)
    assert sizes == [25, 25, 10, 40, 20]


def test_a_network_of_probabilities_is_told():
    image, label = rows()
    net = nn.Sequential(network(), nn.Softmax(1))
    with pytest.warns(UserWarning, match=r"NeuralClamping\.fit: .*as_logits"):
        NeuralClamping((1.0,), descent=FEW).fit(network=net, images=image, labels=label, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gammas": ()}, "one or more finite numbers >= 0"),
        ({"gammas": (-1.0,)}, "one or more finite numbers >= 0"),
        ({"weights": ()}, "one or more rules"),
        ({"penalty": "l1"}, "'l2sq' or 'l2'"),
        ({"batch_size": 0}, "an integer >= 1"),
        ({"batch_size": True}, "an integer >= 1"),
    ],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        NeuralClamping(**arguments)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RandomStart(-1.0),
        lambda: DataDrivenStart([0.0], [0.0]),
        lambda: DataDrivenStart([0.0, 1.0], [2.0]),
        lambda: FixedWeight(-1.0),
        lambda: RelativeWeight(math.inf),
        lambda: TermWeight(-0.1),
        lambda: ClampDescent(epochs=0),
        lambda: ClampDescent(momentum=1.0),
        lambda: ClampDescent(lr=0.0),
    ],
)
def test_refuses_parts(make):
    with pytest.raises(ValueError):
        make()


def test_refuses_input():
    image, label = rows()
    fit = NeuralClamping((1.0,), descent=FEW).fit
    net = network()
    with pytest.raises(ValueError, match=r"labels is None; it must have shape \(60,\)"):
        fit(network=net, images=image, progress=False)
    with pytest.raises(ValueError, match=r"labels has shape \(59,\); it must have shape \(60,\)"):
        fit(network=net, images=image, labels=label[1:], progress=False)
    for wrong in (label.double(), label.numpy(), label > 1):
        with pytest.raises(TypeError, match=r"labels is .*; it must be a tensor of class numbers"):
            fit(network=net, images=image, labels=wrong, progress=False)
        with pytest.raises(TypeError, match=r"labels is .*; it must be a tensor of class numbers"):
            fit(network=net, images=[(image, wrong)], progress=False)
    with pytest.raises(ValueError, match=r"needs network= and images="):
        fit(logits=net.eval()(image), labels=label)
    for once in (iter([(image, label)]), image.numpy(), 3):
        with pytest.raises(TypeError, match="read repeatedly"):
            fit(network=net, images=once, labels=label, progress=False)
    with pytest.raises(TypeError, match=r"uint8 of shape .*; it must be a tensor, floating point of shape"):
        fit(network=net, images=image.to(torch.uint8), labels=label, progress=False)
    with pytest.raises(ValueError, match="label 4"):
        fit(network=net, images=image, labels=label.clone().fill_(4), progress=False)
    with pytest.raises(ValueError, match="1 of 60 rows have invalid logits"):
        fit(network=net, images=image.index_fill(0, torch.tensor([3]), torch.nan), labels=label, progress=False)
    with pytest.raises(ValueError, match="no rows"):
        fit(network=net, images=image[:0], labels=label[:0], progress=False)
    with pytest.raises(ValueError, match="no batches"):
        fit(network=net, images=[], progress=False)
    with pytest.raises(ValueError, match=r"it must (be|return) logits"):
        fit(network=lambda x: x, images=image, labels=label, progress=False)
    with pytest.raises(ValueError, match="no gradient"):
        fit(network=lambda x: network().eval()(x).detach(), images=image, labels=label, progress=False)
    with pytest.raises(TypeError, match="needs the network and its images"):
        NeuralClamping().fit_rows(torch.randn(3, 2), torch.tensor([0, 1, 0]), None)
    with pytest.raises(RuntimeError, match="not fitted"):
        NeuralClamping().perturb(image)
    fitted = NeuralClamping((1.0,), descent=FEW).fit(network=network(), images=image, labels=label, progress=False)
    with pytest.raises(ValueError, match=r"\(60, 1, 3, 3\); it must have shape \(N, 2, 3, 3\)"):
        fitted.perturb(image[:, :1])
    with pytest.raises(TypeError, match=r"images is torch\.uint8; it must be a tensor, floating point"):
        fitted.perturb(image.to(torch.uint8))
    with pytest.raises(ValueError, match="label 4"):
        fitted.fit(network=network(), images=image, labels=label.clone().fill_(4), progress=False)
    assert not fitted.fitted, "a fit that failed must leave nothing to use"


def test_divergence_is_told_by_name():
    image, label = rows(dtype=torch.float32)
    with pytest.raises(FloatingPointError, match="use a lower lr"):
        NeuralClamping((0.0,), descent=ClampDescent(epochs=50, lr=1e6)).fit(
            network=network(dtype=torch.float32), images=image, labels=label, progress=False
        )


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_divergence_in_the_last_step_is_told(gamma):
    image, label = rows()
    clamping = NeuralClamping((gamma,), descent=ClampDescent(epochs=1, lr=1e4), batch_size=100)
    with pytest.raises(FloatingPointError, match="ends with log T"):
        clamping.fit(network=network(), images=image, labels=label, progress=False)


def test_what_did_not_work_is_noted():
    image, label = rows()
    with pytest.warns(UserWarning, match="stopped before the optimum"):
        slow = NeuralClamping((1.0,), descent=ClampDescent(epochs=1, lr=1e-6)).fit(
            network=network(), images=image, labels=label, progress=False
        )
    assert any("by log T" in note for note in slow.report.notes)
    with pytest.warns(UserWarning, match="the objective rose"):
        NeuralClamping((1.0,), descent=ClampDescent(epochs=1, lr=6.0)).fit(
            network=network(), images=image, labels=label, progress=False
        )


# --- a real network --------------------------------------------------------------------------------------------------


def test_improves_a_trained_network_on_digits():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    image = torch.from_numpy(digits.images).float().unsqueeze(1) / 16 - 0.3
    label = torch.from_numpy(digits.target)
    noisy = label.clone()
    noisy[::4] = torch.randint(10, noisy[::4].shape, generator=torch.Generator().manual_seed(0))
    train, calibration = slice(0, 400), slice(900, None)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(60):  # long enough to learn the noisy labels by heart
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(image[train]), noisy[train]).backward()
        optimizer.step()
    descent = ClampDescent(epochs=15, lr=0.05, momentum=0.9)
    start = DataDrivenStart([-0.3], [0.7])
    clamping = NeuralClamping((0.0, 1.0), start=start, descent=descent, batch_size=128)
    report = clamping.fit(network=net, images=image[calibration], labels=noisy[calibration], progress=False).report
    assert clamping.search.chosen.loss_end < clamping.search.chosen.loss_start
    assert report.nll_after < report.nll_before
    assert report.ece_after < report.ece_before
    assert 0.0 < clamping.search.start_moved < 1.0, (
        "digits have pixels that are always black and others that never are white"
    )
    cheap = NeuralClamping((0.0,), start=start, descent=None).fit(
        network=net, images=image[calibration], labels=noisy[calibration], progress=False
    )
    assert cheap.search.chosen.nll < report.nll_before


# --- the default, recipes, ablations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_the_default_reaches_the_optimum_of_a_long_run(gamma):
    image, label = rows(200)
    arguments = {"network": network(scale=20.0), "images": image, "labels": label, "progress": False}
    found = NeuralClamping((gamma,)).fit(**arguments)
    long = NeuralClamping((gamma,), descent=ClampDescent(epochs=1000, lr=0.03, momentum=0.9)).fit(**arguments)
    assert abs(long.temperature - 1.0) > 0.5, "the test needs a network that is far from calibrated"
    assert found.temperature == pytest.approx(long.temperature, rel=0.01)
    assert found.search.chosen.loss_end < long.search.chosen.loss_end + 0.01
    assert found.report.converged
    assert found.report.passes == 16


def test_the_default_pool_is_chosen_by_calibration_error_and_reports_entropy():
    image, label = rows(200)
    pool = NeuralClamping().fit(network=network(), images=image, labels=label, progress=False)
    runs = pool.search.candidates
    assert [run.gamma for run in runs] == pytest.approx([0.05 * step for step in range(21)])
    assert pool.search.chosen == min(runs, key=lambda run: run.ece)
    q = predicted(pool, network().eval(), image).exp().numpy()
    assert pool.search.chosen.entropy == pytest.approx(-(q * np.log(q)).sum(1).mean(), rel=1e-9)
    assert runs[-1].entropy > runs[0].entropy  # a larger gamma lowers confidence
    assert pool.report.passes == 4 * 24


def test_a_sum_over_rows_is_a_longer_step():
    image, label = rows()
    arguments = {"network": network(), "images": image, "labels": label, "progress": False}
    fit = NeuralClamping((1.0,), FixedWeight(0.2), descent=ClampDescent(epochs=3, lr=1e-4, reduction="sum"))
    same = NeuralClamping((1.0,), FixedWeight(0.2), descent=ClampDescent(epochs=3, lr=6e-3))  # one batch of 60 rows
    fit.fit(**arguments)
    same.fit(**arguments)
    torch.testing.assert_close(fit.delta, same.delta, rtol=1e-12, atol=0)
    assert fit.temperature == pytest.approx(same.temperature, rel=1e-12)
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        ClampDescent(reduction="max")


def test_ablations_as_calibrators():
    image, label = rows()
    arguments = {"network": network(), "images": image, "labels": label, "progress": False}
    both, moved, cooled = (NeuralClamping((1.0,), keep=keep).fit(**arguments) for keep in ("both", "input", "output"))
    net = network().eval()
    for ablation, expected in ((moved, both.input_only()), (cooled, both.output_only())):
        log_probs = predicted(ablation, net, image)
        torch.testing.assert_close(log_probs, predicted(expected, net, image))
        assert ablation.report.nll_after == pytest.approx(nn.functional.nll_loss(log_probs, label).item())
        assert ablation.search.chosen == both.search.chosen
    with pytest.raises(ValueError, match="'both', 'input' or 'output'"):
        NeuralClamping(keep="neither")


def test_a_start_without_a_range_is_refused_outside_a_run():
    image, label = rows()
    with pytest.raises(ValueError, match="low and high are not given"):
        NeuralClamping(start=DataDrivenStart()).fit(network=network(), images=image, labels=label, progress=False)
    with pytest.raises(ValueError, match="one number per channel"):
        DataDrivenStart([0.0])


def test_a_report_of_an_earlier_version_has_no_entropy():
    image, label = rows()
    clamping = NeuralClamping((1.0,)).fit(network=network(), images=image, labels=label, progress=False)
    state = clamping.get_extra_state()
    search = state["search"]
    search["chosen"], search["candidates"] = search["chosen"][:-1], [run[:-1] for run in search["candidates"]]
    again = build(clamping.spec, NeuralClamping)
    again.set_extra_state(state)
    assert again.search.chosen[:-1] == clamping.search.chosen[:-1]
    assert math.isnan(again.search.chosen.entropy)
