"""Agents of torchrun on this machine, as on two: what they train is what one process trains; killed, they go on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("torchrun")]

NETWORK = '''
from torch import nn
from calib_lightning.core import Encoder
from calib_lightning.methods import CrossEntropy


class Plain(CrossEntropy):
    """Without batch norm, whose statistics are those of one process's rows."""

    def __init__(self, num_classes: int, **options):
        super().__init__(num_classes, **options)
        layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 96), nn.Tanh())
        self.encoder = Encoder(layers, name="digits_cnn", num_features=96, in_channels=1)
'''
STAGE = """
select_on: last
trainer:
  max_epochs: 5
  num_sanity_val_steps: 0
  callbacks:
    - class_path: MaskedClassifier
      init_args: {at_epoch: -3, training: {class_path: StageTraining, init_args: {batch_size: BATCH}}}
"""
ROWS = 40  # of a global batch; of 452, the last has 12: the same number for each of 1, 2 and 4 processes


class Job:
    """A job of two agents, or of one process; ``run`` is the folder of its run."""

    def __init__(self, folder, name, processes=0):
        self.folder, self.run, self.processes = folder, folder / name, processes
        batch = ROWS // (2 * processes or 1)
        (folder / "network.py").write_text(NETWORK)
        (folder / f"stage-{batch}.yaml").write_text(STAGE.replace("BATCH", str(batch)))
        self.command = ["-m", "calib_lightning", "fit", "-c", "quickstart", "-c", f"stage-{batch}.yaml"]
        self.command += ["--model=network.Plain", f"--batch_size={batch}", f"--run_dir={name}", "--quiet"]
        if processes:
            self.command += [f"--trainer.devices={processes}", "--trainer.num_nodes=2", "--trainer.strategy=ddp"]
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]
        self.agents = []

    def start(self, node=0, **environment):
        """Start an agent (with its workers in a process group of its own), or the one process."""
        before = [sys.executable]
        if self.processes:
            before += ["-m", "torch.distributed.run", "--nnodes=2", f"--nproc-per-node={self.processes}"]
            before += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{self.port}", f"--rdzv-id={self.run.name}"]
            before += [f"--rdzv-conf=is_host={int(node == 0)},join_timeout=120", "--max-restarts=2"]
        # with the store of torchrun's own, an agent that is started anew never hears of the others
        environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} | environment
        with (self.folder / f"{self.run.name}-{node}-{len(self.agents)}.log").open("w") as log:
            kept = {"cwd": self.folder, "stdout": log, "stderr": log, "start_new_session": True}
            self.agents.append(subprocess.Popen([*before, *self.command], env=environment, **kept))
        return self.agents[-1]

    def wait(self, *agents):
        codes = [agent.wait(timeout=240) for agent in agents]
        assert codes == [0] * len(agents), self.logs()
        return self

    def logs(self):
        return "\n".join(path.read_text()[-3000:] for path in self.folder.glob(f"{self.run.name}-*.log"))

    def until_epoch(self, epoch):
        """Wait until the last checkpoint is of an epoch."""
        last, begin = self.run / "checkpoints" / "last.ckpt", time.monotonic()
        while not last.is_file() or torch.load(last, weights_only=True)["epoch"] < epoch:
            assert time.monotonic() - begin < 240, self.logs()
            time.sleep(0.02)

    @property
    def checkpoint(self):
        return torch.load(self.run / "checkpoints" / "last.ckpt", weights_only=True)

    @property
    def results(self):
        return json.loads((self.run / "run.json").read_text())["results"]


def kill(agent):
    """SIGKILL for an agent and all that it has started, as when its machine is lost."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.splitlines()
    parents = [tuple(map(int, line.split())) for line in table]
    found, more = {agent.pid}, {agent.pid}
    while more:
        more = {child for child, parent in parents if parent in more} - found
        found |= more
    for process in found:
        os.kill(process, signal.SIGKILL)
    agent.wait()


@pytest.fixture
def job(tmp_path):
    jobs = []

    def make(name, processes=0):
        jobs.append(Job(tmp_path, name, processes))
        return jobs[-1]

    yield make
    for agent in (agent for one in jobs for agent in one.agents if agent.poll() is None):
        kill(agent)


def whole(job, name="whole"):
    made = job(name, 1)
    return made.wait(made.start(0), made.start(1))


def assert_equal(one, two):
    """Bit for bit."""
    assert one.checkpoint["global_step"] == two.checkpoint["global_step"]
    weights, others = one.checkpoint["state_dict"], two.checkpoint["state_dict"]
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        assert torch.equal(value, others[name]), name
    assert one.results == two.results


@pytest.mark.parametrize("processes", [1, 2])
def test_two_agents_train_what_one_process_trains(job, processes):
    alone, together = job("alone"), job("together", processes)
    alone.wait(alone.start())
    together.wait(together.start(0), together.start(1))
    assert [path.name for path in together.folder.glob("together*/run.json")] == ["run.json"]
    assert alone.checkpoint["epoch"] == together.checkpoint["epoch"] == 7
    assert alone.checkpoint["global_step"] == together.checkpoint["global_step"]
    others = together.checkpoint["state_dict"]
    assert "head.linear.keep" in others  # of the second stage
    for name, value in alone.checkpoint["state_dict"].items():
        torch.testing.assert_close(others[name], value, rtol=0, atol=2e-6)
    assert together.results == pytest.approx(alone.results, abs=1e-5)
    assert together.results["test/n"] == alone.results["test/n"]


@pytest.mark.parametrize("epoch", [1, 5])  # in the first stage, in the second
def test_a_killed_agent_comes_back(job, epoch):
    part = job("part", 1)
    stays, lost = part.start(0), part.start(1)
    part.until_epoch(epoch)
    kill(lost)
    part.wait(stays, part.start(1))
    assert_equal(part, whole(job))
    assert not (part.folder / "part-2").exists()


def test_all_agents_killed_and_started_again(job):
    part = job("part", 1)
    agents = part.start(0), part.start(1)
    part.until_epoch(3)
    for agent in agents:
        kill(agent)
    part.wait(part.start(0), part.start(1))
    assert_equal(part, whole(job))
    assert not (part.folder / "part-2").exists()


def test_a_slurm_job_that_is_started_again_finds_its_run(job):
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "calib", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}
    slurm |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NUM_NODES": "1"}
    part, alone = job("part"), job("alone")
    lost = part.start(**slurm)
    part.until_epoch(2)
    kill(lost)
    part.wait(part.start(**slurm, SLURM_RESTART_COUNT="1"))
    alone.wait(alone.start())
    assert_equal(part, alone)
    assert not (part.folder / "part-2").exists()
