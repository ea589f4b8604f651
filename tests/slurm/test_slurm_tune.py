"""Ray Tune inside a job: head and worker on two nodes, the search in the batch script."""

import mlflow
import pytest
import yaml

pytest.importorskip("ray", reason="Ray is not installed: pip install 'keyreid[tune]'")
pytestmark = pytest.mark.slow

TRIALS = 4


def test_a_search_of_four_trials_over_two_nodes(cluster, keyreid, queued, walkers, workspace):
    if not cluster.isolated:
        pytest.skip("two Rays on one machine need nodes with addresses of their own: root and namespaces")
    keyreid("shard", "mars", walkers, "--out", workspace / "shards")
    (workspace / "search.yaml").write_text(
        "name: search\n"
        "base: tiny.yaml\n"
        "settings: {schedule: {steps_per_epoch: 2}, evaluation: {clips: 1}}\n"
        "space: {loss.alpha: {uniform: [0.3, 0.9]}}\n"
        f"trials: {TRIALS}\n"
        "budget: {epochs: 1}\n"
        "holdout: 0.4\n"
    )
    job = queued(keyreid("submit", "tune", "search.yaml", "--nodes=2", "--cpus-per-task=1"))
    ended = cluster.wait(job)
    log = (workspace / "runs" / "slurm" / f"tune-{job}.log").read_text()
    assert ended["JobState"] == "COMPLETED", log
    assert yaml.safe_load((workspace / "runs" / "search" / "best.yaml").read_text())["loss"]["alpha"] > 0
    client = mlflow.MlflowClient(f"sqlite:///{workspace}/runs/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    children = client.search_runs(experiments, "tags.`mlflow.parentRunId` != ''")
    assert [run.info.status for run in children] == ["FINISHED"] * TRIALS
    assert {run.data.params["host"] for run in children} == set(cluster.nodes)
    assert not list(cluster.scratch.glob("*")), "the scratch disk of the login node is not used"
    assert not list(cluster.folder.glob("spool/*/scratch/ray-*")), "nothing is left on the nodes"
