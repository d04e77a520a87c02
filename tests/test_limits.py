"""A small file cannot ask for much memory or time: what it says of itself is compared with its size."""

import json
import resource
import zipfile

import numpy as np
import pytest
import torch
import yaml

from calib_lightning.__main__ import main
from calib_lightning.data.array_files import load_npy, load_npz
from calib_lightning.predictions.reading import read_predictions
from calib_lightning.predictions.settings import Reading, Settings
from calib_lightning.utils.config_search import check_aliases
from calib_lightning.utils.stored import DamagedFileError, load_torch

HUGE = 10**10


def expanded(path):
    torch.save({"logits": torch.zeros(1).expand(HUGE // 10, 10), "labels": torch.zeros(3, dtype=torch.int64)}, path)


def lists_of_lists(path):
    deep = [0] * 10
    for _ in range(12):
        deep = [deep] * 10
    torch.save({"logits": torch.zeros(3, 2), "labels": torch.arange(3) % 2, "class_names": deep}, path)


def header(shape, kind="<f8"):
    return f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"


def npy(shape, kind="<f8", data=b""):
    text = header(shape, kind)
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def bomb(path):
    """150 MB of zeros in 150 kB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("logits.npy", "w") as file:
        file.write(npy((15_000_000, 10), "|u1"))
        for _ in range(15):
            file.write(bytes(10_000_000))


def npz_header(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("logits.npy", npy((HUGE, 10)))
        archive.writestr("labels.npy", npy((3,), "<i8", bytes(24)))


FILES = {
    "a.pt": (expanded, r"tensor \(1000000000, 10\) of 40,000,000,000 bytes, but holds 4 of them"),
    "b.pt": (lists_of_lists, "has more than 100,000 values"),
    "a.npy": (lambda path: path.write_bytes(npy((HUGE, 10))), r"shape \(10000000000, 10\) of float64, which is more"),
    "c.npy": (lambda path: path.write_bytes(npy((2**62, 2**62))), "which is more than the"),
    "a.npz": (bomb, r"parts would take 0\.15 GB, and the limit is 0\.1 GB\).* Or raise max_gb"),
    "b.npz": (npz_header, "which is more than the 128 bytes that it has"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_small_file_cannot_ask_for_much(name, tmp_path):
    make, message = FILES[name]
    path, labels = tmp_path / name, tmp_path / "labels.npy"
    make(path)
    np.save(labels, np.zeros(3, np.int64))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message):
        read_predictions(path, Reading(max_gb=0.1), labels if path.suffix == ".npy" else None)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100_000  # KiB


def test_the_limit_is_an_option(tmp_path, capsys):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, logits=2 * np.tile(np.eye(4), (500, 1)), labels=np.arange(2000) % 4)
    assert main(["score", str(path), "--metrics=accuracy"]) == 0
    assert main(["score", str(path), "--metrics=accuracy", "--max_gb=0.00001"]) == 1
    assert "the limit is 1e-05 GB" in capsys.readouterr().err
    np.savez(path, logits=2 * np.eye(4), labels=np.arange(4))
    assert len(read_predictions(path, Reading(max_gb=1e-9)).labels) == 4  # not compressed


def test_a_repeated_tensor_of_a_checkpoint_still_loads(tmp_path):
    torch.save(
        {"w": torch.ones(1).expand(1000), "part": torch.arange(100.0)[:3]},
        tmp_path / "a.ckpt",
    )
    assert load_torch(tmp_path / "a.ckpt")["w"].sum() == 1000


def test_a_cycle_is_refused(tmp_path):
    content = [torch.zeros(2)]
    content.append(content)
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(DamagedFileError, match="has more than"):
        load_torch(tmp_path / "a.pt")


@pytest.mark.parametrize("shape", [(HUGE, 3), (2**62, 2**62)])
def test_data_files_are_bounded_too(shape, tmp_path):
    (tmp_path / "x.npy").write_bytes(npy(shape))
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", npy(shape))
    for load, name in ((load_npy, "x.npy"), (load_npz, "x.npz")):
        with pytest.raises(ValueError, match="which is more than the 128 bytes that it has"):
            load(tmp_path / name)


def aliases(depth):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, depth)]
    return "\n".join(lines)


def test_aliases_that_repeat_each_other_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bomb.yaml").write_text(aliases(9))
    with pytest.raises(SystemExit):
        main(["fit", "-c", "bomb.yaml"])
    assert "more than 100,000 values" in capsys.readouterr().err
    with pytest.raises(yaml.YAMLError, match="more than 100,000"):
        check_aliases("a: &a [*a]")
    check_aliases(aliases(3))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--intervals=1000000000", ">= 2 and <= 100000"),
        ("--bins=1000000000", "at most 10000"),
        ("--bins=10,20000", "at most 10000"),
        ("--max_gb=0", "above 0"),
        ("--max_gb=nan", "above 0"),
    ],
)
def test_numbers_of_options_are_bounded(option, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["score", "x.npz", option])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_settings_are_bounded_in_python():
    with pytest.raises(ValueError, match="at most 10000"):
        Settings(bins=10**9)
    assert Settings(intervals=100_000, bins=10_000).bins == (10_000,)


@pytest.mark.parametrize("content", ["[" * 100_000, json.dumps([1] * 5)])
def test_counts_of_any_depth_are_named(content, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", logits=2 * np.eye(3), labels=np.arange(3))
    (tmp_path / "counts.json").write_text(content)
    files = [str(tmp_path / "a.npz"), "--groups=frequency", f"--train_counts={tmp_path / 'counts.json'}"]
    assert main(["score", *files]) == 1
    assert "counts.json" in capsys.readouterr().err
