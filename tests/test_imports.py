"""Imports point one way: walk the syntax trees and refuse an upward arrow."""

import ast
from pathlib import Path

import pytest

import calib_lightning

PACKAGE = Path(calib_lightning.__file__).parent
ALLOWED = {
    "types": set(),
    "utils": set(),
    "functional": {"types"},
    "metrics": {"types", "functional"},
    "plots": {"metrics", "utils"},
    "posthoc": {"types", "functional", "metrics", "utils"},
    "predictions": {"types", "functional", "metrics", "plots", "posthoc", "utils", "core", "data"},
    "comparison": {"benchmark", "types", "functional", "metrics", "posthoc", "predictions", "utils"},
    "data": {"types", "utils"},
    "core": {"types", "functional", "metrics", "utils"},
    "methods": {"types", "functional", "core", "data", "utils"},
    "callbacks": {"types", "functional", "metrics", "plots", "posthoc", "data", "core", "utils"},
    "deploy": {"types", "functional", "metrics", "posthoc", "core", "methods", "utils"},
    "benchmark": {"predictions", "utils"},
    "commands": {
        *("core", "data", "methods", "callbacks", "metrics", "plots", "posthoc", "predictions", "deploy", "utils"),
        "comparison",
        "benchmark",
    },
    "__main__": {"commands", "utils"},
    "__init__": {
        "comparison",
        "core",
        "deploy",
        "metrics",
        "posthoc",
        "predictions",
    },  # for type checkers; at run time on first use
}
WITHOUT_TRAINER = {"utils", "plots", "functional", "metrics", "posthoc", "predictions", "benchmark"}
ASKS_NETWORK = {"run_network.py", "run_folder.py"}


def _parts():
    return sorted({path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")})


def _imports(part):
    """(module name, file) of everything that the part imports, ours as ``calib_lightning.<part>``."""
    root = PACKAGE / part
    for path in sorted(root.rglob("*.py")) if root.is_dir() else [PACKAGE / f"{part}.py"]:
        package = ("calib_lightning", *path.relative_to(PACKAGE).parts[:-1])
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((alias.name, path) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = list(package[: len(package) - node.level + 1]) if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                names = [f"{module}.{alias.name}" for alias in node.names] if module == "calib_lightning" else [module]
                yield from ((name, path) for name in names)


@pytest.mark.parametrize("part", _parts())
def test_imports_point_one_way(part):
    assert part in ALLOWED, f"{part} has no place in the order of imports"
    for name, path in _imports(part):
        if name.startswith("calib_lightning."):
            other = name.split(".")[1]
            assert other == part or other in ALLOWED[part], f"{path.name} of {part} imports {name}"
        if part in WITHOUT_TRAINER and path.name not in ASKS_NETWORK:
            assert not name.startswith("lightning"), f"{path.name} of {part} imports {name}"


def _modules_imported_from_methods(source, stem=""):
    """Names that a method file takes from other methods; functions, criteria and its own parts are left out."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (
            node.level or (node.module or "").startswith("calib_lightning.methods")
        ):
            if (node.module or "").startswith(f"calib_lightning.methods.parts.{stem}_"):
                continue
            names = [alias.name for alias in node.names]
            yield from (name for name in names if name[0].isupper() and not name.endswith("Loss"))


def test_methods_import_no_other_method_module():
    assert list(_modules_imported_from_methods("from calib_lightning.methods.focal import Focal, FocalLoss")) == [
        "Focal"
    ]
    part = "from calib_lightning.methods.parts.focal_head import FocalHead"
    assert list(_modules_imported_from_methods(part, "focal")) == []
    assert list(_modules_imported_from_methods(part, "brier")) == ["FocalHead"]
    for path in (PACKAGE / "methods").rglob("*.py"):
        stem = path.stem.partition("_")[0] if path.parent.name == "parts" else path.stem
        if path.stem != "__init__":
            assert not list(_modules_imported_from_methods(path.read_text(), stem)), path.name
