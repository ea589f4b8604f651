"""What makes a run: which settings do, and how a change is refused or allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_runs import toy_config

from keyreid.checkpoints import folder as checkpoints
from keyreid.checkpoints import manifest
from keyreid.checkpoints.folder import TrainingState
from keyreid.checkpoints.weights_file import WeightsHeader
from keyreid.config import ClipConfig, Config, ModelConfig
from keyreid.errors import CheckpointError, ConfigError
from keyreid.training.recipe import FREE, below, changes, flatten, settings

OTHER = {
    "seed": 7,
    "data": {"sampler": "camera", "holdout": 0.5, "augment": {"flip_probability": 0.1}},
    "clip": {"frames": 3},
    "model": {"drop_path": 0.2},
    "loss": {"alpha": 0.1},
    "optimizer": {"name": "adamw", "lr": 0.5},
    "schedule": {"epochs": 1},
    "training": {"precision": "bf16", "clip_gradient_norm": 1.0, "ema_decay": 0.5},
    "evaluation": {"protocol": "official"},
}


def toy(**sections: object) -> Config:
    return toy_config(Path("shards"), Path("runs"), **sections)


def test_every_setting_makes_the_run_but_those_that_say_why_not() -> None:
    assert all(why for why in FREE.values())
    everything = flatten(toy().model_dump(mode="json"))
    assert {key for key in FREE if not any(below(each, (key,)) for each in everything)} == set()
    assert len(settings(toy())) + sum(below(key, FREE) for key in everything) == len(everything)


@pytest.mark.parametrize("key", flatten(OTHER))
def test_a_change_names_key_and_both_values(key: str) -> None:
    section, _, name = key.partition(".")
    value = flatten(OTHER)[key]
    inner = {name: value} if "." not in name else {"augment": {"pad_pixels": 3, name.split(".")[1]: value}}
    before, now = settings(toy()), settings(toy(**{section: inner if name else value}))
    with pytest.raises(CheckpointError) as refused:
        changes("step-1", before, now, ())
    assert f"{key} was {before[key]!r} and is now {value!r}" in str(refused.value)
    assert f"--change {key}" in str(refused.value)
    for allowed in (key, section):
        assert changes("step-1", before, now, (allowed,)) == {key: (before[key], value)}
    with pytest.raises(CheckpointError):
        changes("step-1", before, now, ("loss.triplet",))


def test_what_only_one_version_knows_is_no_change() -> None:
    now = settings(toy())
    assert changes("step-1", now | {"loss.forgotten": 1}, now, ()) == {}
    assert changes("step-1", {key: now[key] for key in list(now)[1:]}, now, ()) == {}


def test_the_name_of_nothing_is_refused() -> None:
    now = settings(toy())
    with pytest.raises(ConfigError, match="--change optimiser: optimiser is no setting"):
        changes("step-1", now, now, ("optimiser",))
    with pytest.raises(ConfigError, match=r"data\.workers may change anyway"):
        changes("step-1", now, now, ("data.workers",))


def test_a_state_of_a_newer_version_says_so(tmp_path: Path) -> None:
    header = WeightsHeader(ModelConfig(parts=3), ClipConfig(frames=2), identities=[3], cameras=[1], about={})
    folder = checkpoints.save(tmp_path, checkpoints.Snapshot(TrainingState(step=1), header, {}, {}, {}))
    values = json.loads((folder / manifest.STATE).read_text())
    (folder / manifest.STATE).write_text(json.dumps(values | {"phase": 2}))
    with pytest.raises(CheckpointError, match="phase: of a newer version of keyreid"):
        checkpoints.read_state(folder)
    del values["recipe"]  # as keyreid 0.1 wrote it
    (folder / manifest.STATE).write_text(json.dumps(values))
    assert checkpoints.read_state(folder) == TrainingState(step=1)


def test_no_checkpoint_of_another_run_is_written_over_or_taken_for_this_ones(tmp_path: Path) -> None:
    header = WeightsHeader(ModelConfig(parts=3), ClipConfig(frames=2), identities=[3], cameras=[1], about={})
    taken = checkpoints.Snapshot(TrainingState(step=1), header, {}, {}, {})
    folder = checkpoints.save(tmp_path, taken)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match="step-00000001: is there, and not of this run"):
        checkpoints.save(tmp_path, taken)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
