"""Load the network and the images of a run, for calibrators that need more than logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor, nn

from calib_lightning import data
from calib_lightning.core import ClassificationModule, load_module
from calib_lightning.data import BenchmarkDataModule
from calib_lightning.posthoc import Calibrator, DataDrivenStart, Evidence, NeuralClamping, Sequential
from calib_lightning.predictions.inputs import Inputs, read_record
from calib_lightning.predictions.reading import Predictions
from calib_lightning.types import Batch
from calib_lightning.utils.config_search import check_aliases

AGREEMENT = 0.02
"""Tolerance of recomputed logits, relative to the size of the saved ones, which may have a lower precision."""


class RunNetwork:
    """The selected checkpoint of a run, in evaluation mode, and its data; ``run`` may be the folder of a test in it."""

    def __init__(self, run: Path) -> None:
        inner = not (run / "config.yaml").is_file() and (run.parent / "config.yaml").is_file()
        home = run.parent if inner else run
        config, record = home / "config.yaml", read_record(home)
        if not config.is_file():
            raise ValueError(
                f"{run} has no config.yaml, which defines the images of the network. Give the folder of a run."
            )
        chosen = (record.get("checkpoint") or {}).get("path")
        if not chosen or not (home / chosen).is_file():
            raise ValueError(
                f"{run} has no selected checkpoint, so there is no network. Finish the training of the run."
            )
        self.checkpoint = home / chosen
        others = {key: value for key, value in (read_record(run).get("others") or {}).items() if key != "notes"}
        self.data = _data_of(config, others)
        self.data.prepare_data()
        self.data.setup("test")
        if record.get("splits") not in (None, self.data.splits_hash):
            raise ValueError(
                f"{config}: the splits of the data differ from those of the run, so its predictions belong to other "
                "images. Use the data that the run was trained with."
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.module: ClassificationModule = load_module(self.checkpoint, device)

    def with_features(self, inputs: Inputs) -> Inputs:
        """Add features, the input of the network's head, to all sets, with a note on the agreement of the logits.

        Logits that differ from the saved ones are a ``ValueError``: they are from another network.
        """
        found, largest = {}, 0.0
        for name, predictions in {"calibration": inputs.calibration, **inputs.tests, **inputs.others}.items():
            logits, features = self._outputs(name)
            off = _distance(logits, predictions)
            if not off <= AGREEMENT:
                raise ValueError(
                    f"{predictions.where}: the relative difference to the logits of {self.checkpoint} is {off:.2g}; it "
                    f"must be at most {AGREEMENT:g}. Test this network again, or give the folder of its test."
                )
            largest = max(largest, off)
            found[name] = predictions._replace(features=features)
        note = f"the logits of {self.checkpoint} agree with the saved ones (largest relative difference {largest:.1g})"
        calibration = found.pop("calibration")
        notes = [*inputs.notes, note]
        others = {name: found.pop(name) for name in inputs.others}
        return inputs._replace(
            calibration=calibration, tests=found, notes=notes, checkpoint=self.checkpoint, others=others
        )

    def evidence(self, name: str, predictions: Predictions, calibrator: Calibrator) -> Evidence:
        """Evidence on a set, as far as the calibrator needs it; images of test sets are read a batch at a time."""
        if "network" not in calibrator.needs:
            return Evidence(predictions.logits, predictions.features)
        if name == "calibration":
            self._give_range(calibrator)
        images: Any = self._calibration_images if name == "calibration" else self.data.evaluation_loader(name)
        return Evidence(predictions.logits, predictions.features, self.module, images)

    def _give_range(self, calibrator: Calibrator) -> None:
        """Tell a data-driven start the range of normalised images."""
        for part in calibrator.members if isinstance(calibrator, Sequential) else [calibrator]:
            start = part.start if isinstance(part, NeuralClamping) else None
            if isinstance(part, NeuralClamping) and isinstance(start, DataDrivenStart) and not start.low:
                pairs = list(zip(self.data.mean, self.data.std, strict=True))
                low, high = [(0.0 - mean) / std for mean, std in pairs], [(1.0 - mean) / std for mean, std in pairs]
                part.start = DataDrivenStart(low, high)

    @cached_property
    def _calibration_images(self) -> Tensor:
        """All at once: a fit passes over them many times."""
        return torch.cat([Batch(*batch).image for batch in self.data.evaluation_loader("calibration")])

    def _images(self, name: str) -> Iterator[Tensor]:
        for batch in self.data.evaluation_loader(name):
            yield Batch(*batch).image.to(self.module.device)

    def _outputs(self, name: str) -> tuple[Tensor, Tensor]:
        logits: list[Tensor] = []
        features: list[Tensor] = []
        with torch.no_grad(), _inputs_of(self.module.head, features):
            for image in self._images(name):
                logits.append(self.module.outputs(image).logits.float().cpu())
        return torch.cat(logits), torch.cat(features)


def _data_of(config: Path, others: dict[str, Any]) -> BenchmarkDataModule:
    """Build the data module of a run's configuration, which must be one of this package, with the evaluated sets."""
    try:
        text = config.read_text(encoding="utf-8")
        check_aliases(text)
        section = yaml.safe_load(text)["data"]
        class_path, arguments = str(section["class_path"]), (section.get("init_args") or {}) | others
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{config} does not specify the data ({error!r}).") from error
    known = {name: item for name in data.__all__ if _is_benchmark(item := getattr(data, name))}
    package, _, name = class_path.rpartition(".")
    if name not in known or package.partition(".")[0] not in ("", data.__name__.partition(".")[0]):
        raise ValueError(
            f"{config}: the data module is {class_path!r}; it must be one of {', '.join(known)}. For other data, save "
            "logits and features, and give --calibration and --test."
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(known[name], "data")
    try:
        found = parser.instantiate_classes(parser.parse_object({"data": arguments})).data
    except ArgumentError as error:
        raise ValueError(f"{config}: {error}") from error
    assert isinstance(found, BenchmarkDataModule)
    return found


def _is_benchmark(item: Any) -> bool:
    return isinstance(item, type) and issubclass(item, BenchmarkDataModule) and item is not BenchmarkDataModule


@contextmanager
def _inputs_of(head: nn.Module, kept: list[Tensor]) -> Iterator[None]:
    """Collect the inputs of a head."""
    handle = head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].flatten(1).float().cpu()))
    try:
        yield
    finally:
        handle.remove()


def _distance(logits: Tensor, predictions: Predictions) -> float:
    """RMS difference, relative to the RMS deviation of the saved logits from their row means."""
    saved = predictions.logits.float()
    if saved.shape != logits.shape:
        return float("inf")
    size = (saved - saved.mean(dim=1, keepdim=True)).square().mean().sqrt()
    return float((logits - saved).square().mean().sqrt() / size.clamp_min(torch.finfo(torch.float32).tiny))
