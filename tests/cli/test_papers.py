"""The papers' tables: what the index says, what ``calib paper`` prints and runs, and that every command works."""

import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import timm
import yaml

from calib_lightning import paper_command
from calib_lightning.cli import CalibCLI
from calib_lightning.config_search import find_config
from calib_lightning.core import encoder_names
from calib_lightning.papers import cell, cells, read_index, rows_and_columns, tables

from .small_sets import SETS, write_sets
from .test_configs import CONFIGS, METHODS

INDEX = read_index()
CELLS = cells(INDEX)
RECIPES = sorted(path.stem for path in (CONFIGS / "recipe").glob("*.yaml"))

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


def options_of(command):
    """``{"--model": [...], ...}`` of a command; what is not an option is under ""."""
    words, options = shlex.split(command), {}
    assert words.pop(0) == "calib"
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=") if word.startswith("-") else ("", "=", word)
        options.setdefault(name, []).append(value if equals else words.pop(0))
    return options


def fits():
    """Every training of the index once: command, a cell that has it."""
    return {command: found for found in CELLS for command in found.commands if command.startswith("calib fit ")}


def test_every_table_has_its_cells():
    assert {(paper, table) for paper in INDEX for table in tables(INDEX, paper)} == set(SIZES)
    for (paper, table), (rows, columns, unpublished) in SIZES.items():
        found = rows_and_columns(INDEX, paper, table)
        assert tuple(len(set(names)) for names in found) == tuple(map(len, found)) == (rows, columns), (paper, table)
        there = [each for each in CELLS if (each.paper, each.table) == (paper, table)]
        assert len(there) == rows * columns
        assert sum(not each.published for each in there) == unpublished, (paper, table)
        assert sum(where[:2] == (paper, table) for where in PUBLISHED) >= 2
    assert len(CELLS) == sum(rows * columns for rows, columns, _ in SIZES.values()) == 582


@pytest.mark.parametrize("where", PUBLISHED, ids="-".join)
def test_published_values_are_those_of_the_papers(where):
    found = cell(INDEX, *where)
    assert found.published == PUBLISHED[where]
    assert not found.published or len(found.published) == len(found.figures)


def test_published_values_belong_to_cells_that_exist():
    for paper, known in INDEX.items():
        for name, table in known["tables"].items():
            rows, columns = rows_and_columns(INDEX, paper, name)
            assert set(rows) <= set(known["rows"])
            assert set(columns) <= set(known["columns"])
            assert set(table["published"]) <= set(rows)
            for row, values in table["published"].items():
                assert set(values) <= {*columns, *(column.partition("/")[0] for column in columns)}, (paper, name, row)
                assert all(len(value) == len(table["figures"]) for value in values.values()), (paper, name, row)


def test_averages_over_networks_are_marked():
    averaged = {(each.paper, each.table) for each in CELLS if each.averaged}
    assert averaged == {("mac_cal", "table2"), ("mac_cal", "table3")}
    assert all(each.averaged for each in CELLS if (each.paper, each.table) in averaged)


def test_averages_are_those_of_the_single_networks():
    # but for two values, which are as printed in both tables
    off = set()
    for each in CELLS:
        if each.table != "table3" or each.paper != "mac_cal" or "+" in each.row or "tiny" in each.column:
            continue
        data = each.column.partition("/")[0]
        networks = [
            column for column in rows_and_columns(INDEX, "mac_cal", "table1")[1] if column.startswith(f"{data}/")
        ]
        single = [cell(INDEX, "mac_cal", "table1", each.row, column).published[0] for column in networks]
        if abs(np.mean(single) - each.published[1]) > 0.011:
            off.add((each.row, data))
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
                assert run.startswith(f"runs/{each.paper}/")
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
        command = cell(INDEX, each.paper, each.table, each.row, each.column, seed).commands[0]
        commands.setdefault(options_of(command)["--run_dir"][0], set()).add(command)
    assert {run: found for run, found in commands.items() if len(found) > 1} == {}
    assert len(commands) == len(fits())
    # Neural Clamping repeats the calibrators on one network
    seeded = {run for run in commands if run.endswith("-seed7")}
    assert seeded == {run for run in commands if seed and not run.startswith("runs/neural_clamping/")}


# --- calib paper -----------------------------------------------------------------------------------------------------

WHERE = ("mac_cal", "table1", "--row", "flsd", "--column", "cifar100/resnet110")
FLSD = (
    "calib fit -c recipe/mukhoti --data cifar100_mac_cal --model flsd --model.encoder=resnet110_bottleneck "
    "--seed_everything=1 --select_on=last --run_dir=runs/mac_cal/cifar100/resnet110/flsd"
)
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
    assert "# Ours, not the paper's; it looks at the calibration images, which are held out.\n" in done.out


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
    assert done.err.endswith("calib paper lists them all.\n")


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
        "NeuralClamping(gammas=(1,),start=RandomStart(seed=0),descent=ClampDescent(seed=0))"
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

    def run(words, check):
        assert words[:3] == [sys.executable, "-m", "calib_lightning"]
        commands.append(words[3:])
        if words[3] == "fit":
            (tmp_path / options_of(shlex.join(["calib", *words[3:]]))["--run_dir"][-1]).mkdir(parents=True)
        return subprocess.CompletedProcess(words, codes.get(words[3], 0))

    monkeypatch.setattr(paper_command.subprocess, "run", run)
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


def test_an_unfinished_training_is_not_run_over(calib, ran):
    # the fit of the first call has failed and left its folder
    ran[1]["fit"] = 143
    assert calib("paper", *SHIFTED, "--run").code == 143
    assert [words[0] for words in ran[0]] == ["fit"]
    ran[0].clear()
    done = calib("paper", *SHIFTED, "--run")
    assert (done.code, ran[0]) == (1, [])
    assert f"calib fit -c {BASELINE}/config.yaml --ckpt_path {BASELINE}/checkpoints/last.ckpt, or remove" in done.err


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


# --- composing -------------------------------------------------------------------------------------------------------


def composed(calib, command):
    """The configuration of a command."""
    done = calib(*shlex.split(command)[1:], "--print_config")
    assert done.code == 0, done.err
    return yaml.safe_load(done.out)


def _short(config):
    """What a recipe decides."""
    model, trainer = config["model"]["init_args"], config["trainer"]
    optimizer, scheduler = model.get("optimizer") or {}, model.get("scheduler") or {}
    return {
        "encoder": model["encoder"],
        "optimizer": optimizer.get("class_path", "").rpartition(".")[2],
        "lr": optimizer.get("init_args", {}).get("lr"),
        "decay": optimizer.get("init_args", {}).get("weight_decay"),
        "milestones": scheduler.get("init_args", {}).get("milestones"),
        "factor": scheduler.get("init_args", {}).get("gamma"),
        "epochs": trainer["max_epochs"],
        "callbacks": [each["class_path"].rpartition(".")[2] for each in trainer["callbacks"] or []],
        "seed": config["seed_everything"],
        "batch": config["batch_size"],
        "select": config["select_on"],
    }


SUITED = {
    "refcal": "refcal",
    "confidnet": "confidnet",
    "crl": "crl",
    "ldam": "ldam",
    "mukhoti-brier": "brier",
    "tst": "tst",
}
"""Recipes that were made for a method; the others go with the focal loss."""

EPOCHS = {
    **dict.fromkeys(("cifar350", "mukhoti", "mukhoti-brier"), 350),
    **dict.fromkeys(("tiny-imagenet", "tiny-imagenet-mean", "dark-imagenet", "mdca-svhn", "mdca-tiny-imagenet"), 100),
    **dict.fromkeys(("dark-cifar", "crl"), 300),
    **dict.fromkeys(("ldam", "mdca-cifar100"), 200),
    **{"refcal": 1000, "refcal-baseline": 500, "confidnet": 250, "mdca-cifar10": 160, "medmnist": 100, "tst": 600},
    **{"cpu-evening": 30, "gpu-hour": 120},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes(calib, recipe):
    method = SUITED.get(recipe, "focal")
    found = _short(composed(calib, f"calib fit -c recipe/{recipe} --data cifar10_mac_cal --model {method}"))
    assert found["epochs"] == EPOCHS[recipe]
    assert found["encoder"] in encoder_names() or (recipe, found["encoder"]) == ("dark-imagenet", "resnet50")
    assert found["lr"] > 0
    batches = {"refcal": 1024, "mdca-tiny-imagenet": 64}
    batches |= dict.fromkeys(("tst", "refcal-baseline", "gpu-hour", "dark-imagenet"), 256)
    assert found["batch"] == batches.get(recipe, 128)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_composes_with_the_recipe_of_the_focal_losses(calib, method):
    config = composed(calib, f"calib fit -c recipe/mukhoti --data cifar10_mac_cal --model {method}")
    found = _short(config)
    # refcal brings its own optimiser; all else is the recipe's
    assert (found["lr"], found["milestones"]) == ((0.5, None) if method == "refcal" else (12.8, [149, 249]))
    assert (found["epochs"], found["callbacks"], found["seed"]) == (350, ["ClipGradients"], 1)
    alone = yaml.safe_load((CONFIGS / "method" / f"{method}.yaml").read_text())
    assert config["model"]["class_path"].rpartition(".")[2] == alone["class_path"]
    for name, value in alone.get("init_args", {}).items():
        if isinstance(value, int | float | str):
            assert config["model"]["init_args"][name] == value


def _one_cell_of_each():
    """Every row and every column of every table at least once: the commands that train them."""
    chosen = {}
    for paper, table in SIZES:
        rows, columns = rows_and_columns(INDEX, paper, table)
        for number in range(max(len(rows), len(columns))):
            row, column = rows[number % len(rows)], columns[number % len(columns)]
            chosen[cell(INDEX, paper, table, row, column).commands[0]] = (paper, row, column)
    return chosen


@pytest.mark.parametrize("command", _one_cell_of_each(), ids=lambda command: options_of(command)["--run_dir"][0][5:])
def test_every_row_and_every_column_composes(calib, command):
    found, options = composed(calib, command), options_of(command)
    assert found["model"]["init_args"]["encoder"] == yaml.safe_load(options["--model.encoder"][0])
    assert found["run_dir"] == options["--run_dir"][0]
    callbacks = _short(found)["callbacks"]
    assert ("MaskedClassifier" in callbacks) == any(
        "mac_cal_paper" in name or name == "callback/mac_cal" for name in options.get("-c", [])
    )


MUKHOTI = {
    "optimizer": "SGD",
    "lr": 12.8,
    "decay": 3.90625e-6,
    "milestones": [149, 249],
    "factor": 0.1,
    "epochs": 350,
    "callbacks": ["ClipGradients"],
    "seed": 1,
    "batch": 128,
    "select": "last",
}
PLAIN = MUKHOTI | {"lr": 0.1, "decay": 5e-4, "milestones": [150, 250], "callbacks": []}
STEP = {"optimizer": "SGD", "lr": 0.1, "select": "last", "callbacks": [], "batch": 128, "seed": 0, "decay": 5e-4}
DARK = STEP | {"milestones": [150, 225], "factor": 0.2, "epochs": 300}
DARK_IMAGENET = STEP | {"milestones": [30, 60, 90], "factor": 0.1, "epochs": 100, "batch": 256, "decay": 1e-4}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (("mac_cal", "table1", "vanilla", "cifar100/resnet110"), MUKHOTI | {"encoder": "resnet110_bottleneck"}),
        (("mac_cal", "table1", "acls", "cifar10/wrn26_10"), PLAIN | {"encoder": "wrn26_10"}),
        (
            ("mac_cal", "table3", "fl+mac_cal", "tiny_imagenet/resnet50"),
            MUKHOTI
            | {"milestones": [39, 59], "epochs": 100, "callbacks": ["ClipGradients", "MaskedClassifier"]}
            | {"encoder": "resnet50_tiny_imagenet"},
        ),
        (
            ("mac_cal", "table3", "mbls+mac_cal", "tiny_imagenet/resnet50"),
            PLAIN
            | {"milestones": [40, 60], "epochs": 100, "callbacks": ["MaskedClassifier"], "batch": 128}
            | {"encoder": "resnet50_tiny_imagenet"},
        ),
        (("dark_side", "table2", "mx", "cifar100/densenet121"), DARK | {"encoder": "densenet121_cifar"}),
        (("dark_side", "table2", "fl", "cifar10/vgg16"), DARK | {"encoder": "vgg16_bn_cifar", "factor": 0.1}),
        (("dark_side", "table3", "ls", "cifar10_1/vgg16"), DARK | {"encoder": "vgg16_bn_cifar", "factor": 0.1}),
        (("dark_side", "table1", "baseline", "imagenet/resnet50"), DARK_IMAGENET | {"encoder": "resnet50"}),
        (("dark_side", "table1", "mx", "imagenet_v2/resnet50"), DARK_IMAGENET | {"encoder": "resnet50"}),
        (
            ("dark_side", "table4", "confidnet", "cifar10/vgg16"),
            STEP | {"encoder": "vgg16_bn_cifar", "lr": 1e-3, "milestones": None, "factor": None, "epochs": 250},
        ),
        (
            ("refcal", "headline", "refcal", "cifar100_lt/resnet50"),
            STEP
            | {"encoder": "resnet50_cifar", "lr": 0.5, "decay": 1e-4, "milestones": None, "factor": None}
            | {"epochs": 1000, "batch": 1024, "seed": 1234},
        ),
        (
            ("neural_clamping", "table1", "ts", "bloodmnist/resnet50"),
            STEP
            | {"encoder": "resnet50_cifar", "optimizer": "Adam", "lr": 1e-3, "decay": 0.0, "milestones": [50, 75]}
            | {"factor": 0.1, "epochs": 100},
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_cells_compose_to_the_settings_of_the_papers(calib, where, expected):
    assert _short(composed(calib, cell(INDEX, *where).commands[0])) == expected


def test_parameters_of_methods_are_those_of_the_papers(calib):
    def model(*where):
        return composed(calib, cell(INDEX, *where).commands[0])["model"]["init_args"]

    assert model("dark_side", "table2", "ls", "cifar10/vgg16")["smoothing"] == 0.05
    assert model("dark_side", "table1", "ls", "imagenet/resnet50")["smoothing"] == 0.1
    assert model("dark_side", "table2", "mx", "cifar10/vgg16")["alpha"] == 0.2
    assert model("dark_side", "table2", "fl", "cifar10/vgg16")["gamma"] == 3
    assert model("mac_cal", "table1", "mbls", "cifar10/resnet50")["margin"] == 6
    assert model("mac_cal", "table1", "mbls", "tiny_imagenet/resnet50")["margin"] == 10
    assert model("dark_side", "table1", "erl", "imagenet_v2/resnet50")["strength"] == 0.1
    temperatures = [
        options_of(cell(INDEX, "dark_side", *where).commands[1])["--calibrators"]
        for where in (("table1", "ts", "imagenet/resnet50"), ("table2", "ts", "cifar10/vgg16"))
    ]
    assert temperatures == [["FixedTemperature(1.1)"], ["FixedTemperature(1.5)"]]


def test_the_clip_of_the_literal_recipe(calib):
    found = composed(calib, FLSD)
    assert found["trainer"]["callbacks"][0]["init_args"] == {"max_norm": 2 / 128}
    assert found["model"]["init_args"]["optimizer"]["init_args"]["weight_decay"] == 5e-4 / 128
    split = found["data"]["init_args"]["split"]
    assert (split["val"], split["share"], split["choose"], split["seed"]) == (5000, True, "shuffled", 1)


@pytest.mark.parametrize("row", ["tst", "vtst"])
def test_heads_of_tst_are_trained_as_in_mac_cal(calib, row):
    found = composed(calib, cell(INDEX, "mac_cal", "table1", row, "cifar100/wrn26_10").commands[0])
    switch = found["model"]["init_args"]["switch"]["init_args"]
    assert switch["at_epoch"] == -40
    training = switch["training"]["init_args"]
    assert training["optimizer"]["class_path"] == "torch.optim.SGD"
    assert training["optimizer"]["init_args"]["lr"] == 0.1
    assert training["optimizer"]["init_args"]["momentum"] == 0.9
    assert training["optimizer"]["init_args"]["weight_decay"] == 5e-4
    assert (training["batch_size"], training["scheduler"]) == (128, None)
    assert _short(found) == MUKHOTI | {"encoder": "wrn26_10"}


@pytest.mark.parametrize(
    ("row", "head", "gradient", "scaling", "eta"),
    [
        ("masked_retraining", "MaskedLinearHead", "straight_through", "none", [0, 0]),
        ("gradient_restriction", "MaskedLinearHead", "restricted", "none", [0, 0]),
        ("classifier_restructure", "MaskedBottleneck", "restricted", "none", [0, 0]),
        ("static_sparsity", "MaskedBottleneck", "restricted", "none", [0.1, 0.1]),
        ("decaying_sparsity", "MaskedBottleneck", "restricted", "none", [0.1, 0.001]),
    ],
)
def test_the_ablation_of_mac_cal_adds_one_part_after_the_other(calib, row, head, gradient, scaling, eta):
    found = composed(calib, cell(INDEX, "mac_cal", "table5", row, "cifar10/densenet121").commands[0])
    clip, masked = found["trainer"]["callbacks"]
    assert clip["init_args"] == {"max_norm": 2 / 128}
    classifier = masked["init_args"]["classifier"]
    assert classifier["class_path"].rpartition(".")[2] == head
    assert (classifier["init_args"]["gradient"], classifier["init_args"]["scaling"]) == (gradient, scaling)
    assert masked["init_args"]["sparsity"]["eta"] == eta
    assert (masked["init_args"]["sparsity"]["q_is"], masked["init_args"]["sparsity"]["start"]) == ("keep", 0.5)


def test_another_seed_counts_after_that_of_the_paper(calib):
    for where in (
        ("mac_cal", "table1", "flsd", "cifar100/resnet110"),
        ("refcal", "headline", "crl", "cifar100_lt/resnet50"),
    ):
        assert composed(calib, cell(INDEX, *where, 5).commands[0])["seed_everything"] == 5


def test_null_reaches_a_stage_and_our_criterion_is_meant(calib):
    plain = composed(calib, "calib fit -c recipe/mukhoti --data cifar10_mac_cal --model mac_cal")
    stage = plain["model"]["init_args"]["switch"]["init_args"]["training"]["init_args"]
    assert stage["scheduler"]["class_path"].endswith(".CosineToEnd")
    options = (
        "--model.scheduler=null --model.switch.training.scheduler=null "
        "--model.switch.training.criterion=CrossEntropyLoss"
    )
    found = composed(calib, f"calib fit -c recipe/mukhoti --data cifar10_mac_cal --model mac_cal {options}")
    stage = found["model"]["init_args"]["switch"]["init_args"]["training"]["init_args"]
    assert stage["scheduler"] is None
    assert found["model"]["init_args"]["scheduler"] is None
    assert stage["criterion"]["class_path"].startswith("calib_lightning.methods.")


def test_a_criterion_in_a_file_is_ours(calib, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "model: {class_path: MDCA, init_args: {criterion: CrossEntropyLoss}}\ndata: ToyDataModule\n"
    )
    found = composed(calib, "calib fit -c mine.yaml")
    assert found["model"]["init_args"]["criterion"]["class_path"].startswith("calib_lightning.methods.")


# --- the batch size of a recipe --------------------------------------------------------------------------------------


@pytest.fixture
def built(calib, monkeypatch):
    """What ``calib fit`` has built of a command, and what it said; it does not train."""
    kept = []
    monkeypatch.setattr(CalibCLI, "_run_subcommand", lambda cli, subcommand: kept.append(cli))

    def build(command):
        done = calib(*shlex.split(command)[1:])
        assert done.code == 0, done.err
        return kept.pop(), done.err

    return build


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("-c recipe/tst --data digits", 256),
        ("--data digits -c recipe/tst", 256),
        ("-c recipe/tst --data digits --batch_size=7", 7),
        ("-c recipe/tst --batch_size=null --data digits", 128),
        ("-c recipe/tst --data digits --data.batch_size=9", 9),
        ("-c recipe/tst --data digits --data.init_args.batch_size 9", 9),
        ("-c recipe/tst --data digits --data.batch_size=9 --batch_size=7", 9),
        ("-c recipe/dark-imagenet --data digits", 256),
        ("--data digits", 128),
        ("-c recipe/tst --data digits_lt", 256),  # which has batches of its own
    ],
)
def test_batches_of_a_recipe(built, options, expected):
    cli, _ = built(f"calib fit {options} --model cross_entropy --model.encoder=digits_cnn")
    assert cli.datamodule.batch_size == expected


def test_batches_of_data_that_has_no_batch_size(built, tmp_path):
    (tmp_path / "own_rows.py").write_text(
        "from calib_lightning.data import DigitsDataModule\n\n\n"
        "class Own(DigitsDataModule):\n    def __init__(self) -> None:\n        super().__init__()\n"
    )
    cli, said = built("calib fit -c recipe/tst --data=own_rows.Own --model cross_entropy --model.encoder=digits_cnn")
    assert cli.datamodule.batch_size == 128
    assert "The recipe asks for batches of 256, but Own has no batch_size: its own are used." in said


def test_no_batch_without_rows(calib):
    done = calib("fit", "-c", "recipe/tst", "--data", "digits", "--model", "focal", "--batch_size=0")
    assert done.code == 1
    assert "batch_size is 0; it must be at least 1." in done.err


# --- slow: every cell is built, and some are run ---------------------------------------------------------------------


@pytest.fixture
def no_download(monkeypatch):
    """``timm.create_model`` without pretrained weights; the names that were asked for with them."""
    create, asked = timm.create_model, []

    def untrained(name, pretrained=False, **options):
        asked.extend([name] if pretrained else [])
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", untrained)
    return asked


CLASSES = {"cifar10": 10, "cifar100": 100, "cifar100_lt": 100, "tiny_imagenet": 200, "imagenet": 1000, "bloodmnist": 8}


@pytest.mark.slow
def test_every_training_of_the_index_is_built(built, no_download, tmp_path):
    for command, found in fits().items():
        cli, _ = built(command)
        encoder = yaml.safe_load(options_of(command)["--model.encoder"][0])
        name = encoder if isinstance(encoder, str) else encoder["name"]
        data = found.column.partition("/")[0]
        assert cli.model.encoder.name == name
        assert (
            cli.model.num_classes
            == CLASSES[{"cifar10_1": "cifar10", "cifar10_2": "cifar10"}.get(data, data.removesuffix("_v2"))]
        )
        assert (name in no_download) == isinstance(encoder, dict)
        stages = [type(each).__name__ for each in cli.trainer.callbacks]
        assert ("MaskedClassifier" in stages) == any(
            "mac_cal" in piece for piece in options_of(command).get("-c", [])
        ), command
        assert ("ClipGradients" in stages) == any(
            piece in ("recipe/mukhoti", "recipe/tiny-imagenet") for piece in options_of(command).get("-c", [])
        )
        shutil.rmtree(tmp_path / "runs")
    print(f"{len(CELLS)} cells, {len(fits())} trainings: all built")


def _of_index():
    """Cells of the index: all rows of MaC-Cal's Table 1 and of its ablation, and what the other papers add."""
    rows, columns = rows_and_columns(INDEX, "mac_cal", "table1")
    columns = [column for column in columns if "tiny" not in column] + ["tiny_imagenet/resnet50"]
    chosen = [("mac_cal", "table1", row, columns[number % 9]) for number, row in enumerate(rows)]
    chosen += [
        ("mac_cal", "table5", row, "cifar10/densenet121")
        for row in rows_and_columns(INDEX, "mac_cal", "table5")[0][1:5]
    ]
    chosen += [
        ("mac_cal", "table3", "mit+mac_cal", "tiny_imagenet/resnet50"),
        ("mac_cal", "table3", "mixup+mac_cal", "cifar10/resnet50"),
        ("mac_cal", "table3", "dfl+mac_cal", "tiny_imagenet/resnet50"),
        ("refcal", "headline", "refcal", "cifar100_lt/resnet50"),
        ("refcal", "headline", "crl", "cifar100_lt/resnet50"),
        ("dark_side", "table1", "ts", "imagenet_v2/resnet50"),
        ("dark_side", "table1", "mx", "imagenet/resnet50"),
        ("dark_side", "table2", "erl", "cifar100/vgg16"),
        ("dark_side", "table2", "ts", "cifar10/densenet121"),
        ("dark_side", "table3", "ts", "cifar10_1/vgg16"),
        ("dark_side", "table3", "fl", "cifar10_2/vgg16"),
        ("dark_side", "table4", "confidnet", "cifar10/vgg16"),
        ("neural_clamping", "table1", "nc_fl", "bloodmnist/resnet50"),
        ("neural_clamping", "table2", "dir_odir", "cifar100/resnet110"),
        ("neural_clamping", "table2", "vs", "cifar100/wrn40_10"),
        ("neural_clamping", "table3", "ts", "imagenet/resnet101"),
        ("neural_clamping", "table3", "ts", "imagenet/vit_s16"),
        ("neural_clamping", "table3", "ts", "imagenet/mixer_b16"),
        ("neural_clamping", "table4", "output_only", "cifar100/resnet110"),
    ]
    return {"-".join(where).replace("/", "-"): cell(INDEX, *where).commands for where in chosen}


def _beside_the_index():
    """Methods, recipes and layouts that no table has."""
    grey = "--model.encoder='{name: NAME, in_channels: 1}'"
    trainings = {
        "mdca-svhn": "-c recipe/mdca-svhn --data svhn --model mdca",
        "mdca-cifar10": "-c recipe/mdca-cifar10 --data cifar10 --model dca",
        "mdca-cifar100": "-c recipe/mdca-cifar100 --data cifar100_lt --model class_balanced",
        "mdca-tiny": "-c recipe/mdca-tiny-imagenet --data tiny_imagenet_lt --model logit_norm",
        "ldam": "-c recipe/ldam --data cifar10_lt --model ldam",
        "crl": "-c recipe/crl --data cifar10 --model crl",
        "tst": "-c recipe/tst --data cifar10_mac_cal --model tst",
        "brier-mnist": f"-c recipe/mukhoti-brier --data mnist --model brier {grey.replace('NAME', 'resnet20_classic')}",
        "fashion": f"-c recipe/cifar350 --data fashion_mnist --model mit_a {grey.replace('NAME', 'preact_resnet18')}",
        "breast": f"-c recipe/medmnist --data breastmnist --model focal_schedule {grey.replace('NAME', 'wrn40_2')}",
        "textures": "-c recipe/dark-imagenet --data textures --model regmixup --model.encoder=resnet18",
        "folder": "-c recipe/gpu-hour --data folder --model two_stage --model.encoder=resnet18_cifar "
        "--trainer.callbacks.compile=false",
        "arrays": "-c recipe/cpu-evening --data arrays --model mac_cal",
        "augmix": "-c recipe/cifar350 --data cifar10h --model augmix --model.encoder=densenet_bc100",
        "ada-focal": "-c recipe/cifar350 -c callback/temperature --data cifar10 --model ada_focal",
        "digits": "-c recipe/cifar350 --data digits --model entropy_regularization --model.encoder=digits_cnn",
    }
    commands = {name: (f"calib fit {options} --run_dir=runs/{name}",) for name, options in trainings.items()}
    shifted = "calib test -c runs/shift/config.yaml --data cifar10_c --data.corruptions=[fog] --run_dir=runs/shift/fog"
    fit = "calib fit -c recipe/refcal-baseline --data cifar10 --model focal --model.encoder=resnet20_classic"
    return commands | {"shift": (f"{fit} --run_dir=runs/shift", shifted)}


COVERING = _of_index() | _beside_the_index()
SHORT = (
    *("--trainer.accelerator=cpu", "--trainer.devices=1", "--quiet=true"),
    *(f"--trainer.limit_{name}_batches=1" for name in ("train", "val", "test")),
)


def _short_fit(options):
    """What makes a training one of a single step in each stage."""
    sizes = SETS[options["--data"][0]][1]
    more = [f"--data.split.{name}={size}" for name, size in sizes.items() if f"--data.split.{name}" not in options]
    if options.get("--trainer.max_epochs") != ["0"]:
        more += ["--trainer.max_epochs=1"]
    if options["--model"][0] in ("tst", "v_tst", "mac_cal", "two_stage", "refcal", "confidnet"):
        more += ["--model.switch.at_epoch=-1", "--model.switch.training.batch_size=4"]
    if any(name.startswith("callback/mac_cal") for name in options.get("-c", [])):
        more += ["--trainer.callbacks.at_epoch=-1", "--trainer.callbacks.training.batch_size=4"]
    return [*SHORT, "--batch_size=4", *more]


def test_the_covering_set_has_every_method_network_and_layout():
    trained = [options_of(commands[0]) for commands in COVERING.values()]
    all_of_them = [options_of(command) for commands in COVERING.values() for command in commands]
    assert {options["--model"][0] for options in trained} == set(METHODS)
    assert {name for options in all_of_them for name in options.get("--data", [])} == set(SETS)
    pieces = Counter(name for options in trained for name in options.get("-c", []))
    assert set(pieces) == {f"recipe/{name}" for name in RECIPES} | {
        f"callback/{path.stem}" for path in (CONFIGS / "callback").glob("*.yaml")
    }
    configured = {each["encoder"] for each in map(_recipe_model, trained)}
    asked = {options["--model.encoder"][0] for options in trained if "--model.encoder" in options} | configured
    for network in (
        *("resnet20_classic", "resnet110_classic", "resnet50_cifar", "resnet110_bottleneck", "wrn26_10", "wrn40_10"),
        *("densenet121_cifar", "vgg16_bn_cifar", "preact_resnet110", "resnet50_tiny_imagenet", "resnet50"),
    ):
        assert any(network in name for name in asked), network
    # every network and every piece of data of the index
    assert {options_of(command)["--model.encoder"][0] for command in fits()} <= asked
    print(f"{len(COVERING)} cells cover the methods, networks and layouts")


def _recipe_model(options):
    return (
        yaml.safe_load(find_config(options["-c"][0]).read_text())["model"]["init_args"]
        if "-c" in options
        else {"encoder": ""}
    )


@pytest.fixture(scope="module")
def count():
    """Prints how many cells were run."""
    done = []
    yield done
    print(f"\n{len(done)} of {len(COVERING)} cells of the covering set were run")


@pytest.mark.slow
@pytest.mark.parametrize("name", COVERING)
def test_cells_are_run(calib, tmp_path, monkeypatch, no_download, count, name):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    commands = COVERING[name]
    options = [options_of(command) for command in commands]
    write_sets([data for each in options for data in each.get("--data", [])], tmp_path / "work" / "data", monkeypatch)
    for command, each in zip(commands, options, strict=True):
        kind = each[""][0]
        more = {"fit": _short_fit, "test": lambda _: SHORT}.get(kind, lambda _: ())(each)
        if "NeuralClamping" in commands[-1]:  # which sees all images again
            more = [word for word in more if "limit_test" not in word]
        done = calib(*shlex.split(command)[1:], *more)
        assert done.code == 0, done.err
        if kind in ("fit", "test"):
            record = json.loads((tmp_path / "work" / each["--run_dir"][0] / "run.json").read_text())
            assert [stage["status"] for stage in record["stages"]] == ["finished"] * len(record["stages"])
            assert any(re.fullmatch(r"(test|shift/\w+(/\w+)?)/nll", key) for key in record["results"]), record[
                "results"
            ]
        if kind == "fit":
            # one step in each stage, none of a network that is taken as it is
            stages = 0 if each.get("--trainer.max_epochs") == ["0"] else 2 if _staged(each) else 1
            assert (record["stages"][0]["epochs"], record["stages"][0]["steps"]) == (stages, stages)
            run = tmp_path / "work" / each["--run_dir"][0]
    if "--trainer.max_epochs" in options[0]:
        assert set(no_download) == {yaml.safe_load(options[0]["--model.encoder"][0])["name"]}
        assert (run / "calibrate" / "Temperature.pt").is_file()
    count.append(name)
    shutil.rmtree(tmp_path / "work" / "runs")


def _staged(options):
    return any(word.endswith("at_epoch=-1") for word in _short_fit(options))
