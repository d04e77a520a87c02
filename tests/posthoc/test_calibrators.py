"""What every calibrator must do, whatever it does."""

import copy
import inspect
import math
import pickle
import warnings

import numpy as np
import pytest
import torch

from calib_lightning import posthoc as P
from calib_lightning.metrics import functional as metrics
from tests.posthoc.table import ROWS, evidence_of, features_of, the_set

ALL = pytest.mark.parametrize("name", ROWS)


def fitted(name, logits=None, labels=None, features=None):
    if logits is None:
        logits, labels, features = the_set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return ROWS[name].new().fit(labels=labels, **evidence_of(logits, features)._asdict())


def applied(calibrator, logits, features=None):
    return calibrator(*evidence_of(logits, features))


def predicted(calibrator, logits, features=None):
    return calibrator.predict(*evidence_of(logits, features))


def test_every_exported_calibrator_has_a_row():
    exported = [getattr(P, name) for name in P.__all__]
    wanted = {
        cls.__name__
        for cls in exported
        if inspect.isclass(cls) and issubclass(cls, P.Calibrator) and not inspect.isabstract(cls)
    }
    inner = {
        cls.__name__
        for cls in exported
        if inspect.isclass(cls) and issubclass(cls, P.BinaryCalibrator) and not inspect.isabstract(cls)
    }
    assert {type(row.new()).__name__ for row in ROWS.values()} == wanted
    assert inner <= set("-".join(ROWS).split("-"))


@ALL
def test_is_described_by_its_arguments(name):
    calibrator = ROWS[name].new()
    assert P.build(calibrator.spec, P.Calibrator).spec == calibrator.spec
    assert P.parse(calibrator.name, P.Calibrator).spec == calibrator.spec


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gives_log_probabilities(name, dtype):
    logits, labels, features = the_set(dtype)
    log_probs = applied(fitted(name, logits, labels, features), logits, features)
    assert log_probs.dtype == dtype
    assert log_probs.shape == logits.shape
    assert bool(log_probs.isfinite().all())
    sums = log_probs.double().exp().sum(dim=1)
    assert float((sums - 1).abs().max()) < (1e-5 if dtype == torch.float32 else 1e-12)


@ALL
def test_report_says_what_the_rows_say(name):
    logits, labels, features = the_set()
    calibrator = fitted(name)
    report, prediction = calibrator.report, predicted(calibrator, logits, features)
    if ROWS[name].looks_up:
        of_fit = calibrator.of_fitted_rows(logits, features, torch.arange(500))
        assert not torch.equal(of_fit.confidence, prediction.confidence), "a row finds itself"
        prediction = of_fit
    assert report.rows == 500
    assert report.calibrator == calibrator.name
    assert report.converged
    assert not report.at_bound
    assert report.nll_before == pytest.approx(0.670436471058, abs=1e-11)
    assert report.ece_before == pytest.approx(0.054325825305, abs=1e-11)
    assert report.nll_after == pytest.approx(float(metrics.nll(prediction.logits, labels)), abs=1e-12)
    ece = metrics.ece(prediction.logits, labels, confidence=prediction.confidence)
    assert report.ece_after == pytest.approx(float(ece), abs=1e-12)
    change = float((prediction.logits.argmax(1) == labels).double().mean()) - 0.764
    assert report.accuracy_change == pytest.approx(change, abs=1e-12)


@ALL
def test_keeps_the_predicted_class_where_it_says_so(name):
    logits, _, features = the_set()
    calibrator = fitted(name)
    kept = torch.equal(applied(calibrator, logits, features).argmax(1), logits.argmax(1))
    assert kept or not calibrator.preserves_argmax
    others = torch.randn(400, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 20
    if calibrator.preserves_argmax:
        assert torch.equal(applied(calibrator, others).argmax(1), others.argmax(1))
        assert fitted(name).report.accuracy_change == 0.0


# W (z + c) is not W z + c
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.shift])
def test_what_is_added_to_a_row_changes_nothing(name):
    logits, labels, features = the_set()
    shift = torch.linspace(-30, 30, len(logits), dtype=torch.float64).unsqueeze(1)
    one = applied(fitted(name), logits, features)
    other = applied(fitted(name, logits + shift, labels, features), logits + shift, features)
    # binned maps may move a row that lies on an edge
    moved = ((one - other).abs().amax(dim=1) > 1e-6).double().mean()
    assert float(moved) < 0.01


# folds are drawn by the place of a row
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.exact_order])
def test_order_of_rows_does_not_matter(name):
    logits, labels, features = the_set()
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))
    one = applied(fitted(name), logits, features)
    other = applied(fitted(name, logits[order], labels[order], features[order]), logits, features)
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@ALL
def test_the_same_fit_twice_is_the_same(name):
    logits, _, features = the_set()
    assert torch.equal(applied(fitted(name), logits, features), applied(fitted(name), logits, features))


@ALL
def test_one_row_is_calibrated_as_in_a_batch(name):
    logits, _, features = the_set()
    calibrator = fitted(name)
    whole = applied(calibrator, logits, features)
    torch.testing.assert_close(applied(calibrator, logits[3:4], features[3:4]), whole[3:4], atol=1e-10, rtol=0)
    assert applied(calibrator, logits[:0], features[:0]).shape == (0, 5)


@ALL
def test_file_gives_back_the_same_calibrator(name, tmp_path):
    logits, _, features = the_set()
    calibrator = fitted(name)
    P.save_calibrator(calibrator, tmp_path / "c.pt")
    loaded = P.load_calibrator(tmp_path / "c.pt")
    assert torch.equal(applied(loaded, logits, features), applied(calibrator, logits, features))
    assert str(loaded.report) == str(calibrator.report)
    assert loaded.spec == calibrator.spec


@ALL
def test_state_dict_copies_and_pickles(name):
    logits, _, features = the_set()
    calibrator = fitted(name)
    wanted = applied(calibrator, logits, features)
    fresh = ROWS[name].new()
    fresh.load_state_dict(calibrator.state_dict())
    assert torch.equal(applied(fresh, logits, features), wanted)
    assert torch.equal(applied(copy.deepcopy(calibrator), logits, features), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        refitted = fresh.fit(**_other_classes())  # what was loaded does not stand in the way of another K
    assert refitted.num_classes == 3
    assert torch.equal(applied(pickle.loads(pickle.dumps(calibrator)), logits, features), wanted)


def _other_classes():
    logits, labels, features = the_set()
    rows = labels < 3
    return {"labels": labels[rows], **evidence_of(logits[rows, :3], features[rows])._asdict()}


class _WithNetwork(torch.nn.Module):
    """A calibrator behind the network that it may ask: what is exported."""

    def __init__(self, calibrator):
        super().__init__()
        self.calibrator, self.network = calibrator, torch.nn.Flatten()

    def forward(self, logits, features):
        evidence = evidence_of(logits, features)._replace(network=self.network)
        return self.calibrator(*evidence)


@ALL
def test_can_be_exported(name):
    logits, _, features = the_set(torch.float32)
    calibrator = fitted(name)
    rows = torch.export.Dim("rows", min=2)
    shapes = ({0: rows}, {0: rows})
    program = torch.export.export(_WithNetwork(calibrator), (logits, features), dynamic_shapes=shapes)
    for n in (2, 77, 500, 1200):  # the last is more than one batch
        some = [argument.repeat(3, 1)[:n] for argument in (logits, features)]
        torch.testing.assert_close(program.module()(*some), applied(calibrator, *some), atol=1e-6, rtol=1e-6)


@ALL
def test_half_precision_of_the_network_leaves_the_state_alone(name):
    logits, _, features = the_set(torch.float32)
    calibrator = fitted(name)
    wanted = applied(calibrator, logits, features)
    for narrowed in (copy.deepcopy(calibrator).half(), copy.deepcopy(calibrator).to(torch.bfloat16)):
        assert torch.equal(applied(narrowed, logits, features), wanted)
    assert torch.equal(applied(torch.nn.Sequential(copy.deepcopy(calibrator)).float()[0], logits, features), wanted)


@ALL
def test_autocast_changes_nothing(name):
    logits, labels, features = the_set(torch.float32)
    wanted = applied(fitted(name, logits, labels, features), logits, features)
    with torch.autocast("cpu", torch.bfloat16):
        calibrator = fitted(name, logits, labels, features)
        assert torch.equal(applied(calibrator, logits, features), wanted)
        assert torch.equal(predicted(calibrator, logits, features).logits, wanted)


@ALL
def test_fitted_in_inference_mode_it_has_gradients_all_the_same(name):
    logits, labels, features = the_set()
    with torch.inference_mode():
        calibrator = fitted(name, logits, labels, features)
    assert not any(buffer.is_inference() for buffer in calibrator.buffers() if buffer.numel() > 0)
    point = logits.clone().requires_grad_()
    log_probs = applied(calibrator, point, features)
    if log_probs.requires_grad:  # steps have no slope
        log_probs.sum().backward()


@ALL
def test_a_row_that_is_no_number_has_no_confidence(name):
    logits, _, features = the_set()
    broken = logits.index_fill(0, torch.tensor([3]), math.nan)
    log_probs, confidence = predicted(fitted(name), broken, features)
    confidence = log_probs.exp().amax(1) if confidence is None else confidence
    assert confidence.isnan().nonzero().flatten().tolist() == [3]
    assert log_probs.isnan().all(dim=1).nonzero().flatten().tolist() == [3]


# --- input that leaves little to fit ---------------------------------------------------------------------------------


def _all_right(n=60, k=4):
    logits = torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return logits, logits.argmax(1)


def _all_wrong(n=60, k=4):
    logits = torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return logits, logits.argmin(1)


def _absent():
    logits, labels, _ = the_set()
    return logits[labels != 2], labels[labels != 2]


DEGENERATE = {
    "all right": _all_right,
    "all wrong": _all_wrong,
    "one row": lambda: (torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([1])),
    "one wrong row": lambda: (torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([0])),
    "ten rows": lambda: (the_set()[0][:10], the_set()[1][:10]),
    "constant": lambda: (torch.ones(30, 4), torch.arange(30) % 4),
    "one class": lambda: (torch.randn(30, 4, generator=torch.Generator().manual_seed(3)), torch.zeros(30).long()),
    "absent class": _absent,
    "two classes": lambda: (the_set()[0][:, :2], the_set()[1] % 2),
    "huge logits": lambda: (1e4 * the_set()[0], the_set()[1]),
    "tiny logits": lambda: (1e-6 * the_set()[0], the_set()[1]),
    "bfloat16": lambda: (the_set()[0].bfloat16(), the_set()[1]),
    "float16": lambda: (the_set()[0].half(), the_set()[1]),
}


@pytest.mark.parametrize("case", DEGENERATE)
@ALL
def test_little_to_fit_gives_a_finite_result(name, case):
    logits, labels = DEGENERATE[case]()
    if ROWS[name].diverges and case == "huge logits":
        with pytest.raises(FloatingPointError, match="use a lower lr"):
            fitted(name, logits, labels, features_of(logits))
        return
    calibrator = fitted(name, logits, labels, features_of(logits))
    log_probs = applied(calibrator, logits, features_of(logits).float())
    assert log_probs.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert bool(log_probs.isfinite().all())
    assert float((log_probs.double().exp().sum(1) - 1).abs().max()) < 1e-4
    report = calibrator.report
    assert math.isfinite(report.nll_after)
    assert 0 <= report.ece_after <= 1
    if ROWS[name].identity:
        assert report.nll_after <= report.nll_before + 1e-6 * max(1.0, report.nll_before)
    # values far from those of the fit stay finite too
    far = torch.tensor([[1e4] + [0.0] * (logits.shape[1] - 1), [-1e4] * logits.shape[1]], dtype=torch.float32)
    assert bool(applied(calibrator, far).isfinite().all())


@ALL
def test_one_class_alone_is_certain(name):
    logits = torch.randn(6, 1)
    calibrator = fitted(name, logits, torch.zeros(6).long(), torch.randn(6, 3))
    found = applied(calibrator, logits, torch.randn(6, 3))
    if type(calibrator).__name__ == "NeuralClamping":  # one logit of a network is that of class 1 of two
        assert found.shape == (6, 2)
        torch.testing.assert_close(found.exp().sum(dim=1), torch.ones(6))
    else:
        assert torch.equal(found, torch.zeros(6, 1))


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.identity])
@pytest.mark.parametrize("scale", [0.05, 0.3, 1.0, 2.5, 20.0])
def test_never_worse_than_the_logits_on_the_fitted_rows(name, scale):
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(200, 4, generator=generator, dtype=torch.float64) * 2
        labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
        report = fitted(name, logits * scale, labels).report
        assert report.nll_after <= report.nll_before + 1e-12


# --- input that is wrong ---------------------------------------------------------------------------------------------


@ALL
def test_what_was_not_fitted_cannot_be_used_or_saved(name, tmp_path):
    calibrator = ROWS[name].new()
    with pytest.raises(RuntimeError, match="is not fitted"):
        applied(calibrator, torch.randn(3, 5))
    with pytest.raises(RuntimeError, match="is not fitted"):
        P.save_calibrator(calibrator, tmp_path / "c.pt")
    assert not list(tmp_path.iterdir())


@ALL
def test_the_temperature_of_what_was_not_fitted_is_a_clear_error(name):
    calibrator = ROWS[name].new()
    if isinstance(getattr(type(calibrator), "temperature", None), property) and name != "FixedTemperature":
        with pytest.raises(RuntimeError, match=r"is not fitted\. Call fit"):
            _ = calibrator.temperature


@pytest.mark.parametrize("name", ["Temperature", "EnsembleTemperature"])
def test_with_one_class_the_temperature_is_one(name):
    assert ROWS[name].new().fit(torch.zeros(4, 1), torch.zeros(4).long()).temperature == 1.0


@ALL
def test_wrong_input_is_named(name):
    logits, labels, features = the_set()
    calibrator = ROWS[name].new()

    def fit(logits=logits, labels=labels, features=features):
        return calibrator.fit(labels=labels, **evidence_of(logits, features)._asdict())

    bad = logits.clone()
    bad[17, 2] = math.nan
    with pytest.raises(ValueError, match="row 17 has nan for class 2"):
        fit(bad)
    bad[17, 2] = math.inf
    with pytest.raises(ValueError, match="row 17 has inf for class 2"):
        fit(bad)
    with pytest.raises(ValueError, match="no rows were given"):
        fit(logits[:0], labels[:0], features[:0])
    with pytest.raises(ValueError, match=r"has label 5; it must be in 0\.\.4"):
        fit(labels=labels + 1)
    with pytest.raises(TypeError, match="integer dtype"):
        fit(labels=labels.float())
    with pytest.raises(ValueError, match="must have shape"):
        fit(labels=labels[:-1])
    with pytest.raises(TypeError, match="labels"):
        fit(labels=labels.numpy())
    with pytest.warns(UserWarning, match="as_logits"):
        fit(logits.softmax(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fit()
    with pytest.raises(ValueError, match="was fitted to"):
        applied(calibrator, torch.randn(3, 4))
    with pytest.raises(TypeError, match=r"ndarray; it must be a tensor"):
        calibrator(logits.numpy(), features, torch.nn.Flatten(), logits[:, :, None, None].numpy())
    with pytest.raises(ValueError, match="row 17"):
        fit(bad)
    assert not calibrator.fitted or torch.equal(applied(calibrator, logits), applied(fitted(name), logits))


def test_a_calibrator_whose_second_fit_fails_counts_as_not_fitted(tmp_path, monkeypatch):
    def exhausted(*args):
        raise MemoryError

    logits, labels, _ = the_set()
    calibrator = fitted("Temperature")
    monkeypatch.setattr(P.Temperature, "fit_rows", exhausted)
    with pytest.raises(MemoryError):
        calibrator.fit(logits, labels)
    assert not calibrator.fitted
    assert calibrator.report is None
    with pytest.raises(RuntimeError, match="is not fitted"):
        calibrator(logits)
    with pytest.raises(RuntimeError, match="is not fitted"):
        P.save_calibrator(calibrator, tmp_path / "c.pt")


@ALL
def test_what_is_needed_and_missing_is_named(name):
    logits, labels, features = the_set()
    calibrator, whole = fitted(name), evidence_of(logits, features)._asdict()
    words = {"logits": "logits=", "features": "features=", "network": "network= and images="}
    for need in calibrator.needs:
        for part in ("network", "images") if need == "network" else (need,):
            lacking = {**whole, part: None}
            with pytest.raises(ValueError, match=words[need]):
                calibrator.predict(**lacking)
            with pytest.raises(ValueError, match=words[need]):
                ROWS[name].new().fit(labels=labels, **lacking)
    with pytest.raises((TypeError, ValueError), match="labels"):
        ROWS[name].new().fit(**whole)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if "features" in row.new().needs])
def test_wrong_features_are_named(name):
    logits, labels, features = the_set()
    calibrator = fitted(name)
    for wrong in (features[:9], features[0], features.long()):
        with pytest.raises(ValueError, match=r"floating point of shape \(500, d\)"):
            applied(calibrator, logits, wrong)
        with pytest.raises(ValueError, match=r"floating point of shape \(500, d\)"):
            fitted(name, logits, labels, wrong)
    with pytest.raises(ValueError, match=r"fitted to 8 features.*\(500, 3\)"):
        predicted(calibrator, logits, features[:, :3])
    with pytest.raises(ValueError, match="not finite; the first is row 4"):
        fitted(name, logits, labels, features.index_fill(0, torch.tensor([4]), math.nan))


@ALL
def test_what_is_not_needed_is_not_looked_at(name):
    logits, labels, features = the_set()
    calibrator = ROWS[name].new()
    rubbish = {"logits": None, "features": "nothing of use", "network": 1, "images": object()}
    kept = {*calibrator.needs, *(("images",) if "network" in calibrator.needs else ())}
    bare = {part: value if part in kept else rubbish[part] for part, value in evidence_of(logits)._asdict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        calibrator.fit(labels=labels, **bare)
    assert repr(calibrator.report) == repr(fitted(name).report)  # as text nan is nan
    wanted = applied(fitted(name), logits, features)
    assert torch.equal(calibrator(**bare), wanted)
    assert torch.equal(calibrator.predict(**bare).logits, wanted)


def test_probabilities_become_logits():
    probs = torch.tensor([[0.2, 0.8, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    logits = P.as_logits(probs)
    np.testing.assert_allclose(logits.softmax(1).numpy(), probs.numpy(), atol=1e-7)
    assert bool(logits.isfinite().all())
    with pytest.raises(ValueError, match=r"row 1 has -0\.5 for class 0"):
        P.as_logits(torch.tensor([[0.5, 0.5], [-0.5, 1.5]]))


class _Gadget:
    def __reduce__(self):
        return (print, ("executed",))


def test_hostile_and_damaged_files_are_refused(tmp_path, capsys):
    path = tmp_path / "c.pt"
    with pytest.raises(FileNotFoundError, match="no calibrator"):
        P.load_calibrator(path)
    good = fitted("Temperature")
    P.save_calibrator(good, path)
    whole = path.read_bytes()
    content = torch.load(path, weights_only=True)
    record = content["calib_lightning.calibrator"]

    def refused(message, change=None, raw=None):
        if raw is not None:
            path.write_bytes(raw)
        else:
            torch.save(change, path)
        with pytest.raises(ValueError, match=message):
            P.load_calibrator(path)

    def with_record(**parts):
        return {"calib_lightning.calibrator": {**record, **parts}}

    refused("holds the Python object", {"calib_lightning.calibrator": _Gadget()})
    assert "executed" not in capsys.readouterr().out
    refused("damaged|no file", raw=whole[: len(whole) // 2])
    refused("not a file of torch.save", raw=b"<html>not found</html>")
    refused("damaged|no file", raw=b"")
    refused("holds no calibrator", {"state_dict": {}})
    refused("not that of a calibrator", {"calib_lightning.calibrator": 3})
    for class_path in ("os.system", "torch.nn.Linear", "calib_lightning.posthoc.base.Calibrator", 7):
        refused("damaged|class", with_record(spec={"class_path": class_path, "init_args": {}}))
    refused("has no argument", with_record(spec={**record["spec"], "init_args": {"command": "x"}}))
    refused("damaged", with_record(state={}))
    refused("damaged", with_record(state={**record["state"], "_extra_state": {"num_classes": "many", "report": None}}))
    path.write_bytes(whole)
    assert P.load_calibrator(path).fitted


def test_names_are_read_but_not_executed():
    found = P.parse("Sequential(Temperature, TopLabel(HistogramBinning(n_bins=10)))", P.Calibrator)
    assert found.name == "Sequential(Temperature, TopLabel(HistogramBinning(n_bins=10)))"
    for text, message in {
        "Temprature": "Did you mean .*Temperature",
        "Temperature(": "cannot be parsed",
        "Isotonic": "Isotonic",
        "FixedTemperature": "temperature",
        "FixedTemperature(2, bins=3)": "bins",
        "FixedTemperature(2 + 3)": "neither a name nor a literal",
        "open('x')": "open",
        "().__class__": "neither|not a Calibrator",
        "FixedTemperature(**{})": "by its name",
    }.items():
        with pytest.raises(ValueError, match=message):
            P.parse(text, P.Calibrator)


def test_numbers_of_numpy_are_written_as_plain_ones(tmp_path):
    logits, labels, _ = the_set()
    calibrator = P.TopLabel(P.Beta(np.str_("am"))).fit(logits, labels)
    P.save_calibrator(calibrator, tmp_path / "c.pt")
    assert P.load_calibrator(tmp_path / "c.pt").name == calibrator.name == "TopLabel(Beta(variant='am'))"
