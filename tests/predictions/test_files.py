"""Files that other programs write: separators of spreadsheets, and plain `torch.save`."""

import pytest
import torch

from calib_lightning.predictions import read_predictions

LOGITS, LABELS = torch.tensor([[0.5, 2.0], [3.0, -1.0]]), torch.tensor([1, 0])


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("header", [True, False])
def test_cells_may_be_separated_by_commas_semicolons_or_tabs(tmp_path, mark, header):
    rows = [["z0", "z1", "label"]] * header + [["0.5", "2.0", "1"], ["3.0", "-1.0", "0"]]
    path = tmp_path / "a.csv"
    path.write_text("".join(mark.join(row) + "\n" for row in rows))
    found = read_predictions(path)
    assert found.scores.tolist() == LOGITS.tolist()
    assert found.labels.tolist() == LABELS.tolist()


def test_commas_of_decimals_are_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("label;z0;z1\n1;0,5;2\n")
    with pytest.raises(ValueError, match=r"column 2 'z0' has '0,5' in row 0 .* Write decimals with a point"):
        read_predictions(path)


def test_commas_of_decimals_in_the_first_row_are_no_header(tmp_path):
    (tmp_path / "run.csv").write_text("0,5;0,5;1\n0,2;0,8;0\n")
    with pytest.raises(ValueError, match=r"row 0, the first, has '0,5'.*Write decimals with a point"):
        read_predictions(tmp_path / "run.csv")


def test_a_cell_with_a_semicolon_is_shown_whole(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("label,z0,z1\n1,0.5;2,1\n")
    with pytest.raises(ValueError, match=r"column 2 'z0' has '0\.5;2' in row 0"):
        read_predictions(path)


@pytest.mark.parametrize("content", [{"logits": LOGITS, "labels": LABELS}, (LOGITS, LABELS), [LOGITS, LABELS]])
def test_what_torch_saves_is_read(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    found = read_predictions(tmp_path / "a.pt")
    assert torch.equal(found.scores, LOGITS)
    assert torch.equal(found.labels, LABELS)


def test_other_content_is_told_what_a_file_may_hold(tmp_path):
    torch.save(3, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a int; .* the tensors 'logits' and 'labels', a tuple of these two, or one"):
        read_predictions(tmp_path / "a.pt")
