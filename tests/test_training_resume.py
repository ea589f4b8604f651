"""A run that is killed, stopped or moved to other ranks resumes as if nothing had happened."""

import contextlib
import random
import signal
import time

import pytest
import torch
from training_runs import logged, newest_tensors, printed, run, start, toy_config, toy_shards, train

from keyreid.checkpoints import folder as checkpoints
from keyreid.checkpoints import manifest

pytestmark = pytest.mark.slow
SETTINGS = {"checkpoint_every_steps": 1, "ema_decay": 0.9, "zero_stage": 1}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return toy_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """A run of 10 steps on 2 ranks that nobody disturbs."""
    config = toy_config(shards, tmp_path_factory.mktemp("undisturbed"), training=SETTINGS)
    run(train, config, 2)
    return config


def assert_same_ending(config, undisturbed):
    ours, theirs = newest_tensors(config), newest_tensors(undisturbed)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different
    assert logged(config, "train/loss") == logged(undisturbed, "train/loss")  # no gap, no repeat, the same numbers


def test_twenty_kills_change_no_bit(shards, undisturbed, tmp_path):
    config = toy_config(shards, tmp_path, training=SETTINGS)
    root = config.run_dir / "checkpoints"
    draw = random.Random(3)
    inside_a_save = 0
    for kill in range(20):
        begun, at = _step(config), time.time_ns()
        ranks = start(train, config, 2)
        if kill % 2:  # at some moment of the start or of the next steps
            while _step(config) == begun and draw.random() < 0.999 and ranks.processes[0].is_alive():
                time.sleep(0.005)
        else:  # while a checkpoint is being written
            while not _being_written(root, at) and ranks.processes[0].is_alive():
                time.sleep(0.0005)
        ranks.kill()
        inside_a_save += _being_written(root, at)
        if (config.run_dir / "completed").exists():
            break
    run(train, config, 2)
    assert inside_a_save >= 3
    assert_same_ending(config, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_stop_signal_to_one_rank_saves_and_ends_well(shards, undisturbed, tmp_path, number):
    config = toy_config(shards, tmp_path, training={**SETTINGS, "checkpoint_every_steps": None})
    ranks = start(train, config, 2)
    log = config.run_dir / "logs" / "rank-0.log"
    while not (log.is_file() and "step 2/" in log.read_text()):
        time.sleep(0.01)
        assert ranks.processes[0].is_alive(), printed(config)
    ranks.signal(number, rank=1)
    assert ranks.wait() == [0, 0]
    assert (config.run_dir / "interrupted").is_file() and not (config.run_dir / "completed").exists()
    stopped_at = checkpoints.read_state(checkpoints.named(config.run_dir / "checkpoints", "latest")).step
    assert 2 <= stopped_at <= len(logged(config, "train/loss")) <= stopped_at  # within one step
    run(train, config, 2)
    assert (config.run_dir / "completed").is_file() and not (config.run_dir / "interrupted").exists()
    assert_same_ending(config, undisturbed)


def test_other_ranks_and_stages_go_on_with_the_same_samples(shards, undisturbed, tmp_path):
    for ranks, stage, epochs in ((2, 1, 1), (1, 3, 1), (2, 2, 2)):
        config = toy_config(
            shards, tmp_path, training={**SETTINGS, "zero_stage": stage}, schedule={"epochs": 2, "warmup_epochs": 1}
        )
        process = start(train, config, ranks)
        target = {1: 3, 3: 6, 2: 10}[stage]
        while not (checkpoints.checkpoints(config.run_dir / "checkpoints") or [None])[-1:] or _step(config) < target:
            time.sleep(0.01)
            if not process.processes[0].is_alive():
                break
        process.kill() if epochs == 1 else process.wait()
    assert (config.run_dir / "completed").is_file(), printed(config)
    ours, theirs = logged(config, "train/loss"), logged(undisturbed, "train/loss")
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in theirs], rel=1e-5)
    for name, tensor in newest_tensors(undisturbed).items():
        assert torch.allclose(newest_tensors(config)[name].float(), tensor.float(), atol=1e-4), name


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(shards, undisturbed, tmp_path):
    config = toy_config(shards, tmp_path, training=SETTINGS)
    run(train, config, 1)
    (config.run_dir / "completed").unlink()
    newest = checkpoints.checkpoints(config.run_dir / "checkpoints")[-1]
    content = bytearray((newest / manifest.TRAINING).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / manifest.TRAINING).write_bytes(content)
    run(train, config, 1)
    text = printed(config)
    assert f"{newest / manifest.TRAINING}: SHA-256 does not fit" in text
    assert "resuming from" in text and checkpoints.folder_name(9) in text.split("resuming from")[-1].splitlines()[0]


def test_another_architecture_is_refused(shards, undisturbed):
    other = toy_config(
        shards, undisturbed.run_dir.parent, training=SETTINGS, model={"depth": 3}, schedule={"epochs": 3}
    )
    ranks = start(train, other, 1)
    assert ranks.wait() != [0]
    assert "of another architecture or dataset: model.depth is 2 there and 3 here" in printed(other)


def _step(config):
    folders = checkpoints.checkpoints(config.run_dir / "checkpoints")
    return checkpoints.read_state(folders[-1]).step if folders else 0


def _being_written(root, since: int) -> bool:
    """Whether a checkpoint is being written, or was left half written, since a moment; older remains do not count."""
    for path in root.glob("*.partial"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ctime_ns > since:
                return True
    return False
