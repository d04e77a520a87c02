"""Files of classifiers: the same numbers to the last bit, and nothing that a file holds is executed."""

import math
import pickle

import pytest
import timm
import torch

from calib_lightning.deploy import CalibratedClassifier, load_classifier, save_classifier
from calib_lightning.deploy.saving import FILE_KEY
from calib_lightning.methods import CrossEntropy
from calib_lightning.posthoc import FixedTemperature
from calib_lightning.posthoc.isotonic import Isotonic
from calib_lightning.posthoc.neural_clamping import NeuralClamping
from calib_lightning.posthoc.saving import calibrator_record
from calib_lightning.posthoc.sequential import Sequential
from calib_lightning.posthoc.temperature import Temperature
from calib_lightning.posthoc.wrappers import TopLabel

from .networks import CLASSES, PREPROCESSING, SmallNet, batches, classifier, images, labelled
from .test_classifier import ByFeatures


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def color(image):
    return image.repeat(1, 3, 4, 4)  # (N, 3, 32, 32)


def of_timm(name, **options):
    network = timm.create_model(name, num_classes=len(CLASSES), **options).eval()
    image, label = labelled(20)
    image = color(image)[:, : options.get("in_chans", 3)]
    return CalibratedClassifier(network, FixedTemperature(1.5)).fit([(image, label)]), image


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet10t", {}), ("resnet10t", {"in_chans": 1}), ("vit_tiny_patch16_224", {"img_size": 32})],
)
def test_timm_models_are_built_again(name, options, tmp_path):
    made, image = of_timm(name, **options)
    save_classifier(made, tmp_path / "file.pt")
    state = torch.random.get_rng_state()
    found = load_classifier(tmp_path / "file.pt")
    assert torch.equal(torch.random.get_rng_state(), state)  # loading draws no numbers of the run
    assert type(found.network) is type(made.network)
    assert torch.equal(found(image), made(image))


def test_a_timm_model_that_its_name_does_not_tell_is_not_guessed(tmp_path):
    # max pooling has the same weights as average pooling
    made, image = of_timm("resnet10t", global_pool="max")
    save_classifier(made, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=r"not how to build it.*network=network"):
        load_classifier(tmp_path / "file.pt")
    same = timm.create_model("resnet10t", num_classes=len(CLASSES), global_pool="max")
    assert torch.equal(load_classifier(tmp_path / "file.pt", same)(image), made(image))


def test_modules_of_the_package_are_built_again(tmp_path):
    network = CrossEntropy(len(CLASSES), encoder="digits_cnn")
    made = CalibratedClassifier(network, Temperature()).fit(batches())
    save_classifier(made, tmp_path / "file.pt")
    found = load_classifier(tmp_path / "file.pt")
    assert type(found.network) is CrossEntropy
    assert torch.equal(found(images(9)), made(images(9)))


def test_half_precision_stays_half_precision(tmp_path):
    network = CrossEntropy(len(CLASSES), encoder="digits_cnn").bfloat16()
    image, label = labelled(50)
    made = CalibratedClassifier(network, Temperature()).fit([(image.bfloat16(), label)])
    save_classifier(made, tmp_path / "file.pt")
    found = load_classifier(tmp_path / "file.pt")
    assert torch.equal(found(image.bfloat16()), made(image.bfloat16()))


@pytest.mark.filterwarnings("ignore:NeuralClamping")
def test_every_part_comes_back(tmp_path):
    image, _ = labelled()
    both = Sequential(NeuralClamping(descent=None), TopLabel(Isotonic()))
    made = classifier(both, preprocessing=PREPROCESSING, classes=CLASSES)
    made.set_threshold(batches(seed=5), risk=0.2)
    save_classifier(made, tmp_path / "file.pt")
    found = load_classifier(tmp_path / "file.pt", network=SmallNet(seed=9))
    assert found.metadata == made.metadata
    assert found.operating_point == made.operating_point
    assert found.preprocessing == PREPROCESSING
    for mine, theirs in zip(found.predict(image), made.predict(image), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(found.calibrator.members[0].delta, both.members[0].delta)


@pytest.mark.filterwarnings("ignore:NeuralClamping")
def test_a_perturbation_beside_the_calibrator_as_in_files_of_before(tmp_path):
    image, label = labelled()
    clamping = NeuralClamping(descent=None).fit(network=SmallNet().eval(), images=image, labels=label, progress=False)
    expected = clamping.predict(network=SmallNet().eval(), images=image).logits / 2.0
    save_classifier(classifier(FixedTemperature(2.0)), tmp_path / "file.pt")
    content = torch.load(tmp_path / "file.pt", weights_only=True)
    content[FILE_KEY]["clamping"] = dict(calibrator_record(clamping))
    torch.save(content, tmp_path / "file.pt")
    found = load_classifier(tmp_path / "file.pt", network=SmallNet())
    torch.testing.assert_close(found(image), expected.log_softmax(dim=1))
    assert found.metadata["temperature"] == pytest.approx(2.0 * clamping.temperature)


def test_features_and_a_threshold_out_of_reach_come_back(tmp_path):
    made = classifier(ByFeatures(), features="pool")
    with pytest.warns(UserWarning, match="always abstains"):
        made.set_threshold([(images(20), torch.full((20,), 4))], risk=0.0)
    save_classifier(made, tmp_path / "file.pt")
    found = load_classifier(tmp_path / "file.pt", network=SmallNet(seed=9))
    assert found.operating_point.threshold == math.inf
    assert torch.equal(found(images(9)), made(images(9)))


def test_another_network_needs_to_be_given(tmp_path):
    save_classifier(classifier(), tmp_path / "file.pt")
    with pytest.raises(ValueError, match=r"file\.pt: the file has the weights.*load_classifier\(path, network"):
        load_classifier(tmp_path / "file.pt")
    with pytest.raises(ValueError, match=r"file\.pt: the weights do not fit the given Linear"):
        load_classifier(tmp_path / "file.pt", network=torch.nn.Linear(64, 5))


def test_what_is_not_fitted_is_not_saved(tmp_path):
    with pytest.raises(RuntimeError, match="Temperature is not fitted"):
        save_classifier(CalibratedClassifier(SmallNet(), Temperature()), tmp_path / "file.pt")
    made = classifier()
    made.calibrator = NeuralClamping()
    with pytest.raises(RuntimeError, match="NeuralClamping is not fitted"):
        save_classifier(made, tmp_path / "file.pt")
    assert not list(tmp_path.iterdir())


# --- files of strangers ----------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return print, ("executed",)


@pytest.fixture
def changed(tmp_path):
    """Write a good file with one entry changed."""

    def write(*path, value):
        network = CrossEntropy(len(CLASSES), encoder="digits_cnn")
        made = CalibratedClassifier(network, Temperature(), preprocessing=PREPROCESSING).fit(batches())
        save_classifier(made, tmp_path / "file.pt")
        content = torch.load(tmp_path / "file.pt", weights_only=True)
        place = content[FILE_KEY]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        torch.save(content, tmp_path / "file.pt")
        return tmp_path / "file.pt"

    return write


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("network",), None, "no weights of a network"),
        (("network", "state"), {}, "cannot be built"),
        (("network", "module"), {}, "cannot be built"),
        (("network", "module", "calib_lightning", "class_path"), "os.system", "class_path is 'os.system'"),
        (("network", "module", "hyper_parameters"), {"num_classes": "many"}, "cannot be built"),
        (("network", "module"), 3, "cannot be built"),
        (("calibrator", "spec"), {"class_path": "builtins.print", "init_args": {}}, "calibrator is damaged"),
        (("calibrator", "state"), {}, "calibrator is damaged"),
        (("clamping",), {"spec": {"class_path": "Temperature", "init_args": {}}, "state": {}}, "perturbation"),
        (("features",), "nothing", "must be a submodule"),
        (("metadata",), {}, "metadata are damaged"),
        (("metadata", "classes"), ["a"], "must be 5 class names"),
        (("metadata", "num_classes"), None, "number of classes"),
        (("metadata", "preprocessing", "size"), [0, 8], "size is"),
        (("metadata", "preprocessing"), "squash", "the preprocessing is"),
        (("metadata", "operating_point"), {"threshold": 1}, "the operating point is"),
    ],
)
def test_damaged_files_are_named(changed, path, value, message):
    file = changed(*path, value=value)
    with pytest.raises(ValueError, match=rf"file\.pt: (?s:.*)({message})"):
        load_classifier(file)


@pytest.mark.parametrize(
    "recipe",
    [
        {"name": "hf-hub:someone/model", "options": {}},
        {"name": "resnet10t", "options": {"pretrained": True}},
        {"name": "resnet10t", "options": {"checkpoint_path": "/tmp/x"}},
        {"name": "resnet10t", "options": {"num_classes": 10**15}},
        {"name": 3, "options": {}},
        "resnet10t",
    ],
)
def test_recipes_of_strangers_are_refused(recipe, tmp_path):
    made, _ = of_timm("resnet10t")
    save_classifier(made, tmp_path / "file.pt")
    content = torch.load(tmp_path / "file.pt", weights_only=True)
    content[FILE_KEY]["network"]["timm"] = recipe
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=r"file\.pt: the network cannot be built"):
        load_classifier(tmp_path / "file.pt")


def test_nothing_in_a_file_is_executed(tmp_path, capsys):
    for content in ({FILE_KEY: Bomb()}, {FILE_KEY: {"metadata": Bomb()}}):
        torch.save(content, tmp_path / "file.pt")
        with pytest.raises(ValueError, match=r"file\.pt is not loaded: it holds the Python object"):
            load_classifier(tmp_path / "file.pt")
    (tmp_path / "file.pt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(ValueError, match=r"file\.pt is (damaged|not loaded)"):
        load_classifier(tmp_path / "file.pt")
    assert "executed" not in capsys.readouterr().out


def test_files_of_other_kinds_and_halves_of_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no classifier"):
        load_classifier(tmp_path / "none.pt")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="does not contain a classifier"):
        load_classifier(tmp_path / "other.pt")
    save_classifier(classifier(), tmp_path / "file.pt")
    whole = (tmp_path / "file.pt").read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 10):
        (tmp_path / "file.pt").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"file\.pt is (damaged|not loaded)"):
            load_classifier(tmp_path / "file.pt")
