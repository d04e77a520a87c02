"""Shifted sets and images of other classes on one, two and three processes."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from calib_lightning.data import DigitsDataModule
from calib_lightning.metrics.functional import max_prob_log_odds
from tests.ddp import other_cases


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Two sets of other classes: one in memory, one of image files."""
    root, draw = tmp_path_factory.mktemp("others"), np.random.default_rng(0)
    images = draw.integers(0, 256, (67, 12, 12), dtype=np.uint8)
    np.savez(root / "a.npz", images=images, labels=np.arange(67) % 2, class_names=["ant", "bee"])
    for row, image in enumerate(images[:35]):
        (root / "files" / f"other-{row % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / "files" / f"other-{row % 2}" / f"{row}.png")
    return [{"name": "arrays", "file": str(root / "a.npz")}, {"name": "folder", "root": str(root / "files")}]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """300 digits as image files."""
    root, found = tmp_path_factory.mktemp("digits"), DigitsDataModule().load_train()
    for row, (image, label) in enumerate(zip(found.image[:300, 0], found.label.tolist(), strict=False)):
        (root / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image.numpy()).save(root / str(label) / f"{row:03}.png")
    return str(root)


@pytest.mark.parametrize("kind", ["in memory", "files"])
def test_every_set_is_the_same_on_one_two_and_three_processes(pool2, pool3, others, digits, tmp_path, kind):
    images = digits if kind == "files" else None
    alone = other_cases.evaluate(0, 1, str(tmp_path / "1"), others, images)
    corrupted = [f"shift/generated/{kind}_{severity}" for kind in ("contrast", "gaussian_noise") for severity in (2, 5)]
    assert [*alone["values"]] == ["test", *corrupted, "ood/arrays", "ood/folder", "calibration"]
    assert alone["metrics"]["shift/generated/sets"] == 4
    assert (alone["metrics"]["ood/arrays/n"], alone["metrics"]["ood/folder/n"]) == (67, 35)
    for world, pool in ((2, pool2), (3, pool3)):
        together, *ranks = pool.run(other_cases.evaluate, str(tmp_path / str(world)), others, images)
        assert all(rank["metrics"] == pytest.approx(together["metrics"], nan_ok=True, abs=0) for rank in ranks)
        assert together["metrics"].keys() == alone["metrics"].keys()
        assert together["metrics"] == pytest.approx(alone["metrics"], abs=1e-5, nan_ok=True)
        stored = sorted(path.stem for path in (tmp_path / str(world)).rglob("*.npy"))
        assert stored == (sorted(name.rpartition("/")[2] for name in corrupted) if images is None else [])
        for name, columns in alone["files"].items():
            np.testing.assert_array_equal(together["files"][name]["index"], columns["index"])
            np.testing.assert_allclose(together["files"][name]["logits"], columns["logits"], atol=1e-5)
        # of the predictions of these processes, exactly
        scores = {name: max_prob_log_odds(_logits(together["files"], name)).numpy() for name in ("test", "ood/arrays")}
        truth = np.repeat([1, 0], [len(scores["test"]), 67])
        both = np.concatenate([scores["test"], scores["ood/arrays"]])
        found = together["values"]["ood/arrays"]
        assert found["ood_auroc"] == pytest.approx(roc_auc_score(truth, both), abs=1e-12)
        assert found["ood_aupr"] == pytest.approx(average_precision_score(truth, both), abs=1e-12)
        assert found["ood_aupr_out"] == pytest.approx(average_precision_score(1 - truth, -both), abs=1e-12)


def _logits(files, name):
    return torch.from_numpy(files[f"{name}.npz"]["logits"])
