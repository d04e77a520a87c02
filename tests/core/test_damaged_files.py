"""A file that is damaged is refused, whoever reads it: no flipped bit reaches a weight or a number."""

import contextlib
import io
import pickle
import random
import warnings
import zipfile

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from calib_lightning.callbacks import PostHocCalibrate
from calib_lightning.core import AtomicCheckpointIO, ClassificationModule, load_checkpoint, load_module, load_stages
from calib_lightning.data import SplitSpec, ToyDataModule
from calib_lightning.deploy import export_torch, load_classifier, load_exported, save_classifier
from calib_lightning.posthoc import FixedTemperature, load_calibrator, save_calibrator
from calib_lightning.predictions.reading import read_predictions
from calib_lightning.utils.stored import DamagedFileError, check_archive, load_torch
from tests.ddp.cases import sgd, trainer
from tests.deploy.networks import classifier, images


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    module = ClassificationModule(3, encoder="digits_cnn", optimizer=sgd)
    run = trainer(folder, max_epochs=1)
    run.fit(module, datamodule=ToyDataModule(batch_size=100))
    run.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt"


def with_plain_trainer(path):
    """Lightning's own reader, which a trainer without our plugin has."""
    module = ClassificationModule(3, encoder="digits_cnn", optimizer=sgd)
    plain = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    plain.validate(module, datamodule=ToyDataModule(), ckpt_path=path, verbose=False)
    return module


def flipped(whole, bit):
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def inside(path, wanted=""):
    """The place of the middle of the largest member with ``wanted`` in its name."""
    with zipfile.ZipFile(path) as archive:
        member = max((m for m in archive.infolist() if wanted in m.filename), key=lambda member: member.file_size)
    raw = path.read_bytes()
    start = member.header_offset + 30 + raw[member.header_offset + 26] + 256 * raw[member.header_offset + 27]
    start += raw[member.header_offset + 28] + 256 * raw[member.header_offset + 29]
    return start + member.file_size // 2


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or one is other


def test_forty_flipped_bits_are_refused_or_harmless(checkpoint, tmp_path):
    whole, good = checkpoint.read_bytes(), AtomicCheckpointIO().load_checkpoint(checkpoint)
    path, refused, draw = tmp_path / "a.ckpt", 0, random.Random(3)
    for bit in [draw.randrange(8 * len(whole)) for _ in range(40)]:
        path.write_bytes(flipped(whole, bit))
        try:
            found = AtomicCheckpointIO().load_checkpoint(path)
        except (RuntimeError, pickle.UnpicklingError):
            refused += 1
        else:
            assert same(found, good), bit
    assert refused > 20  # most bytes are weights


@pytest.mark.parametrize(
    "load",
    [
        AtomicCheckpointIO().load_checkpoint,
        load_module,
        lambda path: load_stages(ClassificationModule(3, encoder="digits_cnn"), path),
        ClassificationModule.load_from_checkpoint,
        with_plain_trainer,
    ],
    ids=["plugin", "load_module", "load_stages", "load_from_checkpoint", "trainer without the plugin"],
)
@pytest.mark.parametrize("damage", ["bit", "64 bytes", "half"])
@pytest.mark.filterwarnings("ignore:.* is from before the first switch")
def test_every_way_to_a_checkpoint_refuses_damage(load, damage, checkpoint, tmp_path):
    load(checkpoint)
    path, whole, place = tmp_path / "a.ckpt", checkpoint.read_bytes(), inside(checkpoint, "data/")
    noise = random.Random(0).randbytes(64)
    path.write_bytes(
        {
            "bit": flipped(whole, 8 * place),
            "64 bytes": whole[:place] + noise + whole[place + 64 :],
            "half": whole[: len(whole) // 2],
        }[damage]
    )
    # of half a file torch itself may complain first
    match = "failed finding central directory" if damage == "half" else r"a\.ckpt is damaged or incomplete"
    with pytest.raises(RuntimeError, match=f"{match}|is damaged or incomplete"):
        load(path)


def saved_predictions(path):
    logits, labels = torch.randn(50, 3), torch.arange(50) % 3
    if path.suffix == ".npz":
        np.savez(path, logits=logits.numpy(), labels=labels.numpy())
    else:
        torch.save({"logits": logits, "labels": labels}, path)


FILES = {
    "calibrator.pt": (
        lambda path: save_calibrator(FixedTemperature(2.0).fit(torch.randn(4, 3), torch.arange(4) % 3), path),
        load_calibrator,
    ),
    "classifier.pt": (
        lambda path: save_classifier(classifier(), path),
        lambda path: load_classifier(path, classifier().network),
    ),
    "test.npz": (saved_predictions, read_predictions),
    "test.pt": (saved_predictions, read_predictions),
    "test.pt2": (lambda path: export_torch(classifier(), path, images(2)), load_exported),
}


@pytest.mark.parametrize("name", FILES)
def test_other_files_are_checked_too(name, tmp_path):
    save, load = FILES[name]
    path = tmp_path / name
    save(path)
    load(path)
    path.write_bytes(flipped(path.read_bytes(), 8 * inside(path)))
    with pytest.raises(
        ValueError, match=rf"{name.replace('.', '[.]')}.*(does not match its checksum|archive is damaged)"
    ):
        load(path)


def test_damage_gets_no_new_checksum(checkpoint, tmp_path):
    """A callback that adds a calibrator to a damaged checkpoint would write sums that agree with the damage."""

    class Damaging(PostHocCalibrate):
        def on_train_end(self, trainer, pl_module):
            path = tmp_path / "kept.ckpt"
            trainer.save_checkpoint(path)
            self.bad = flipped(path.read_bytes(), 8 * inside(path, "data/"))
            path.write_bytes(self.bad)
            trainer.checkpoint_callback.best_model_path = str(path)
            super().on_train_end(trainer, pl_module)

    callback = Damaging(FixedTemperature(2.0))
    run = trainer(tmp_path, max_epochs=1, callbacks=[callback, ModelCheckpoint(tmp_path / "own", save_top_k=0)])
    with pytest.warns(UserWarning, match=r"kept\.ckpt was left without a calibrator: .*checksum"):
        run.fit(
            ClassificationModule(3, encoder="digits_cnn", optimizer=sgd),
            datamodule=ToyDataModule(batch_size=100, split=SplitSpec(calibration=50)),
        )
    assert (tmp_path / "kept.ckpt").read_bytes() == callback.bad


@pytest.mark.parametrize("kind", ["legacy", "without sums"])
def test_a_file_without_checksums_is_read_with_a_warning(kind, tmp_path):
    path, content = tmp_path / "old.pt", {"w": torch.arange(5.0)}
    if kind == "legacy":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        torch.serialization.set_crc32_options(False)
        torch.save(content, path)
        torch.serialization.set_crc32_options(True)
    with pytest.warns(UserWarning, match=r"old\.pt has no checksums, so damage in it is not noticed"):
        assert torch.equal(load_torch(path)["w"], content["w"])


def test_a_whole_file_is_read_without_a_word(checkpoint):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_torch(checkpoint)
        assert check_archive(checkpoint)


@pytest.mark.parametrize("part", [0.01, 0.5, 0.99])
def test_a_part_of_a_file_is_damaged(part, checkpoint, tmp_path):
    whole = checkpoint.read_bytes()
    (tmp_path / "a.ckpt").write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(DamagedFileError, match="archive is damaged"):
        check_archive(tmp_path / "a.ckpt")


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_header_of_numpy_with_any_bit_turned_is_an_error_or_keeps_the_bytes(suffix, tmp_path):
    scores = np.random.default_rng(0).normal(size=(20, 3))
    buffer = io.BytesIO()
    np.save(buffer, scores)
    content = buffer.getvalue()
    for place in range(8 * 128):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path = tmp_path / f"scores{suffix}"
        if suffix == ".npy":
            path.write_bytes(bytes(flipped))
        else:  # with a checksum of its own, as an archive made from a damaged file
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("logits.npy", bytes(flipped))
        with contextlib.suppress(ValueError, TypeError):
            read = read_predictions(path, labels_path=_labels(tmp_path))
            # another byte order or type is all that is not noticed: these files have no checksum
            assert read.scores.shape == (20, 3), place


def _labels(folder):
    np.save(folder / "labels.npy", np.arange(20) % 3)
    return folder / "labels.npy"


def test_a_checkpoint_that_holds_something_else_is_named(tmp_path):
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(RuntimeError, match=r"list\.ckpt holds a list, not the dict of a checkpoint\. Give"):
        load_checkpoint(tmp_path / "list.ckpt")
