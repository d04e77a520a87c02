"""Heads remember how they were built, and a hostile spec finds nothing to run."""

import copy
import itertools
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

import calib_lightning
from calib_lightning.core.heads import Head, LinearHead, build_head
from calib_lightning.utils.registry import class_path_of, find_class


class TwoLayerHead(Head):
    def __init__(self, in_features: int, num_classes: int, widths: list[int], dropout: float = 0.5) -> None:
        super().__init__()
        sizes = [in_features, *widths, num_classes]
        self.layers = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))
        self.dropout = nn.Dropout(dropout)

    def forward(self, features):
        return self.layers(self.dropout(features))


class NarrowHead(TwoLayerHead):
    """Its arguments are not those of its base, whose constructor it calls with others."""

    def __init__(self, in_features: int, num_classes: int, *, mode: str | None = None, **more) -> None:
        super().__init__(in_features, num_classes, widths=[2], **more)
        self.mode = mode


class SilentHead(LinearHead):
    """No constructor of its own."""


class BareHead(Head):
    """No constructor and no arguments at all."""

    def forward(self, features):
        return features


class Outer:
    class InnerHead(LinearHead):
        pass

    head = LinearHead(1, 1)


class AnyArgumentHead(Head):
    def __init__(self, value=None, *rest) -> None:
        super().__init__()


class KeywordHead(Head):
    def __init__(self, value=None) -> None:
        super().__init__()


CASES = [
    (lambda: LinearHead(4, 3), LinearHead, {"in_features": 4, "num_classes": 3, "bias": True}),
    (lambda: LinearHead(4, num_classes=3, bias=False), LinearHead, {"in_features": 4, "num_classes": 3, "bias": False}),
    (
        lambda: TwoLayerHead(4, 3, [5, 6]),
        TwoLayerHead,
        {"in_features": 4, "num_classes": 3, "widths": [5, 6], "dropout": 0.5},
    ),
    (
        lambda: NarrowHead(4, 3, mode="x", dropout=0.1),
        NarrowHead,
        {"in_features": 4, "num_classes": 3, "mode": "x", "dropout": 0.1},
    ),
    (lambda: SilentHead(4, 3), SilentHead, {"in_features": 4, "num_classes": 3, "bias": True}),
    (lambda: BareHead(), BareHead, {}),
    (lambda: Outer.InnerHead(4, 3), Outer.InnerHead, {"in_features": 4, "num_classes": 3, "bias": True}),
]


@pytest.mark.parametrize(("make", "cls", "init_args"), CASES)
def test_spec_records_class_and_arguments_and_builds_the_same_head(make, cls, init_args):
    head = make()
    assert head.spec == {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": init_args}
    for again in (build_head(head.spec), copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert type(again) is cls
        assert again.spec == head.spec
        again.load_state_dict(head.state_dict())
        features = torch.randn(2, 4)
        torch.testing.assert_close(again.eval()(features), head.eval()(features), rtol=0, atol=0)


def test_spec_is_not_state_and_loads_without_unpickling(tmp_path):
    head = TwoLayerHead(4, 3, [5])
    assert set(head.state_dict()) == {f"layers.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")}
    torch.save(head.spec, tmp_path / "spec.pt")
    assert torch.load(tmp_path / "spec.pt", weights_only=True) == head.spec


def test_spec_does_not_change_with_what_was_given_or_returned():
    widths = [5]
    head = TwoLayerHead(4, 3, widths)
    widths.append(7)
    head.spec["init_args"]["widths"].append(8)
    assert head.spec["init_args"]["widths"] == [5]


def test_linear_head_is_an_affine_map():
    head = LinearHead(4, 3)
    features = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    weight, bias = (p.detach().double().numpy() for p in (head.linear.weight, head.linear.bias))
    logits = head(torch.from_numpy(features)).detach().numpy()
    np.testing.assert_allclose(logits, features.astype("float64") @ weight.T + bias, rtol=1e-5, atol=1e-6)
    assert LinearHead(4, 3, bias=False).linear.bias is None


@pytest.mark.parametrize("value", [{1: 2}, print, nn.Linear(1, 1), [1, {"a": {2}}], b"x"])
def test_an_argument_that_is_not_plain_is_named(value):
    with pytest.raises(TypeError, match=r"KeywordHead: argument value.* plain data"):
        KeywordHead(value)


@pytest.mark.parametrize("value", [1, 2.5, "x", True, None, [1, [None]], {"a": {"b": [1.0]}}])
def test_plain_arguments_keep_value_and_type(value):
    kept = KeywordHead(value).spec["init_args"]["value"]
    assert kept == value
    assert type(kept) is type(value)


@pytest.mark.parametrize(
    ("value", "kept"),
    [((1, 2), [1, 2]), (np.float64(1.5), 1.5), (np.int32(3), 3), (torch.tensor([1.0, 2.0]), [1.0, 2.0])],
)
def test_arguments_become_plain_data(value, kept):
    found = KeywordHead(value).spec["init_args"]["value"]
    assert found == kept
    assert type(found) is type(kept)


def test_a_head_within_a_head_is_built_again():
    outer = KeywordHead(LinearHead(4, 3, bias=False))
    again = build_head(outer.spec)
    assert again.spec == outer.spec
    assert again.spec["init_args"]["value"]["init_args"] == {"in_features": 4, "num_classes": 3, "bias": False}


def test_arguments_without_names_are_kept_and_missing_ones_are_refused():
    assert build_head(AnyArgumentHead(1, 2, 3).spec).spec["init_args"] == {"value": 1, "rest": [2, 3]}
    with pytest.raises(TypeError, match="LinearHead: missing a required argument: 'num_classes'"):
        LinearHead(4)


@pytest.mark.parametrize(
    "spec",
    [
        "LinearHead",
        {},
        {"class_path": "LinearHead"},
        {"class_path": "LinearHead", "init_args": [1, 2]},
        {"class_path": "LinearHead", "init_args": {}, "more": 1},
    ],
)
def test_a_malformed_spec_is_refused(spec):
    with pytest.raises(ValueError, match="class_path"):
        build_head(spec)


# --- finding classes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "class_path",
    [
        "os.system",
        "builtins.eval",
        "builtins.object",
        "subprocess.Popen",
        "torch.nn.Linear",
        "torch.hub.load",
        "calib_lightning.core.heads.os.system",
        "calib_lightning.core.heads.__builtins__.eval",
        "calib_lightning.core.heads.__builtins__.__class__",
        "calib_lightning.core.heads.copy.deepcopy",
        "calib_lightning.core.heads.nn.Linear",
        "calib_lightning.core.heads.build_head",
        "calib_lightning.core.heads.LinearHead.forward",
        "calib_lightning.core.heads.LinearHead.__class__",
        "calib_lightning.core.heads.LinearHead.__init__.__globals__",
        "calib_lightning.core.heads",
        f"{__name__}.Outer",
        f"{__name__}.Outer.head",
        f"{__name__}.CASES",
        "..",
        "calib_lightning..heads.LinearHead",
        ".LinearHead",
        "LinearHead.",
    ],
)
def test_hostile_paths_are_refused_and_nothing_runs(class_path, monkeypatch):
    def called(*args, **kwargs):
        raise AssertionError("executed")

    monkeypatch.setattr("os.system", called)
    monkeypatch.setattr(subprocess.Popen, "__init__", called)
    monkeypatch.setattr(nn.Linear, "__init__", called)
    with pytest.raises(ValueError, match=r"[Ii]mport the module that defines it first") as error:
        build_head({"class_path": class_path, "init_args": {"args": "touch pwned"}})
    assert repr(class_path) in str(error.value)


def test_foreign_modules_are_not_imported(tmp_path, monkeypatch):
    (tmp_path / "evil_head.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"[Ii]mport the module that defines it first"):
        find_class("evil_head.Head", Head)
    assert "evil_head" not in sys.modules


def test_hooks_of_a_loaded_module_or_class_do_not_run(monkeypatch):
    class Meta(type):
        def __getattr__(cls, name):
            raise AssertionError("metaclass hook ran")

    module = types.ModuleType("loaded_with_hooks")
    module.__getattr__ = lambda name: pytest.fail("module hook ran")
    module.Holder = Meta("Holder", (), {"lazy": property(lambda self: pytest.fail("property ran"))})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for path in ("Missing", "Holder.missing", "Holder.lazy.fget"):
        with pytest.raises(ValueError, match="which does not exist in"):
            find_class(f"loaded_with_hooks.{path}", Head)


@pytest.fixture
def late_modules(tmp_path, monkeypatch):
    """Modules of the package that nothing has imported yet."""
    lines = "from calib_lightning.core.heads import Head\nclass LateHead(Head):\n    pass\n"
    for name in ("late_head", "_late_head"):
        (tmp_path / f"{name}.py").write_text(lines)
    (tmp_path / "late_broken.py").write_text(f"import not_installed_anywhere\n{lines}")
    monkeypatch.setattr(calib_lightning, "__path__", [*calib_lightning.__path__, str(tmp_path)])
    yield
    for name in ("late_head", "_late_head", "late_broken"):
        sys.modules.pop(f"calib_lightning.{name}", None)
        vars(calib_lightning).pop(name, None)


def test_public_modules_of_the_package_are_imported_on_demand(late_modules):
    late = build_head({"class_path": "calib_lightning.late_head.LateHead", "init_args": {}})
    assert class_path_of(type(late)) == "calib_lightning.late_head.LateHead"
    with pytest.raises(ValueError, match=r"[Ii]mport the module that defines it first"):
        find_class("calib_lightning._late_head.LateHead", Head)
    assert "calib_lightning._late_head" not in sys.modules


def test_a_missing_dependency_of_the_package_is_not_hidden(late_modules):
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        find_class("calib_lightning.late_broken.LateHead", Head)


@pytest.mark.parametrize("cls", [Head, LinearHead, TwoLayerHead, Outer.InnerHead])
def test_find_class_inverts_class_path_of(cls):
    assert find_class(class_path_of(cls), Head) is cls


def test_a_reexported_class_and_a_name_alone_are_found():
    assert find_class("calib_lightning.core.LinearHead", Head) is LinearHead
    assert find_class("TwoLayerHead", Head) is TwoLayerHead
    with pytest.raises(ValueError, match="no known TwoLayerHead called 'LinearHead'"):
        find_class("LinearHead", TwoLayerHead)


def test_names_that_the_package_imports_on_first_use_are_found():
    assert find_class("calib_lightning.ClassificationModule", nn.Module) is calib_lightning.ClassificationModule
    with pytest.raises(ValueError, match="does not exist in calib_lightning"):
        find_class("calib_lightning.score", object)  # a function


def test_near_names_are_suggested():
    with pytest.raises(ValueError, match=r"Did you mean .*calib_lightning\.core\.heads\.LinearHead"):
        find_class("LinaerHead", Head)
    with pytest.raises(ValueError, match=r"'calib_lightning\.core\.heads\.Linear'.*Did you mean .*heads\.LinearHead"):
        find_class("calib_lightning.core.heads.Linear", Head)
    with pytest.raises(ValueError) as error:
        find_class("zzzzzz", Head)
    assert "Did you mean" not in str(error.value)


def test_an_ambiguous_name_is_refused():
    twins = [type("TwinHead", (Head,), {"__module__": module}) for module in ("first", "second")]
    with pytest.raises(ValueError, match=r"may be any of first\.TwinHead, second\.TwinHead"):
        find_class("TwinHead", Head)
    del twins


def test_a_name_means_the_latest_definition(monkeypatch):
    versions = [type("TwiceHead", (Head,), {"__module__": __name__}) for _ in range(9)]
    for version in versions:
        monkeypatch.setattr(sys.modules[__name__], "TwiceHead", version, raising=False)
        assert find_class("TwiceHead", Head) is version


def test_a_class_inside_a_function_is_not_found():
    class LocalHead(Head):
        pass

    with pytest.raises(ValueError, match="<locals>"):
        build_head(LocalHead().spec)


def test_a_class_path_must_be_a_string():
    with pytest.raises(TypeError, match="must be a string"):
        find_class(LinearHead, Head)
