"""Tables as LaTeX: the structure, every special character, and, where there is a compiler, the printed page."""

import re
import shutil
import subprocess

import numpy as np
import pytest

from calib_lightning import score
from calib_lightning.__main__ import main
from calib_lightning.predictions.latex import bold, escape, latex_tables
from calib_lightning.predictions.tables import Grid, Report

from ..metrics.golden import golden_set

SPECIAL = 'a&b 50 % $x_1$ #2 {c} ~d ^e \\f <g> |h| "i" [j] --k ↑ ↓ → ← ± · ≤ ≥ ≈ ∞ ² … é \N{MULTIPLICATION SIGN}'
SPECIAL += "\N{MINUS SIGN} \N{EN DASH} \N{EM DASH}"
GRIDS = [
    Grid(
        "Digits, 3 seeds & 50 % noise_1",
        ["method", "ECE % ↓", "Brier ↓", "signed gap % →0"],
        [
            ["baseline"],
            ["cross_entropy", "4.11 ± 0.20", "-", "-1.5 [-2.0, 0.1]"],
            ["with one cell less"],
            ["[mixup]", "**1.25 ± 0.10**", "0.1†", "**0.2‡***"],
            [SPECIAL, SPECIAL, bold(SPECIAL), ""],
            ["short", "1"],
        ],
    ),
    Grid("Digits, 3 seeds & 50 % noise_1", ["", "p"], [["a - b", "0.05"]]),
    Grid("", ["name", "value"], []),
]
REMARKS = ["† worse than the baseline (p < 0.05).", "100 % of A_1 & B: {x}\nsecond line"]


class Made(Report):
    """A report of given tables."""

    notes = ()

    def grids(self):
        yield from GRIDS

    def remarks(self):
        yield from REMARKS

    def content(self):
        return {}


def checked(source):
    """Check braces, mathematics, environments and columns; return the rows of each tabular as lists of cells."""
    assert source.isascii() or not re.search(r"[^\x00-\xff]", source)
    bare = re.sub(r"(?m)^%.*$", "", source).replace(r"\\", "\n").replace(r"\{", "").replace(r"\}", "")
    depth = 0
    for char in bare:
        depth += (char == "{") - (char == "}")
        assert depth >= 0
    assert depth == 0
    assert len(re.findall(r"(?<!\\)\$", bare)) % 2 == 0
    assert not re.search(r"(?<!\\)[%#~]", bare)
    math = re.findall(r"(?<!\\)\$(.*?)(?<!\\)\$", bare)
    outside = re.sub(r"(?<!\\)\$(.*?)(?<!\\)\$", "", bare)
    assert all("\n" not in part for part in math)
    assert not re.search(r"(?<!\\)[_^]", outside)
    assert all(re.fullmatch(r"[^{}]*(\{[^{}]*\})?", part) for part in math)
    open_ones = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", source):
        if kind == "begin":
            open_ones.append(name)
        else:
            assert open_ones.pop() == name
    assert open_ones == []
    tables = []
    for columns, body in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", source, re.S):
        rows = []
        for line in body.strip().splitlines():
            line = line.strip()
            if line in (r"\toprule", r"\midrule", r"\bottomrule"):
                continue
            assert line.endswith(r" \\")
            assert not line.startswith("[")
            if found := re.match(r"\\multicolumn\{(\d+)\}\{l\}", line):
                assert int(found[1]) == len(columns)
                continue
            cells = re.split(r"(?<!\\)&", line.removesuffix(r"\\"))
            assert len(cells) == len(columns)
            rows.append([cell.strip() for cell in cells])
        assert body.count(r"\toprule") == body.count(r"\bottomrule") == 1
        assert r"\midrule" + "\n    " + r"\midrule" not in body
        tables.append(rows)
    return tables


def test_structure_and_cells():
    source = Made().to_latex()
    first, second, third = checked(source)
    assert first[0] == ["method", r"ECE \% $\downarrow$", r"Brier $\downarrow$", r"signed gap \% $\rightarrow$0"]
    assert first[1] == [r"cross\_entropy", r"4.11 $\pm$ 0.20", "--", "$-$1.5 [$-$2.0, 0.1]"]
    assert first[2] == ["{}[mixup]", r"\textbf{1.25 $\pm$ 0.10}", r"0.1$^{\dagger}$", r"\textbf{0.2$^{\ddagger*}$}"]
    assert first[4] == ["short", "1", "", ""]
    assert second[1] == ["a - b", "0.05"]
    assert third == [["name", "value"]]
    assert r"\multicolumn{4}{l}{\textbf{baseline}} \\" in source
    assert r"\caption{Digits, 3 seeds \& 50 \% noise\_1}" in source
    assert re.findall(r"\\label\{(.*)\}", source) == [
        "tab:digits-3-seeds-50-noise-1",
        "tab:digits-3-seeds-50-noise-1-2",
    ]
    notes = source[source.index(r"\footnotesize") :]
    assert r"$^{\dagger}$ worse than the baseline (p $<$ 0.05)." in notes
    assert r"100 \% of A\_1 \& B: \{x\} second line" in notes
    assert notes.endswith("\\end{table}\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\\", r"\textbackslash{}"),
        ("x^2~y", r"x\textasciicircum{}2\textasciitilde{}y"),
        ("a--b---c", "a-{}-b-{}-{}-c"),
        ("2026-01-02, label-1", "2026-01-02, label-1"),
        ("-3 (-inf, 1e-5)", "$-$3 ($-$inf, 1e-5)"),
        ("*†", r"$^{*\dagger}$"),
        ("\t a\n\nb ", "a b"),
        ("", ""),
    ],
)
def test_escape(text, expected):
    assert escape(text) == expected


def test_remarks_without_a_table_are_text():
    assert latex_tables([], ["a & b"]) == (
        "% needs \\usepackage{booktabs}\n{\\footnotesize\\raggedright a \\& b\\par}\n"
    )


def test_bold_cells_of_terminal_and_markdown():
    report = Made()
    text = report.table()
    assert "*1.25 ± 0.10*" in text  # plain text knows no bold
    assert "**1.25" not in text
    assert "| [mixup] | **1.25 ± 0.10** | 0.1† | **0.2‡*** |" in report.to_markdown()
    assert "| **baseline** |" in report.to_markdown()
    assert (bold("a"), bold("**a**"), bold("****")) == ("**a**", "**a**", "********")


def test_every_report_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logits, labels = golden_set()
    source = score(logits, labels, metrics="all").to_latex()
    (table,) = checked(source)
    assert r"ECE \% $\downarrow$" in [row[0] for row in table]
    np.savez("run.npz", logits=logits, labels=labels)
    assert main(["score", "run.npz", "--metrics", "all", "--output", "report.tex"]) == 0
    assert main(["score", "run.npz", "--metrics", "all", "--format", "latex", "--output", "other"]) == 0
    assert (tmp_path / "report.tex").read_text() == (tmp_path / "other").read_text()
    checked((tmp_path / "report.tex").read_text())


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex; tests above check the structure")
def test_it_compiles(tmp_path):
    logits, labels = golden_set()
    body = Made().to_latex() + score(logits, labels, metrics="all", intervals=10).to_latex()
    document = ["\\documentclass{article}", "\\usepackage{booktabs}", "\\begin{document}", body, "\\end{document}"]
    (tmp_path / "page.tex").write_text("\n".join(document))
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "! " not in done.stdout
    assert (tmp_path / "page.pdf").stat().st_size > 1000
