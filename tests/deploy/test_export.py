"""Exported classifiers: torch.export and ONNX Runtime give what the module gives, or there is no file."""

import json
import zipfile

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import nn

from calib_lightning.deploy import (
    CalibratedClassifier,
    ParityError,
    export_onnx,
    export_torch,
    load_exported,
)
from calib_lightning.methods import CrossEntropy
from calib_lightning.posthoc import Calibrator, FixedTemperature, Optimum, parse
from calib_lightning.posthoc.density_ratio import DensityRatio
from calib_lightning.posthoc.histogram_binning import HistogramBinning
from calib_lightning.posthoc.isotonic import Isotonic
from calib_lightning.posthoc.neural_clamping import NeuralClamping
from calib_lightning.posthoc.platt import Platt
from calib_lightning.posthoc.sequential import Sequential
from calib_lightning.posthoc.temperature import Temperature
from calib_lightning.posthoc.vector import VectorScaling
from calib_lightning.posthoc.wrappers import OneVsRest, TopLabel

from .networks import CLASSES, PREPROCESSING, SmallNet, batches, classifier, images, labelled
from .test_classifier import ByFeatures

EXPORTS = {".pt2": export_torch, ".onnx": export_onnx}
CALIBRATORS = {
    "fixed": lambda: FixedTemperature(1.5),
    "temperature": Temperature,
    "vector scaling": VectorScaling,
    "isotonic": lambda: OneVsRest(Isotonic()),
    "own confidence": lambda: TopLabel(HistogramBinning()),
    "in sequence": lambda: Sequential(Temperature(), TopLabel(Platt())),
    "features": ByFeatures,
    "density of features": DensityRatio,
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def run_onnx(path, image):
    """By ONNX Runtime alone, as whoever gets the file would."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"image": image.numpy()}), strict=True))


def run_torch(path, image):
    with torch.no_grad():
        outputs = torch.export.load(path).module()(image)
    return {name: output.numpy() for name, output in zip(("log_probs", "confidence"), outputs, strict=False)}


RUN = {".pt2": run_torch, ".onnx": run_onnx}


def check(made, path, image):
    with torch.no_grad():
        expected = made.outputs(image)
    found = RUN[path.suffix](path, image)
    assert list(found) == (["log_probs"] if expected.confidence is None else ["log_probs", "confidence"])
    assert all(value.dtype == np.float32 for value in found.values())
    np.testing.assert_allclose(found["log_probs"], expected.logits.numpy(), rtol=1e-3, atol=1e-4)
    if expected.confidence is not None:
        np.testing.assert_allclose(found["confidence"], expected.confidence.numpy(), atol=1e-4)


FAST = ("temperature", "own confidence", "density of features")


@pytest.mark.parametrize(
    ("suffix", "calibrator"),
    [
        *(pytest.param(".onnx", name, marks=pytest.mark.slow) for name in CALIBRATORS if name not in FAST),
        *((".onnx", name) for name in FAST),
        *((".pt2", name) for name in ("temperature", "own confidence", "features")),
    ],
)
def test_every_kind_of_calibrator(suffix, calibrator, tmp_path):
    new = CALIBRATORS[calibrator]()
    made = classifier(new, features="pool" if "features" in new.needs else None)
    path = tmp_path / f"file{suffix}"
    EXPORTS[suffix](made, path, images(3))
    for n in (1, 4, 50):
        check(made, path, images(n, seed=20 + n))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", EXPORTS)
def test_timm_models(suffix, tmp_path):
    network = timm.create_model("resnet10t", num_classes=10)
    calibrator = FixedTemperature(1.5).fit(torch.randn(20, 10), torch.arange(20) % 10)
    made = CalibratedClassifier(network, calibrator)
    EXPORTS[suffix](made, tmp_path / f"file{suffix}", torch.randn(1, 3, 64, 64))
    check(made, tmp_path / f"file{suffix}", torch.randn(3, 3, 64, 64))


@pytest.mark.parametrize("suffix", EXPORTS)
@pytest.mark.filterwarnings("ignore:NeuralClamping")
def test_modules_of_the_package_with_a_perturbation(suffix, tmp_path):
    network = CrossEntropy(len(CLASSES), encoder="digits_cnn").eval()
    image, label = labelled(50)
    both = Sequential(NeuralClamping(descent=None), FixedTemperature(1.5))
    made = CalibratedClassifier(network, both, preprocessing=PREPROCESSING)
    made.fit([(image, label)])
    EXPORTS[suffix](made, tmp_path / f"file{suffix}")  # the preprocessing says the size
    check(made, tmp_path / f"file{suffix}", image[:5])


@pytest.mark.parametrize("suffix", EXPORTS)
def test_metadata_and_decisions_come_back(suffix, tmp_path):
    made = classifier(preprocessing=PREPROCESSING, classes=CLASSES)
    made.set_threshold(batches(seed=5), risk=0.2)
    EXPORTS[suffix](made, tmp_path / f"file{suffix}")
    found = load_exported(tmp_path / f"file{suffix}")
    assert found.metadata == made.metadata
    assert (found.operating_point, found.preprocessing) == (made.operating_point, made.preprocessing)
    image = labelled(seed=5)[0]
    mine, theirs = found.predict(image), made.predict(image)
    assert torch.equal(mine.label, theirs.label)
    assert torch.equal(mine.abstain, theirs.abstain)
    assert 0 < mine.abstain.sum() < len(image)
    torch.testing.assert_close(mine.confidence, theirs.confidence, rtol=0, atol=1e-5)
    assert not found.predict(image, threshold=0.0).abstain.any()


def test_metadata_are_where_other_tools_find_them(tmp_path):
    made = classifier()
    export_onnx(made, tmp_path / "file.onnx", images(2))
    export_torch(made, tmp_path / "file.pt2", images(2))
    session = onnxruntime.InferenceSession(tmp_path / "file.onnx", providers=["CPUExecutionProvider"])
    in_onnx = json.loads(session.get_modelmeta().custom_metadata_map["calib_lightning"])
    with zipfile.ZipFile(tmp_path / "file.pt2") as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("calib_lightning.json")]
        in_torch = json.loads(archive.read(name))
    assert in_onnx == in_torch == made.metadata
    assert in_onnx["temperature"] == made.calibrator.temperature
    assert parse(in_onnx["calibrator"], Calibrator).spec == in_onnx["calibrator_spec"]
    assert session.get_inputs()[0].shape == ["batch", 1, 8, 8]


class Wandering(Calibrator):
    """Another temperature in every call: no export of it can be right."""

    preserves_argmax = True
    calls = 0

    def fit_rows(self, logits, labels, features):
        return Optimum()

    def transform(self, logits, features):
        type(self).calls += 1
        return torch.log_softmax(logits / self.calls, dim=-1)


@pytest.mark.parametrize("suffix", EXPORTS)
def test_without_parity_there_is_no_file(suffix, tmp_path):
    path = tmp_path / f"file{suffix}"
    path.write_text("the older one")
    with pytest.raises(ParityError, match=r"SmallNet with Wandering differs from the module by .* in log_probs"):
        EXPORTS[suffix](classifier(Wandering()), path, images(3))
    assert path.read_text() == "the older one"
    assert list(tmp_path.iterdir()) == [path]


class OnlyOfTwo(nn.Module):
    """Its output says how large the batch was when it was traced."""

    def forward(self, image):
        return image.flatten(1)[:, :5] * image.new_tensor(int(image.shape[0] > 2))


class Fixed(nn.Module):
    def forward(self, image):
        return image.reshape(3, -1)[:, :5]


class Valued(nn.Module):
    def forward(self, image):
        return image.flatten(1)[:, :5] * (2.0 if image.sum() > 0 else 1.0)


@pytest.mark.parametrize("suffix", EXPORTS)
@pytest.mark.parametrize("network", [OnlyOfTwo, Fixed, Valued])
def test_networks_that_cannot_be_exported_are_named(suffix, network, tmp_path):
    calibrator = FixedTemperature(1.5).fit(torch.randn(9, 5), torch.arange(9) % 5)
    with pytest.raises(RuntimeError, match=network.__name__):
        EXPORTS[suffix](CalibratedClassifier(network(), calibrator), tmp_path / f"file{suffix}", images(3))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("export", EXPORTS.values())
@pytest.mark.parametrize(
    ("make", "example", "error", "message"),
    [
        (lambda: CalibratedClassifier(SmallNet(), Temperature()), images(2), RuntimeError, "not fitted"),
        (classifier, None, ValueError, "size of the images is not known"),
        (classifier, images(2).double(), TypeError, "example is torch.float64 of 2 rows"),
        (classifier, images(2)[:0], TypeError, "of 0 rows"),
        (classifier, [1], TypeError, "example is list"),
        (
            lambda: classifier(preprocessing=PREPROCESSING),
            torch.zeros(2, 1, 9, 8),
            ValueError,
            r"example has shape \(2, 1, 9, 8\); it must have the shape \(N, 1, 8, 8\) of the preprocessing",
        ),
        (classifier, torch.zeros(2, 3, 8, 8), TypeError, r"does not accept an example \(2, 3, 8, 8\)"),
    ],
)
def test_bad_input_is_named(export, make, example, error, message, tmp_path):
    with pytest.raises(error, match=message):
        export(make(), tmp_path / "file", example)
    assert not list(tmp_path.iterdir())


def test_images_of_another_size_are_named(tmp_path):
    export_onnx(classifier(), tmp_path / "file.onnx", images(2))
    with pytest.raises(RuntimeError, match=r"ONNX Runtime failed on images \(2, 1, 9, 9\)"):
        load_exported(tmp_path / "file.onnx").predict(torch.zeros(2, 1, 9, 9))


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError, match=r"onnxscript is not installed.*calib-lightning\[export\]"):
        export_onnx(classifier(), tmp_path / "file.onnx", images(2))


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no classifier"):
        load_exported(tmp_path / "none.onnx")
    for suffix in EXPORTS:
        for content in (b"", b"nonsense"):
            (tmp_path / f"file{suffix}").write_bytes(content)
            with pytest.raises(ValueError, match=rf"file\{suffix} is damaged"):
                load_exported(tmp_path / f"file{suffix}")
    (tmp_path / "file.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must be \.pt2 \(export_torch\) or \.onnx \(export_onnx\)"):
        load_exported(tmp_path / "file.ckpt")


def test_files_of_others_and_halves_are_named(tmp_path):
    program = torch.export.export(SmallNet().eval(), (images(2),))
    torch.export.save(program, tmp_path / "file.pt2")
    with pytest.raises(ValueError, match="was not written by export_torch"):
        load_exported(tmp_path / "file.pt2")
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "file.onnx")
    with pytest.raises(ValueError, match="was not written by export_torch or export_onnx"):
        load_exported(tmp_path / "file.onnx")
    for suffix, export in EXPORTS.items():
        path = tmp_path / f"half{suffix}"
        export(classifier(), path, images(2))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match=rf"half\{suffix} is damaged"):
            load_exported(path)


def test_a_device_that_is_not_there_is_named(tmp_path):
    export_onnx(classifier(), tmp_path / "file.onnx", images(2))
    with pytest.raises(ValueError, match="device is 'meta'"):
        load_exported(tmp_path / "file.onnx", "meta")


@pytest.mark.parametrize("place", ["secret.bin", "../secret.bin", "/etc/hostname"])
def test_a_model_cannot_read_other_files(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    weight = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=place)
    ends = [onnx.helper.make_tensor_value_info(name, 1, [4]) for name in ("image", "log_probs")]
    node = onnx.helper.make_node("Add", ["image", "w"], ["log_probs"])
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "file.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"file\.onnx is damaged or not an ONNX model"):
        load_exported(tmp_path / "file.onnx")
