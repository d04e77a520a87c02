"""What the figures show: drawn heights, ends and points against plain numpy."""

import ast
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

import calib_lightning.plots
from calib_lightning.metrics.functional.bins import bin_sums
from calib_lightning.metrics.functional.ordered import Ordered, order_rows
from calib_lightning.plots import confidence_histogram, reliability_diagram, risk_coverage_curve, wilson_interval
from tests.metrics.golden import golden_set

GOLDEN = {"ece": 0.054325825305, "gap": -0.039006782131, "accuracy": 0.764, "aurc": 0.111777532010}
GOLDEN_OPTIMUM = GOLDEN["aurc"] - 0.081200955862


def rows_of(logits, labels):
    """Confidence, log-odds of it and correctness, in float64 numpy."""
    z = logits.numpy()
    odds = np.exp(z - z.max(axis=1, keepdims=True))
    odds[np.arange(len(z)), z.argmax(axis=1)] = 0
    against = odds.sum(axis=1)
    return 1 / (1 + against), -np.log(against), z.argmax(axis=1) == labels.numpy()


@pytest.fixture(scope="module")
def golden():
    return rows_of(*golden_set())


def ordered_of(rows):
    return order_rows(torch.from_numpy(rows[1]), torch.from_numpy(rows[2]))


def bins_of(rows, n_bins):
    return bin_sums(torch.from_numpy(rows[0]), torch.from_numpy(rows[2]), n_bins)


def container(axes, label):
    return next(each for each in axes.containers if each.get_label() == label)


def line(axes, label):
    return next(each for each in axes.lines if each.get_label().startswith(label))


def numbers(figure):
    return figure.axes[0].get_title(loc="left")


def luminance(colour):
    return float(np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)))


def wilson(correct, count):
    """Both roots of (p - share)^2 = z^2 p (1 - p) / n in p."""
    z2 = 1.959963984540054**2
    return np.sort(np.roots([1 + z2 / count, -2 * correct / count - z2 / count, (correct / count) ** 2]))


@pytest.mark.parametrize(("correct", "count"), [(0, 5), (5, 5), (1, 1), (5, 10), (81, 263), (9999, 10_000), (0.5, 2.5)])
def test_wilson_interval_solves_its_equation(correct, count):
    ends = wilson_interval(torch.tensor(float(correct)), torch.tensor(float(count)))
    np.testing.assert_allclose(ends.numpy(), wilson(correct, count), atol=1e-7)
    assert 0 <= ends[0] <= correct / count <= ends[1] <= 1


def test_wilson_interval_of_published_example():
    # 81 of 263 in Newcombe (1998), table 1: 0.2553 to 0.3662
    ends = wilson_interval(torch.tensor([81.0]), torch.tensor([263.0]))
    assert [round(float(end), 4) for end in ends[0]] == [0.2553, 0.3662]


def test_wilson_interval_of_another_level_and_without_trials():
    ends = wilson_interval(torch.tensor([5.0, 0.0]), torch.tensor([10.0, 0.0]), level=0.5)
    z = 0.6744897501960817
    half = z * np.sqrt(0.025 + z**2 / 400) / (1 + z**2 / 10)
    np.testing.assert_allclose(ends[0].numpy(), [0.5 - half, 0.5 + half], rtol=1e-12)
    assert ends[1].isnan().all()


@pytest.mark.parametrize("level", [0, 1, 95, float("nan")])
def test_wilson_interval_refuses_levels(level):
    with pytest.raises(ValueError, match=r"level is .*fraction in \(0, 1\)"):
        wilson_interval(torch.tensor(1.0), torch.tensor(2.0), level)


def test_wilson_interval_refuses_more_correct_rows_than_rows():
    with pytest.raises(ValueError, match=r"correct is \[3.0\]; it must be in 0\.\.count"):
        wilson_interval(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]))


@pytest.mark.parametrize("n_bins", [1, 2, 15, 100])
def test_reliability_diagram_draws_the_bins(golden, n_bins):
    confidence, _, correct = golden
    figure = reliability_diagram(bins_of(golden, n_bins))
    top, below = figure.axes
    inside = [(confidence > m / n_bins) & (confidence <= (m + 1) / n_bins) for m in range(n_bins)]
    held = [m for m in range(n_bins) if inside[m].any()]
    accuracy = np.array([correct[inside[m]].mean() for m in held])
    mean = np.array([confidence[inside[m]].mean() for m in held])
    share = [inside[m].mean() for m in held]

    bars = container(top, "accuracy")
    few = np.array([inside[m].sum() < 20 for m in held])
    hollow = container(top, "accuracy, < 20 rows")
    for drawn, chosen in ((bars, ~few), (hollow, few)):
        np.testing.assert_allclose([bar.get_height() for bar in drawn], accuracy[chosen], rtol=1e-12)
        np.testing.assert_allclose([bar.get_x() for bar in drawn], np.array(held)[chosen] / n_bins, atol=1e-12)
        assert all(bar.get_width() < 0.6 / n_bins for bar in drawn)
    np.testing.assert_allclose([bar.get_height() for bar in container(below, "share")], share, rtol=1e-12)
    for label, chosen in (("dots", ~few), ("hollow dots", few)):
        if chosen.any():
            dots = line(top, label).get_xydata()
            np.testing.assert_allclose(dots, np.stack([mean, accuracy], axis=1)[chosen], rtol=1e-12)

    segments = np.array(next(c for c in top.collections if c.get_label() == "interval").get_segments())
    ends = [wilson(correct[inside[m]].sum(), inside[m].sum()) for m in held]
    np.testing.assert_allclose(segments[:, :, 1], ends, atol=1e-7)
    np.testing.assert_allclose(segments[:, 0, 0], mean, rtol=1e-12)

    over, under = container(top, "over-confident"), container(top, "under-confident")
    boxes = np.array([(bar.get_y(), bar.get_y() + bar.get_height()) for bar in over]).reshape(-1, 2)
    np.testing.assert_allclose(boxes, np.stack([accuracy, mean], axis=1)[mean > accuracy], rtol=1e-9)
    boxes = np.array([(bar.get_y(), bar.get_y() + bar.get_height()) for bar in under]).reshape(-1, 2)
    np.testing.assert_allclose(boxes, np.stack([mean, accuracy], axis=1)[mean < accuracy], rtol=1e-9)
    # no gap is drawn over the bar of an accuracy, so that the bar ends at the accuracy
    ends = {m: (m + 0.58) / n_bins for m in held}
    for bar in (*over, *under):
        m = int(n_bins * (bar.get_x() + bar.get_width() / 2))
        assert bar.get_x() >= ends[m] - 1e-12
        assert bar.get_x() + bar.get_width() <= (m + 1) / n_bins + 1e-12
    if n_bins > 2:
        assert len(over)
        assert len(under)


def test_reliability_diagram_says_the_numbers(golden):
    expected = f"ECE {100 * GOLDEN['ece']:.2f} % (15 bins)   gap {100 * GOLDEN['gap']:.2f} %"
    assert expected == "ECE 5.43 % (15 bins)   gap -3.90 %"
    assert numbers(reliability_diagram(bins_of(golden, 15))) == expected
    assert "(1 bin)" in numbers(reliability_diagram(bins_of(golden, 1)))


def test_reliability_diagram_takes_intervals_of_the_caller(golden):
    bins = bins_of(golden, 15)
    figure = reliability_diagram(bins, intervals=torch.stack([torch.arange(15) / 100, torch.arange(15) / 20], dim=1))
    segments = next(c for c in figure.axes[0].collections if c.get_label() == "interval").get_segments()
    held = np.flatnonzero(bins[:, 0].numpy())
    np.testing.assert_allclose([segment[:, 1] for segment in segments], np.stack([held / 100, held / 20], 1), rtol=1e-6)
    assert "95 %" not in " ".join(text.get_text() for text in figure.legends[0].get_texts())


def test_shares_are_drawn_on_a_logarithmic_scale_where_they_differ_much():
    def scale(least):
        return reliability_diagram(torch.tensor([[least, 0.0, 0.0], [100.0, 90.0, 90.0]])).axes[1].get_yscale()

    assert (scale(1.0), scale(50.0)) == ("log", "linear")


def test_over_and_under_confidence_are_told_apart_in_grey(golden):
    top = reliability_diagram(bins_of(golden, 15)).axes[0]
    over, under = (container(top, label)[0] for label in ("over-confident", "under-confident"))
    assert over.get_hatch() != under.get_hatch()
    assert over.get_hatch()
    assert under.get_hatch()
    assert abs(luminance(over.get_facecolor()) - luminance(under.get_facecolor())) > 0.15
    for patch in (over, under):
        assert abs(luminance(patch.get_facecolor()) - luminance(patch.get_edgecolor())) > 0.3


@pytest.mark.parametrize(
    ("bins", "message"),
    [
        (torch.zeros(3), r"shape \(M, 3\)"),
        (torch.zeros(0, 3), r"has shape \(0, 3\)"),
        (torch.zeros(4, 2), r"has shape \(4, 2\)"),
        (torch.tensor([[1.0, 0.5, float("nan")]]), "both in 0..count"),
        (torch.tensor([[1.0, 0.5, 2.0]]), r"begins with \[\[1.0, 0.5, 2.0\]\]"),
        (torch.tensor([[1.0, -0.5, 1.0]]), "both in 0..count"),
    ],
)
def test_reliability_diagram_refuses_values_that_are_not_bins(bins, message):
    with pytest.raises(ValueError, match=message):
        reliability_diagram(bins)


def test_reliability_diagram_refuses_intervals_of_other_bins(golden):
    with pytest.raises(ValueError, match=r"intervals has shape \(10, 2\); it must have shape \(15, 2\)"):
        reliability_diagram(bins_of(golden, 15), intervals=torch.zeros(10, 2))


def shares(figure, panel, label):
    patch = next(p for p in figure.axes[panel].patches if p.get_label() == label)
    return patch.get_data().values, patch.get_data().edges


@pytest.mark.parametrize("n_bins", [1, 7, 20])
def test_confidence_histogram_draws_shares_of_each_group(golden, n_bins):
    confidence, log_odds, correct = golden
    figure = confidence_histogram(ordered_of(golden), n_bins=n_bins)
    edges = [np.arange(n_bins + 1) / n_bins, np.linspace(np.floor(log_odds.min()), np.ceil(log_odds.max()), n_bins + 1)]
    for panel, values in enumerate((confidence, log_odds)):
        for label, group in (("correct", values[correct]), ("wrong", values[~correct])):
            expected = np.histogram(group, edges[panel])[0] / len(group)
            drawn, at = shares(figure, panel, label)
            np.testing.assert_allclose(drawn, expected, rtol=1e-12, atol=1e-15)
            np.testing.assert_allclose(at, edges[panel], atol=1e-12)
    for label, group in (("correct", confidence[correct]), ("wrong", confidence[~correct])):
        assert line(figure.axes[0], f"mean of {label}").get_xdata()[0] == pytest.approx(group.mean(), rel=1e-12)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [
        "correct: 382 rows",
        f"mean {confidence[correct].mean():.3f}",
        "wrong: 118 rows",
        f"mean {confidence[~correct].mean():.3f}",
    ]
    assert numbers(figure) == "accuracy 76.40 %"


def test_confidence_histogram_of_grouped_rows_puts_a_group_at_its_mean():
    # 4 rows of mean confidence 0.7, 3 of them right, and a group without rows
    figure = confidence_histogram(
        Ordered(*(torch.tensor(v, dtype=torch.float64) for v in ([4, 0, 2], [3, 0, 2], [2.8, 0, 1.9]))), n_bins=10
    )
    values, _ = shares(figure, 0, "correct")
    np.testing.assert_allclose(values, [0, 0, 0, 0, 0, 0, 0.6, 0, 0, 0.4])
    values, _ = shares(figure, 0, "wrong")
    np.testing.assert_allclose(values, [0, 0, 0, 0, 0, 0, 1, 0, 0, 0])


def test_log_odds_keep_apart_what_crowds_at_one_and_overflow_is_counted():
    scores = torch.tensor([7.5, 11.5, 15.5, 60.0, float("inf"), -50.0], dtype=torch.float64)
    figure = confidence_histogram(order_rows(scores, torch.ones(6, dtype=torch.bool)), n_bins=30)
    values, edges = shares(figure, 1, "correct")
    np.testing.assert_allclose(edges[[0, -1]], [-10, 20])
    expected = np.zeros(30)
    expected[[0, 17, 21, 25, 29]] = np.array([1, 1, 1, 1, 2]) / 6
    np.testing.assert_allclose(values, expected, atol=1e-12)
    assert len(figure.axes[0].lines) == 1, "no wrong rows: no mean of wrong rows"


def test_ticks_of_the_log_odds_are_confidences(golden):
    axes = confidence_histogram(ordered_of(golden)).axes[1]
    decimals = {t.get_text(): at for at, t in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)}
    assert {"0.5", "0.9", "0.99"} <= decimals.keys()
    for text, at in decimals.items():
        if not text.startswith("$"):
            assert 1 / (1 + np.exp(-at)) == pytest.approx(float(text), rel=1e-9)


def test_right_and_wrong_are_told_apart_in_grey(golden):
    axes = confidence_histogram(ordered_of(golden)).axes[0]
    right, wrong = axes.patches
    assert not right.get_hatch()
    assert wrong.get_hatch()
    assert right.get_facecolor()[3] == 1
    assert wrong.get_facecolor()[3] == 0
    assert line(axes, "mean of correct").get_linestyle() != line(axes, "mean of wrong").get_linestyle()


def curve_of(log_odds, correct):
    """Coverage and risk at the ends of groups of equal scores, highest first, by a plain loop."""
    points = []
    for score in np.unique(log_odds)[::-1]:
        answered = log_odds >= score
        points.append((answered.mean(), 1 - correct[answered].mean()))
    return np.array(points)


@pytest.mark.parametrize("decimals", [12, 1, 0])
def test_risk_coverage_curve_draws_the_risk_at_group_ends(golden, decimals):
    log_odds, correct = np.round(golden[1], decimals), golden[2]
    axes = risk_coverage_curve(order_rows(torch.from_numpy(log_odds), torch.from_numpy(correct))).axes[0]
    drawn = line(axes, "by confidence").get_xydata()
    expected = curve_of(log_odds, correct)
    np.testing.assert_allclose(drawn[1:], expected, atol=1e-12)
    np.testing.assert_allclose(drawn[0], [0, expected[0, 1]], atol=1e-12)
    coverage, optimum = line(axes, "optimum").get_xydata()[1:].T
    np.testing.assert_allclose(optimum, np.maximum(0, (coverage - 0.764) / coverage), atol=1e-12)
    assert line(axes, "all rows").get_ydata()[0] == pytest.approx(1 - 0.764)


def test_risk_coverage_curve_says_the_numbers(golden):
    expected = f"AURC {100 * GOLDEN['aurc']:.2f} % (optimum {100 * GOLDEN_OPTIMUM:.2f} %)"
    assert expected == "AURC 11.18 % (optimum 3.06 %)"
    assert numbers(risk_coverage_curve(ordered_of(golden))) == expected


def test_area_is_the_expectation_over_the_orders_of_tied_rows():
    scores = np.array([0.0, 0, 0, 1, 1, 2, 2, 2, 2, 3] * 30)
    generator = np.random.default_rng(0)
    correct = generator.random(300) < 0.7
    areas = []
    for _ in range(4000):
        shuffled = generator.permutation(300)
        order = shuffled[np.argsort(-scores[shuffled], kind="stable")]
        areas.append(((~correct[order]).cumsum() / np.arange(1, 301)).mean())
    text = numbers(risk_coverage_curve(order_rows(torch.from_numpy(scores), torch.from_numpy(correct))))
    assert float(text.split()[1]) / 100 == pytest.approx(np.mean(areas), abs=5e-4)


def test_large_sets_are_thinned_without_a_visible_change():
    generator = np.random.default_rng(1)
    log_odds = generator.normal(size=60_000)
    correct = generator.random(60_000) < 1 / (1 + np.exp(-log_odds))
    axes = risk_coverage_curve(order_rows(torch.from_numpy(log_odds), torch.from_numpy(correct))).axes[0]
    drawn = line(axes, "by confidence").get_xydata()
    order = np.argsort(-log_odds)
    risk = (~correct[order]).cumsum() / np.arange(1, 60_001)
    coverage = np.arange(1, 60_001) / 60_000
    assert len(drawn) <= 2000
    assert (np.diff(drawn[:, 0]) > 0).all()
    # every drawn point is a point of the curve
    np.testing.assert_allclose(drawn[1:, 1], risk[np.rint(drawn[1:, 0] * 60_000).astype(int) - 1], atol=1e-12)
    # in every part that is narrower than a line is wide, the lowest and the highest point are drawn
    for part in range(499):
        here = (coverage >= part / 499) & (coverage < (part + 1) / 499)
        there = (drawn[:, 0] >= part / 499) & (drawn[:, 0] < (part + 1) / 499)
        assert drawn[there, 1].max() == pytest.approx(risk[here].max(), abs=1e-12)
        assert drawn[there, 1].min() == pytest.approx(risk[here].min(), abs=1e-12)
    assert drawn[-1, 0] == 1


def test_jumps_of_the_first_rows_do_not_set_the_scale():
    log_odds = torch.linspace(5, -5, 1000, dtype=torch.float64)
    correct = torch.ones(1000, dtype=torch.bool)
    correct[[0, 999]] = False
    axes = risk_coverage_curve(order_rows(log_odds, correct)).axes[0]
    assert axes.get_ylim()[1] == pytest.approx(1.15 / 20)


@pytest.mark.parametrize("figure_of", [confidence_histogram, risk_coverage_curve])
def test_only_one_set_is_drawn(figure_of):
    with pytest.raises(ValueError, match=r"\(2, 3\).*of one set"):
        figure_of(Ordered(*torch.ones(3, 2, 3)))
    with pytest.raises(ValueError, match="negative or infinite"):
        figure_of(Ordered(*torch.tensor([[1.0], [float("nan")], [0.5]])))


EMPTY = torch.zeros(0, dtype=torch.float64)
CASES = {
    "reliability": lambda rows: reliability_diagram(bins_of(rows, 15), title="a set"),
    "histogram": lambda rows: confidence_histogram(ordered_of(rows), title="a set"),
    "risk": lambda rows: risk_coverage_curve(ordered_of(rows), title="a set"),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_set_without_rows_is_a_figure_that_says_so(kind):
    figure = CASES[kind]((EMPTY.numpy(), EMPTY.numpy(), EMPTY.bool().numpy()))
    assert [text.get_text() for text in figure.axes[0].texts] == ["no rows"]
    assert figure.get_suptitle() == "a set, N 0"


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_degenerate_sets_are_drawn(kind, right, count, recwarn):
    figure = CASES[kind]((np.full(count, 1.0), np.full(count, np.inf), np.full(count, right)))
    figure.draw_without_rendering()
    assert figure.get_suptitle() == f"a set, N {count}"
    assert not [w for w in recwarn if not issubclass(w.category, DeprecationWarning)]


@pytest.mark.parametrize("kind", CASES)
def test_all_text_lies_inside_the_figure_and_apart(kind):
    generator = np.random.default_rng(2)
    log_odds = 2 + 2 * generator.normal(size=1_281_167 if kind == "reliability" else 20_000)
    rows = (1 / (1 + np.exp(-log_odds)), log_odds, generator.random(len(log_odds)) < 0.8)
    figure = CASES[kind](rows)
    figure.draw_without_rendering()
    assert figure.get_figwidth() == 3.3
    texts = [figure._suptitle, *figure.legends[0].get_texts()]
    for axes in figure.axes:
        texts += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        texts += [label for label in axes.get_xticklabels() if axes.get_xlabel()]
    boxes = {text.get_text(): text.get_window_extent() for text in texts if text.get_text().strip()}
    assert len(boxes) > 5
    for text, box in boxes.items():
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1, text  # noqa: PT018
    found = list(boxes.items())
    for number, (text, box) in enumerate(found):
        for other, its in found[number + 1 :]:
            assert box.x1 <= its.x0 or its.x1 <= box.x0 or box.y1 <= its.y0 or its.y1 <= box.y0, (text, other)
    assert min(text.get_fontsize() for text in texts) >= 7


def test_user_settings_are_left_alone(golden):
    before = dict(matplotlib.rcParams)
    for draw in CASES.values():
        draw(golden)
    assert dict(matplotlib.rcParams) == before


def test_neither_pyplot_nor_loggers_are_imported():
    for path in sorted(Path(calib_lightning.plots.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                assert "pyplot" not in name, path.name
                assert name.partition(".")[0] not in {"lightning", "wandb", "tensorboard"}, path.name


@pytest.mark.parametrize("name", ["cifar10_resnet-20", "adrenalmnist_resnet50"])
def test_figures_of_real_networks_say_the_published_numbers(name, real_data):
    folder = real_data / "logits" / "expected_cost" / name
    logits = torch.from_numpy(np.load(folder / "scores.npy").astype(np.float64))
    rows = rows_of(logits, torch.from_numpy(np.load(folder / "targets.npy").reshape(-1).astype(np.int64)))
    reliability, histogram, risk = (draw(rows) for draw in CASES.values())
    # top-label ECE of Ferrer and Ramos (2024), table 2, in percent with one decimal
    published = {"cifar10_resnet-20": 3.9, "adrenalmnist_resnet50": 11.1}[name]
    assert round(float(numbers(reliability).split()[1]), 1) == published
    accuracy = rows[2].mean()
    assert numbers(histogram).startswith(f"accuracy {100 * accuracy:.2f} %")
    risks = (~rows[2][np.argsort(-rows[1], kind="stable")]).cumsum() / np.arange(1, len(logits) + 1)
    assert float(numbers(risk).split()[1]) == pytest.approx(100 * risks.mean(), abs=0.006)
