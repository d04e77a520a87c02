"""Run two checkouts on this machine and compare what they compute: ``python tests/compare_checkouts.py OLD NEW``.

Saved predictions go through ``calib score`` and ``calib calibrate``, whose numbers must agree to 1e-12; trainings run
with seed 0, and their weights must be equal bit for bit. Nothing is stored: both checkouts run here and now.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TRAININGS = {
    "quickstart": [],
    "label_smoothing": ["--model", "label_smoothing"],
    "mac_cal": ["--model", "mac_cal", "--model.switch.at_epoch=-4", "--model.switch.training.batch_size=32"],
    "refcal": ["--model", "refcal", "--data.batch_size=64"],
    "crl": ["--model", "crl"],
    "ada_focal": ["--model", "ada_focal"],
    "balcal": ["--model", "balcal"],
    "plp": ["--model", "plp"],
    "mit_a": ["--model", "mit_a"],
    "v_tst": ["--model", "v_tst"],
    "confidnet": ["--model", "confidnet"],
}
CALIBRATORS = (
    "Temperature,ECETemperature,EnsembleTemperature,VectorScaling,StructuredVectorScaling,OneVsRest(Isotonic),"
    "TopLabel(Beta),IRM,Sequential(Temperature(),TopLabel(HistogramBinning()))"
)
METRICS = "accuracy,nll,brier,ece,aece_official,classwise_ece,correctness_auroc,smece,aurc"
IGNORED = {"calib_lightning", "file", "other", "sha256", "notes", "columns"}


def main() -> int:
    """Compare; the exit code says whether they agree."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--predictions", nargs="*", default=[], metavar="CALIBRATION:TEST", help="pairs of .npz files")
    parser.add_argument("--trainings", nargs="*", default=list(TRAININGS)[:4], choices=list(TRAININGS))
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()
    for checkout in (options.old, options.new):
        _check_that_it_is_run(checkout.resolve())
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        for pair in options.predictions:
            faults += _compared(pair, *(_scored(at.resolve(), pair, Path(folder)) for at in (options.old, options.new)))
        for name in options.trainings:
            runs = [_trained(at.resolve(), name, options.epochs, Path(folder)) for at in (options.old, options.new)]
            faults += _compared(name, *runs)
    return 1 if faults else 0


def _check_that_it_is_run(checkout: Path) -> None:
    """Without a package there, Python would run the installed one, and find it equal to itself."""
    if not (checkout / "calib_lightning" / "__init__.py").is_file():
        raise SystemExit(f"{checkout} is not a checkout; it must have the folder calib_lightning. Give another path.")


def _calib(checkout: Path, where: Path, *words: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    environment.pop("CALIB_RUN_FOLDER", None)
    command = [sys.executable, "-m", "calib_lightning", *words]
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{checkout}: calib {' '.join(words)} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def _scored(checkout: Path, pair: str, folder: Path) -> dict[str, Any]:
    calibration, test = (str(Path(path).resolve()) for path in pair.split(":"))
    where = Path(tempfile.mkdtemp(dir=folder))
    _calib(checkout, where, "score", test, "--output", "score.json", "--bins", "10,15")
    _calib(checkout, where, "score", test, "--output", "intervals.json", "--metrics", METRICS, "--intervals", "50")
    words = ["--calibration", calibration, "--test", test, "--calibrators", CALIBRATORS, "--output", "calibrated"]
    _calib(checkout, where, "calibrate", *words, "--intervals", "20")
    files = [where / name for name in ("score.json", "intervals.json", "calibrated/report.json")]
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in files}


def _trained(checkout: Path, name: str, epochs: int, folder: Path) -> dict[str, Any]:
    import torch

    where = Path(tempfile.mkdtemp(dir=folder))
    config = str(checkout / "configs" / "quickstart.yaml")
    words = ["fit", "-c", config, *TRAININGS[name], f"--trainer.max_epochs={epochs}", "--run_dir=run", "--quiet=true"]
    _calib(checkout, where, *words, "--seed_everything=0")
    state = torch.load(where / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    record = json.loads((where / "run" / "run.json").read_text(encoding="utf-8"))
    return {"weights": state, "results": record.get("results", {})}


def _compared(name: str, old: Any, new: Any) -> int:
    differences = list(_differences(old, new, name))
    print(f"{name}: {'equal' if not differences else f'{len(differences)} differences'}", *differences[:10], sep="\n  ")
    return len(differences)


def _differences(old: Any, new: Any, where: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new} - IGNORED, key=str):
            if key not in old or key not in new:
                yield f"{where}/{key}: only {'before' if key in old else 'after'}"
            else:
                yield from _differences(old[key], new[key], f"{where}/{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _differences(one, other, f"{where}[{place}]")
    elif hasattr(old, "equal"):
        if old.shape != new.shape or not bool(((old == new) | ((old != old) & (new != new))).all()):
            yield f"{where}: weights differ"
    elif isinstance(old, float) and isinstance(new, float):
        if not (math.isclose(old, new, rel_tol=1e-12, abs_tol=1e-15) or (math.isnan(old) and math.isnan(new))):
            yield f"{where}: {old!r} and {new!r}"
    elif old != new:
        yield f"{where}: {old!r:.200} and {new!r:.200}"


if __name__ == "__main__":
    sys.exit(main())
