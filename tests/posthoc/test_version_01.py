"""Records as version 0.1 wrote them: class paths, arguments and states, with what it predicted from them."""

import copy
import math

import pytest
import torch

from calib_lightning.posthoc import DensityRatio, NeuralClamping, Temperature, TopLabel, calibrator_of, load_calibrator
from calib_lightning.posthoc.clamping_report import ClampCandidate

F64 = torch.float64
X = torch.tensor([[1.0, 0.5, -1.0]], dtype=F64)


def report(calibrator, rows, **values):
    first = {"calibrator": calibrator, "rows": rows, "converged": True, "passes": 1, "gradient_norm": math.nan}
    return {**first, "at_bound": False, "accuracy_change": 0.0, "notes": [], **values}


TEMPERATURE = {
    "spec": {"class_path": "calib_lightning.posthoc.temperature.Temperature", "init_args": {"solver": None}},
    "state": {
        "beta": torch.tensor(0.65696470985411759, dtype=F64),
        "_extra_state": {
            "num_classes": 3,
            "report": report(
                "Temperature",
                6,
                passes=4,
                gradient_norm=2.0758350266312117e-08,
                nll_before=0.9432005555303459,
                nll_after=0.9036902622833765,
                ece_before=0.24510381244380688,
                ece_after=0.23378669978481484,
            ),
        },
    },
}

TOP_LABEL = {
    "spec": {
        "class_path": "calib_lightning.posthoc.wrappers.TopLabel",
        "init_args": {"calibrator": {"class_path": "calib_lightning.posthoc.isotonic.Isotonic", "init_args": {}}},
    },
    "state": {
        "calibrator.knots": torch.tensor(
            [0.17406058012115633, 0.18673831248177714, 0.68673831248177719, 2.3068528194400546], dtype=F64
        ),
        "calibrator.values": torch.tensor([0.5, 0.5, 0.75, 0.75], dtype=F64),
        "_extra_state": {
            "num_classes": 3,
            "report": report(
                "TopLabel(Isotonic)",
                6,
                nll_before=0.9432005555303459,
                nll_after=0.7736739680475683,
                ece_before=0.24510381244380688,
                ece_after=4.5559112038517924e-11,
            ),
        },
    },
}

_HALF = 0.70710678118654746
DENSITY_RATIO = {
    "spec": {
        "class_path": "calib_lightning.posthoc.density_ratio.DensityRatio",
        "init_args": {"neighbours": 3, "distance_power": 2.0},
    },
    "state": {
        "reference": torch.tensor(
            [
                [1.0, 0.0],
                [0.0, 1.0],
                [_HALF, _HALF],
                [0.6, 0.8],
                [0.8, 0.6],
                [-1.0, 0.0],
                [0.0, -1.0],
                [_HALF, -_HALF],
                [-0.6, 0.8],
                [-0.8, 0.6],
            ],
            dtype=F64,
        ),
        "right": torch.tensor(
            [
                [0.73105857863000490, 0.59455195203567435],
                [0.62245933120185459, 0.63243599903565684],
                [0.88079707797788231, 0.83895574555503660],
                [0.81757447619364365, 0.85784535274566132],
                [0.56217650088579807, 0.85784535274566132],
            ],
            dtype=F64,
        ),
        "wrong": torch.tensor(
            [
                [0.95257412682243336, 0.41832809779649116],
                [0.77729986117469108, 0.27577949050297240],
                [0.67917869917539297, 0.43097057191981408],
                [0.62245933120185459, 0.68092178551316562],
                [0.85195280196831058, 0.68092178551316562],
            ],
            dtype=F64,
        ),
        "_extra_state": {
            "num_classes": 2,
            "report": report(
                "DensityRatio(neighbours=3)",
                10,
                nll_before=1.0263307954255105,
                nll_after=0.5199428163578365,
                ece_before=0.3611583627504505,
                ece_after=0.1314638460279616,
            ),
        },
    },
}

_FIRST = [0.0, 0.1, 0.9421560920093108, 0.9188008125541579, 0.293565980207876, 0.9183017695664324]
_FIRST += [1.060876944770968, 0.07064297471974804, 0.0]
_SECOND = [1.0, 0.1, 0.7005650844655202, 0.6542172461016093, 0.29529932144537424, 0.9121960083766014]
_SECOND += [1.1113346178654147, 0.06459969465310712, 0.0]
NEURAL_CLAMPING = {
    "spec": {
        "class_path": "calib_lightning.posthoc.neural_clamping.NeuralClamping",
        "init_args": {
            "gammas": [0.0, 1.0],
            "weights": [
                {"class_path": "calib_lightning.posthoc.clamping_descent.FixedWeight", "init_args": {"value": 0.1}}
            ],
            "start": {
                "class_path": "calib_lightning.posthoc.clamping_start.RandomStart",
                "init_args": {"scale": 0.01, "seed": 0},
            },
            "descent": {
                "class_path": "calib_lightning.posthoc.clamping_descent.ClampDescent",
                "init_args": {"epochs": 3, "lr": 0.1, "momentum": 0.0, "seed": 0},
            },
            "penalty": "l2sq",
            "batch_size": 512,
        },
    },
    "state": {
        "delta": torch.tensor([-0.00220321106348644, 0.04653923643578027, -0.0531006140288343], dtype=F64).view(
            3, 1, 1
        ),
        "log_temperature": torch.tensor(0.05909587248238103, dtype=F64),
        "_extra_state": {
            "report": {
                "rows": 6,
                "chosen": _FIRST,
                "candidates": [_FIRST, _SECOND],
                "nll_before": 0.9432005555303459,
                "ece_before": 0.24510381244380688,
                "start_moved": 1.0,
                "notes": ["the calibration error is 0.2936, not below the 0.2451 of the network alone"],
            }
        },
    },
}


@pytest.fixture(params=["record", "file"])
def loaded(request, tmp_path):
    """Load a record as a checkpoint of a training brings it, or as a file."""

    def load(record):
        if request.param == "record":
            return calibrator_of(copy.deepcopy(record))
        torch.save({"calib_lightning.calibrator": record}, tmp_path / "c.pt")
        return load_calibrator(tmp_path / "c.pt")

    return load


def near(found, *expected):
    torch.testing.assert_close(found, torch.tensor([*expected], dtype=F64), atol=1e-12, rtol=0)


def test_temperature(loaded):
    calibrator = loaded(TEMPERATURE)
    assert type(calibrator) is Temperature
    near(calibrator(X), [-0.68752014510472248, -1.01600250003178116, -2.00144956481295777])
    assert calibrator.report.nll_after == 0.9036902622833765
    assert calibrator.report.passes == 4


def test_isotonic_of_the_top_label(loaded):
    calibrator = loaded(TOP_LABEL)
    assert type(calibrator) is TopLabel
    assert calibrator.name == "TopLabel(Isotonic)"
    near(calibrator(X), [-0.58712331635179138, -1.01317329916030019, -2.51317329916030019])
    near(calibrator.predict(X).confidence, 0.55592420478590798)


def test_density_ratio(loaded):
    calibrator = loaded(DENSITY_RATIO)
    assert type(calibrator) is DensityRatio
    logits, features = torch.tensor([[1.0, 0.0], [0.0, 0.5]], dtype=F64), torch.eye(2, dtype=F64)
    log_probs, confidence = calibrator.predict(logits, features)
    near(log_probs, [-0.46002018696318464, -0.99769305615050574], [-1.03357673966875829, -0.43964098783625954])
    near(confidence, 0.63127090193584245, 0.64426767950201080)


def test_neural_clamping(loaded):
    calibrator = loaded(NEURAL_CLAMPING)
    assert type(calibrator) is NeuralClamping
    assert calibrator.fitted
    assert calibrator.report is None, "version 0.1 had none of this kind"
    assert calibrator.search.chosen == ClampCandidate(*_FIRST)
    assert calibrator.search.candidates == (ClampCandidate(*_FIRST), ClampCandidate(*_SECOND))
    assert calibrator.details["start_moved"] == 1.0
    network, images = torch.nn.Flatten(), X[:, :, None, None]
    found = calibrator.predict(network=network, images=images)
    near(found.logits, [-0.58679492452298021, -1.01215769135938727, -2.52000443866518298])
    assert found.confidence is None
    again = calibrator_of({"spec": calibrator.spec, "state": calibrator.state_dict()})
    near(again(network=network, images=images), *found.logits.tolist())
    assert again.search == calibrator.search


def test_old_state_does_not_keep_the_report_of_a_later_fit():
    labels = torch.arange(6) % 3
    images = torch.randn(6, 3, 1, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    clamping = calibrator_of(copy.deepcopy(NEURAL_CLAMPING))
    with pytest.warns(UserWarning, match=r"NeuralClamping\.fit"):
        clamping.fit(network=torch.nn.Flatten(), images=images, labels=labels)
    assert clamping.report is not None
    clamping.load_state_dict(NEURAL_CLAMPING["state"])
    assert clamping.report is None
    assert clamping.search.chosen == ClampCandidate(*_FIRST)


def test_what_was_never_fitted_loads_and_is_not_fitted():
    empty = torch.empty(0, dtype=F64)
    state = {"delta": empty, "log_temperature": empty, "_extra_state": {"report": None}}
    assert not calibrator_of({"spec": NEURAL_CLAMPING["spec"], "state": state}).fitted
    with pytest.raises(ValueError, match="damaged"):
        calibrator_of({"spec": NEURAL_CLAMPING["spec"], "state": {**state, "_extra_state": {"report": {"rows": 3}}}})
