"""What a start costs and leaves behind: imports of each rank, and who started the run from what."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from training_runs import toy_config, toy_shards

from keyreid.config import save_config
from keyreid.tracking import RUN_ID, TRACKING
from keyreid.version import commit

RANK = """
import sys
from keyreid.config import load_config
from keyreid.training.run import train
train(load_config(sys.argv[1]))
assert "deepspeed" in sys.modules
print("mlflow" in sys.modules)
"""


def test_training_imports_neither_mlflow_nor_deepspeed():
    """Before an engine is built: a command that only asks, or evaluates, has no use for them."""
    program = "import sys, keyreid.training.loop; print({'mlflow', 'deepspeed'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "set()"


def test_deepspeed_is_imported_without_mlflow_which_stays_importable():
    program = (
        "import sys\n"
        "from keyreid.training.engine import import_deepspeed\n"
        "deepspeed = import_deepspeed()\n"
        "print('mlflow' in sys.modules, hasattr(deepspeed, 'initialize'))\n"
        "import mlflow\n"
        "print('mlflow' in sys.modules)\n"
    )
    printed = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert printed.splitlines()[-2:] == ["False True", "True"]


@pytest.mark.slow
def test_two_ranks(tmp_path):
    """The first rank alone imports MLflow; the run's folder and MLflow know who started it, each time."""
    schedule = {"epochs": 1, "steps_per_epoch": 2, "warmup_epochs": 0}
    config = toy_config(toy_shards(tmp_path), tmp_path / "runs", schedule=schedule)
    save_config(config, tmp_path / "toy.yaml")
    for _ in range(2):
        assert _start(tmp_path / "toy.yaml") == ["True", "False"]
    starts = json.loads((config.run_dir / "provenance.json").read_text())
    assert len(starts) == 2
    assert starts[-1]["command"] == f"-c {tmp_path / 'toy.yaml'}"
    assert (starts[-1]["commit"], starts[-1]["ranks"]) == (commit() or "", "2")
    run_id = (config.run_dir / TRACKING / RUN_ID).read_text()
    tags = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}").get_run(run_id).data.tags
    assert tags["mlflow.source.name"] == starts[-1]["command"]
    assert tags["mlflow.user"] == starts[-1]["user"]
    assert tags["mlflow.source.git.commit"] == commit()


def _start(config: Path) -> list[str]:
    """Train on two ranks; the last line that each prints."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(config)],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    return [rank.communicate(timeout=300)[0].splitlines()[-1] for rank in ranks]
