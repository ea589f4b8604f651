"""Fixtures of the Slurm tests: one cluster of two nodes for all of them, and what they share."""

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


@pytest.fixture
def queued(cluster: Cluster) -> Callable[[subprocess.CompletedProcess], str]:
    """The id of the (last) job that a `keyreid submit` queued; all are cancelled if the test leaves them."""
    jobs = []

    def find(result: subprocess.CompletedProcess) -> str:
        jobs.extend(re.findall(r"^\w+: job (\d+)", result.stdout, re.MULTILINE))
        return jobs[-1]

    yield find
    for job in jobs:
        cluster.run("scancel", job, check=False)
