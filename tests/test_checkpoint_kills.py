"""A kill at any file operation of evaluate-and-save: the run that resumes ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kills import Killer, in_child

from keyreid.checkpoints import folder as checkpoints
from keyreid.checkpoints import manifest
from keyreid.checkpoints.folder import BackgroundWriter, Snapshot, TrainingState
from keyreid.checkpoints.weights_file import WeightsHeader
from keyreid.config import ClipConfig, ModelConfig
from keyreid.evaluation.scores import write_scores

HEADER = WeightsHeader(ModelConfig(parts=3), ClipConfig(frames=2), identities=[3, 9], cameras=[1, 4], about={})
SCORES = {2: 0.1, 4: 0.9, 6: 0.3, 8: 0.9}  # by step: each second one ends an epoch


def train(root: Path, stop_at: int | None = None, keep: int = 1) -> None:
    """The order in which the loop does things, with these scores; a stop signal ends it after `stop_at`."""
    folder = checkpoints.newest_whole(root)
    state = checkpoints.read_state(folder) if folder else TrainingState(recipe={"seed": 1})
    writer = BackgroundWriter(root, keep)
    if folder:
        checkpoints.settle(root, state, keep)
        if (score := evaluation(root, state)) is not None:
            state = state.evaluated(score)
            writer.write(state)
    for step in range(state.step + 1, 9):
        state = replace(state, step=step)
        stopping = step == stop_at
        if not stopping and (score := evaluation(root, state)) is not None:
            state = state.evaluated(score)
        if stopping or step % 3 == 0 or step in (8, state.best_step):
            value = {"w": torch.full((3, 2), float(step))}
            writer.write(Snapshot(state, HEADER, value, value, value))
        if stopping:
            break
    writer.wait()


def evaluation(root: Path, state: TrainingState) -> float | None:
    if state.step not in SCORES or state.evaluated_step == state.step:
        return None
    score = SCORES[state.step]
    write_scores({"mAP": score}, root.parent / "evaluation" / f"{state.step}" / "scores.json")
    return score


def ending(run: Path) -> dict[str, object]:
    """All that a run leaves: names, bytes and states of its files."""
    root = run / "checkpoints"
    for leftover in (run / "evaluation").rglob(".scores.json.*.partial"):  # never taken for anything
        leftover.unlink()
    assert all(manifest.verify(folder) == [] for folder in root.glob("step-*"))
    found = {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    manifests = {name: json.loads(text)["files"] for name, text in found.items() if name.endswith("manifest.json")}
    for files in manifests.values():
        files["state.json"].pop("before", None)  # a kill in the midst of put_state
    return found | manifests


def killed(run: Path, at: int | None, torn: bool, stop_at: int | None) -> int:
    """Train in a child that is killed at its `at`-th operation; gives how many it would have made."""
    killer = Killer(run, at, torn)
    if stop_at:
        train(run / "checkpoints", stop_at)
    train(run / "checkpoints")
    (run.parent / "count").write_text(str(killer.done))
    return 0


@pytest.fixture(scope="module", autouse=True)
def fast_disk() -> Iterator[None]:
    """Nothing here depends on what a power cut leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(run / "checkpoints")
    found = ending(run)
    assert found["checkpoints/best"] == b"step-00000004"
    assert found["checkpoints/latest"] == b"step-00000008"
    return found


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("stop_at", [None, 2, 4, 5, 8])
def test_a_kill_at_some_operations_changes_nothing(
    tmp_path: Path, undisturbed: dict[str, object], torn: bool, stop_at: int | None
) -> None:
    kill_at_each(tmp_path, undisturbed, torn, stop_at, 17)


@pytest.mark.slow
@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("stop_at", [None, 2, 4, 5, 8])
def test_a_kill_at_any_operation_changes_nothing(
    tmp_path: Path, undisturbed: dict[str, object], torn: bool, stop_at: int | None
) -> None:
    kill_at_each(tmp_path, undisturbed, torn, stop_at, 1)


def kill_at_each(folder: Path, undisturbed: dict[str, object], torn: bool, stop_at: int | None, every: int) -> None:
    """A run for every so many operations, killed there and resumed."""
    assert in_child(killed, folder / "whole" / "run", None, torn, stop_at) == 0
    assert ending(folder / "whole" / "run") == undisturbed
    operations = int((folder / "whole" / "count").read_text())
    assert operations > 100
    for at in range(1 + (stop_at or 0) % every, operations + 1, every):
        run = folder / f"{at}" / "run"
        assert in_child(killed, run, at, torn, stop_at) == -signal.SIGKILL
        train(run / "checkpoints")
        assert ending(run) == undisturbed, f"killed at operation {at} of {operations}"
        shutil.rmtree(run)


def judge_late(root: Path, at: int | None) -> int:
    """A checkpoint that was saved before its evaluation is judged, and the one before it pruned."""
    killer = Killer(root, at)
    state = checkpoints.read_state(root / "step-00000002").evaluated(0.9)
    writer = BackgroundWriter(root, 1)
    writer.write(state)
    writer.wait()
    (root.parent / "count").write_text(str(killer.done))
    return 0


def test_at_any_moment_of_a_late_evaluation_every_checkpoint_is_whole(tmp_path: Path) -> None:
    value = {"w": torch.zeros(2)}
    for at in [None, *range(1, 100)]:
        root = tmp_path / f"{at}" / "checkpoints"
        for step in (1, 2):
            checkpoints.save(
                root, Snapshot(TrainingState(step=step, best_score=0.1, best_step=1), HEADER, value, {}, value)
            )
        status = in_child(judge_late, root, at)
        assert all(manifest.verify(folder) == [] for folder in checkpoints.checkpoints(root)), f"operation {at}"
        state = checkpoints.read_state(root / "step-00000002")
        assert (state.best_score, state.best_step) in ((0.1, 1), (0.9, 2))
        if at and status == 0:
            break
    assert at > 20
    assert checkpoints.named(root, "best") == root / "step-00000002"
