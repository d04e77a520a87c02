"""A class is read in one sitting: walk the syntax trees and refuse a longer one. Ruff does the same for functions."""

import ast
from pathlib import Path

import calib_lightning

PACKAGE = Path(calib_lightning.__file__).parent
LONGEST = 300


def _too_long(source):
    """(name, lines) of every class of more lines than `LONGEST`, its decorators and docstring included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if (lines := node.end_lineno - first + 1) > LONGEST:
                yield node.name, lines


def test_no_class_is_longer_than_one_sitting():
    body = "    x = 1\n" * (LONGEST - 1)
    assert list(_too_long(f"class Fits:\n{body}")) == []
    assert list(_too_long(f"class Long:\n{body}    y = 2\n")) == [("Long", LONGEST + 1)]
    assert list(_too_long(f"@decorated\nclass Long:\n{body}")) == [("Long", LONGEST + 1)]
    found = {path: list(_too_long(path.read_text(encoding="utf-8"))) for path in PACKAGE.rglob("*.py")}
    assert len(found) > 200
    assert {str(path): classes for path, classes in found.items() if classes} == {}
