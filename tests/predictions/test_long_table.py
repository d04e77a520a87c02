"""Long tables in CSV, read back with the standard library."""

import csv
import io
import math

import numpy as np
import pytest
import torch

from calib_lightning.predictions.long_table import to_csv


def read(text):
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_numbers_come_back_as_they_were():
    values = [1 / 3, 0.1, 1e-300, -2.5e17, float(np.float64(2) / 7), 5e-324, math.inf, -math.inf]
    rows = read(to_csv({"value": value} for value in values))
    assert [float(row["value"]) for row in rows] == values
    assert [row["value"] for row in rows[-2:]] == ["inf", "-inf"]
    (row,) = read(to_csv([{"a": np.float64(1) / 3, "b": np.float32(0.5), "c": np.int64(7), "d": True, "e": 10**30}]))
    assert row == {"a": repr(1 / 3), "b": "0.5", "c": "7", "d": "true", "e": "1" + "0" * 30}


def test_undefined_is_empty_and_columns_appear_in_order():
    text = to_csv([{"method": "a", "ece": math.nan}, {"seed": None, "ece": 0.5, "method": "b"}, {"nll": 1}])
    assert text == "method,ece,seed,nll\na,,,\nb,0.5,,\n,,,1\n"
    assert to_csv([]) == ""
    assert to_csv([{"only": None}]) == 'only\n""\n'
    assert read(to_csv([{"only": None}, {"only": 1}])) == [{"only": ""}, {"only": "1"}]


def test_quotes_commas_and_lines():
    texts = ["a,b", 'say "no"', "two\nlines", " space ", "ü ± ↓", ""]
    text = to_csv({"text": value, "place": place} for place, value in enumerate(texts))
    assert "\r" not in text
    assert [row["text"] for row in read(text)] == texts
    assert '"say ""no"""' in text
    assert read(to_csv([{"text": "two\r\nold\rlines"}])) == [{"text": "two\nold\nlines"}]


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-x", "@sum", "=SUM(A1)", " =1", "\t=1", "\n@x", "--", "-"])
def test_formulas_are_text(text):
    (row,) = read(to_csv([{"name": text, text: 1}]))
    assert row["name"] == f"'{text}"
    assert f"'{text}" in row


@pytest.mark.parametrize("text", ["-0.5", "+1", "-inf", "a=b", "1-2", "'=1"])
def test_other_text_is_as_it_is(text):
    assert read(to_csv([{"name": text}])) == [{"name": text}]


@pytest.mark.parametrize("value", [[1], {"a": 1}, torch.tensor(1.0), 1j, b"x"])
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match=r"ece is .*; it must be text, a number, True, False or None"):
        to_csv([{"ece": value}])
