"""Runs of several methods are not averaged, intervals hold possible values only, and odd values say why."""

import json

import numpy as np
import pytest
import torch
import yaml

from calib_lightning.__main__ import main
from calib_lightning.metrics import over_seeds
from calib_lightning.metrics.functional import variational_split
from calib_lightning.metrics.functional.temperature import fit_inverse_temperature
from calib_lightning.predictions import losses
from calib_lightning.predictions.paired import auroc_influence
from calib_lightning.predictions.reading import predictions_of, read_predictions
from calib_lightning.predictions.scoring import score


def random_set(seed, rows=200, classes=3, skill=2.0):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    logits = torch.randn(rows, classes, generator=draw) + skill * torch.eye(classes)[labels]
    return logits, labels


def auroc(confidence, correct):
    pairs = confidence[correct][:, None] - confidence[~correct]
    return ((pairs > 0).double() + 0.5 * (pairs == 0)).mean()


def save(path, seed, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    logits, labels = random_set(seed, **options)
    np.savez(path, logits=logits.numpy(), labels=labels.numpy())
    return path


def run(folder, method, data, seed, **arguments):
    """A run as `calib fit` leaves it, as far as it is read here."""
    path = save(folder / f"{data}-{method}-{seed}" / "predictions" / "test.npz", seed)
    (path.parents[1] / "run.json").write_text("{}")
    content = {
        "seed_everything": seed,
        "model": {"class_path": f"calib_lightning.methods.{method}", "init_args": arguments},
        "data": {"class_path": f"calib_lightning.data.{data}DataModule", "init_args": {"seed": seed}},
    }
    (path.parents[1] / "config.yaml").write_text(yaml.safe_dump(content))
    return path


def accuracies(paths):
    return [float(score(read_predictions(path), metrics="accuracy").values["accuracy"]) for path in paths]


def test_methods_and_data_sets_have_rows_of_their_own(tmp_path, capsys):
    groups = {
        "Focal on Digits, test": [run(tmp_path, "Focal", "Digits", seed) for seed in range(3)],
        "Brier on Digits, test": [run(tmp_path, "Brier", "Digits", seed) for seed in (3, 4)],
        "Focal on Toy, test": [run(tmp_path, "Focal", "Toy", 5)],
        "Focal on Digits, test (2)": [run(tmp_path, "Focal", "Digits", seed, gamma=5.0) for seed in (6, 7)],
        "90 rows of 4 classes": [save(tmp_path / f"x{seed}.npz", seed, rows=90, classes=4) for seed in (8, 9)],
    }
    files = [str(path) for paths in groups.values() for path in paths]
    assert main(["score", *files, "--seeds", "--metrics=accuracy", "--format=json"]) == 0
    found = json.loads(capsys.readouterr().out)["seeds"]
    assert list(found) == list(groups)
    for group, paths in groups.items():
        assert found[group]["accuracy"]["mean"] == pytest.approx(np.mean(accuracies(paths)), abs=1e-12)
        assert found[group]["accuracy"]["runs"] == len(paths)
    assert found["Focal on Toy, test"]["accuracy"]["std"] is None
    assert main(["score", *files, "--seeds", "--metrics=accuracy"]) == 0
    assert "Focal on Digits, test (2): over 2 runs" in capsys.readouterr().out


def test_no_interval_holds_an_impossible_value(tmp_path):
    logits = torch.eye(2).repeat(50, 1) * 4
    labels = [torch.arange(100) % 2, torch.cat([torch.arange(90) % 2, 1 - torch.arange(10) % 2])]
    report = score({str(i): (logits, label) for i, label in enumerate(labels)}, metrics="accuracy,ece,nll", seeds=True)
    (spreads,) = report.spreads.values()
    assert over_seeds(accuracies_of := [1.0, 0.9])[3] > 1.0
    assert accuracies_of == [report.sets[name].values.values["accuracy"] for name in "01"]
    assert spreads["accuracy"].high == 1.0
    for key in ("accuracy", "ece", "nll"):
        assert spreads[key].low >= 0.0
    assert np.isfinite(spreads["nll"].high)


def test_bounds_of_over_seeds():
    free = over_seeds([0.9, 1.0, 0.95])
    assert over_seeds([0.9, 1.0, 0.95], low=0.0, high=1.0) == free._replace(high=1.0)
    assert over_seeds([0.9, 1.0, 0.95], low=0.0, high=10.0) == free
    with pytest.raises(ValueError, match=r"values has 1\.5; it must be from 0 to 1"):
        over_seeds([0.5, 1.5], low=0, high=1)


def test_probabilities_are_not_taken_for_logits_in_python_either():
    logits, labels = random_set(0)
    probs = logits.softmax(dim=1)
    with pytest.raises(ValueError, match="look like probabilities"):
        score(probs, labels)
    assert score(probs, labels, input="logits").notes
    assert not score(probs, labels, input="probs").notes


def test_a_negative_calibration_part_says_why():
    draw = torch.Generator().manual_seed(3)
    logits = 2.0 * torch.randn(500, 3, generator=draw, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=draw).squeeze(1)
    for _ in range(3):  # scaled to its own optimum, so that nothing is left to gain
        logits = fit_inverse_temperature(logits, labels).beta * logits
    assert -np.log(501 / 500) <= float(variational_split(logits, labels).calibration) < 0.0
    report = score(logits, labels)
    assert any("calibration_nll is below 0: hardly any temperature improves" in note for note in report.notes)
    assert "calibration_nll is below 0" in report.table()
    assert not any("below 0" in note for note in score(5 * logits, labels).notes)


@pytest.mark.parametrize("ties", [False, True])
def test_influences_on_the_auroc_are_those_of_leaving_rows_out(ties):
    draw = torch.Generator().manual_seed(0)
    correct = torch.rand(600, generator=draw) < 0.7
    confidence = torch.randn(600, generator=draw, dtype=torch.float64) + correct
    confidence = (2 * confidence).round() if ties else confidence
    found, value = auroc_influence(confidence, correct), float(auroc(confidence, correct))
    assert float(found.mean()) == pytest.approx(value, abs=1e-12)
    without = [auroc(confidence[rows], correct[rows]) for rows in ~torch.eye(600, dtype=torch.bool)]
    jackknife = value + 599 * (value - torch.stack(without).double())
    assert torch.allclose(found, jackknife, rtol=0.0, atol=0.03)
    assert float(found.std()) == pytest.approx(float(jackknife.std()), rel=0.02)
    assert auroc_influence(confidence, torch.ones(600)).isnan().all()


@pytest.mark.parametrize("rows", [200, 20_000])
def test_a_change_that_chance_explains_is_no_loss(rows):
    """The same fall of the AUROC is a loss on many rows and none on few."""
    draw = torch.Generator().manual_seed(5)
    labels = torch.arange(rows) % 2
    margin = torch.randn(rows, generator=draw) + 1.0
    noisy = margin + 0.35 * torch.randn(rows, generator=draw) * (torch.rand(rows, generator=draw) < 0.3)
    before, after = (
        predictions_of((torch.stack([torch.zeros(rows), m * (2.0 * labels - 1.0)], dim=1), labels))
        for m in (margin, noisy)
    )
    old, new = (losses.quality(found, 15)["correctness_auroc"] for found in (before, after))
    said = " ".join(losses.losses(before, after, "test", "X", 15))
    if rows == 20_000:
        assert 0.005 < old - new < 0.03
        assert "the correctness AUROC from" in said
        assert "paired 95 % interval of the change: -" in said
    else:
        assert "correctness AUROC from" not in said
