"""Arrays of pose and shard: one task is killed, the same command again does just its part."""

import importlib.util
import json
import re
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_shards_of_a_killed_task_are_packed_by_the_same_command(cluster, keyreid, queued, walkers, workspace):
    out = workspace / "array-shards"
    words = ["submit", "shard", "--array=0-1", "--", "mars", walkers, "--out", out, "--target-megabytes=0.05"]
    first = queued(keyreid(*words))
    kill_task(cluster, workspace / "runs" / "slurm" / f"shard-{first}_1.log", first, 1)
    assert cluster.wait(f"{first}_0")["JobState"] == "COMPLETED"
    packed = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(packed) > 0
    assert not (out / "dataset.json").exists()

    second = queued(keyreid(*words))
    logs = finished_logs(cluster, workspace, "shard", second)
    assert re.search(r"^0 shards written, [1-9]\d* were there already", logs[0], re.MULTILINE)
    assert re.search(r"^[1-9]\d* shards written, 0 were there already", logs[1], re.MULTILINE)
    assert {name: (out / name).stat().st_mtime_ns for name in packed} == packed

    check = queued(keyreid("submit", "shard", "--", "mars", walkers, "--out", out, "--target-megabytes=0.05"))
    assert cluster.wait(check)["JobState"] == "COMPLETED"
    card = json.loads((out / "dataset.json").read_text())
    assert sorted(shard["file"] for shard in card["shards"]) == sorted(path.name for path in out.glob("*.tar"))


@pytest.mark.skipif(
    not importlib.util.find_spec("openpifpaf"), reason="OpenPifPaf is not installed: launch/install-pose"
)
def test_keypoints_of_a_killed_task_are_found_by_the_same_command(cluster, keyreid, queued, workspace):
    root, out = workspace / "few", workspace / "poses"
    few = ["--identities=2", "--cameras=2", "--tracklets=1", "--frames", 1, 1, "--distractors=0", "--junk=0"]
    keyreid("walkers", root, *few, "--size", 128, 64)
    words = ["submit", "pose", "--array=0-1", "--", "mars", root, "--out", out, "--workers=0"]
    first = queued(keyreid(*words))
    kill_task(cluster, workspace / "runs" / "slurm" / f"pose-{first}_1.log", first, 1)
    assert cluster.wait(f"{first}_0")["JobState"] == "COMPLETED"

    second = queued(keyreid(*words))
    logs = finished_logs(cluster, workspace, "pose", second)
    assert re.search(r": 0 tracklets written, [1-9]\d* were there", logs[0])
    assert re.search(r": [1-9]\d* tracklets written, 0 were there", logs[1])
    assert {path.stem for path in out.glob("*.npz")} == {path.stem for path in (root / "keypoints").glob("*.npz")}


def test_a_part_of_an_array_again(cluster, keyreid, queued, walkers, workspace):
    words = ["submit", "shard", "--array=3", "--", "mars", walkers, "--out", workspace / "part"]
    unknown, known = queued(keyreid(*words)), queued(keyreid(*words, KEYREID_SHARES="4"))
    assert cluster.wait(f"{unknown}_3")["JobState"] == "FAILED"
    log = workspace / "runs" / "slurm" / f"shard-{unknown}_3.log"
    assert "array task 3, but 1 shares count from 0: --array=0-0, or set KEYREID_SHARES" in log.read_text()
    assert cluster.wait(f"{known}_3")["JobState"] == "COMPLETED"
    assert "share 3/4 of" in (workspace / "runs" / "slurm" / f"shard-{known}_3.log").read_text()


def kill_task(cluster, log: Path, job: str, task: int) -> None:
    """SIGKILL to all of an array task as soon as it works."""
    while not log.is_file() or "share" not in log.read_text():
        time.sleep(0.02)
    cluster.run("scancel", "--full", "--signal=KILL", f"{job}_{task}")
    assert cluster.wait(f"{job}_{task}")["JobState"] != "COMPLETED"


def finished_logs(cluster, workspace: Path, verb: str, job: str) -> list[str]:
    logs = []
    for task in (0, 1):
        state = cluster.wait(f"{job}_{task}")["JobState"]
        logs.append((workspace / "runs" / "slurm" / f"{verb}-{job}_{task}.log").read_text())
        assert state == "COMPLETED", logs[-1]
    return logs
