"""Walk the syntax trees: a class is read in one sitting, as Ruff refuses longer functions; files are written whole."""

import ast
from pathlib import Path

import calib_lightning

PACKAGE = Path(calib_lightning.__file__).parent
LONGEST = 300
# the two that write files whole, what is unpacked into a folder that is renamed, and the part of a download
WRITES = {"utils/files.py", "core/checkpoint_io.py", "data/archives.py", "data/web_files.py"}


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


def _writes_in_place(source):
    """Lines that open a file for writing under its own name; appending is left out."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            modes = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            if name in ("write_text", "write_bytes") and isinstance(node.func, ast.Attribute):
                yield node.lineno
            if name == "open" and any(isinstance(mode, str) and mode[:1] in ("w", "x") for mode in modes):
                yield node.lineno


def test_no_file_is_written_in_place():
    assert list(_writes_in_place('path.open("w")\nopen(path, mode="wb")\npath.write_text("")')) == [1, 2, 3]
    assert list(_writes_in_place('path.open()\npath.open("a")\nwrite_text(path, "")')) == []
    found = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert {name for name, source in found.items() if list(_writes_in_place(source))} == WRITES
