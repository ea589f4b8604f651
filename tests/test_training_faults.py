"""What others do to a training: losses that are not finite, a disk that is full, shards that cannot be read."""

import resource

import pytest
from training_runs import damaged, printed, start, toy_config, toy_shards, train

from keyreid.checkpoints import folder as checkpoints

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return toy_shards(tmp_path_factory.mktemp("data"))


def test_bad_steps_are_not_applied_and_end_the_run_with_names(shards, tmp_path):
    config = toy_config(
        shards,
        tmp_path,
        optimizer={"lr": 1e30},
        schedule={"warmup_epochs": 0},
        training={"max_bad_steps": 3, "checkpoint_every_steps": 1},
    )
    assert start(train, config, 2).wait() != [0, 0]
    text = printed(config)
    assert "was not applied: loss nan (1 in a row)" in text
    assert "3 steps in a row were not applied" in text
    assert "Ranks whose features are not finite: [0, 1]" in text
    assert "C1T0000" in text and "last checkpoint: " in text
    assert checkpoints.newest_whole(config.run_dir / "checkpoints") is not None


def small_disk(config):
    """Train where no file can grow beyond some kilobytes, as on a full disk."""
    from keyreid.training.run import train

    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
    train(config)


def test_a_full_disk_ends_the_run_in_order(shards, tmp_path):
    config = toy_config(shards, tmp_path, training={"checkpoint_every_steps": 2})
    assert start(small_disk, config, 2).wait() != [0, 0]
    text = printed(config)
    assert "cannot be saved" in text and "File too large" in text
    assert checkpoints.checkpoints(config.run_dir / "checkpoints") == []


def test_a_damaged_shard_ends_the_run_naming_the_sample(shards, tmp_path):
    config = toy_config(damaged(shards, tmp_path / "broken"), tmp_path)
    assert start(train, config, 1).wait() != [0]
    assert "its bytes are not those packed" in printed(config)
    assert "tracklet 00" in printed(config)


def test_a_missing_shard_folder_is_named(tmp_path):
    config = toy_config(tmp_path / "nowhere", tmp_path)
    assert start(train, config, 1).wait() != [0]
    assert "nowhere/dataset.json: no dataset card" in printed(config)
