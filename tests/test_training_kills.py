"""Real trainings, killed at file operations of their evaluations and saves, end like one that nobody disturbed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from kills import Killer
from training_runs import StopAfter, printed, run, start, toy_config, toy_shards, train

from keyreid.checkpoints import folder as checkpoints
from keyreid.checkpoints import manifest
from keyreid.config import Config

pytestmark = pytest.mark.slow
KILLS = 6
SETTINGS = {
    "schedule": {"epochs": 3, "warmup_epochs": 0, "steps_per_epoch": 1},
    "evaluation": {"every_epochs": 1, "pictures": 0},
    "training": {"keep_checkpoints": 1},
    "tracking": {"sinks": []},
}


def killed(config: Config, at: int | None, stop_at: int | None) -> None:
    """Train; SIGKILL before the `at`-th file operation in the run's folder. Says how many there were."""
    from keyreid.training.run import train

    killer = Killer(config.run_dir, at)
    train(config, stop=StopAfter(stop_at) if stop_at else None)
    (config.run_dir.parent / "operations").write_text(str(killer.done))


def ending(config: Config) -> dict[str, object]:
    root = config.run_dir / "checkpoints"
    folders = checkpoints.checkpoints(root)
    assert [manifest.verify(folder) for folder in folders] == [[]] * len(folders)
    scores = {path.parent.name: path.read_bytes() for path in config.run_dir.rglob("scores.json")}
    names = {name: (root / name).read_bytes() for name in ("best", "latest")}
    weights = {folder.name: (folder / manifest.WEIGHTS).read_bytes() for folder in folders}
    states = {folder.name: checkpoints.read_state(folder) for folder in folders}
    return names | weights | {"states": states, "scores": scores, "result": (config.run_dir / "result.json").exists()}


def test_kills_at_file_operations_change_nothing(tmp_path: Path) -> None:
    shards = toy_shards(tmp_path)
    whole = toy_config(shards, tmp_path / "whole", **SETTINGS)
    run(killed, whole, 1, None, None)
    expected = ending(whole)
    assert len(expected["scores"]) == 3
    operations = int((tmp_path / "whole" / "operations").read_text())
    draw = random.Random(5)
    for number in range(KILLS):
        config = toy_config(shards, tmp_path / f"{number}", **SETTINGS)
        if number % 3 == 2:  # a stop signal comes between a step and its evaluation, and then a kill
            run(killed, config, 1, None, draw.randint(1, 3))
        at = round((number + draw.random()) * operations / KILLS) if number % 3 < 2 else draw.randint(1, 60)
        assert start(killed, config, 1, max(at, 1), None).wait() == [-9], (at, printed(config))
        run(train, config)
        ours = ending(config)
        assert [name for name in expected if ours.get(name) != expected[name]] == [], f"operation {at} of {operations}"
