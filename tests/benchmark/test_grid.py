"""What the file of a benchmark asks for."""

import pytest
import yaml

from calib_lightning.benchmark.grid import read_grid


def _grid(tmp_path, text):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    return read_grid(path)


def test_every_combination_in_the_order_of_the_file(tmp_path):
    grid = _grid(tmp_path, "{data: [a, b], method: [m, n], network: [x, y], seeds: [3, 1]}")
    found = [(run.data, run.network, run.method, run.seed) for run in grid.runs]
    assert found == [(d, w, m, s) for d in "ab" for w in "xy" for m in "mn" for s in (3, 1)]
    assert grid.folder.as_posix() == "runs/grid"


def test_a_command_line_has_pieces_data_method_network_and_options_in_this_order(tmp_path):
    text = """
    config: [quickstart, logger/wandb]
    data: {as: hard, data: cifar10, options: {data.shift: [cifar10_c]}}
    method: {method: focal, callback: mac_cal, options: {model.gamma: 2, trainer.max_epochs: 9}}
    network: {as: big, network: {name: resnet50, pretrained: true}}
    recipe: cifar350
    calibrators: [Temperature, "Sequential(Temperature(),OneVsRest(Isotonic()))"]
    options: {trainer.max_epochs: 3, trainer.max_time: null, trainer.benchmark: true}
    """
    grid = _grid(tmp_path, text)
    (run,) = grid.runs
    pieces = [
        "-c",
        "quickstart",
        "-c",
        "logger/wandb",
        "-c",
        "recipe/cifar350",
        "-c",
        "callback/mac_cal",
        "--data=cifar10",
        "--model=focal",
    ]
    assert list(run.arguments[:10]) == pieces
    assert list(run.arguments[10:]) == [
        '--model.encoder={"name": "resnet50", "pretrained": true}',
        "--trainer.max_epochs=9",  # that of the entry
        "--trainer.max_time=null",
        "--trainer.benchmark=true",
        '--data.shift=["cifar10_c"]',
        "--model.gamma=2",
    ]
    assert (run.data, run.method, run.network, run.recipe) == ("hard", "focal+mac_cal", "big", None)
    assert len(grid.calibrators) == 2


def test_several_recipes_are_told_apart(tmp_path):
    grid = _grid(tmp_path, "{data: a, method: m, recipe: [cifar350, my/own.yaml]}")
    assert [run.recipe for run in grid.runs] == ["cifar350", "own"]
    assert [run.arguments[:2] for run in grid.runs] == [("-c", "recipe/cifar350"), ("-c", "my/own.yaml")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{methods: focal}", r"methods is no key; .*Did you mean method\?"),
        ("{method: {method: focal, callbak: mac_cal}}", r"method: callbak is no key; .*Did you mean callback\?"),
        ("{data: {data: cifar10, callback: mac_cal}}", "data: callback is no key"),
        ("{method: {options: {}}}", "method has the entry .*must be a name, or a mapping of method, as, callback"),
        ("{method: 3}", "method has the entry 3"),
        ("{method: []}", "method is an empty list"),
        ("{seeds: 1.5}", "seeds is 1.5; it must be a whole number"),
        ("{seeds: [0, true]}", "seeds is .0, True."),
        ("{seeds: [0, 0]}", "each seed must be there once"),
        ("{seeds: -1}", "seeds is -1"),
        (
            "{network: {as: r20, network: resnet20_classic, options: {model.encoder.in_channels: 1}}}",
            r"network: options has model.encoder.in_channels; .*network: {as: r20, network: {name: resnet20_classic, ",
        ),
        ("{options: {model.encoder.in_channels: 1}}", "options has model.encoder.in_channels; .* with its name"),
        ("{network: {name: resnet18, in_channels: 1}}", "which has no label. Write for example network: {as: r20, "),
        ("{options: {run_dir: x}}", "options has run_dir, which the benchmark sets. .*use folder:"),
        ("{method: {method: focal, options: {seed_everything: 3}}}", "use seeds:"),
        ("{options: [a]}", "options is .*must be options of calib fit"),
        ("{calibrators: 3}", "calibrators is 3; it must be a name or a list of names"),
        ("{folder: 3}", "folder is 3"),
        ("{baseline: [a]}", "baseline is"),
        ("just text", "must have keys"),
        ("{a: [", "is not YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        _grid(tmp_path, text)
    assert "grid.yaml" in str(caught.value)


def test_aliases_cannot_multiply(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 8)]
    assert yaml.compose("\n".join(lines)) is not None
    with pytest.raises(ValueError, match="100,000 values"):
        _grid(tmp_path, "\n".join(lines))
