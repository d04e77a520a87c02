"""Figures in files and loggers."""

import os
import re
import threading
import warnings
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image

from calib_lightning.callbacks import guarded
from calib_lightning.callbacks.run_logger import RunLogger
from calib_lightning.metrics.functional.ordered import order_rows
from calib_lightning.plots import (
    confidence_histogram,
    log_figure,
    reliability_diagram,
    risk_coverage_curve,
    save_figure,
)

SCORES = torch.linspace(-1, 6, 200, dtype=torch.float64)
ROWS = order_rows(SCORES, torch.arange(200) % 3 > 0)
DRAW = {
    "reliability": lambda: reliability_diagram(torch.tensor([[4.0, 1.0, 2.0], [6.0, 5.0, 3.0]]), title="a set"),
    "histogram": lambda: confidence_histogram(ROWS),
    "risk": lambda: risk_coverage_curve(ROWS),
}


@pytest.fixture
def figure():
    return DRAW["reliability"]()


@pytest.mark.parametrize("kind", DRAW)
def test_png_is_whole_and_not_blank(kind, tmp_path):
    path = save_figure(DRAW[kind](), tmp_path / "new" / "folder" / "figure.PNG")
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert image.width == 990
        assert np.asarray(image.convert("L")).std() > 10
    assert [each.name for each in path.parent.iterdir()] == ["figure.PNG"]


@pytest.mark.parametrize("kind", DRAW)
def test_svg_is_valid_and_the_same_each_time(kind, tmp_path):
    first = DRAW[kind]()
    paths = [save_figure(first, tmp_path / "1.svg"), save_figure(first, str(tmp_path / "2.svg"))]
    save_figure(first, tmp_path / "between.png")
    paths += [save_figure(first, tmp_path / "3.svg"), save_figure(DRAW[kind](), tmp_path / "4.svg")]
    contents = {path.read_bytes() for path in paths}
    assert len(contents) == 1
    content = contents.pop()
    assert ElementTree.fromstring(content).tag == "{http://www.w3.org/2000/svg}svg"
    assert b"dc:date" not in content
    assert matplotlib.rcParams["svg.hashsalt"] is None


@pytest.mark.parametrize("name", ["figure.pdf", "figure", "figure.jpg", "png"])
def test_other_formats_are_refused(name, figure, tmp_path):
    with pytest.raises(ValueError, match=rf"file name is '{re.escape(name)}'.*\.png or \.svg"):
        save_figure(figure, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_older_file(figure, tmp_path, monkeypatch):
    path = save_figure(figure, tmp_path / "figure.svg")
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_figure(DRAW["risk"](), path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["figure.svg"]


def test_threads_draw_and_save_at_the_same_time(tmp_path):
    errors = []

    def work(number):
        try:
            for kind, draw in DRAW.items():
                save_figure(draw(), tmp_path / f"{kind}{number}.svg")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for kind, draw in DRAW.items():
        alone = save_figure(draw(), tmp_path / "alone.svg").read_bytes()
        assert all((tmp_path / f"{kind}{number}.svg").read_bytes() == alone for number in range(4))


def test_no_figure_stays_open_in_pyplot(figure, tmp_path):
    from matplotlib import pyplot

    save_figure(figure, tmp_path / "figure.png")
    log_figure(TensorBoardLogger(tmp_path), "val/reliability", figure, step=3)
    log_figure(CSVLogger(tmp_path), "val/reliability", figure, step=3)
    assert pyplot.get_fignums() == []


def test_tensorboard_gets_the_image_at_its_step(figure, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    log_figure(logger, "val/reliability", figure, step=7)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    (image,) = events.Images("val/reliability")
    assert image.step == 7
    assert (image.width, image.height) == (660, 800)
    assert image.encoded_image_string.startswith(b"\x89PNG")


def test_wandb_gets_the_image_offline(figure, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.finish()  # a run that another test left open would be taken for this one
    logger = WandbLogger(project="figures", save_dir=str(tmp_path), offline=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            log_figure([logger], "val/reliability", figure, step=7)
        assert logger.experiment.summary["trainer/global_step"] == 7
    finally:
        wandb.finish()
    (path,) = (tmp_path / "wandb").glob("offline-run-*/files/media/images/val/reliability_*.png")
    with Image.open(path) as image:
        assert image.size == (660, 800)


@pytest.mark.parametrize("kind", ["CSVLogger", "RunLogger"])
def test_loggers_with_a_folder_get_a_file_per_name_and_epoch(kind, figure, tmp_path):
    logger = CSVLogger(tmp_path, name="run", version=0) if kind == "CSVLogger" else RunLogger(tmp_path)
    for name, epoch in (("val/reliability", 5), ("val/reliability", 12), ("val/reliability", None), ("a set: b", None)):
        log_figure(logger, name, figure, 99, epoch)
    folder = tmp_path / "run" / "version_0" / "figures" if kind == "CSVLogger" else tmp_path / "figures"
    names = ["a_set__b", "val_reliability", "val_reliability_epoch0005", "val_reliability_epoch0012"]
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.png" for name in names]
    with Image.open(folder / f"{names[0]}.png") as image:
        assert image.format == "PNG"


def test_only_save_dir_is_a_folder_too(figure, tmp_path):
    log_figure(SimpleNamespace(log_dir=None, save_dir=tmp_path), "risk", figure, step=1)
    assert (tmp_path / "figures" / "risk.png").is_file()


class Broken:
    save_dir = "unused"

    def log_image(self, key, images, step):
        raise ConnectionError("no network")


def test_a_broken_logger_costs_a_warning_and_not_the_run_nor_the_other_loggers(figure, tmp_path):
    with pytest.warns(UserWarning, match=r"Broken rejected figure 'val/risk'.*no network") as caught:
        log_figure((Broken(), CSVLogger(tmp_path, name="", version="")), "val/risk", figure, step=2)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert (tmp_path / "figures" / "val_risk.png").is_file()


def test_a_logger_that_breaks_when_looked_at_is_a_warning(figure):
    class Unreachable:
        @property
        def experiment(self):
            raise RuntimeError("server is down")

    with pytest.warns(UserWarning, match="Unreachable rejected.*server is down"):
        log_figure(Unreachable(), "risk", figure, step=0)


def test_a_folder_that_cannot_be_written_is_a_warning(figure, tmp_path):
    (tmp_path / "figures").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="CSVLogger rejected"):
        log_figure(CSVLogger(tmp_path, name="", version=""), "risk", figure, step=0)


def test_an_unknown_logger_is_named_once(figure):
    class HomeMade:
        pass

    with pytest.warns(UserWarning, match="HomeMade has neither log_image") as caught:
        log_figure([HomeMade()], "risk", figure, step=0)
    assert len(caught) == 1


def test_a_logger_without_images_still_tells_that_it_fails(figure):
    class Down(Logger):
        name = version = "down"

        def log_hyperparams(self, *args, **kwargs):
            pass

        def log_metrics(self, *args, **kwargs):
            raise ConnectionError("no route to host")

    logger = guarded(Down())
    with pytest.warns(UserWarning, match="neither log_image"):
        log_figure(logger, "risk", figure, step=0)
    with pytest.warns(UserWarning, match="log_metrics failed") as caught:
        logger.log_metrics({"loss": 1.0}, 0)
    logger.log_metrics({"loss": 1.0}, 1)
    assert len(caught) == 1


@pytest.mark.parametrize("loggers", [None, [], (), DummyLogger()])
def test_nothing_to_log_to_is_fine(loggers, figure, recwarn):
    log_figure(loggers, "risk", figure, step=0)
    assert not len(recwarn)


def test_only_the_first_rank_logs(figure, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (1, 0):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        log_figure(SimpleNamespace(save_dir=str(tmp_path)), f"rank{rank}", figure, step=0)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["rank0.png"]
