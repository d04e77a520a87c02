"""Figures name their set and its size, and mark what rests on few rows."""

import pytest
import torch

from calib_lightning.callbacks import LogFigures
from calib_lightning.callbacks import figures as callback_module
from calib_lightning.callbacks import monitor as monitor_module
from calib_lightning.callbacks.monitor import CalibrationMonitor
from calib_lightning.data import ToyDataModule
from calib_lightning.methods import CrossEntropy
from calib_lightning.plots import confidence_histogram, reliability_diagram, risk_coverage_curve
from calib_lightning.plots.sheet import image_sheet
from calib_lightning.predictions import figures as score_figures
from calib_lightning.predictions.reading import Origin, Predictions
from tests.callbacks.modules import Foreign, loader
from tests.callbacks.test_monitor import trainer_with
from tests.metrics.golden import golden_set
from tests.plots.test_figures import bins_of, container, luminance, numbers, ordered_of, rows_of

ROWS = rows_of(*golden_set())


def test_small_sets_and_bins_of_few_rows_are_marked():
    def drawn(counts):
        rows = torch.tensor([[n, 0.6 * n, 0.5 * n] for n in counts])
        figure = reliability_diagram(rows)
        legend = [text.get_text() for text in figure.legends[0].get_texts()]
        return "few rows" in numbers(figure), "accuracy, < 20 rows" in legend

    assert drawn([20.0, 20.0]) == (False, False)
    assert drawn([19.0, 21.0]) == (False, True)
    assert drawn([39.0, 0.0]) == (True, False)
    hollow, solid = (container(reliability_diagram(bins_of(ROWS, n)).axes[0], label)[0] for n, label in (
        (100, "accuracy, < 20 rows"), (1, "accuracy"),
    ))  # fmt: skip
    assert luminance(hollow.get_facecolor()) - luminance(solid.get_facecolor()) > 0.15
    assert hollow.get_linestyle() != solid.get_linestyle()


@pytest.mark.parametrize("name", ["Focal, CIFAR10, test", "x" * 30 + " " + "y" * 30, "$a_1$ and 50 %"])
def test_titles_end_in_the_number_of_rows_and_fit(name):
    bins, ordered = bins_of(ROWS, 15), ordered_of(ROWS)
    for figure in (
        reliability_diagram(bins, title=name),
        confidence_histogram(ordered, title=name),
        risk_coverage_curve(ordered, title=name),
    ):
        assert figure.get_suptitle().replace("\n", " ") == f"{name}, N 500"
        figure.draw_without_rendering()
        box = figure._suptitle.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1


def test_figures_of_a_trainer_name_method_data_and_set(tmp_path, monkeypatch):
    titles = []
    for module in (monitor_module, callback_module):
        monkeypatch.setattr(module, "figures", lambda state, title: titles.append(title) or {})
    trainer = trainer_with(CalibrationMonitor(figures_every=1), tmp_path)
    trainer.fit(Foreign(), loader(40), [loader(8, seed=1), loader(8, seed=2)])
    data = ToyDataModule(batch_size=64)
    trainer_with(LogFigures(), tmp_path).test(CrossEntropy(3, encoder="digits_cnn"), data, verbose=False)
    during = [f"Foreign, TensorDataset, validation/{place}, epoch 0" for place in (0, 1)]
    assert titles[:4] == [*during, *(title.removesuffix(", epoch 0") for title in during)]
    assert titles[4] == "CrossEntropy, Toy, test"


def test_figures_of_files_name_run_set_and_calibrator(tmp_path, monkeypatch):
    run = tmp_path / "digits-focal-0"
    for folder in (run, run / "test"):
        (folder / "predictions").mkdir(parents=True)
        (folder / "run.json").write_text("{}")
    titles = []
    for kind in ("reliability_diagram", "confidence_histogram", "risk_coverage_curve"):
        monkeypatch.setattr(score_figures, kind, lambda sums, title: titles.append(title))
    monkeypatch.setattr(score_figures, "save_figure", lambda figure, path: path)
    for origin in (
        Origin((run / "predictions" / "test.npz",)),
        Origin((run / "test" / "predictions" / "test.npz",), calibrator="Temperature"),
        Origin((tmp_path / "test.csv",)),
    ):
        found = Predictions(torch.eye(3), torch.arange(3), origin=origin)
        score_figures.write_figures(tmp_path, "test", found, 15)
    assert titles[::3] == ["digits-focal-0, test", "digits-focal-0, test, Temperature", "test"]


def test_names_that_are_not_utf8_are_drawn(tmp_path):
    name = b"caf\xe9".decode(errors="surrogateescape")
    figure = reliability_diagram(bins_of(ROWS, 10), title=name)
    assert figure.get_suptitle().startswith("caf?, N")
    figure.savefig(tmp_path / "reliability.png")
    sheet = image_sheet([(name, torch.zeros(1, 1, 8, 8, dtype=torch.uint8))], [name], title=name)
    sheet.savefig(tmp_path / "sheet.png")
