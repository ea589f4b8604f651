"""Real trainings on two real nodes, and what ends them."""

import re
import sys
import time
from pathlib import Path

import mlflow
import pytest
from slurm_cluster import REPOSITORY

pytestmark = pytest.mark.slow

SIZE = ["--nodes=2", "--tasks-per-node=1"]


@pytest.fixture(scope="module")
def shards(keyreid, walkers, workspace) -> Path:
    keyreid("shard", "mars", walkers, "--out", workspace / "shards")
    return workspace / "shards"


def test_training_on_two_nodes_ends_with_a_score_and_a_run(cluster, keyreid, queued, shards, workspace):
    result = keyreid("submit", "train", "tiny.yaml", *SIZE, "--follow")
    job = queued(result)
    assert result.stdout.endswith(f"job {job}: COMPLETED\n")
    assert "mars, protocol torchreid: mAP" in result.stdout  # followed from the log of rank 0
    for rank in (0, 1):
        assert (workspace / "runs" / "tiny" / "slurm" / f"{job}-{rank}.log").is_file()
    (run,) = runs(workspace, "tiny")
    assert run.info.status == "FINISHED"
    assert 0 < run.data.metrics["test/torchreid/mAP"] <= 1
    assert not list(workspace.rglob("pwned"))


def test_requeued_out_of_time_and_bereft_of_a_node_it_goes_on_as_one_run(
    cluster, keyreid, queued, shards, workspace, pipeline, search
):
    steps = 60
    changes = ["name=faults", f"schedule.steps_per_epoch={steps}", "training.checkpoint_every_steps=5"]
    # Of 1-2 nodes Slurm takes those that have room at that moment, and the pipeline and the search are there already.
    cluster.wait_for_nodes(2, seconds=600, free_cpus=1)
    job = queued(keyreid("submit", "train", "tiny.yaml", *changes, "--nodes=1-2", "--tasks-per-node=1"))
    folder, log = workspace / "runs" / "faults", workspace / "runs" / "slurm" / f"train-{job}.log"

    wait_for_step(folder, 5)
    cluster.run("scontrol", "requeue", job)
    restarted(cluster, job, 1)

    wait_for_step(folder, newest_step(folder) + 5)
    # 120 s before the limit is now, but Slurm looks at limits every 30 s: until then the ranks are frozen.
    cluster.run("scancel", "--signal=STOP", job)
    hours, minutes, _ = map(int, cluster.job(job)["RunTime"].split(":"))
    cluster.run("scontrol", "update", f"job={job}", f"TimeLimit={60 * hours + minutes + 2}")
    wait_for_text(log, "signal USR2")
    cluster.run("scontrol", "update", f"job={job}", "TimeLimit=60")
    for other in [pipeline[-1][1], search]:  # must not lose the node that this test takes away
        if other:
            cluster.wait(other)
    cluster.run("scancel", "--signal=CONT", job)
    restarted(cluster, job, 2)

    wait_for_step(folder, newest_step(folder) + 5)
    cluster.crash(cluster.nodes[1])
    cluster.wait(job, ["PENDING"])
    restarted(cluster, job, 3)  # on the node that is left
    cluster.start_node(cluster.nodes[1])

    ended = cluster.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "3"), log.read_text()
    assert re.findall(r"start (\d): (\d) nodes", log.read_text()) == [("1", "2"), ("2", "2"), ("3", "2"), ("4", "1")]
    # What Slurm still sends to the lost node is for a step that no later start has.
    assert f"Terminating StepId={job}.2" in log.read_text()
    (run,) = runs(workspace, "faults")
    client = mlflow.MlflowClient(f"sqlite:///{workspace}/runs/mlflow.db")
    curve = client.get_metric_history(run.info.run_id, "train/loss")
    assert run.info.status == "FINISHED"
    assert sorted(point.step for point in curve) == list(range(1, steps + 1))
    cluster.wait_for_nodes(2)


def test_what_would_fail_again_is_not_started_again(cluster, keyreid, queued, shards, workspace, tmp_path):
    """Three jobs at once: a rank that raises, no progress, enough restarts."""
    folder = workspace / "runs" / "raises"
    folder.mkdir(parents=True)
    (folder / "tracking").write_text("this should be a folder")  # rank 0 alone writes there
    by_hand = ["--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/log", REPOSITORY / "slurm" / "train.sbatch"]
    home = {"KEYREID_HOME": str(REPOSITORY), "KEYREID_BIN": str(Path(sys.executable).parent)}
    words = ["sbatch", "--parsable", *by_hand, "tiny.yaml", "name=raises"]
    raises = cluster.run(*words, cwd=workspace, env=cluster.environment | home).strip()
    words = {
        "KEYREID_MAX_STALLS": "no progress: the last 1 starts left the newest checkpoint where it was (none)",
        "KEYREID_MAX_RESTARTS": "0 restarts are the limit",
    }
    jobs = {
        variable: queued(keyreid("submit", "train", "tiny.yaml", f"name={variable.lower()}", *SIZE, **{variable: "0"}))
        for variable in words
    }
    for variable, job in jobs.items():
        log = workspace / "runs" / "slurm" / f"train-{job}.log"
        wait_for_text(log, "start 1")
        cluster.run("scancel", "--batch", "--signal=USR2", job)
        assert cluster.wait(job)["JobState"] == "FAILED"
        assert f"not requeued: {words[variable]}" in log.read_text()

    ended = cluster.wait(raises)
    log = (tmp_path / "log").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), log
    assert "task 0: Exited with exit code 1" in log and "a rank ended with status" in log
    said = (folder / "slurm" / f"{raises}-0.log").read_text()
    assert "error: runs/raises/tracking: File exists" in said


def test_a_pipeline_goes_from_pictures_to_scores(cluster, pipeline, workspace):
    assert [verb for verb, _ in pipeline] == ["shard", "shard", "train", "evaluate"]
    last = pipeline[-1][1]
    ended = cluster.wait(last)
    assert [cluster.job(job)["JobState"] for _, job in pipeline] == ["COMPLETED"] * 4
    assert ended["NumNodes"] == "2"
    log = (workspace / "runs" / "slurm" / f"evaluate-{last}.log").read_text()
    assert "torchreid" in log and "mAP" in log


def newest_step(folder: Path) -> int:
    try:
        return int((folder / "checkpoints" / "latest").read_text().removeprefix("step-"))
    except OSError:
        return 0


def wait_for_step(folder: Path, step: int, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while newest_step(folder) < step:
        assert time.monotonic() < deadline, f"no checkpoint at step {step}"
        time.sleep(0.05)


def wait_for_text(log: Path, text: str, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not log.is_file() or text not in log.read_text():
        assert time.monotonic() < deadline, f"{log} does not say {text!r}"
        time.sleep(0.05)


def restarted(cluster, job: str, times: int) -> None:
    """Wait until the job runs for the (times + 1)th time."""
    while (state := cluster.job(job))["JobState"] != "RUNNING" or state["Restarts"] != str(times):
        assert state["JobState"] in ("RUNNING", "SIGNALING", "PENDING", "COMPLETING"), state
        time.sleep(0.1)


def runs(workspace: Path, name: str) -> list[mlflow.entities.Run]:
    client = mlflow.MlflowClient(f"sqlite:///{workspace}/runs/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [run for run in client.search_runs(experiments) if run.info.run_name == name]
