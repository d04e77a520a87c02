"""The help of ``calib`` and of the trainer's commands; nothing heavy is imported, so that it is there at once."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from calib_lightning.commands.names import COMMANDS

_WIDTH = 118
_COLUMN = 34

RUN_DIR = "folder of the run; a number is added where it exists (default: runs/DATA-METHOD-SEED)"
SELECT_ON = (
    "validation metric that chooses the checkpoint, such as val/nll, val/accuracy or val/ece, or 'last' (default: the "
    "method's own, val/nll for most; 'last' where the data has no validation split)"
)
NUM_CLASSES = "number of classes K, for data of your own that does not say it"
TEST_AFTER_FIT = "test the chosen checkpoint after fit, save all predictions and print the table (default: true)"
BATCH_SIZE = "rows in one batch of one process; --data.batch_size on the command line wins"
LOG_ALL = "give every value to the loggers beside the CSV file, not the core metrics of each set alone (default: false)"
LOG_LIMIT = "largest artifact that Weights & Biases gets, in MiB, such as a checkpoint; 0 for none (default: 500)"
QUIET = "print only the table of results, and on standard error what is wrong or not as asked (default: false)"


class Option(NamedTuple):
    """A line of the help.

    Attributes:
        spelling: Name and value, as they are written.
        text: What it does.
        only: The one command that needs it; empty for all.
    """

    spelling: str
    text: str
    only: str = ""


_CONFIGURATION = (
    Option("-c, --config NAME", "a name of `calib list configs` or a file; may be given several times"),
    Option("--data NAME", "data: a name of `calib list data`, a file, or a class such as my_module.MyDataModule"),
    Option("--data.SETTING=VALUE", "a setting of the data, such as --data.root=DIR; --data.help NAME lists them"),
    Option("--model NAME", "method: a name of `calib list methods`, a file, or a class"),
    Option("--model.SETTING=VALUE", "a setting of the method, such as --model.encoder=NAME of `calib list networks` or "
        "--model.optimizer.lr=0.1; --model.help NAME lists them"),
    Option("--print_config", "print the whole configuration instead of running it"),
)  # fmt: skip

_RUN = (
    Option("--run_dir DIR", RUN_DIR),
    Option("--ckpt_path FILE", "go on from this checkpoint, such as RUN/checkpoints/last.ckpt", "fit"),
    Option("--seed_everything N", "seed of everything random (default: 0)"),
    Option("--batch_size N", BATCH_SIZE),
    Option("--num_classes K", NUM_CLASSES),
    Option("--select_on METRIC", SELECT_ON, "fit"),
    Option("--test_after_fit=false", TEST_AFTER_FIT, "fit"),
    Option("--log_all", LOG_ALL),
    Option("--log_limit MIB", LOG_LIMIT),
    Option("--quiet", QUIET),
)

_NETWORK = Option("--ckpt_path FILE", "the trained network (default: the checkpoint that the run of -c has chosen)")

_TRAINER = (
    Option("--trainer.max_epochs N", "epochs of training", "fit"),
    Option("--trainer.accelerator KIND", "cpu, gpu or auto (default: auto)"),
    Option("--trainer.devices N", "how many processes, each with a device of its own (default: auto)"),
    Option("--trainer.strategy NAME", "how they work together, such as ddp"),
    Option("--trainer.precision NAME", "such as bf16-mixed (default: 32-true)"),
    Option("--trainer.accumulate_grad_batches N", "batches in one step of the optimiser", "fit"),
    Option("--trainer.check_val_every_n_epoch N", "epochs between validations", "fit"),
    Option("--trainer.limit_train_batches N", "at most so many batches in an epoch", "fit"),
    Option("--trainer.fast_dev_run=true", "one batch of everything, to see whether it works"),
    Option("--trainer.callbacks+=CLASS", "one more callback; --trainer.callbacks.help CLASS lists its settings"),
)

_EXAMPLES = {
    "fit": (
        "calib fit -c quickstart                                              a first table, in a minute",
        "calib fit -c recipe/cifar350 --data cifar10 --model focal --model.gamma=2",
        "calib fit -c RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt   go on where a run was stopped",
    ),
    "validate": ("calib validate -c RUN/config.yaml",),
    "test": ("calib test -c RUN/config.yaml", "calib test -c RUN/config.yaml --data cifar10_c"),
    "predict": ("calib predict -c RUN/config.yaml",),
}

_DATA_USAGE = """usage: calib data list [--markdown]
       calib data prepare NAME [--data.SETTING=VALUE ...]
       calib data show NAME [--data.SETTING=VALUE ...] [--output FILE] [--images N] [--seed S] [--corruptions]

list     every data set with its size, licence and source
prepare  download the files, or check those that are there; unpack them
show     count the images of every set and class, and draw a sheet of examples as the network sees them, before and
         after augmentation; with corrupted sets a second sheet of corruptions by severity. Missing files are
         downloaded first"""

_DATA = (
    Option("NAME", "a name of the list, a file, or a class such as my_module.MyDataModule, as for calib fit --data"),
    Option("--data.SETTING=VALUE", "a setting of the data, such as --data.root=DIR or --data.download=false; calib fit "
        "--data.help NAME lists them"),
    Option("--output FILE", "the sheet, .png or .svg; a second one ends in _corruptions (default: NAME.png here, or "
        "NAME-2.png if that is there)"),
    Option("--images N", "augmented versions of each image; if there are none, as many more images (default: 5)"),
    Option("--seed S", "which images are drawn, and how they are augmented (default: 0)"),
    Option("--corruptions", "draw also one test image in the corruptions that --data.shift=generated evaluates"),
    Option("--markdown", "the list as the table of docs/data.md"),
)  # fmt: skip

_DATA_EXAMPLES = """examples:
  calib data list
  calib data prepare fashion_mnist --data.root=DIR
  calib data show folder --data.root=DIR --data.augment=true --output examples.png"""


def overview() -> str:
    """Write the help of ``calib``: every command in one line.

    Returns:
        Text of several lines.
    """
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.line}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: calib COMMAND [options]",
            "",
            "Classifiers whose confidence can be trusted.",
            "",
            "commands:",
            *lines,
            "",
            "calib COMMAND --help says more. A first table: calib fit -c quickstart",
        ]
    )


def trainer_help(command: str) -> str:
    """Write the short help of one of the trainer's commands.

    Args:
        command: fit, validate, test or predict.

    Returns:
        Text of at most 60 lines.
    """
    line = COMMANDS[command].line
    run = _RUN if command == "fit" else (_NETWORK, *_RUN)
    sections = {"what is run, where later words win:": _CONFIGURATION, "the run:": run, "the trainer:": _TRAINER}
    parts = [f"usage: calib {command} [options]", f"{line[0].upper()}{line[1:]}."]
    for heading, options in sections.items():
        wanted = [option for option in options if option.only in ("", command)]
        parts.append("\n".join([heading, *(line for option in wanted for line in _lines(option))]))
    parts.append("\n".join(["examples:", *(f"  {example}" for example in _EXAMPLES[command])]))
    parts.append(f"Every option of the trainer and the loggers: calib {command} --help_all")
    return "\n\n".join(parts)


def data_help() -> str:
    """Write the help of ``calib data``.

    Returns:
        Text of at most 60 lines.
    """
    parts = [
        _DATA_USAGE,
        "\n".join(["options:", *(line for option in _DATA for line in _lines(option))]),
        _DATA_EXAMPLES,
    ]
    return "\n\n".join(parts)


def _lines(option: Option) -> Iterator[str]:
    first, *others = textwrap.wrap(option.text, _WIDTH - _COLUMN, break_on_hyphens=False)
    if len(option.spelling) + 4 > _COLUMN:
        yield f"  {option.spelling}"
        yield " " * _COLUMN + first
    else:
        yield f"  {option.spelling}".ljust(_COLUMN) + first
    yield from (" " * _COLUMN + line for line in others)
