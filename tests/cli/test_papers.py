"""The papers' tables: what the index says, and what ``calib paper`` prints and runs."""

import copy
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import yaml

from calib_lightning.commands import paper as paper_command
from calib_lightning.core import encoder_names
from calib_lightning.utils.config_search import find_config
from calib_lightning.utils.papers import cell, rows_and_columns, tables

from .paper_cells import CELLS, FLSD, INDEX, fits, options_of

# --- the index -------------------------------------------------------------------------------------------------------

# by hand: rows, columns, cells without a published value
SIZES = {
    ("refcal", "headline"): (2, 1, 0),
    ("dark_side", "table1"): (6, 2, 0),
    ("dark_side", "table2"): (6, 6, 0),
    ("dark_side", "table3"): (6, 2, 0),
    ("dark_side", "table4"): (2, 2, 0),
    ("neural_clamping", "table1"): (9, 1, 0),
    ("neural_clamping", "table2"): (9, 2, 1),  # the copy of the paper ends before WRN-40-10's last row
    ("neural_clamping", "table3"): (9, 3, 0),
    ("neural_clamping", "table4"): (6, 1, 0),
    ("mac_cal", "table1"): (18, 9, 18),  # two rows are our own
    ("mac_cal", "table2"): (6, 8, 0),
    ("mac_cal", "table3"): (20, 9, 0),
    ("mac_cal", "table4"): (6, 9, 0),
    ("mac_cal", "table5"): (6, 2, 0),
}

# copied from the papers by hand
PUBLISHED = {
    ("refcal", "headline", "refcal", "cifar100_lt/resnet50"): (58.81, 95.67, 0.08),
    ("refcal", "headline", "crl", "cifar100_lt/resnet50"): (46.27, 93.7, 0.22),
    ("dark_side", "table1", "ls", "imagenet/resnet50"): (33.63, 5.35, 85.22),
    ("dark_side", "table1", "fl", "imagenet_v2/resnet50"): (51.15, 4.80, 83.10),
    ("dark_side", "table2", "ts", "cifar100/vgg16"): ("39.18 ± 0.55", "6.46 ± 1.10", "84.31 ± 0.53"),
    ("dark_side", "table2", "erl", "cifar10/resnet50"): ("7.01 ± 0.18", "2.37 ± 0.02", "93.64 ± 0.49"),
    ("dark_side", "table2", "mx", "cifar100/densenet121"): ("28.93 ± 0.03", "3.55 ± 0.09", "85.80 ± 0.32"),
    ("dark_side", "table3", "baseline", "cifar10_2/vgg16"): ("34.25 ± 0.73", "16.32 ± 0.60", "83.39 ± 1.72"),
    ("dark_side", "table3", "mx", "cifar10_1/vgg16"): ("20.89 ± 0.71", "6.87 ± 0.60", "84.76 ± 1.24"),
    ("dark_side", "table4", "baseline", "cifar100/vgg16"): ("19.12 ± 0.13", "85.18 ± 0.21"),
    ("dark_side", "table4", "confidnet", "cifar10/vgg16"): ("4.1 ± 0.2", "92.55 ± 0.1"),
    ("neural_clamping", "table1", "uncalibrated", "bloodmnist/resnet50"): (85.79, 0.2256, 5.77, 5.76, 1.7003),
    ("neural_clamping", "table1", "nc_fl", "bloodmnist/resnet50"): (
        *("85.82 ± 0.03", "0.4204 ± 0.0004", "1.05 ± 0.03", "1.19 ± 0.06", "1.0797 ± 0.0042"),
    ),
    ("neural_clamping", "table2", "ts_grid", "cifar100/wrn40_10"): (79.51, 0.8359, 1.75, 1.54, 0.1659),
    ("neural_clamping", "table2", "ms", "cifar100/resnet110"): (
        *("62.03 ± 0.31", "0.1552 ± 0.0026", "31.85 ± 0.29", "31.85 ± 0.29", "0.6842 ± 0.0057"),
    ),
    ("neural_clamping", "table2", "nc_fl", "cifar100/wrn40_10"): (),
    ("neural_clamping", "table3", "ts", "imagenet/resnet101"): (75.73, 0.9376, 1.88, 1.91, 0.3117),
    ("neural_clamping", "table3", "dir_odir", "imagenet/vit_s16"): (
        *("75.93 ± 0.09", "0.9788 ± 0.0007", "0.93 ± 0.06", "0.86 ± 0.09", "0.3149 ± 0.0018"),
    ),
    ("neural_clamping", "table3", "nc_ce", "imagenet/mixer_b16"): (
        *("74.14 ± 0.01", "1.7952 ± 0.0302", "2.43 ± 0.16", "2.51 ± 0.18", "0.3054 ± 0.0020"),
    ),
    ("neural_clamping", "table4", "ts_fl", "cifar100/resnet110"): (74.15, 1.0542, 2.01, 2.02, 0.1812),
    ("neural_clamping", "table4", "input_only", "cifar100/resnet110"): (
        *("74.16 ± 0.09", "0.4775 ± 0.03", "10.62 ± 0.10", "10.61 ± 0.10", "0.2776 ± 0.0019"),
    ),
    ("mac_cal", "table1", "flsd", "cifar100/resnet110"): (7.83,),
    ("mac_cal", "table1", "vtst", "cifar100/resnet50"): (4.83,),
    ("mac_cal", "table1", "mbls", "tiny_imagenet/resnet50"): (10.17,),
    ("mac_cal", "table1", "cpc", "cifar10/wrn26_10"): (5.42,),
    ("mac_cal", "table1", "mac_cal_sparsity", "cifar10/wrn26_10"): (),
    ("mac_cal", "table2", "plp", "cifar10/densenet121"): (91.53, 49.66),
    ("mac_cal", "table2", "mac_cal", "cifar100/resnet50"): (79.05, 77.06),
    ("mac_cal", "table3", "mixup", "tiny_imagenet/resnet50"): (60.06, 7.52),
    ("mac_cal", "table3", "dfl+mac_cal", "tiny_imagenet/resnet50"): (2.76, 0.80),  # as printed
    ("mac_cal", "table3", "acls+mac_cal", "cifar100/wrn26_10"): (77.77, 3.49),
    ("mac_cal", "table4", "mit", "cifar10/resnet110"): (42819,),
    ("mac_cal", "table4", "mac_cal", "tiny_imagenet/resnet50"): (112028,),
    ("mac_cal", "table5", "gradient_restriction", "cifar10/densenet121"): (94.28, 1.96, 1.95, 75.02),
    ("mac_cal", "table5", "decaying_sparsity", "cifar100/densenet121"): (77.88, 1.73, 1.94, 8.86),
}


def test_every_table_has_its_cells():
    assert {(paper, table) for paper in INDEX for table in tables(INDEX, paper)} == set(SIZES)
    for (paper, table), (rows, columns, unpublished) in SIZES.items():
        found = rows_and_columns(INDEX, paper, table)
        assert tuple(len(set(names)) for names in found) == tuple(map(len, found)) == (rows, columns), (paper, table)
        there = [each for each in CELLS if (each.where.paper, each.where.table) == (paper, table)]
        assert len(there) == rows * columns
        assert sum(not each.published for each in there) == unpublished, (paper, table)
        assert sum(where[:2] == (paper, table) for where in PUBLISHED) >= 2
    assert len(CELLS) == sum(rows * columns for rows, columns, _ in SIZES.values()) == 582


@pytest.mark.parametrize("where", PUBLISHED, ids="-".join)
def test_published_values_are_those_of_the_papers(where):
    found = cell(INDEX, *where)
    assert tuple(found.published.values()) == PUBLISHED[where]


def test_published_values_belong_to_cells_that_exist():
    for paper, known in INDEX.items():
        for name, table in known["tables"].items():
            rows, columns = rows_and_columns(INDEX, paper, name)
            assert set(rows) <= set(known["rows"])
            assert set(columns) <= set(known["columns"])
            assert set(table["published"]) <= set(rows)
            for row, values in table["published"].items():
                assert set(values) <= {*columns, *(column.partition("/")[0] for column in columns)}, (paper, name, row)
                assert all(len(value) == len(table["metrics"]) for value in values.values()), (paper, name, row)


def test_averages_over_networks_are_marked():
    averaged = {(each.where.paper, each.where.table) for each in CELLS if each.averaged}
    assert averaged == {("mac_cal", "table2"), ("mac_cal", "table3")}
    assert all(each.averaged for each in CELLS if (each.where.paper, each.where.table) in averaged)


def test_averages_are_those_of_the_single_networks():
    # but for two values, which are as printed in both tables
    off = set()
    for each in CELLS:
        paper, table, row, column = each.where
        if (paper, table) != ("mac_cal", "table3") or "+" in row or "tiny" in column:
            continue
        data = column.partition("/")[0]
        networks = [name for name in rows_and_columns(INDEX, "mac_cal", "table1")[1] if name.startswith(f"{data}/")]
        single = [cell(INDEX, "mac_cal", "table1", row, name).published["ECE %"] for name in networks]
        if abs(np.mean(single) - each.published["ECE %"]) > 0.011:
            off.add((row, data))
    assert off == {("mit", "cifar100"), ("dfl", "cifar100")}


def _used_templates(index, paper, table):
    """Of each template of a table, in how many cells it makes a command."""
    written, counts = index[paper]["tables"][table].get("commands", index[paper].get("commands")), []
    for template in written:
        alone = copy.deepcopy(index)
        alone[paper]["tables"][table]["commands"] = [template]
        rows, columns = rows_and_columns(alone, paper, table)
        counts.append(sum(len(cell(alone, paper, table, row, column).commands) for row in rows for column in columns))
    return counts


@pytest.mark.parametrize(("paper", "table"), SIZES)
def test_every_template_makes_a_command(paper, table):
    counts = _used_templates(INDEX, paper, table)
    assert counts
    assert all(counts), counts
    rows, columns, _ = SIZES[paper, table]
    assert counts[0] == rows * columns, "a cell that trains nothing"


def test_a_misspelt_word_is_noticed():
    for wrong in ("calib score {rum}/x.npz", "{callibrate}"):
        index = copy.deepcopy(INDEX)
        index["dark_side"]["tables"]["table2"]["commands"].append(wrong)
        assert _used_templates(index, "dark_side", "table2") == [36, 6, 0]


def test_every_word_of_a_row_or_column_is_used():
    for paper, known in INDEX.items():
        used = set(re.findall(r"\{(\w+)\}", yaml.safe_dump(known)))
        for axis in ("rows", "columns"):
            for name, words in known[axis].items():
                assert set(words) <= used | {"note", "fit"}, (paper, name)


@pytest.mark.parametrize(
    ("where", "kinds"),
    [
        (("refcal", "headline", "crl", "cifar100_lt/resnet50"), "fit"),
        (("dark_side", "table1", "baseline", "imagenet/resnet50"), "fit"),
        (("dark_side", "table1", "ts", "imagenet/resnet50"), "fit calibrate"),
        (("dark_side", "table1", "mx", "imagenet_v2/resnet50"), "fit test"),
        (("dark_side", "table1", "ts", "imagenet_v2/resnet50"), "fit test calibrate score"),
        (("dark_side", "table2", "ls", "cifar10/vgg16"), "fit"),
        (("dark_side", "table2", "ts", "cifar10/vgg16"), "fit calibrate"),
        (("dark_side", "table3", "fl", "cifar10_1/vgg16"), "fit test"),
        (("dark_side", "table3", "ts", "cifar10_2/vgg16"), "fit test calibrate score"),
        (("dark_side", "table4", "confidnet", "cifar100/vgg16"), "fit"),
        (("neural_clamping", "table1", "uncalibrated", "bloodmnist/resnet50"), "fit"),
        (("neural_clamping", "table1", "ms_odir", "bloodmnist/resnet50"), "fit calibrate"),
        (("neural_clamping", "table3", "nc_fl", "imagenet/mixer_b16"), "fit calibrate"),
        (("mac_cal", "table1", "tst", "cifar100/wrn26_10"), "fit"),
    ],
)
def test_a_cell_has_the_commands_that_it_needs(where, kinds):
    assert " ".join(shlex.split(command)[1] for command in cell(INDEX, *where).commands) == kinds


def test_every_cell_has_commands_of_pieces_that_exist():
    networks, pretrained = set(encoder_names()) | set(timm.list_models()), set(timm.list_pretrained())
    for each in CELLS:
        assert each.commands, each
        run = ""
        for command in each.commands:
            words = shlex.split(command)
            assert words[0] == "calib"
            assert shlex.join(words) == command
            braces = [word for word in words if set("{}") & set(word)]
            assert all(re.fullmatch(r"--model\.encoder=\{name: [\w.]+, pretrained: true\}", word) for word in braces)
            options = options_of(command)
            kind = options[""][0]
            if kind == "fit":
                run = options["--run_dir"][0]
                assert run.startswith(f"runs/{each.where.paper}/")
                assert all(find_config(name) for name in options.get("-c", [])), command
                assert find_config(options["--model"][0], "method").parent.name == "method"
                encoder = yaml.safe_load(options["--model.encoder"][0])
                assert encoder in networks if isinstance(encoder, str) else encoder["name"] in pretrained, command
            elif kind == "test":
                assert options["-c"] == [f"{run}/config.yaml"]
                assert options["--run_dir"][0].startswith(f"{run}/")
            elif kind == "calibrate":
                assert options[""][1] == run
            else:
                assert kind == "score"
                assert options[""][1].startswith(f"{run}/")
                assert options["--calibrator"][0].startswith(f"{run}/calibrate/")
            for name in options.get("--data", []):
                assert find_config(name, "data").parent.name == "data", command


@pytest.mark.parametrize("seed", [None, 7])
def test_a_run_folder_belongs_to_one_training(seed):
    commands = {}
    for each in CELLS:
        command = cell(INDEX, *each.where, seed).commands[0]
        commands.setdefault(options_of(command)["--run_dir"][0], set()).add(command)
    assert {run: found for run, found in commands.items() if len(found) > 1} == {}
    assert len(commands) == len(fits())
    # Neural Clamping repeats the calibrators on one network
    seeded = {run for run in commands if run.endswith("-seed7")}
    assert seeded == {run for run in commands if seed and not run.startswith("runs/neural_clamping/")}


# --- calib paper -----------------------------------------------------------------------------------------------------

WHERE = ("mac_cal", "table1", "--row", "flsd", "--column", "cifar100/resnet110")
SHIFTED = ("dark_side", "table3", "--row", "ts", "--column", "cifar10_1/vgg16")


def test_listing_papers_tables_rows_and_columns(calib):
    done = calib("paper")
    assert done.code == 0
    assert [line.partition(":")[0] for line in done.out.splitlines() if not line.startswith((" ", "calib"))] == [
        *("refcal", "dark_side", "neural_clamping", "mac_cal"),
    ]
    assert "\n  table4: Seconds of training on one A40\n" in done.out
    done = calib("paper", "refcal")
    assert done.out.splitlines()[1:] == [
        "  headline: CIFAR-100-LT, imbalance 0.1",
        "calib paper PAPER TABLE lists rows and columns.",
    ]
    for half in ((), ("--row", "ts"), ("--column", "cifar10_1/vgg16")):
        done = calib("paper", "dark_side", "table3", *half)
        assert done.code == 0
        assert done.out.splitlines()[1:] == [
            "  --row baseline, ts, erl, ls, mx, fl",
            "  --column cifar10_1/vgg16, cifar10_2/vgg16",
        ]


def test_a_cell_is_comments_and_a_command(calib):
    done = calib("paper", *WHERE)
    assert done.code == 0
    assert done.out.splitlines() == [
        "# mac_cal table1, row flsd, column cifar100/resnet110: ECE of one run",
        "# published: ECE % 7.83",
        "# evaluated epoch: the last epoch",
        FLSD,
    ]
    done = calib("paper", "mac_cal", "table3", "--row", "fl+mac_cal", "--column", "cifar10/resnet50")
    assert "# published: accuracy % 94.98, ECE % 0.71 (the average over networks)\n" in done.out
    done = calib("paper", "mac_cal", "table1", "--row", "mac_cal_recommended", "--column", "cifar10/resnet50")
    assert "# published: nothing\n" in done.out
    assert "# Ours, not the paper's; it uses the calibration images, which are held out.\n" in done.out


@pytest.mark.parametrize(
    "where",
    [
        SHIFTED,
        ("neural_clamping", "table3", "--row", "nc_fl", "--column", "imagenet/vit_s16"),
        ("mac_cal", "table5", "--row", "masked_retraining", "--column", "cifar10/densenet121"),
        ("neural_clamping", "table1", "--row", "nc_ce", "--column", "bloodmnist/resnet50"),
    ],
)
def test_the_output_is_a_script(calib, where):
    done = calib("paper", *where)
    # the shell hands on the words that the index means
    said = "calib() { printf '%s\\0' calib \"$@\"; echo; }\n"
    shell = subprocess.run(["bash", "-eu"], input=said + done.out, capture_output=True, text=True, check=True)
    commands = cell(INDEX, where[0], where[1], where[3], where[5]).commands
    assert [line.split("\0")[:-1] for line in shell.stdout.splitlines()] == [shlex.split(each) for each in commands]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            ("mac_call",),
            "paper is 'mac_call'; it must be one of refcal, dark_side, neural_clamping, mac_cal. The nearest: ",
        ),
        (
            ("mac_cal", "tabel1"),
            "table of mac_cal is 'tabel1'; it must be one of table1, table2, table3, table4, table5. The nearest: ",
        ),
        (("mac_cal", "table1", "--row", "fsld", "--column", "cifar10/resnet50"), "The nearest: flsd"),
        (("mac_cal", "table1", "--row", "flsd", "--column", "cifar100/resnet11"), "The nearest: cifar100/resnet110, "),
        # known to the paper, not to the table
        (("mac_cal", "table4", "--row", "flsd", "--column", "cifar10/resnet50"), "row of mac_cal table4 is 'flsd'; "),
        (("mac_cal", "table5", "--row", "vanilla", "--column", "cifar10/resnet50"), "The nearest: cifar10/densenet121"),
    ],
)
def test_what_the_index_does_not_know(calib, where, message):
    done = calib("paper", *where)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("calib: error: ")
    assert message in done.err
    assert done.err.endswith("`calib paper` lists all names.\n")


def test_a_wrong_command_line_and_help(calib):
    assert calib("paper", *WHERE, "--seed", "one").code == 2
    assert calib("paper", *WHERE, "more").code == 2
    done = calib("paper", "--help")
    assert done.code == 0
    assert "What follows -- is added to every calib fit and calib test" in " ".join(done.out.split())


def test_an_index_of_ones_own_comes_first(calib, tmp_path):
    (tmp_path / "configs").mkdir()
    mine = {"mine": {"title": "Mine", "tables": {"t": {"title": "A table"}}}}
    (tmp_path / "configs" / "papers.yaml").write_text(yaml.safe_dump(mine))
    assert calib("paper").out.startswith("mine: Mine\n  t: A table\n")


def test_another_seed_trains_in_another_folder(calib):
    done = calib("paper", *WHERE, "--seed", "5")
    assert done.out.splitlines()[-1] == f"{FLSD}-seed5 --seed_everything=5"
    lines = [line for line in calib("paper", *SHIFTED, "--seed", "5").out.splitlines() if line.startswith("calib")]
    assert len(lines) == 4
    assert [line.endswith(" --seed_everything=5") for line in lines] == [True, False, False, False]
    run = "runs/dark_side/cifar10/vgg16/baseline-seed5"
    assert all(re.search(rf"[ =]{run}( |/)", line) for line in lines)


def test_another_seed_of_neural_clamping_is_that_of_its_calibrators(calib):
    where = ("neural_clamping", "table2", "--row", "nc_fl", "--column", "cifar100/resnet110")
    usual, other = (calib("paper", *where, *more).out.splitlines()[-2:] for more in ((), ("--seed", "5")))
    assert other[0] == usual[0]
    assert usual[1] == "calib calibrate runs/neural_clamping/cifar100/resnet110 --calibrators " + shlex.quote(
        "NeuralClamping(gammas=(1,),start=RandomStart(seed=0),descent=ClampDescent(seed=0,reduction='sum'))"
    )
    assert other[1] == usual[1].replace("seed=0", "seed=5")


def test_more_options_go_to_what_sees_images(calib):
    done = calib("paper", *SHIFTED, "--", "--data.root=my data", "--trainer.precision=bf16-mixed")
    lines = [shlex.split(line) for line in done.out.splitlines() if line.startswith("calib")]
    assert [words[1] for words in lines] == ["fit", "test", "calibrate", "score"]
    assert all(words[-2:] == ["--data.root=my data", "--trainer.precision=bf16-mixed"] for words in lines[:2])
    assert not any("--data.root=my data" in words for words in lines[2:])


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """What ``--run`` has started, and the code of each kind of command, 0 where it is not given."""
    commands, codes = [], {}

    def run(words):
        assert words[:3] == [sys.executable, "-m", "calib_lightning"]
        commands.append(words[3:])
        if words[3] == "fit":
            (tmp_path / options_of(shlex.join(["calib", *words[3:]]))["--run_dir"][-1]).mkdir(parents=True)
        return SimpleNamespace(returncode=codes.get(words[3], 0), wait=lambda: None)

    monkeypatch.setattr(paper_command.subprocess, "Popen", run)
    return commands, codes


BASELINE = "runs/dark_side/cifar10/vgg16/baseline"


def test_commands_are_run_in_their_order(calib, ran):
    done = calib("paper", *SHIFTED, "--run", "--", "--quiet=true")
    assert done.code == 0
    commands = [shlex.split(command)[1:] for command in cell(INDEX, *SHIFTED[:2], "ts", "cifar10_1/vgg16").commands]
    assert ran[0] == [[*commands[0], "--quiet=true"], [*commands[1], "--quiet=true"], *commands[2:]]


def test_nothing_is_run_without_being_asked(calib, ran):
    assert calib("paper", *SHIFTED).code == 0
    assert ran[0] == []


def test_a_finished_training_is_not_repeated(calib, ran):
    baseline = ("dark_side", "table2", "--row", "baseline", "--column", "cifar10/vgg16", "--run")
    assert calib("paper", *baseline).code == 0
    assert [words[0] for words in ran[0]] == ["fit"]
    ran[0].clear()
    # another cell of the same network
    done = calib("paper", *SHIFTED, "--run")
    assert done.code == 0
    assert [words[0] for words in ran[0]] == ["test", "calibrate", "score"]
    assert f"# {BASELINE} is finished: not trained again" in done.out
    # with another seed it is another training
    ran[0].clear()
    assert calib("paper", *SHIFTED, "--run", "--seed", "2").code == 0
    assert [words[0] for words in ran[0]] == ["fit", "test", "calibrate", "score"]


def test_a_training_with_other_options_is_not_taken_for_the_cell(calib, ran):
    assert calib("paper", *SHIFTED, "--run", "--", "--trainer.max_epochs=1").code == 0
    ran[0].clear()
    done = calib("paper", *SHIFTED, "--run")
    assert (done.code, ran[0]) == (1, [])
    assert f"calib: error: {BASELINE} was made by another command (calib fit -c recipe/dark-cifar " in done.err
    assert "--trainer.max_epochs=1)" in done.err


def test_an_unfinished_training_is_not_run_over(calib, ran, tmp_path):
    # the fit of the first call has failed and left its folder
    ran[1]["fit"] = 143
    assert calib("paper", *SHIFTED, "--run").code == 143
    assert [words[0] for words in ran[0]] == ["fit"]
    ran[0].clear()
    done = calib("paper", *SHIFTED, "--run")
    assert (done.code, ran[0]) == (1, [])
    assert done.err.endswith(f"{BASELINE} exists, but its training is not finished. Remove the folder.\n")
    for file in ("config.yaml", "config-2.yaml", "checkpoints/last.ckpt"):  # resumed once
        (tmp_path / BASELINE / file).parent.mkdir(exist_ok=True)
        (tmp_path / BASELINE / file).touch()
    done = calib("paper", *SHIFTED, "--run")
    assert (done.code, ran[0]) == (1, [])
    assert f"calib fit -c {BASELINE}/config-2.yaml --ckpt_path {BASELINE}/checkpoints/last.ckpt, or remove" in done.err


def test_the_folder_that_more_options_name_counts(calib, ran):
    for expected in (1, 0):
        ran[0].clear()
        assert calib("paper", *WHERE, "--run", "--", "--run_dir=mine").code == 0
        assert len(ran[0]) == expected
    assert calib("paper", *WHERE, "--run").code == 0
    assert len(ran[0]) == 1


@pytest.mark.parametrize("kind", ["fit", "test", "calibrate", "score"])
def test_a_command_that_fails_is_the_last(calib, ran, kind):
    ran[1][kind] = 143
    assert calib("paper", *SHIFTED, "--run").code == 143
    assert ran[0][-1][0] == kind


CHILD = """
import os, signal, sys, time
def save(*_):
    time.sleep(0.5)
    open("saved", "w").close()
    sys.exit({code})
signal.signal(signal.{signum}, save)
os.kill(os.getppid(), signal.{signum})
time.sleep(20)
"""


@pytest.mark.parametrize(
    ("signum", "code", "ends_with"), [("SIGTERM", 143, 143), ("SIGINT", 130, 130), ("SIGTERM", 143, 0)]
)
def test_a_signal_is_passed_on_and_the_training_saves(calib, tmp_path, monkeypatch, signum, code, ends_with):
    (tmp_path / "child.py").write_text(CHILD.format(signum=signum, code=ends_with))
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho x >> started\nexec {sys.executable} child.py\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert calib("paper", *SHIFTED, "--run").code == code
    assert (tmp_path / "saved").is_file()
    assert (tmp_path / "started").read_text() == "x\n"  # what comes after it in the cell does not begin
