"""Sheets of images: each pixel is drawn with its own value."""

import numpy as np
import pytest
import torch
from PIL import Image

from calib_lightning.plots import save_figure
from calib_lightning.plots.sheet import image_sheet


def test_only_the_colours_of_the_images_are_drawn(tmp_path):
    image = torch.tensor([[[0, 255], [100, 7]]], dtype=torch.uint8).expand(3, 2, 2).clone()
    image[0, 0, 1] = 30
    path = save_figure(image_sheet([("", image[None])], [""]), tmp_path / "sheet.png")
    colours, counts = np.unique(np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3), axis=0, return_counts=True)
    found = {tuple(colour): count for colour, count in zip(colours.tolist(), counts.tolist(), strict=True)}
    assert set(found) == {(0, 0, 0), (30, 255, 255), (100, 100, 100), (7, 7, 7), (255, 255, 255)}
    assert {found[colour] for colour in found if colour != (255, 255, 255)} == {105 * 105}


def test_labels_are_taken_literally():
    label = "$x$ and a name that is far too long for a label"
    figure = image_sheet([(label, torch.zeros(1, 1, 4, 4, dtype=torch.uint8))], ["a_b"], title="$title")
    texts = [text.get_text() for text in figure.texts]
    assert texts == ["$title", "a_b", "$x$ and a name that i…"]
    assert not any(text.get_parse_math() for text in figure.texts)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "images of 0 sizes"),
        ([("a", torch.zeros(1, 1, 2, 2)), ("b", torch.zeros(1, 1, 2, 3))], "images of 2 sizes"),
        ([("a", torch.zeros(1, 2, 2, 2))], "2 channels; they must have 1"),
    ],
)
def test_images_that_make_no_sheet(rows, said):
    with pytest.raises(ValueError, match=said):
        image_sheet(rows, ["x"])


def test_labels_have_room():
    figure = image_sheet([("tandem bicycle made for two", torch.zeros(1, 1, 4, 4, dtype=torch.uint8))], ["augmented 1"])
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.texts]
    assert all(box.x0 > 0 and box.x1 < figure.bbox.width for box in boxes)
    assert boxes[0].width < figure.axes[0].get_window_extent().width + 15
    assert boxes[1].x1 < figure.axes[0].get_window_extent().x0
