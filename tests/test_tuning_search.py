"""Searches that really train: early stopping, kills of the driver and of a rank, several ranks, population training."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import yaml
from packed import make_dataset, pack_dataset

pytest.importorskip("ray.tune")

from safetensors.torch import load_file

from keyreid.tuning.space import Parameter, mutated, random_points

pytestmark = pytest.mark.slow

SECONDS = 600  # for a whole search on busy cores
BASE = {
    "name": "tiny",
    "data": {
        "reader": "dali" if importlib.util.find_spec("nvidia.dali") else "plain",
        "workers": 1,
        "identities": 4,
        "tracklets": 2,
        "augment": {"pad_pixels": 3},
    },
    "clip": {"frames": 2, "height": 64, "width": 32},
    "model": {"backbone": "vit_tiny_patch16_224", "depth": 2, "drop_path": 0.0},
    "optimizer": {"name": "adamw", "lr": 1e-3, "bias_lr_factor": 1.0, "weight_decay": 0.0},
    "schedule": {"epochs": 3, "warmup_epochs": 0, "floor_lr": 0.0, "steps_per_epoch": 1},
    "training": {"precision": "fp32", "zero_stage": 0, "log_every_steps": 1},
    "evaluation": {"clips": 1},
    "tracking": {"system_metrics": False},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tuning")
    dataset = make_dataset(root / "raw", identities=24, tracklets=6, frames=(2, 3))
    pack_dataset(dataset, root / "raw", root / "shards", 10_000_000)
    return root / "shards"


@pytest.fixture
def started(shards, tmp_path):
    """Start `keyreid tune` on a search; whatever is left of it ends with the test."""
    processes: list[psutil.Process] = []
    base = {**BASE, "output": str(tmp_path / "runs"), "data": {**BASE["data"], "shards": str(shards)}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))

    def start(*arguments: str, **search) -> subprocess.Popen:
        path = tmp_path / "search.yaml"
        if search:
            path.write_text(yaml.safe_dump({"name": "s", "base": "base.yaml", "holdout": 0.34, **search}))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "keyreid.cli", "tune", str(path), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env=environment,
        )  # fmt: skip
        processes.append(psutil.Process(process.pid))
        return process

    yield start
    for process in processes:
        if process.is_running():
            for each in [*process.children(recursive=True), process]:
                each.kill()


def read_until(process: subprocess.Popen, enough) -> list[str]:
    """Output lines of a search until `enough(lines)`, or its end."""
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if enough(lines):
            break
    return lines


def rank_of(driver: subprocess.Popen, trial: str) -> psutil.Process:
    """The process that trains a trial, as soon as it writes the trial's log."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        for child in psutil.Process(driver.pid).children(recursive=True):
            try:
                rank = "ray::Rank" in " ".join(child.cmdline())
                if rank and any(file.path.endswith(f"{trial}/logs/rank-0.log") for file in child.open_files()):
                    return child
            except psutil.Error:
                continue
        time.sleep(0.1)
    raise TimeoutError(f"no process writes the log of {trial}")


def wait_gone(processes: list[psutil.Process]) -> list[psutil.Process]:
    return psutil.wait_procs(processes, timeout=180)[1]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def mlflow_runs(runs: Path):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    return client, client.search_runs([client.get_experiment_by_name("keyreid").experiment_id])


def test_a_search_outlives_its_driver_and_its_ranks(started, tmp_path):
    """8 trials by ASHA over alpha and two loss weights: SIGKILL of the driver, Ctrl-C, and a killed rank on the way."""
    space = {
        "loss.alpha": {"uniform": [0.2, 0.95]},
        "loss.triplet": {"loguniform": [0.1, 10]},
        "optimizer.lr": {"loguniform": [1e-5, 1e-2]},
    }
    folder = tmp_path / "runs" / "s"

    driver = started(
        space=space, trials=8, concurrency=2, scheduler="asha", asha={"reduction": 2}, seed=1, budget={"epochs": 8}
    )
    lines = read_until(driver, lambda lines: " epoch 2/8" in lines[-1])
    time.sleep(1.5)  # the state is saved every second
    everything = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    assert not wait_gone(everything), "Ray's processes and the ranks end with a killed driver"

    driver = started("--resume")
    first = read_until(driver, lambda lines: " epoch 5/8" in lines[-1])  # past the last rung: it will not be stopped
    driver.send_signal(signal.SIGINT)
    output, _ = driver.communicate(timeout=SECONDS)
    assert driver.returncode == 130, output
    assert "interrupted; all reports are saved, go on with: keyreid tune" in output
    lines += first + output.splitlines()

    refused = started()
    output, _ = refused.communicate(timeout=SECONDS)
    assert refused.returncode == 1
    assert "holds a search already: go on with it by --resume" in output

    driver = started("--resume")
    last = read_until(driver, lambda lines: "goes on from its checkpoint" in lines[-1])
    victim = last[-1].split()[0]
    rank_of(driver, victim).kill()
    output, _ = driver.communicate(timeout=SECONDS)
    assert driver.returncode == 0, output
    lines += last + output.splitlines()
    print("\n".join(lines))

    reports = rows(folder)
    trials = {row["trial"]: row for row in reports}
    assert len(trials) == 8
    assert set(Counter((row["trial"], row["epoch"]) for row in reports).values()) == {1}
    points = random_points({key: Parameter(**value) for key, value in space.items()}, 8, seed=1)
    assert [float(row["loss.alpha"]) for row in trials.values()] == [point["loss.alpha"] for point in points]
    statuses = Counter(row["status"] for row in trials.values())
    assert set(statuses) == {"finished", "stopped"}
    assert sum(int(row["failures"]) for row in trials.values()) == 1
    after = output.split(f"{victim} died: retry 1 of 2", 1)[1]
    assert f"{victim} goes on from its checkpoint" in after
    assert not any(f"{victim} starts" in line for line in [*last, *output.splitlines()])

    client, found = mlflow_runs(tmp_path / "runs")
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in found if "mlflow.parentRunId" in run.data.tags]
    assert [run.info.run_name for run in parents] == ["s"]
    assert sorted(run.info.run_name for run in children) == sorted(trials)
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}
    assert {run.info.status for run in found} == {"FINISHED"}
    for run in children:
        assert run.data.tags["keyreid.status"] == trials[run.info.run_name]["status"]
        assert run.data.params["loss.alpha"] == trials[run.info.run_name]["loss.alpha"]
        for name in ("holdout/torchreid/mAP", "train/loss", "search/score"):
            steps = [metric.step for metric in client.get_metric_history(run.info.run_id, name)]
            assert len(steps) == len(set(steps)) == int(trials[run.info.run_name]["epoch"]), (run.info.run_name, name)
    logged = {file.path for file in client.list_artifacts(parents[0].info.run_id)}
    assert {"best.yaml", "trials.csv", "report.html", "plots"} <= logged
    assert {path.name for path in (folder / "plots").iterdir()} == {"parameters.png", "parallel.png", "curves.png"}

    best = max((row for row in trials.values() if row["status"] == "finished"), key=lambda row: float(row["mAP"]))
    command = [sys.executable, "-m", "keyreid.cli", "train", str(folder / "best.yaml"), "--ranks", "1"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=SECONDS, env={**os.environ, "OMP_NUM_THREADS": "1"})
    result = json.loads((tmp_path / "runs" / "s-best" / "result.json").read_text())
    assert result["part"] == "holdout"
    assert result["mAP"] == pytest.approx(float(best["mAP"]), abs=1e-9)


def test_trials_of_two_ranks_by_tpe(started, tmp_path):
    """One at a time on two cores."""
    space = {
        "model.tcss.enabled": {"choice": [True, False]},
        "model.tcss.shift": {"choice": [1, 2], "when": {"model.tcss.enabled": True}},
        "loss.alpha": {"uniform": [0.2, 0.95]},
    }
    driver = started(space=space, trials=2, algorithm="tpe", resources={"ranks": 2}, budget={"epochs": 1})
    output, _ = driver.communicate(timeout=SECONDS)
    assert driver.returncode == 0, output
    reports = rows(tmp_path / "runs" / "s")
    assert [row["status"] for row in reports] == ["finished"] * 2
    assert all((row["model.tcss.shift"] != "") == (row["model.tcss.enabled"] == "True") for row in reports)
    logs = sorted((tmp_path / "runs" / "s" / "trials").glob("*/logs/rank-*.log"))
    assert [path.name for path in logs] == ["rank-0.log", "rank-1.log"] * 2
    assert "2 rank(s)" in logs[0].read_text()
    starts = [line.split()[0] for line in output.splitlines() if " starts: " in line or " finished" in line]
    assert starts == ["trial-000", "trial-000", "trial-001", "trial-001"]


def test_population_based_training_takes_over_weights_and_optimizer(started, tmp_path):
    """Two trials in turns; after an exploit the learning rate is, by the seed, too small to change weights."""
    space = {"optimizer.lr": {"choice": [1e-12, 1e-3]}}
    parameters = {key: Parameter(**value) for key, value in space.items()}

    def suits(seed: int) -> bool:
        one, other = random_points(parameters, 2, seed)
        return (
            one != other
            and mutated(parameters, {"optimizer.lr": 1e-3}, 0.0, random.Random(seed))["optimizer.lr"] < 1e-9
        )

    driver = started(
        space=space, trials=2, algorithm="pbt", pbt={"interval_epochs": 1, "resample": 0.0}, budget={"epochs": 4},
        resources={"cpus": 2}, seed=next(seed for seed in itertools.count() if suits(seed)),
    )  # fmt: skip
    output, _ = driver.communicate(timeout=SECONDS)
    assert driver.returncode == 0, output
    assert " takes over trial-00" in output
    folder = tmp_path / "runs" / "s"
    first = next(row for row in rows(folder) if row["from"])
    epoch = int(first["epoch"])
    assert float(first["optimizer.lr"]) == 1e-12

    def tensors(trial: str, epoch: int, name: str) -> dict:
        folders = sorted((folder / "ray" / trial).glob("checkpoint_*"))
        at_epoch = [each for each in folders if json.loads((each / "trial.json").read_text())["epoch"] == epoch]
        return load_file(next(at_epoch[-1].glob(f"step-*/{name}.safetensors")))

    after, donor = tensors(first["trial"], epoch, "weights"), tensors(first["from"], epoch - 1, "weights")
    own = tensors(first["trial"], epoch - 1, "weights")
    trained = [name for name in after if "running" not in name and "tracked" not in name]
    assert max((after[name] - donor[name]).abs().max().item() for name in trained) < 1e-9
    assert max((own[name] - donor[name]).abs().max().item() for name in trained) > 1e-4
    moments, donor_moments = (
        tensors(*where, "training") for where in ((first["trial"], epoch), (first["from"], epoch - 1))
    )
    squares = [name for name in moments if name.endswith("exp_avg_sq")]
    assert squares  # Adam's second moment is .999 of the one before, and something above 0
    assert all((moments[name] >= 0.998 * donor_moments[name]).all() for name in squares)
    assert any((moments[name] > 0).any() for name in squares)
