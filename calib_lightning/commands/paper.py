"""``calib paper``: the commands behind a cell of a published table, printed or run."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calib_lightning.utils.files import write_text
from calib_lightning.utils.papers import Cell, cell, read_index, rows_and_columns, tables
from calib_lightning.utils.stopping import Stopped

FINISHED = "paper.txt"
"""File in the folder of a finished run, with its command."""


def main(argv: Sequence[str]) -> int:
    """Run ``calib paper``; exit code 1 for an unknown cell, or the exit code of the command that failed."""
    own = list(argv)
    at = own.index("--") if "--" in own else len(own)
    own, more = own[:at], own[at + 1 :]
    asked = _parser().parse_args(own)
    try:
        index = read_index()
        if asked.table is None:
            print(_contents(index, [asked.paper] if asked.paper else list(index)))
            return 0
        if asked.row is None or asked.column is None:
            print(_axes(index, asked.paper, asked.table))
            return 0
        found = cell(index, asked.paper, asked.table, asked.row, asked.column, asked.seed)
    except (ValueError, OSError) as error:
        print(f"calib: error: {error}", file=sys.stderr)
        return 1
    commands = [_with(command, more) for command in found.commands]
    print(_described(found), *commands, sep="\n")
    return _run(commands) if asked.run else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="calib paper",
        description="Print or run the commands of a cell of a published table; without a cell, list what there is.",
        epilog="What follows -- is added to every calib fit and calib test: calib paper ... --run -- --data.root=DIR",
    )
    parser.add_argument("paper", nargs="?", help="refcal, dark_side, neural_clamping or mac_cal")
    parser.add_argument("table", nargs="?", help="a table of the paper, such as table1")
    parser.add_argument("--row", help="a row of the table, a method")
    parser.add_argument("--column", help="a column of the table, data/network")
    parser.add_argument("--seed", type=int, help="a seed other than the paper's; it is part of the run folder's name")
    parser.add_argument("--run", action="store_true", help="run the commands; finished trainings are not repeated")
    return parser


def _contents(index: Mapping[str, Any], papers: Sequence[str]) -> str:
    lines = []
    for paper in papers:
        names = tables(index, paper)
        lines.append(f"{paper}: {index[paper]['title']}")
        lines += [f"  {name}: {index[paper]['tables'][name]['title']}" for name in names]
    return "\n".join([*lines, "calib paper PAPER TABLE lists rows and columns."])


def _axes(index: Mapping[str, Any], paper: str, table: str) -> str:
    rows, columns = rows_and_columns(index, paper, table)
    title = f"{paper} {table}: {index[paper]['tables'][table]['title']}"
    return f"{title}\n  --row {', '.join(rows)}\n  --column {', '.join(columns)}"


def _described(found: Cell) -> str:
    """Comments above the commands, so that the output is a script."""
    paper, table, row, column = found.where
    title, *remarks = found.remarks
    published = ", ".join(f"{name} {value}" for name, value in found.published.items()) or "nothing"
    average = " (the average over networks)" if found.averaged else ""
    lines = [f"{paper} {table}, row {row}, column {column}: {title}", f"published: {published}{average}", *remarks]
    return "\n".join(f"# {line}" for line in lines)


def _with(command: str, more: Sequence[str]) -> str:
    trained = command.startswith(("calib fit ", "calib test "))
    return shlex.join([*shlex.split(command), *more]) if trained else command


def _run(commands: Sequence[str]) -> int:
    for command in commands:
        words = shlex.split(command)
        if words[1] == "fit":
            run = Path(next(word.partition("=")[2] for word in reversed(words) if word.startswith("--run_dir=")))
            done = run / FINISHED
            if done.is_file() and done.read_text(encoding="utf-8").strip() == command:
                print(f"# {run} is finished: not trained again")
                continue
            if run.exists():
                print(f"calib: error: {_why_not(run, done)}", file=sys.stderr)
                return 1
        code, stopped = _call(words[1:])
        if code:
            return code
        if words[1] == "fit" and run.is_dir():
            write_text(done, f"{command}\n")
        if stopped is not None:
            raise stopped
    return 0


def _call(words: Sequence[str]) -> tuple[int, Stopped | None]:
    """Run a command to its end: the exit code, and the request to stop that has come and that was passed on to it."""
    process, stopped = subprocess.Popen([sys.executable, "-m", "calib_lightning", *words]), None
    try:
        process.wait()
    except Stopped as request:
        stopped = request
        process.send_signal(request.code - 128)
        process.wait()  # a training saves its checkpoint
    return process.returncode if process.returncode >= 0 else 128 - process.returncode, stopped


def _why_not(run: Path, done: Path) -> str:
    from calib_lightning.commands.fit_folder import resume_command  # here: its parser takes a while to import

    if done.is_file():
        return (
            f"{run} was made by another command ({done.read_text(encoding='utf-8').strip()}). Remove or rename "
            "the folder, or give a --seed, which has its own folder."
        )
    resume = resume_command(run)
    remedy = "Remove the folder." if resume is None else f"Continue with {resume}, or remove the folder."
    return f"{run} exists, but its training is not finished. {remedy}"
