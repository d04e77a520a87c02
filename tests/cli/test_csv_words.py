"""What a command says of CSV files: in the spelling of its options, and before torch is imported."""

import subprocess
import sys

import pytest

from calib_lightning.commands.running import as_options
from calib_lightning.posthoc import FixedTemperature, save_calibrator

from ..metrics.golden import random_set

LOGITS, LABELS = random_set(40, 3)


def _write(path, header="z0,z1,z2,label"):
    rows = [",".join(map(str, [*row, label])) for row, label in zip(LOGITS.tolist(), LABELS.tolist(), strict=True)]
    path.write_text("\n".join([header, *rows]))


@pytest.mark.parametrize(
    "argv",
    [
        ("score", "run.csv", "--metrics", "core"),
        ("calibrate", "--calibration", "run.csv", "--test", "other.csv"),
        ("apply", "run.csv", "--calibrator", "cal.pt", "--output", "out.csv"),
    ],
)
def test_a_wrong_header_is_said_before_torch_is_imported(tmp_path, argv):
    _write(tmp_path / "run.csv", "z2,z1,z0,label")
    program = (
        "import sys\n"
        "from calib_lightning.__main__ import main\n"
        f"code = main({list(argv)!r})\n"
        "print(code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "1 False\n"
    assert done.stderr.startswith("calib: error: run.csv: columns of scores out of order or missing: 'z2', 'z1', 'z0'")
    assert done.stderr.count("\n") == 1


def test_options_are_spelled_as_options(calib, tmp_path):
    _write(tmp_path / "run.csv", "z0,z1,z2,truth")
    assert "name it 'label', set --labels_key, or" in calib("score", "run.csv").err
    (tmp_path / "p.csv").write_text("prob,label\n0.25,0\n0.5,1\n")
    assert "column 'prob' has probabilities of class 1. Set --input probs." in calib("score", "p.csv").err
    assert as_options("labels_key is 'x'; set input=probs or --labels_key") == (
        "--labels_key is 'x'; set --input probs or --labels_key"
    )


def test_a_packed_file_is_to_be_unpacked(calib, tmp_path):
    (tmp_path / "run.csv.gz").write_bytes(b"\x1f\x8b")
    assert "'.gz'" in (said := calib("score", "run.csv.gz").err)
    assert said.endswith("Unpack it first.\n")


def test_a_table_after_a_calibrator_does_not_name_the_scores_of_the_file(calib, tmp_path):
    _write(tmp_path / "run.csv")
    save_calibrator(FixedTemperature(2.0).fit(LOGITS, LABELS), tmp_path / "cal.pt")
    first = calib("score", "run.csv", "--metrics", "core", "--calibrator", "cal.pt").out.splitlines()[0]
    assert first.strip() == "15 bins (lo, hi], calibrated by FixedTemperature(temperature=2.0)"
    assert calib("score", "run.csv", "--metrics", "core").out.startswith("logits, 15 bins")
