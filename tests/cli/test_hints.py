"""A misspelt name is looked up in the list that it belongs to, and nothing else is."""

import pytest

from calib_lightning.utils.names import nearest

START = ("fit", "--data", "digits", "--model", "label_smoothing")


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (("--trainer.max_epoch=2",), "--trainer.max_epoch: did you mean --trainer.max_epochs?"),
        (("--max_epochs=2",), "--max_epochs: did you mean --trainer.max_epochs?"),
        (("--run-dri=x",), "--run_dri: did you mean --run_dir?"),
        (("--seed=3",), "--seed: did you mean --seed_everything?"),
        (("--trainer.callback+=EarlyStopping",), "--trainer.callback+: did you mean --trainer.callbacks?"),
        (("--model.smoothin=0.1",), "smoothin: did you mean smoothing?"),
        (("--model", "focal", "--model.gama=2"), "gama: did you mean gamma?"),
        (("--model", "focal", "--model.init_args.gama=2"), "gama: did you mean gamma?"),
        (("--data.split.vall=3",), "vall: did you mean val?"),
        (("--model=LabelSmoothin",), "LabelSmoothin: did you mean LabelSmoothing?"),
        (("--data=Cifar10",), "Cifar10: did you mean cifar10?"),
        (("--data=DigitDataModule",), "DigitDataModule: did you mean DigitsDataModule?"),
        (("--model.scheduler=CosineToEn",), "CosineToEn: did you mean CosineToEnd?"),
        (("--model.optimizer=SDG",), "SDG: did you mean SGD?"),
        (("--model.optimizer=SGD", "--model.optimizer.lrr=1"), "lrr: did you mean lr?"),
        (("--trainer.callbacks+=EarlyStoping",), "EarlyStoping: did you mean EarlyStopping?"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_name_at_fault_gets_the_nearest_of_its_list(calib, options, hint):
    done = calib(*START, *options)
    assert done.code == 2
    assert [line.strip() for line in done.err.splitlines() if "did you mean" in line] == [hint]


@pytest.mark.parametrize(
    ("option", "name", "meant"),
    [
        ("--data", "cifar1O", "cifar10"),
        ("--model", "focl", "focal"),
        ("--model.help", "focl", "focal"),
        ("-c", "quikstart", "quickstart"),
        ("-c", "cpu-evenin", "recipe/cpu-evening"),
        ("-c", "cifar350", "recipe/cifar350"),
    ],
)
def test_a_misspelt_configuration_gets_the_nearest(calib, option, name, meant):
    done = calib("fit", option, name)
    assert done.code == 1
    assert f" is {name!r}; it must be a file" in done.err
    assert done.err.endswith(f"prints. Did you mean {meant}?\n")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--model.smoothing=much",), 'Parser key "smoothing"'),
        (("--data.split.val=lots",), "Given value: lots"),
        (("--trainer.max_epochs=many",), "Given value: many"),
        (("--xyzzy=1",), "unrecognized arguments: --xyzzy=1"),
        (("--model.xyzzy=1",), "Option 'xyzzy' is not accepted"),
        (("--model=Xyzzy",), "Xyzzy is neither a known class nor a file"),
        (("more",), "unrecognized arguments: more"),
        (("--model",), "argument --model: expected one argument"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_words_that_are_right_or_far_from_everything_get_no_hint(calib, options, said):
    done = calib(*START, *options)
    assert done.code == 2
    assert said in done.err
    assert "did you mean" not in done.err.lower()


def test_what_the_parser_says_of_its_types_is_left_out(calib):
    for options in (("--model.optimizer=SDG",), ("--model.optimizer=SGD", "--model.optimizer.lrr=1"), ("--data=X",)):
        done = calib(*START, *options)
        for talk in ("Union", "Subtypes", "NoneType", "Namespace", "NestedArg", "Expected a path", "typing."):
            assert talk not in done.err


def test_a_missing_method_is_asked_for(calib):
    assert "error: --model is missing; name one, or give a configuration" in calib("fit", "--data=digits").err


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("FOCL", ["focal", "brier"], "focal"),
        ("Focl", ["focal", "Focal"], "Focal"),
        ("seed", ["seed_everything", "select_on"], "seed_everything"),
        ("s", ["seed_everything"], None),
        ("xyzzy", ["focal", "brier"], None),
        ("focal", [], None),
    ],
)
def test_nearest(name, known, meant):
    assert nearest(name, known) == meant
