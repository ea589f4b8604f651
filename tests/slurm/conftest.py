"""Fixtures of the Slurm tests: one cluster of two nodes for all of them, and what they share."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_cluster import REPOSITORY, Cluster, ClusterError


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A real Slurm cluster of two nodes, stopped at the end of the tests."""
    try:
        running = Cluster(nodes=2).__enter__()
    except ClusterError as error:
        pytest.skip(f"no Slurm cluster: {error}")
    # Jobs compute on the CPU even where there is a GPU: both nodes are this machine, and two ranks cannot share one.
    running.environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "KEYREID_SCRATCH": str(running.scratch)}
    yield running
    running.__exit__()


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name holds what a shell or sbatch would take for its own, with a configuration that is quick."""
    folder = tmp_path_factory.mktemp("slurm") / 'a "b"; $(touch pwned) `touch pwned` %j'
    folder.mkdir()
    (folder / "tiny.yaml").write_text(
        f"extends: {REPOSITORY / 'configs' / 'walkers.yaml'}\n"
        "name: tiny\n"
        "data: {shards: shards, identities: 2, tracklets: 2}\n"
        "clip: {height: 64, width: 32}\n"
        "model: {depth: 2}\n"
        "schedule: {epochs: 1, warmup_epochs: 0}\n"
        "training: {log_every_steps: 1}\n"
        "evaluation: {clips: 1, pictures: 0}\n"
        "tracking: {system_metrics: false}\n"
    )
    return folder


Keyreid = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="session")
def keyreid(cluster: Cluster, workspace: Path) -> Keyreid:
    """Runs `keyreid ...` on the login node, in the workspace unless `cwd` says otherwise."""

    def run(*words: object, cwd: Path = workspace, check: bool = True, **variables: str) -> subprocess.CompletedProcess:
        result = subprocess.run(
            [sys.executable, "-m", "keyreid.cli", *map(str, words)],
            cwd=cwd,
            env=cluster.environment | {"PYTHONPATH": str(REPOSITORY)} | variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        if check:
            assert result.returncode == 0, result.stdout + result.stderr
        return result

    return run


@pytest.fixture(scope="session")
def walkers(keyreid: Keyreid, workspace: Path) -> Path:
    """Rendered people in MARS's layout, small."""
    root = workspace / "walkers"
    keyreid("walkers", root, "--identities", 12, "--cameras", 2, "--frames", 4, 5, "--size", 64, 32, "--seed", 1)
    return root


# Jobs that fill the time in which the fault test waits for Slurm; tests of their own look at what they did.


@pytest.fixture(scope="session")
def pipeline(keyreid: Keyreid, walkers: Path) -> list[tuple[str, str]]:
    """Verb and id of each job of a pipeline that was queued."""
    changes = ["name=piped", "data.shards=piped-shards", "schedule.steps_per_epoch=1", "evaluation.every_epochs=0"]
    size = ["--shares=2", "--nodes=2", "--tasks-per-node=1", "--cpus-per-task=1"]
    where = ["--dataset=mars", f"--root={walkers}"]
    return jobs_of(keyreid("submit", "pipeline", "tiny.yaml", *changes, *where, *size))


@pytest.fixture(scope="session")
def search(cluster: Cluster, keyreid: Keyreid, walkers: Path, workspace: Path) -> str | None:
    """Id of a search of four trials over two nodes that was queued; None where it cannot run."""
    if not cluster.isolated or not importlib.util.find_spec("ray"):
        return None
    keyreid("shard", "mars", walkers, "--out", workspace / "shards")
    (workspace / "search.yaml").write_text(
        "name: search\n"
        "base: tiny.yaml\n"
        "settings: {schedule: {steps_per_epoch: 2}}\n"
        "space: {loss.alpha: {uniform: [0.3, 0.9]}}\n"
        "trials: 4\n"
        "budget: {epochs: 1}\n"
        "holdout: 0.4\n"
    )
    return jobs_of(keyreid("submit", "tune", "search.yaml", "--nodes=2", "--cpus-per-task=1"))[0][1]


def jobs_of(result: subprocess.CompletedProcess) -> list[tuple[str, str]]:
    """Verb and id of what a `keyreid submit` queued."""
    return re.findall(r"^(\w+): job (\d+)", result.stdout, re.MULTILINE)


@pytest.fixture
def queued(cluster: Cluster) -> Callable[[subprocess.CompletedProcess], str]:
    """The id of the (last) job that a `keyreid submit` queued; all are cancelled if the test leaves them."""
    jobs = []

    def find(result: subprocess.CompletedProcess) -> str:
        jobs.extend(job for _, job in jobs_of(result))
        return jobs[-1]

    yield find
    for job in jobs:
        cluster.run("scancel", job, check=False)
