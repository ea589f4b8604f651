"""Searches that really train: killed ranks and drivers, Ctrl-C, early stopping, population training of two ranks.

Each start of a trial imports torch and DeepSpeed, 6 of its 7 CPU-seconds: what these tests take is their starts.
"""

from __future__ import annotations

import contextlib
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
pytest.importorskip("optuna")

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
    "schedule": {"warmup_epochs": 0, "floor_lr": 0.0, "steps_per_epoch": 1},
    "training": {"precision": "fp32", "zero_stage": 0, "log_every_steps": 1},
    "evaluation": {"clips": 1, "pictures": 0},
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


def ranks_of(driver: subprocess.Popen, trials: int) -> dict[str, psutil.Process]:
    """The processes that train, by trial, as soon as so many write their trial's log."""
    deadline = time.monotonic() + SECONDS
    found: dict[str, psutil.Process] = {}
    while len(found) < trials and time.monotonic() < deadline:
        time.sleep(0.2)
        for child in psutil.Process(driver.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                logs = [Path(file.path) for file in child.open_files() if file.path.endswith("/logs/rank-0.log")]
                found |= {log.parents[1].name: child for log in logs}
    assert len(found) == trials, f"only {sorted(found)} write a log"
    return found


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def mlflow_runs(runs: Path):
    """The store's client, the run of the search, and those of its trials by name."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("keyreid").experiment_id])
    (parent,) = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in found if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert len({run.info.run_name for run in children}) == len(children)
    return client, parent, {run.info.run_name: run for run in children}


def test_a_search_outlives_its_ranks_and_its_driver(started, tmp_path):
    """8 trials by ASHA over alpha and two loss weights: a rank is killed, then the driver."""
    space = {
        "loss.alpha": {"uniform": [0.2, 0.95]},
        "loss.triplet": {"loguniform": [0.1, 10]},
        "loss.centre": {"loguniform": [1e-5, 1e-2]},
    }
    folder = tmp_path / "runs" / "s"
    # Rungs at 1 and 6: whoever comes first passes the one, and has time to be killed before the other.
    driver = started(
        space=space, trials=8, concurrency=2, scheduler="asha", asha={"reduction": 6}, seed=1, budget={"epochs": 8}
    )
    ranks = ranks_of(driver, 2)
    lines = read_until(driver, lambda lines: " epoch 1/8" in lines[-1])
    victim = lines[-1].split()[0]
    ranks[victim].kill()
    lines += read_until(driver, lambda lines: lines[-1].startswith(f"{victim} epoch 2/8"))
    assert sum(line.startswith(f"{victim} died: retry 1 of 2") for line in lines) == 1
    assert f"{victim} resumes from its checkpoint" in lines

    time.sleep(1.2)  # the state is saved every second
    everything = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()

    driver = started("--resume")
    output, _ = driver.communicate(timeout=SECONDS)
    assert driver.returncode == 0, output
    assert f"{victim} resumes from its checkpoint" in output
    print("\n".join(lines), output, sep="\n")
    assert not psutil.wait_procs(everything, timeout=60)[1], "ranks and Ray's processes end with a killed driver"

    reports = rows(folder)
    trials = {row["trial"]: row for row in reports}
    points = random_points({key: Parameter(**value) for key, value in space.items()}, 8, seed=1)
    assert [float(row["loss.alpha"]) for row in trials.values()] == [point["loss.alpha"] for point in points]
    for trial, last in trials.items():
        epochs = [int(row["epoch"]) for row in reports if row["trial"] == trial]
        assert epochs == list(range(1, len(epochs) + 1))
        assert last["status"] == ("finished" if epochs[-1] == 8 else "stopped")
        assert int(last["failures"]) == (trial == victim)
    assert {row["status"] for row in trials.values()} == {"finished", "stopped"}

    client, parent, children = mlflow_runs(tmp_path / "runs")
    assert children.keys() == trials.keys()
    assert {run.info.status for run in (parent, *children.values())} == {"FINISHED"}
    for trial, run in children.items():
        assert run.data.tags["keyreid.status"] == trials[trial]["status"]
        assert run.data.params["loss.alpha"] == trials[trial]["loss.alpha"]
        for metric in ("search/score", "holdout/torchreid/mAP", "train/loss"):
            steps = [each.step for each in client.get_metric_history(run.info.run_id, metric)]
            assert steps == list(range(1, len(steps) + 1)), (trial, metric)
            # A training may have been ahead of the state that outlived the driver, and is then stopped sooner.
            assert len(steps) - int(trials[trial]["epoch"]) in (range(8) if metric != "search/score" else [0])
    logged = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"best.yaml", "trials.csv", "report.html", "plots"} <= logged
    pictures = {"history.png", "importances.png", "parameters.png", "parallel.png", "curves.png"}
    assert {path.name for path in (folder / "plots").iterdir()} == pictures
    assert (folder / "report.html").read_text().count('src="data:image/png;base64,') == len(pictures)
    import optuna

    study = optuna.load_study(study_name="s", storage=f"sqlite:///{folder / 'study.db'}")
    assert [trial.user_attrs["name"] for trial in study.trials] == list(trials)
    assert [trial.state.name for trial in study.trials] == [
        {"finished": "COMPLETE", "stopped": "PRUNED"}[row["status"]] for row in trials.values()
    ]
    assert [max(trial.intermediate_values) for trial in study.trials] == [int(row["epoch"]) for row in trials.values()]

    best = max((row for row in trials.values() if row["status"] == "finished"), key=lambda row: float(row["mAP"]))
    command = [sys.executable, "-m", "keyreid.cli", "train", str(folder / "best.yaml"), "--ranks", "1"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=SECONDS, env={**os.environ, "OMP_NUM_THREADS": "1"})
    result = json.loads((tmp_path / "runs" / "s-best" / "result.json").read_text())
    assert result["part"] == "holdout"
    assert result["mAP"] == pytest.approx(float(best["mAP"]), abs=1e-9)


def test_ctrl_c_saves_a_search_by_tpe_and_says_how_to_go_on(started, tmp_path):
    space = {
        "model.tcss.enabled": {"choice": [True, False]},
        "model.tcss.shift": {"choice": [1, 2], "when": {"model.tcss.enabled": True}},
        "loss.alpha": {"uniform": [0.2, 0.95]},
    }
    driver = started(space=space, trials=2, algorithm="tpe", budget={"epochs": 5})
    read_until(driver, lambda lines: " epoch 1/5" in lines[-1])
    driver.send_signal(signal.SIGINT)
    output, _ = driver.communicate(timeout=SECONDS)
    assert driver.returncode == 130, output
    command = f"keyreid tune {tmp_path / 'search.yaml'} --resume"
    assert f"interrupted; all reports are saved, resume with: {command}" in output
    before = {(row["trial"], row["epoch"]): row["mAP"] for row in rows(tmp_path / "runs" / "s") if row["epoch"]}
    assert before

    refused = started()
    output, _ = refused.communicate(timeout=SECONDS)
    assert refused.returncode == 1
    assert "holds a search already: resume it by --resume" in output

    driver = started("--resume")
    output, _ = driver.communicate(timeout=SECONDS)
    assert driver.returncode == 0, output
    assert all(f"{trial} resumes from its checkpoint" in output for trial, _ in before)
    reports = rows(tmp_path / "runs" / "s")
    assert before.items() <= {(row["trial"], row["epoch"]): row["mAP"] for row in reports}.items()
    assert Counter(row["trial"] for row in reports) == {"trial-000": 5, "trial-001": 5}
    assert {row["status"] for row in reports} == {"finished"}
    assert all((row["model.tcss.shift"] != "") == (row["model.tcss.enabled"] == "True") for row in reports)


def test_population_based_training_of_two_ranks_takes_over_all_of_a_trial(started, tmp_path):
    """Two trials of two ranks in turns, judged by the learning rate itself: so the second one, which hardly learns, is
    surely the worse. It takes over the first one's state and, by the seed, its learning rate too: from there both are
    the same training, to the last bit.
    """
    space = {"optimizer.lr": {"choice": [1e-12, 1e-3]}}
    parameters = {key: Parameter(**value) for key, value in space.items()}

    def suits(seed: int) -> bool:
        rates = [point["optimizer.lr"] for point in random_points(parameters, 2, seed)]
        later = mutated(parameters, {"optimizer.lr": 1e-3}, 0.0, random.Random(seed))["optimizer.lr"]
        return rates == [1e-3, 1e-12] and later == 1e-3

    driver = started(
        space=space, trials=2, algorithm="pbt", pbt={"interval_epochs": 1, "resample": 0.0}, metric="train/lr",
        resources={"ranks": 2}, budget={"epochs": 2}, seed=next(seed for seed in itertools.count() if suits(seed)),
    )  # fmt: skip
    output, _ = driver.communicate(timeout=SECONDS)
    assert driver.returncode == 0, output
    assert "trial-001 takes over trial-000's weights: optimizer.lr=0.001" in output
    folder = tmp_path / "runs" / "s"
    assert [(row["trial"], row["epoch"]) for row in rows(folder) if row["from"] == "trial-000"] == [("trial-001", "2")]
    records = json.loads((folder / "trials.json").read_text())
    turns = [line.split()[0] for line in output.splitlines() if line.startswith("trial") and " epoch " in line]
    assert turns[:2] == ["trial-000", "trial-001"]
    logs = sorted((folder / "trials").glob("*/logs/rank-*.log"))
    assert [path.name for path in logs] == ["rank-0.log", "rank-1.log"] * 2
    assert all("2 rank(s)" in log.read_text() for log in logs)

    def tensors(trial: str, epoch: int) -> dict:
        folders = sorted((folder / "ray" / trial).glob("checkpoint_*"))
        at_epoch = [each for each in folders if json.loads((each / "trial.json").read_text())["epoch"] == epoch]
        files = [next(at_epoch[-1].glob(f"step-*/{name}.safetensors")) for name in ("weights", "training")]
        return {name: value for file in files for name, value in load_file(file).items()}

    scores = [[trial["reports"][epoch]["numbers"]["torchreid/mAP"] for epoch in "12"] for trial in records]
    assert scores[0][0] != scores[1][0], "trained apart before"
    assert scores[0][1] == scores[1][1]
    before, good, bad = tensors("trial-000", 1), tensors("trial-000", 2), tensors("trial-001", 2)
    assert max((before[name] - good[name]).abs().max().item() for name in good if name.startswith("backbone")) > 1e-4
    assert any(name.endswith("exp_avg_sq") for name in good)
    assert bad.keys() == good.keys()
    assert all(bad[name].equal(good[name]) for name in good)
