"""Others who start ranks: torchrun, DeepSpeed with a hostfile of two nodes, and Ray. All give the same training."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import damaged, free_port, logged, toy_config, toy_shards

from keyreid.config import save_config

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
SECONDS = 240


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return toy_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(shards, tmp_path):
    """A run of three steps; what ranks print lies beside it."""
    config = toy_config(shards, tmp_path / "runs", schedule={"epochs": 1, "steps_per_epoch": 3, "warmup_epochs": 0})
    save_config(config, tmp_path / "toy.yaml")
    return config


def torchrun(folder: Path) -> list[list[str]]:
    command = [BIN / "torchrun", "--nproc-per-node", "2", "--master-port", str(free_port())]
    return [[*command, "-m", "keyreid.cli", "train", folder / "toy.yaml"]]


def deepspeed(folder: Path) -> list[list[str]]:
    """One command a node, as where nodes have no ssh; both nodes are this one."""
    (folder / "hosts").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    command = [BIN / "deepspeed", "--hostfile", folder / "hosts", "--no_ssh", "--master_addr", "127.0.0.1"]
    command += ["--master_port", str(free_port()), "--module"]
    return [[*command, "--node_rank", rank, "keyreid.cli", "train", folder / "toy.yaml"] for rank in "01"]


def ray(folder: Path) -> list[list[str]]:
    return [[BIN / "keyreid", "train", folder / "toy.yaml", "--ray", "local", "--ranks", "2"]]


def launch(commands: list[list[str]], folder: Path) -> tuple[list[int], str]:
    """Statuses and what was printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    output = folder / "printed.txt"
    with output.open("w") as file:
        started = [
            subprocess.Popen([str(word) for word in each], env=environment, stdout=file, stderr=file, cwd=folder)
            for each in commands
        ]
        statuses = [process.wait(SECONDS) for process in started]
    return statuses, output.read_text()


@pytest.fixture(scope="module")
def expected(shards, tmp_path_factory):
    """The losses of `keyreid train --ranks 2`."""
    folder = tmp_path_factory.mktemp("plain")
    config = toy_config(shards, folder / "runs", schedule={"epochs": 1, "steps_per_epoch": 3, "warmup_epochs": 0})
    save_config(config, folder / "toy.yaml")
    statuses, printed = launch([[BIN / "keyreid", "train", folder / "toy.yaml", "--ranks", "2"]], folder)
    assert statuses == [0], printed
    assert len(logged(config, "train/loss")) == 3
    return logged(config, "train/loss")


@pytest.mark.parametrize("launcher", [torchrun, deepspeed, ray])
def test_every_launcher_gives_the_same_training(launcher, config, expected, tmp_path):
    statuses, printed = launch(launcher(tmp_path), tmp_path)
    assert set(statuses) == {0}, printed
    assert "2 rank(s) over gloo" in printed
    assert (config.run_dir / "completed").is_file()
    assert sorted(file.name for file in (config.run_dir / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
    assert logged(config, "train/loss") == expected


def test_a_rank_that_fails_ends_all_and_says_why(config, shards, tmp_path):
    command = [*ray(tmp_path)[0], f"data.shards={damaged(shards, tmp_path / 'broken')}"]
    statuses, printed = launch([command], tmp_path)
    assert statuses != [0]
    assert "its bytes are not those packed" in printed
    logs = (config.run_dir / "logs").glob("rank-*.log")  # of the rank that met it first: then all are ended
    assert any("its bytes are not those packed" in log.read_text() for log in logs)
