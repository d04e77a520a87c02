"""``calib score``: the same figures as the metrics on the arrays, from every kind of file, and faults named."""

import json
import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from calib_lightning.__main__ import main
from calib_lightning.metrics import FULL, METRICS, SOFT, EvaluationState, functional
from calib_lightning.metrics.functional.checks import seem_probs
from calib_lightning.predictions.files import read_counts
from calib_lightning.predictions.reading import unique_names
from calib_lightning.predictions.tables import heading
from calib_lightning.predictions.values import selected_metrics

from ..metrics.golden import GOLDEN, golden_set, pair_auroc, random_set, reference

LOGITS, LABELS = golden_set()


def expected(logits=LOGITS, labels=LABELS, metrics=FULL, **options):
    state = EvaluationState(metrics, **options)
    state.update(logits, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of figures that are not defined
        return {key: value.item() for key, value in state.compute().items()}


def save_npz(path, logits=LOGITS, labels=LABELS, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, logits=np.asarray(logits), labels=np.asarray(labels), **more)
    return path


@pytest.fixture
def scored(calib):
    """The JSON report of a command that succeeds."""

    def run(*argv):
        done = calib("score", *argv, "--format", "json")
        assert done.code == 0, done.err
        return json.loads(done.out)

    return run


def only(report):
    (entry,) = report["sets"].values()
    return entry


def _npz(folder):
    return [save_npz(folder / "run.npz")]


def _npz_column(folder):
    return [save_npz(folder / "run.npz", labels=LABELS.reshape(-1, 1).to(torch.uint8))]


def _npz_names(folder):
    np.savez(folder / "run.npz", z=LOGITS.numpy(), y=LABELS.numpy(), odd=np.array([{}], dtype=object))
    return [folder / "run.npz", "--scores_key", "z", "--labels_key", "y"]


def _npz_big_endian(folder):
    np.savez(folder / "run.npz", logits=LOGITS.numpy().astype(">f8"), labels=LABELS.numpy().astype(">i4"))
    return [folder / "run.npz"]


def _npy(folder):
    np.save(folder / "run.npy", LOGITS.numpy())
    np.save(folder / "labels.npy", LABELS.numpy())
    return [folder / "run.npy", "--labels", folder / "labels.npy"]


def _npy_with_labels_in_csv(folder):
    np.save(folder / "run.npy", LOGITS.numpy())
    np.savetxt(folder / "labels.csv", LABELS.numpy(), fmt="%d", header="truth", comments="")
    return [folder / "run.npy", "--labels", folder / "labels.csv"]


def _pt_dict(folder):
    torch.save({"logits": LOGITS.requires_grad_(), "labels": LABELS, "epoch": 3}, folder / "run.pt")
    LOGITS.requires_grad_(False)
    return [folder / "run.pt"]


def _pt_tensor(folder):
    torch.save(LOGITS, folder / "run.pth")
    torch.save({"labels": LABELS}, folder / "labels.pt")
    return [folder / "run.pth", "--labels", folder / "labels.pt"]


def _rows(fmt="%.17g", label="%d"):
    table = np.column_stack([LOGITS.numpy(), LABELS.numpy()])
    return "".join(",".join([*(fmt % x for x in row[:-1]), label % row[-1]]) + "\n" for row in table)


def _csv(folder):
    (folder / "run.csv").write_text(_rows())
    return [folder / "run.csv"]


def _csv_floats_and_named_labels(folder):
    (folder / "run.csv").write_text(
        "\ufefflogit 1,logit 2,logit 3,logit 4,logit 5,truth\n" + _rows(label="%.1f"), encoding="utf-8"
    )
    return [folder / "run.csv", "--labels_key", "truth"]


def _csv_named(folder):
    lines = [f"{i},{row.rpartition(',')[2]},{row.rpartition(',')[0]}" for i, row in enumerate(_rows().splitlines())]
    (folder / "run.csv").write_text("index,label,0,1,2,3,4\r\n" + "\r\n".join(lines))
    return [folder / "run.csv"]


def _csv_labels_key(folder):
    (folder / "run.csv").write_text("z0,z1,z2,z3,z4,truth\n" + _rows())
    return [folder / "run.csv", "--labels_key", "truth"]


def _csv_of_pandas(folder):
    rows = [f"img{i},{row}" for i, row in enumerate(_rows().splitlines())]
    (folder / "run.csv").write_text("\n".join([",0,1,2,3,4,label", *rows]))
    return [folder / "run.csv"]


def _csvs_of_pandas_without_names(folder):
    rows = [(i, *row.rpartition(",")[::2]) for i, row in enumerate(_rows().splitlines())]
    (folder / "run.csv").write_text("\n".join([",0,1,2,3,4", *(f"{i},{scores}" for i, scores, _ in rows)]))
    (folder / "labels.csv").write_text("\n".join([",0", *(f"{i},{label}" for i, _, label in rows)]))
    return [folder / "run.csv", "--labels", folder / "labels.csv"]


def _pt_unsigned(folder):
    torch.save({"logits": LOGITS, "labels": LABELS.to(torch.uint16)}, folder / "run.pt")
    return [folder / "run.pt"]


def _npz_unsigned(folder):
    return [save_npz(folder / "run.npz", labels=LABELS.numpy().astype(np.uint64))]


FILES = [
    _npz,
    _npz_column,
    _npz_names,
    _npz_big_endian,
    _npy,
    _npy_with_labels_in_csv,
    _pt_dict,
    _pt_tensor,
    _csv,
    _csv_floats_and_named_labels,
    _csv_named,
    _csv_labels_key,
    _csv_of_pandas,
    _csvs_of_pandas_without_names,
    _pt_unsigned,
    _npz_unsigned,
]


@pytest.mark.parametrize("make", FILES)
def test_every_kind_of_file_gives_the_figures_of_the_arrays(scored, tmp_path, make):
    entry = only(scored(*make(tmp_path)))
    assert (entry["n"], entry["classes"], entry["confidence"]) == (500, 5, "largest probability")
    assert entry["values"] == pytest.approx(expected(), abs=1e-12)
    assert {key: entry["values"][key] for key in GOLDEN} == pytest.approx(GOLDEN, abs=1e-10)


def test_narrow_floats_and_own_confidence(scored, tmp_path):
    confidence = torch.linspace(0.01, 0.99, 500)
    torch.save({"logits": LOGITS.bfloat16(), "labels": LABELS, "confidence": confidence}, tmp_path / "run.pt")
    report = scored(tmp_path / "run.pt", "--metrics", "core")
    state = EvaluationState()
    state.update(LOGITS.bfloat16(), LABELS, confidence)
    entry = only(report)
    assert entry["values"] == pytest.approx({key: value.item() for key, value in state.compute().items()}, abs=1e-12)
    assert entry["confidence"] == "from the file"
    assert any("confidence" in note for note in report["notes"])
    (tmp_path / "run.csv").write_text("z0,z1,confidence,label\n1,2,0.9,1\n2,1,0.8,1\n3,1,0.7,0\n")
    entry = only(scored(tmp_path / "run.csv"))
    assert entry["values"]["signed_gap"] == pytest.approx(0.8 - 2 / 3, abs=1e-12)
    assert entry["classes"] == 2


def test_a_set_larger_than_a_batch_is_scored_whole(scored, tmp_path):
    logits, labels = random_set(20000, 3)
    entry = only(scored(save_npz(tmp_path / "large.npz", logits, labels), "--metrics", "core"))
    assert entry["n"] == 20000
    assert entry["values"] == pytest.approx(reference(logits, labels), abs=1e-9)


def test_input_is_stated_and_never_guessed(scored, calib, tmp_path):
    probs = LOGITS.softmax(dim=1)
    path = tmp_path / "run.npz"
    np.savez(path, probs=probs.numpy(), logits=probs.numpy(), labels=LABELS.numpy())
    as_probs = scored(path, "--input", "probs")
    assert only(as_probs)["values"]["ece"] == pytest.approx(GOLDEN["ece"], abs=1e-10)
    assert as_probs["notes"] == []
    refused = calib("score", path, "--format", "json")
    assert (refused.code, refused.out) == (1, "")
    assert (
        "they look like probabilities, but they are taken for logits. Set --input probs, or --input log" in refused.err
    )
    as_logits = scored(path, "--input", "logits")
    assert only(as_logits)["values"]["nll"] == pytest.approx(expected(probs)["nll"], abs=1e-12)
    assert [word in as_logits["notes"][0] for word in ("run", "input=probs")] == [True, True]
    assert seem_probs(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    assert not seem_probs(torch.tensor([[0.5, 0.5], [1.5, -0.5]]))
    assert not seem_probs(torch.tensor([[0.5, 0.5], [0.7, 0.5]]))
    assert not seem_probs(torch.zeros(0, 2))


def test_json_has_settings_and_text_has_the_same_figures(scored, calib, tmp_path):
    path = save_npz(tmp_path / "run.npz")
    report = scored(path, "--bins", "10", "--seed", "4")
    assert report["settings"]["input"] == "logits"
    assert report["settings"]["n_bins"] == [10]
    assert report["settings"]["bins"] == "(lo, hi]"
    assert report["settings"]["seed"] == 4
    assert "." in report["calib_lightning"]
    assert only(report)["file"] == str(path)
    done = calib("score", path, "--bins", "10")
    assert done.code == 0
    assert done.err == ""
    lines = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in done.out.splitlines() if "│" in line}
    assert lines["N"] == "500"
    assert lines["K"] == "5"
    values = expected(n_bins=10)
    for key in FULL:
        shown = f"{100 * values[key]:.2f}" if (METRICS | SOFT)[key].percent else f"{values[key]:.4f}"
        assert lines[heading(key)] == shown
    assert lines["accuracy % ↑"] == "76.40"
    assert lines["NLL ↓"] == "0.6704"
    assert lines["signed gap % →0"] == "-3.90"
    assert lines["entropy"] == f"{values['entropy']:.4f}"


def test_every_metric_has_a_title_of_its_own():
    shown = METRICS | SOFT
    assert len({heading(key) for key in shown}) == len(METRICS) + len(SOFT)
    for key, row in shown.items():
        assert heading(key).endswith({"higher": "↑", "lower": "↓", "zero": "→0"}.get(row.better, ""))
        assert row.section


def test_what_depends_on_the_bins_is_known():
    ten, thirty = expected(n_bins=10), expected(n_bins=30)
    assert {key for key in FULL if abs(ten[key] - thirty[key]) > 1e-12} == {
        key for key, row in METRICS.items() if row.binned
    }


def test_several_numbers_of_bins(scored, calib, tmp_path):
    path = save_npz(tmp_path / "run.npz")
    values = only(scored(path, "--bins", "10,15,20", "--metrics", "ece,nll,aece_split"))["values"]
    assert list(values) == ["nll", "ece@10", "ece@15", "ece@20", "aece_split@10", "aece_split@15", "aece_split@20"]
    for bins in (10, 15, 20):
        assert values[f"ece@{bins}"] == pytest.approx(functional.ece(LOGITS, LABELS, n_bins=bins).item(), abs=1e-12)
        assert values[f"aece_split@{bins}"] == pytest.approx(
            functional.aece_split(LOGITS, LABELS, n_bins=bins).item(), abs=1e-12
        )
    assert values["nll"] == pytest.approx(GOLDEN["nll"], abs=1e-10)
    assert "ECE % ↓ (20 bins)" in calib("score", path, "--bins", "10,20", "--metrics", "core").out
    only_binned = only(scored(path, "--bins", "10,20", "--metrics", "ece", "--intervals", "20"))
    assert list(only_binned["values"]) == list(only_binned["intervals"]) == ["ece@10", "ece@20"]


def test_which_metrics(scored, tmp_path):
    path = save_npz(tmp_path / "run.npz")
    assert set(only(scored(path))["values"]) == set(FULL)
    assert set(only(scored(path, "--metrics", "core"))["values"]) == set(GOLDEN)
    assert list(only(scored(path, "--metrics", "aurc,nll"))["values"]) == ["nll", "aurc"]
    assert set(FULL) - set(selected_metrics(None, 201)) == {"ovo_auroc"}
    assert set(selected_metrics(None, 200)) == set(selected_metrics("all", 201)) == set(FULL)
    logits, labels = random_set(30, 201)
    report = scored(save_npz(tmp_path / "many.npz", logits, labels))
    assert "ovo_auroc" not in only(report)["values"]
    assert any("ovo_auroc" in note and "metrics=all" in note for note in report["notes"])


@pytest.mark.parametrize("skipped", ["id", "index", ""])
def test_columns_that_are_not_scores_are_skipped(scored, tmp_path, skipped):
    rows = [",".join(map(str, [100 + i, label, *z])) for i, (z, label) in enumerate(zip(Z, Y, strict=True))]
    (tmp_path / "run.csv").write_text("\n".join([f"{skipped},label,a0,a1,a2,a3,a4", *rows]))
    found = only(scored(tmp_path / "run.csv"))
    assert found["classes"] == 5
    assert found["values"]["accuracy"] == pytest.approx(float((Z.argmax(1) == Y).mean()))


def test_one_column_p_is_the_probability_of_class_one(scored, tmp_path):
    p, labels = [0.9, 0.2, 0.6, 0.3], [1, 0, 0, 1]
    lines = [f"{value},{label}" for value, label in zip(p, labels, strict=True)]
    (tmp_path / "run.csv").write_text("\n".join(["p,label", *lines]))
    found = only(scored(tmp_path / "run.csv", "--input", "probs", "--metrics", "accuracy,brier"))["values"]
    assert found["accuracy"] == 0.5
    wrong = [1 - value if label else value for value, label in zip(p, labels, strict=True)]
    assert found["brier"] == pytest.approx(2 * np.mean(np.square(wrong)))


def test_markdown_is_a_table(calib, tmp_path):
    save_npz(tmp_path / "a|b.npz")
    save_npz(tmp_path / "other.npz", -LOGITS)
    done = calib("score", "a|b.npz", "other.npz", "--metrics", "core", "--format", "markdown")
    head, line, first, second = [row for row in done.out.splitlines() if row.startswith("|")]
    titles = "set,N,K,accuracy % ↑,NLL ↓,Brier ↓,ECE % ↓,signed gap % →0,correctness AUROC % ↑"
    assert head == f"| {titles.replace(',', ' | ')} |"
    assert line.replace(" ", "") == "|---" + "|---:" * 8 + "|"
    assert first == r"| a\|b | 500 | 5 | 76.40 | 0.6704 | 0.3529 | 5.43 | -3.90 | 75.52 |"
    assert second.startswith("| other | 500 | 5 |")
    full = calib("score", "a|b.npz", "other.npz", "--format", "markdown").out
    counts = {row.replace(r"\|", "").count("|") for row in full.splitlines() if row.startswith("|")}
    assert counts == {4}
    assert r"| metric | a\|b | other |" in full


def test_output_file_and_its_format(calib, tmp_path):
    path = save_npz(tmp_path / "run.npz")
    done = calib("score", path, "--output", tmp_path / "new" / "report.json")
    assert (done.code, done.out) == (0, "")
    written = (tmp_path / "new" / "report.json").read_text()
    assert written == calib("score", path, "--format", "json").out
    calib("score", path, "--metrics", "core", "--output", tmp_path / "report.md")
    assert (tmp_path / "report.md").read_text() == calib("score", path, "--metrics", "core", "--format", "markdown").out
    calib("score", path, "--format", "text", "--output", tmp_path / "report.log")
    assert (tmp_path / "report.log").read_text() == calib("score", path).out
    assert calib("score", path, "--output", tmp_path / "report.log2").code == 2


def test_a_fault_leaves_an_earlier_report(calib, tmp_path):
    out = tmp_path / "report.json"
    out.write_text("earlier")
    assert calib("score", "missing.npz", "--output", out).code == 1
    assert out.read_text() == "earlier"


def test_files_get_different_names(scored, tmp_path):
    for name in ("x/val/test.npz", "y/val/test.npz", "y/tst/test.npz", "other.npz"):
        save_npz(tmp_path / name)
    report = scored("x/val/test.npz", "y/val/test.npz", "y/tst/test.npz", "other.npz", "--metrics", "nll")
    assert list(report["sets"]) == ["x/val/test", "y/val/test", "tst/test", "other"]
    assert unique_names([tmp_path / "a.npz", tmp_path / "a.npy"]) == ["a.npz", "a.npy"]
    three = [tmp_path / "x" / "a.npz", tmp_path / "x" / "a.npy", tmp_path / "y" / "a.npz", tmp_path / "b.npz"]
    assert unique_names(three) == ["x/a.npz", "a.npy", "y/a.npz", "b"]
    assert unique_names([tmp_path / "x" / "a.npz", tmp_path / "y" / "a.npy"]) == ["x/a", "y/a"]
    with pytest.raises(ValueError, match="2 times"):
        unique_names([tmp_path / "a.npz", tmp_path / "x" / ".." / "a.npz"])


def test_labels_once_for_all_or_once_for_each(scored, calib, tmp_path):
    np.save(tmp_path / "a.npy", LOGITS.numpy())
    np.save(tmp_path / "b.npy", -LOGITS.numpy())
    np.save(tmp_path / "one.npy", LABELS.numpy())
    np.save(tmp_path / "two.npy", (LABELS.numpy() + 1) % 5)
    same = scored("a.npy", "b.npy", "--labels", "one.npy", "--metrics", "nll")["sets"]
    assert same["b"]["values"]["nll"] == pytest.approx(expected(-LOGITS)["nll"], abs=1e-12)
    each = scored("a.npy", "b.npy", "--labels", "one.npy", "--labels", "two.npy", "--metrics", "nll")["sets"]
    assert each["a"]["values"]["nll"] == pytest.approx(GOLDEN["nll"], abs=1e-10)
    assert each["b"]["values"]["nll"] == pytest.approx(expected(-LOGITS, (LABELS + 1) % 5)["nll"], abs=1e-12)
    done = calib("score", "a.npy", "b.npy", "a.npy", "--labels", "one.npy", "--labels", "two.npy")
    assert done.code == 2
    assert "--labels" in done.err


def test_intervals_are_seeded_and_cover(scored, calib, tmp_path):
    path = save_npz(tmp_path / "run.npz")
    options = (path, "--metrics", "accuracy,ece,nll", "--intervals", "200")
    once = only(scored(*options))
    assert once["intervals"] == only(scored(*options))["intervals"]
    assert once["intervals"] != only(scored(*options, "--seed", "1"))["intervals"]
    low, high = once["intervals"]["accuracy"]
    normal = 1.96 * math.sqrt(0.764 * 0.236 / 500)
    assert (0.764 - low, high - 0.764) == pytest.approx((normal, normal), rel=0.25)
    narrow = only(scored(*options, "--level", "0.5"))["intervals"]["accuracy"]
    assert low < narrow[0] < narrow[1] < high
    settings = scored("--intervals", path, "--metrics", "accuracy")["settings"]["intervals"]
    assert settings == {"method": "bootstrap", "resamples": 1000, "level": 0.95}
    assert f"76.40 [{100 * low:.2f}, {100 * high:.2f}]" in calib("score", *options).out


def test_figures_of_classes(scored, calib, tmp_path):
    path = save_npz(tmp_path / "run.npz")
    entry = only(scored(path, "--groups", "class"))
    assert list(entry["groups"]) == ["0", "1", "2", "3", "4"]
    for name, group in entry["groups"].items():
        rows = int(name) == LABELS
        assert group["n"] == int(rows.sum())
        values = expected(LOGITS[rows], LABELS[rows], tuple(group["values"]))
        assert {key: math.nan if value is None else value for key, value in group["values"].items()} == pytest.approx(
            values, abs=1e-9, nan_ok=True
        )
    accuracy = {int(name): group["values"]["accuracy"] for name, group in entry["groups"].items()}
    worst = min(accuracy, key=accuracy.get)
    assert entry["worst_class"]["accuracy"] == {"class": worst, "value": accuracy[worst]}
    assert "ovo_auroc" in entry["values"]
    assert "ovo_auroc" not in entry["groups"]["0"]["values"]
    text = calib("score", path, "--groups", "class", "--metrics", "core").out
    assert f"{100 * accuracy[worst]:.2f} ({worst})" in text


@pytest.mark.parametrize("kind", ["csv", "column.csv", "npy", "json"])
def test_figures_of_frequent_and_rare_classes(scored, tmp_path, kind):
    counts = [500, 100, 50, 20, 3]
    path = tmp_path / f"counts.{kind}"
    if kind == "npy":
        np.save(path, counts)
    else:
        separator = "\n" if kind == "column.csv" else ","
        path.write_text(json.dumps(counts) if kind == "json" else separator.join(map(str, counts)))
    entry = only(scored(save_npz(tmp_path / "run.npz"), "--groups", "frequency", "--train_counts", path))
    for name, classes in {"many": [0], "medium": [1, 2, 3], "few": [4]}.items():
        rows = torch.isin(LABELS, torch.tensor(classes))
        group = entry["groups"][name]
        assert group["n"] == int(rows.sum())
        for key in ("accuracy", "nll", "ece", "correctness_auroc"):
            assert group["values"][key] == pytest.approx(expected(LOGITS[rows], LABELS[rows])[key], abs=1e-9)
    assert set(entry["worst_class"]["accuracy"]) == {"class", "value"}


def test_compared_with_another_run(scored, calib, tmp_path):
    generator = torch.Generator().manual_seed(0)
    path = save_npz(tmp_path / "run.npz")
    worse = LOGITS + 6 * torch.randn(LOGITS.shape, generator=generator, dtype=torch.float64)
    other = save_npz(tmp_path / "other.npz", worse)
    found = only(scored(path, "--compare", other, "--metrics", "core"))["compare"]
    mine, theirs = expected(), expected(worse)
    for key in GOLDEN:
        assert found[key]["difference"] == pytest.approx(mine[key] - theirs[key], abs=1e-9)
    assert found["accuracy"]["p_value"] == pytest.approx(1 / 1001)
    same = only(scored(path, "--compare", path, "--metrics", "core", "--bins", "10,15"))["compare"]
    assert set(same) == {"accuracy", "nll", "brier", "ece@10", "ece@15", "signed_gap", "correctness_auroc"}
    assert all(entry == {"difference": 0.0, "p_value": 1.0} for entry in same.values())
    text = calib("score", path, "--compare", other, "--metrics", "core").out
    assert f"+{100 * (mine['accuracy'] - theirs['accuracy']):.2f} │ 0.0010" in text
    shifted = save_npz(tmp_path / "shifted.npz", LOGITS, LABELS.roll(1))
    fewer = save_npz(tmp_path / "fewer.npz", LOGITS[:400], LABELS[:400])
    for wrong in (shifted, fewer):
        done = calib("score", path, "--compare", wrong)
        assert done.code == 1
        assert all(word in done.err for word in (path.name, wrong.name, "same samples"))


def test_mean_and_deviation_over_runs(scored, calib, tmp_path):
    runs = [random_set(300, 4, seed=seed) for seed in range(3)]
    paths = [save_npz(tmp_path / f"seed{i}.npz", *run) for i, run in enumerate(runs)]
    found = scored(*paths, "--seeds")["seeds"]
    for key in ("accuracy", "nll", "aurc"):
        values = [expected(*run)[key] for run in runs]
        assert found[key]["mean"] == pytest.approx(np.mean(values), abs=1e-12)
        assert found[key]["std"] == pytest.approx(np.std(values, ddof=1), abs=1e-12)
        assert found[key]["runs"] == 3
    nll = found["nll"]
    assert f"{nll['mean']:.4f} ± {nll['std']:.4f}" in calib("score", *paths, "--seeds", "--metrics", "core").out
    assert calib("score", paths[0], "--seeds").code == 2


def test_figures_are_written(calib, tmp_path):
    for name in ("x/run.npz", "y/run.npz"):
        save_npz(tmp_path / name)
    done = calib("score", "x/run.npz", "y/run.npz", "--metrics", "core", "--figures", tmp_path / "figures")
    assert done.code == 0, done.err
    for name in ("x/run", "y/run"):
        files = sorted(path.name for path in (tmp_path / "figures" / name).iterdir())
        kinds = ("confidence_histogram", "reliability_diagram", "risk_coverage_curve")
        assert files == [f"{kind}.{suffix}" for kind in kinds for suffix in ("png", "svg")]
        for path in (tmp_path / "figures" / name).iterdir():
            assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")


def test_undefined_values_are_a_dash_and_noted_once(scored, calib, tmp_path):
    right = save_npz(tmp_path / "right.npz", 5 * torch.eye(3)[[0, 1, 2, 0]], torch.tensor([0, 1, 2, 0]))
    done = calib("score", right, "--intervals", "20", "--bins", "10,15", "--groups", "class")
    assert done.code == 0
    assert done.err == ""
    assert done.out.count("all 4 rows are correct") == 1
    assert "UserWarning" not in done.out
    auroc = next(line for line in done.out.splitlines() if "correctness AUROC" in line)
    assert auroc.split("│")[2].strip() == "-"
    entry = only(scored(right))
    assert entry["values"]["correctness_auroc"] is None
    assert entry["values"]["accuracy"] == 1.0


def test_a_warning_of_a_metric_is_a_note(calib, scored, tmp_path):
    rows = LABELS < 3
    path = save_npz(tmp_path / "run.npz", LOGITS[rows], LABELS[rows])
    with pytest.warns(UserWarning, match="2 of 5 classes") as caught:
        functional.ovo_auroc(LOGITS[rows], LABELS[rows])
    done = calib("score", path, "--intervals", "10")
    assert done.err == ""
    assert done.out.count(str(caught[0].message)) == 1
    assert scored(path)["notes"] == [f"run: {caught[0].message}"]


@pytest.mark.parametrize("kind", ["npz", "csv"])
def test_a_set_without_rows_is_refused(calib, tmp_path, kind):
    path = tmp_path / f"empty.{kind}"
    if kind == "npz":
        save_npz(path, torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    else:
        path.write_text("z0,z1,z2,label\n")
    for more in ((), ("--intervals", "10", "--groups", "class", "--figures", tmp_path / "figures")):
        done = calib("score", path, *more)
        assert (done.code, done.out) == (1, "")
        assert f"empty.{kind} has no rows; it must have at least one" in done.err
    assert not (tmp_path / "figures").exists()


def test_a_probability_of_zero_is_said(scored, tmp_path):
    np.savez(tmp_path / "run.npz", probs=np.array([[1.0, 0.0], [0.3, 0.7]]), labels=np.array([1, 1]))
    report = scored(tmp_path / "run.npz", "--input", "probs", "--metrics", "core")
    assert only(report)["values"]["nll"] == "inf"
    assert only(report)["values"]["brier"] == pytest.approx((2.0 + 0.3**2 + 0.3**2) / 2)
    assert any("nll infinite" in note for note in report["notes"])
    np.savez(tmp_path / "other.npz", probs=np.array([[0.5, 0.5], [0.3, 0.7]]), labels=np.array([1, 1]))
    options = ("other.npz", "--compare", "run.npz", "--input", "probs", "--metrics", "nll")
    assert only(scored(*options))["compare"]["nll"]["difference"] == "-inf"


def _array(path, **arrays):
    np.savez(path, **arrays)


Z, Y = LOGITS.numpy(), LABELS.numpy()


def _bad(place, value, like=Z):
    array = like.copy()
    array[place] = value
    return array


BAD = {
    "missing file": (None, "run.npz", ["no such file"]),
    "strange suffix": (lambda p: p.write_text("x"), "run.mat", ["'.mat'", ".npz", ".csv"]),
    "no zip": (lambda p: p.write_bytes(b"PK\3\4broken"), "run.npz", ["damaged"]),
    "empty npz": (lambda p: p.write_bytes(b""), "run.npz", ["damaged"]),
    "missing scores": (lambda p: _array(p, z=Z, labels=Y), "run.npz", ["'logits'", "'z'", "scores_key"]),
    "probs only": (lambda p: _array(p, probs=Z, labels=Y), "run.npz", ["'logits'", "--input probs"]),
    "missing labels": (lambda p: _array(p, logits=Z, y=Y), "run.npz", ["'labels'", "'y'", "labels_key"]),
    "objects": (lambda p: _array(p, logits=Z, labels=Y.astype(object)), "run.npz", ["'labels'", "plain NumPy array"]),
    "text": (lambda p: _array(p, logits=Z.astype(str), labels=Y), "run.npz", ["'logits'", "array of numbers"]),
    "row counts": (lambda p: _array(p, logits=Z, labels=Y[:-1]), "run.npz", ["500 rows", "499 labels"]),
    "label above": (lambda p: _array(p, logits=Z, labels=_bad(7, 5, Y)), "run.npz", ["row 7", "label 5", "0..4"]),
    "label below": (lambda p: _array(p, logits=Z, labels=_bad(7, -1, Y)), "run.npz", ["row 7", "label -1", "0..4"]),
    "nan": (lambda p: _array(p, logits=_bad((9, 2), np.nan), labels=Y), "run.npz", ["row 9", "nan", "class 2"]),
    "inf": (lambda p: _array(p, logits=_bad((9, 2), np.inf), labels=Y), "run.npz", ["row 9", "inf", "finite"]),
    "one-hot": (lambda p: _array(p, logits=Z, labels=np.eye(5)[Y]), "run.npz", ["(500, 5)", "one-hot", "argmax"]),
    "float labels": (lambda p: _array(p, logits=Z, labels=Y * 1.0), "run.npz", ["float64", "integer"]),
    "bool labels": (lambda p: _array(p, logits=Z, labels=Y > 2), "run.npz", ["bool", "integer"]),
    "one column": (lambda p: _array(p, logits=Z[:, :1], labels=Y), "run.npz", ["500 rows", "must be in 0..1"]),
    "flat": (lambda p: _array(p, logits=np.abs(np.sin(Z[:, 0])), labels=Y % 2), "run.npz", ["[0, 1]", "--input probs"]),
    "images": (lambda p: _array(p, logits=Z.reshape(100, 5, 5), labels=Y[:100]), "run.npz", ["(100, 5, 5)", "(N, K)"]),
    "integer scores": (lambda p: _array(p, logits=Z.astype(int), labels=Y), "run.npz", ["int64", "floating"]),
    "confidence": (
        lambda p: _array(p, logits=Z, labels=Y, confidence=np.full(500, 1.5)),
        "run.npz",
        ["500 rows", "confidence 1.5", "[0, 1]"],
    ),
    "npy without labels": (lambda p: np.save(p, Z), "run.npy", ["in a separate file (labels)"]),
    "npy of objects": (lambda p: np.save(p, np.array([{}, {}], dtype=object)), "run.npy", ["plain NumPy array"]),
    "npy that is npz": (lambda p: np.savez(p.open("wb"), Z), "run.npy", ["rename it to .npz"]),
    "npz that is npy": (lambda p: np.save(p.open("wb"), Z), "run.npz", [".npy", "savez"]),
    "pickle": (lambda p: torch.save({"logits": _Gadget()}, p), "run.pt", ["dict of tensors"]),
    "broken pt": (lambda p: p.write_bytes(b"nonsense"), "run.pt", ["dict of tensors"]),
    "list": (lambda p: torch.save([LOGITS, LABELS, LABELS], p), "run.pt", ["a list", "dict of the tensors"]),
    "tensor alone": (lambda p: torch.save(LOGITS, p), "run.pt", ["in a separate file (labels)"]),
    "empty csv": (lambda p: p.write_text(""), "run.csv", ["empty"]),
    "binary csv": (lambda p: p.write_bytes(b"\xff\xfe1,2"), "run.csv", ["UTF-8"]),
    "ragged": (lambda p: p.write_text("1,2,0\n1,2\n"), "run.csv", ["columns changed", "row 2"]),
    "short rows": (lambda p: p.write_text("z0,z1,label\n1,0\n"), "run.csv", ["header has 3", "2"]),
    "word": (lambda p: p.write_text("z0,z1,label\n1,x,0\n"), "run.csv", ["'x'", "column 2"]),
    "half label": (lambda p: p.write_text("1,2,0\n1,2,0.5\n"), "run.csv", ["row 1", "0.5", "whole"]),
    "hole in first row": (lambda p: p.write_text("1,,2,0\n1,2,3,1\n"), "run.csv", ["row 0", "column 2", "header"]),
    "p is probs": (lambda p: p.write_text("p,label\n0.5,1\n"), "run.csv", ["'p'", "class 1", "--input probs"]),
    "two extras": (
        lambda p: p.write_text("z0,z1,prediction,top 1,label\n1,2,1,1,0\n"),
        "run.csv",
        ["'prediction', 'top 1'", "drop"],
    ),
    "second without a name": (lambda p: p.write_text("z0,,z1,label\n1,0,2,0\n"), "run.csv", ["without a name"]),
    "hole taken for a name": (lambda p: p.write_text("0.1,NA,0.2,0\n1,2,3,1\n"), "run.csv", ["'0.1', 'NA', '0.2'"]),
    "order": (lambda p: p.write_text("z1,z0,label\n1,2,0\n"), "run.csv", ["out of order", "'z1', 'z0'"]),
    "last column is named": (
        lambda p: p.write_text("z0,z1,weight\n1,2,0\n"),
        "run.csv",
        ["no column of labels", "'weight'"],
    ),
    "no label": (
        lambda p: p.write_text("z0,z1,z2\n1,2,0\n"),
        "run.csv",
        ["no column of labels", "labels_key", "another file"],
    ),
    "no label in pandas": (lambda p: p.write_text(",0,1,2\n0,1,2,0\n"), "run.csv", ["no column of labels"]),
    "sparse": (
        lambda p: torch.save({"logits": LOGITS.to_sparse(), "labels": LABELS}, p),
        "run.pt",
        ["scores", "sparse_coo", "to_dense"],
    ),
    "sparse labels": (
        lambda p: torch.save({"logits": LOGITS, "labels": LABELS.to_sparse()}, p),
        "run.pt",
        ["labels", "sparse_coo", "to_dense"],
    ),
    "nan in csv": (lambda p: p.write_text("1,2,0\nnan,2,1\n"), "run.csv", ["row 1", "nan"]),
}


class _Gadget:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named(calib, tmp_path, case):
    write, name, words = BAD[case]
    path = tmp_path / name
    if write is not None:
        write(path)
    done = calib("score", path)
    assert (done.code, done.out) == (1, ""), done.err
    assert done.err.startswith("calib: error: ")
    assert done.err.count("\n") == 1
    for word in [name, *words]:
        assert word in done.err, done.err


@pytest.mark.parametrize("content", [b"nonsense", None])
def test_a_refusal_does_not_advise_to_execute_the_file(calib, tmp_path, content):
    path = tmp_path / "run.pt"
    torch.save({"logits": _Gadget()}, path) if content is None else path.write_bytes(content)
    done = calib("score", path)
    assert done.code == 1
    assert ("print" if content is None else "not a file of torch.save") in done.err
    for word in ("weights_only", "safe_globals", "\x1b", "trust", "executed"):
        assert word not in done.err + done.out


def test_the_columns_that_were_read_are_said(calib, tmp_path):
    (tmp_path / "run.csv").write_text("index,z0,z1,z2,label,confidence\n0,1,2,3,2,0.9\n1,1,2,3,0,0.8\n")
    text = " ".join(calib("score", "run.csv").out.split())
    assert "3 columns of the file, 'z0' to 'z2'; the labels are column 'label'" in text
    (tmp_path / "run.csv").write_text("1,2,0\n2,1,0\n")
    assert "2 columns of the file, 1 to 2; the labels are column 3" in calib("score", "run.csv").out
    np.save(tmp_path / "labels.npy", np.zeros(2, dtype=int))
    out = calib("score", "run.csv", "--labels", "labels.npy").out
    assert "3 columns of the file, 1 to 3." in out
    (tmp_path / "run.csv").write_text("z0,z1\n1,2\n2,1\n")
    np.savez(tmp_path / "labels.npz", truth=np.zeros(2, dtype=int))
    out = calib("score", "run.csv", "--labels", "labels.npz", "--labels_key", "truth").out
    assert "2 columns of the file, 'z0' to 'z1'." in out


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (("run.npz", "other.npz"), "other.npz"),
        (("run.npz", "--compare", "other.npz"), "other.npz"),
        (("run.npz", "run2.npz", "--compare", "fewer.npz"), "same samples"),
        (("run.npz", "--groups", "frequency", "--train_counts", "counts.json"), "counts.json"),
        (("run.npz", "--labels", "labels.npy"), "labels.npy"),
        (("run.npz", "--output", "run.npz/report.json"), "--output"),
        (("run.npz", "--output", "folder", "--format", "json"), "--output: folder is a folder"),
        (("run.npz", "--figures", "run2.npz"), "--figures"),
    ],
)
def test_all_inputs_are_checked_before_anything_is_computed(calib, monkeypatch, tmp_path, argv, word):
    def compute(*_, **__):
        raise AssertionError("computed before all inputs were checked")

    for name in ("values.EvaluationState", "values.bootstrap_intervals", "scoring.permutation_test"):
        monkeypatch.setattr(f"calib_lightning.predictions.{name}", compute)
    save_npz(tmp_path / "run.npz")
    save_npz(tmp_path / "run2.npz", -LOGITS)
    save_npz(tmp_path / "other.npz", labels=LABELS + 1)
    save_npz(tmp_path / "fewer.npz", LOGITS[:400], LABELS[:400])
    (tmp_path / "counts.json").write_text("[1, 2]")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    done = calib("score", *argv, "--intervals")
    assert (done.code, done.out) == (1, "")
    assert word in done.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_written_is_refused_early(calib, monkeypatch, tmp_path):
    save_npz(tmp_path / "run.npz")
    (tmp_path / "locked").mkdir()
    # An administrator may write everywhere, so the system's answer is stood in for.
    monkeypatch.setattr(os, "access", lambda path, mode, **_: not str(path).endswith("locked"))
    for option in (("--output", "locked/new/report.json"), ("--figures", "locked/new")):
        done = calib("score", "run.npz", *option)
        assert (done.code, done.out) == (1, "")
        assert all(word in done.err for word in (option[0], "locked"))
        assert list((tmp_path / "locked").iterdir()) == []


def test_a_figure_that_fails_does_not_cost_the_report(calib, tmp_path):
    for name in ("one.npz", "two.npz"):
        save_npz(tmp_path / name)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "one").write_text("in the way")
    options = ("one.npz", "two.npz", "--metrics", "core", "--figures", "figures")
    done = calib("score", *options, "--output", "report.json")
    assert done.code == 1
    assert "calib: warning: no figures of one: " in done.err
    assert set(json.loads((tmp_path / "report.json").read_text())["sets"]) == {"one", "two"}
    assert (tmp_path / "figures" / "two" / "reliability_diagram.png").is_file()
    done = calib("score", *options)
    assert done.code == 1
    assert "76.40" in done.out


def test_bad_probs_and_columns(calib, tmp_path):
    path = tmp_path / "run.npz"
    np.savez(path, probs=np.array([[0.5, 0.5], [0.9, 0.2]]), labels=np.array([0, 1]))
    done = calib("score", path, "--input", "probs")
    assert done.code == 1
    assert all(word in done.err for word in ("row 1", "1.1", "run.npz"))
    (tmp_path / "run.csv").write_text("z0,z1,c\n1,2,0\n")
    done = calib("score", tmp_path / "run.csv", "--labels_key", "truth")
    assert done.code == 1
    assert all(word in done.err for word in ("'truth'", "'c'", "labels_key"))
    np.save(tmp_path / "labels.npy", np.zeros(3, dtype=int))
    named = calib("score", tmp_path / "run.csv", "--labels_key", "c", "--labels", tmp_path / "labels.npy")
    assert "1 rows of scores but 3 labels" in named.err
    done = calib("score", path, "--input", "probs", "--labels", tmp_path / "labels.npy")
    assert done.code == 1
    assert all(word in done.err for word in ("2 rows", "3 labels", "labels.npy"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.json", "[1, 2]"),
        ("c.json", "{}"),
        ("c.json", "[1"),
        ("c.csv", "1,2,-3"),
        ("c.csv", "1,2,0.5"),
        ("c.csv", "a"),
    ],
)
def test_bad_training_counts(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"c\.\w+: .*{'number' if text != '[1' else 'JSON'}"):
        read_counts(path, 3)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), ["FILE"]),
        (("a.npz", "--input", "probabilities"), ["probabilities", "logits", "probs"]),
        (("a.npz", "--metrics", "eec"), ["'eec'", "ece", "core"]),
        (("a.npz", "--metrics", ""), ["--metrics"]),
        (("a.npz", "--bins", "0"), ["bins is 0;", "10,15,20"]),
        (("a.npz", "--bins", "ten"), ["'ten'"]),
        (("a.npz", "--intervals", "1"), ["intervals is 1;", ">= 2"]),
        (("a.npz", "--level", "95"), ["level is 95.0;", "0.95"]),
        (("a.npz", "--seed", str(2**63)), [str(2**63), "2**63 - 1"]),
        (("a.npz", "--seed", "1.5"), ["'1.5'", "whole number"]),
        (("a.npz", "--groups", "size"), ["size", "frequency"]),
        (("a.npz", "--groups", "frequency"), ["--train_counts"]),
        (("a.npz", "--train_counts", "c.csv"), ["--groups frequency"]),
        (("a.npz", "--frobnicate"), ["--frobnicate"]),
    ],
)
def test_wrong_command_lines_end_with_two(calib, argv, words):
    done = calib("score", *argv)
    assert done.code == 2
    for word in words:
        assert word in done.err, done.err


def test_real_networks_have_the_reference_figures(scored, real_data):
    names = ["resnet_basic_110_test.npz", "wrn_28_10_test.npz"]
    folder = real_data / "logits" / "cifar10_human_experiments"
    known = json.loads((real_data / "logits" / "reference_metrics.json").read_text())
    report = scored(*(folder / name for name in names), "--bins", "10,15,20", "--metrics", "core")
    for name in names:
        entry = report["sets"][name.removesuffix(".npz")]
        values, reference = entry["values"], known[f"cifar10_human_experiments/{name}"]
        assert (entry["n"], entry["classes"]) == (10000, 10)
        found = {key: values[ours] for key, ours in _REFERENCE_KEYS.items()}
        assert found == pytest.approx({key: reference[key] for key in found}, abs=1e-6)


_REFERENCE_KEYS = {
    "acc": "accuracy",
    "nll": "nll",
    "brier": "brier",
    "auroc": "correctness_auroc",
    "ece10": "ece@10",
    "ece15": "ece@15",
    "ece20": "ece@20",
}


def test_real_files_of_other_layouts(scored, real_data):
    known = json.loads((real_data / "logits" / "reference_metrics.json").read_text())
    folder = real_data / "logits" / "psr-calibration" / "resnet-50_cifar10"
    files = [folder / part / "predictions.npy" for part in ("val", "tst")]
    labels = [f"--labels={folder / part / 'targets.npy'}" for part in ("val", "tst")]
    sets = scored(*files, *labels, "--metrics", "ece,mce")["sets"]
    assert list(sets) == ["val/predictions", "tst/predictions"]
    for part in ("val", "tst"):
        reference = known[f"psr-calibration/resnet-50_cifar10/{part}"]
        assert sets[f"{part}/predictions"]["values"] == pytest.approx(
            {"ece": reference["ece15"], "mce": reference["mce15"]}, abs=1e-6
        )
    path = real_data / "logits" / "netcal" / "lenet-5-cifar-10.npz"
    keys = ("--scores_key", "predictions", "--labels_key", "ground_truth")
    values = only(scored(path, "--input", "probs", *keys, "--metrics", "accuracy,ece"))["values"]
    reference = known["netcal/lenet-5-cifar-10.npz"]
    assert values == pytest.approx({"accuracy": reference["acc"], "ece": reference["ece15"]}, abs=1e-6)


def test_score_and_calibrate_start_without_the_trainer(tmp_path):
    path = str(save_npz(tmp_path / "run.npz"))
    held_out = str(save_npz(tmp_path / "cal.npz", *random_set(50, LOGITS.shape[1])))
    program = (
        "import sys\n"
        "from calib_lightning.__main__ import main\n"
        "for command in ('score', 'calibrate'):\n"
        "    try:\n        main([command, '--help'])\n"
        "    except SystemExit as leaving:\n        print('code', leaving.code, 'torch' in sys.modules)\n"
        f"print('scored', main(['score', {path!r}, '--figures', 'figures', '--intervals', '10']))\n"
        f"calibrate = ['calibrate', '--calibration', {held_out!r}, '--test', {path!r}, '--no_intervals']\n"
        "print('calibrated', main([*calibrate, '--calibrators', 'FixedTemperature(2)']))\n"
        "print('network', 'calib_lightning.core' in sys.modules)\n"
        "print('trainer', [name for name in sys.modules if name.split('.')[0] in ('lightning', 'pytorch_lightning')])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True)
    lines = done.stdout.splitlines()
    assert lines.count("code 0 False") == 2
    for line in ("scored 0", "calibrated 0", "network False", "trainer []"):
        assert line in lines
    assert (tmp_path / "figures" / "run" / "risk_coverage_curve.svg").is_file()


def test_ranking_is_that_of_the_rows(scored, tmp_path):
    logits, labels = random_set(400, 3, scale=20.0)
    entry = only(scored(save_npz(tmp_path / "sure.npz", logits, labels), "--metrics", "correctness_auroc"))
    top2 = logits.topk(2, dim=1).values
    margin = (top2[:, 0] - torch.logsumexp(logits.masked_fill(logits == top2[:, :1], -torch.inf), dim=1)).numpy()
    correct = (logits.argmax(dim=1) == labels).numpy()
    assert entry["values"]["correctness_auroc"] == pytest.approx(pair_auroc(margin, correct), abs=1e-12)


def test_a_header_that_numpy_wrote_is_a_header(tmp_path):
    scores = np.random.default_rng(0).normal(size=(20, 3))
    table = np.column_stack([scores, np.arange(20) % 3])
    np.savetxt(tmp_path / "a.csv", table, delimiter=",", header="z0,z1,z2,label")
    np.savetxt(tmp_path / "b.csv", table, delimiter=",")
    figures = []
    for name in ("a", "b"):
        out = tmp_path / f"{name}.json"
        assert main(["score", str(tmp_path / f"{name}.csv"), "--metrics", "core", "--output", str(out)]) == 0
        found = json.loads(out.read_text())["sets"][name]
        assert found["n"] == 20
        figures.append(found["values"])
    assert figures[0] == figures[1]
