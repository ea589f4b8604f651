"""Ray Tune inside a job: head and worker on two nodes, the search in the batch script."""

import mlflow
import pytest
import yaml

pytestmark = pytest.mark.slow


def test_a_search_of_four_trials_over_two_nodes(cluster, search, workspace):
    if search is None:
        pytest.skip("needs Ray (extra tune), and root and namespaces for nodes' own addresses")
    ended = cluster.wait(search)
    log = (workspace / "runs" / "slurm" / f"tune-{search}.log").read_text()
    assert ended["JobState"] == "COMPLETED", log
    assert yaml.safe_load((workspace / "runs" / "search" / "best.yaml").read_text())["loss"]["alpha"] > 0
    client = mlflow.MlflowClient(f"sqlite:///{workspace}/runs/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    trials = "tags.`keyreid.trial` != '' and tags.`mlflow.parentRunId` != ''"  # evaluations have a parent too
    children = client.search_runs(experiments, trials)
    assert [run.info.status for run in children] == ["FINISHED"] * 4
    assert {run.data.params["host"] for run in children} == set(cluster.nodes)
    assert not list(cluster.scratch.glob("*")), "the scratch disk of the login node is not used"
    assert not list(cluster.folder.glob("spool/*/scratch/ray-*")), "nothing is left on the nodes"
