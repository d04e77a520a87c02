"""Real CIFAR-10 through the command line."""

import json
import subprocess
import sys

import pytest
import torch


@pytest.mark.slow
def test_resnet18_learns_real_cifar10_and_test_reproduces_the_figures(calib, tmp_path, real_data):
    torch.set_num_threads(2)  # minutes; nothing here is compared across thread counts
    root = tmp_path / "data"
    script = real_data / "unpack_cifar.py"
    subprocess.run([sys.executable, script, "cifar10", real_data / "cifar-10-webp", root], check=True)
    done = calib(
        "fit",
        *("-c", "recipe/cifar350", "--data", "cifar10", f"--data.root={root}", "--data.download=false"),
        *("--model", "cross_entropy", "--model.encoder=resnet18_cifar", "--model.optimizer.init_args.lr=0.02"),
        *(
            "--trainer.accelerator=cpu",
            "--trainer.max_steps=300",
            "--data.batch_size=32",
            "--trainer.max_epochs=null",
            "--run_dir=runs/c10",
        ),
        *("--select_on=last", "--quiet=true", "--data.split.val=0", "--data.split.calibration=1000"),
    )
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "c10"
    results = json.loads((run / "run.json").read_text())["results"]
    print(json.dumps(results, indent=1))
    assert results["test/n"] == 10_000
    assert results["test/accuracy"] > 0.3  # chance is 0.1
    done = calib("test", "-c", run / "config.yaml", "--quiet=true")
    assert done.code == 0, done.err
    again = json.loads((run / "test" / "run.json").read_text())["results"]
    assert again == {key: value for key, value in results.items() if not key.startswith("train/")}
