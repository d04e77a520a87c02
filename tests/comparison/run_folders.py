"""Run folders written by hand, as `calib fit`, `calib calibrate` and `calib benchmark` write them."""

import json
from pathlib import Path

import numpy as np
import torch
import yaml

from calib_lightning.posthoc import Temperature, save_calibrator
from tests.comparison.networks import LABELS, network

METHODS = {"cross_entropy": "CrossEntropy", "label_smoothing": "LabelSmoothing", "mixup": "CrossEntropy"}
VERSIONS = {"python": "3.11.7", "calib-lightning": "0.1.0", "torch": "2.6.0"}


def write_run(
    folder: Path,
    wrong: int,
    seed: int = 0,
    *,
    method: str = "CrossEntropy",
    data: str = "DigitsDataModule",
    network_name: str = "digits_cnn",
    options: dict | None = None,
    config: dict | None = None,
    record: dict | None = None,
    labels: np.ndarray = LABELS,
    sets: dict[str, int] | None = None,
    temperature: bool = False,
) -> Path:
    """Write the folder of a run.

    Args:
        folder: The folder.
        wrong: Number of errors on the test set.
        seed: Seed of the run.
        method: Class of the method.
        data: Class of the data.
        network_name: Name of the network.
        options: Arguments of the method.
        config: Other keys of its configuration.
        record: Other keys of ``run.json``; ``stage`` changes all stages.
        labels: Labels of the test set.
        sets: Numbers of errors on other sets, by name.
        temperature: Whether temperature scaling was fitted to it.

    Returns:
        The folder.
    """
    (folder / "predictions").mkdir(parents=True)
    drawn = np.random.default_rng([wrong, seed, len(method)]).integers(2**31)
    predictions = {name: network(count, seed=drawn + place) for place, (name, count) in enumerate((sets or {}).items())}
    predictions = {"test": network(wrong, seed=drawn, labels=labels), **predictions}
    for name, logits in predictions.items():
        path = folder / "predictions" / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {} if name.startswith("ood/") else {"labels": labels}
        np.savez(path, logits=logits.astype(np.float32), **arrays)
    stages = [
        {"stage": "fit", "seconds": 30.0 + seed, "images_per_second": 1000.0, "peak_memory_mib": {"process": 500.0}},
        {"stage": "test", "seconds": 2.0, "peak_memory_mib": {"process": 600.0, "device": None}},
    ]
    known = {"status": "finished", "seed": seed, "device": "cpu (x86_64)", "versions": VERSIONS}
    record = dict(record or {})
    changed = record.pop("stage", {})
    content = {
        "stages": [known | stage | changed for stage in stages],
        "data": data,
        "splits": "5c" * 32,
        "results": {f"{name}/n": 400.0 for name in predictions},
        **record,
    }
    (folder / "run.json").write_text(json.dumps(content))
    model = {"encoder": network_name, "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}}}
    configuration = {
        "seed_everything": seed,
        "trainer": {"max_epochs": 15, "callbacks": None},
        "model": {"class_path": f"calib_lightning.methods.{method}", "init_args": model | (options or {})},
        "data": {"class_path": f"calib_lightning.data.{data}", "init_args": {"batch_size": 32}},
        **(config or {}),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(configuration))
    if temperature:
        scale(folder)
    return folder


def scale(run: Path) -> None:
    """Fit a temperature to other rows of the same network."""
    calibrator = Temperature()
    calibrator.fit(torch.tensor(network(60, seed=5)), torch.tensor(LABELS))
    (run / "calibrate").mkdir()
    save_calibrator(calibrator, run / "calibrate" / "Temperature.pt")


def write_grid(folder: Path, wrong: dict[str, list[int]], *, baseline: str | None = None, **options) -> Path:
    """Write the folder of a benchmark: numbers of errors by method and seed."""
    entries = []
    for method, counts in wrong.items():
        for seed, count in enumerate(counts):
            name = f"digits_lt-small-{method}-{seed}"
            write_run(folder / name, count, seed, method=METHODS[method], **options)
            entries.append(
                {
                    "folder": name,
                    "data": "digits_lt",
                    "network": "small",
                    "method": method,
                    "seed": seed,
                    "calibrators": ["Temperature"],
                    "status": "finished",
                    "first_stage": None,
                }
            )
    write_record(folder, entries, baseline)
    return folder


def write_record(folder: Path, entries: list[dict], baseline: str | None = None) -> None:
    """Write the ``benchmark.json`` of a benchmark."""
    content = {"calib_lightning": "0.1.0", "file": "grid.yaml", "baseline": baseline, "runs": entries}
    (folder / "benchmark.json").write_text(json.dumps(content))


def entries_of(folder: Path) -> list[dict]:
    """The runs in ``benchmark.json``."""
    return json.loads((folder / "benchmark.json").read_text())["runs"]
