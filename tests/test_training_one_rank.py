"""What a step and a stop do, on one rank: clipping, micro-batches, averages, bad steps, the best one, going on.

Small cousins of test_training_resume.py, test_training_options.py and test_training_faults.py: the same trainer in one
process that trains a few steps several times.
"""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from training_runs import StopAfter, logged, newest_tensors, toy_config, toy_shards
from training_runs import run as on_ranks

from keyreid.checkpoints import folder as checkpoints
from keyreid.checkpoints.run_folder import find_weights
from keyreid.checkpoints.trained import load_trained
from keyreid.distributed.ranks import join, leave
from keyreid.embedding.features import extract
from keyreid.embedding.vectors import Vectors
from keyreid.errors import DataError, KeyreidError
from keyreid.shards.shard_set import ShardSet
from keyreid.tracking import Tracker
from keyreid.training import snapshot, stochastic_depth
from keyreid.training.loop import Interrupted, Trainer

DECAY, LIMIT, SCALE = 0.6, 0.5, 128.0
WHOLE = {
    "training": {"ema_decay": DECAY, "checkpoint_every_epochs": 100, "zero_stage": 0},
    "schedule": {"epochs": 3, "steps_per_epoch": 2},
    "evaluation": {"every_epochs": 1},
    "tracking": {"sinks": []},
}
ONE_STEP = {"optimizer": {"weight_decay": 0.0}, "tracking": {"sinks": []}}  # its momentum is then the gradient


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return toy_shards(tmp_path_factory.mktemp("data"))


def trainer_of(config, ranks, steps=99, resume=False):
    """A trainer that is told to stop after so many steps, and its tracker."""
    tracker = Tracker(config.tracking, config.run_dir.parent, config.run_dir, config.name)
    return Trainer(config, ranks, tracker, StopAfter(steps), resume=resume)


def weights_of(trainer):
    return {name: value.clone() for name, value in trainer.engine.weights()}


def momenta_of(trainer):
    return {name: held.get().clone() for name, held in trainer.engine.held_states().items()}


def one_step(config, ranks, scale=None):
    """Loss, gradient norm and gradients of the first step; `scale`: as fp16 would scale the loss."""
    trainer = trainer_of(config, ranks)
    if scale:
        trainer.engine._deepspeed.torch_autocast_z0_gradscaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer.engine.train()
    outcome = trainer.stepper.step(next(trainer.reader), 0)
    gradients = momenta_of(trainer)
    trainer.reader.close()
    return {"loss": outcome.loss, "norm": outcome.gradient_norm, "gradients": gradients}


def scale_after_a_resume(trainer):
    """Of a loss scaler that was saved at SCALE."""
    engine = trainer.engine
    engine._deepspeed.torch_autocast_z0_gradscaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    state = replace(trainer.state, loss_scale=engine.loss_scale_state())
    folder = checkpoints.save(trainer.root / "scaled", snapshot.take(engine, None, state, trainer.header))
    engine._deepspeed.torch_autocast_z0_gradscaler = torch.amp.GradScaler("cpu")
    restored = snapshot.read(folder, trainer.config, trainer.header, trainer.ranks)
    snapshot.restore_after(restored, engine, None, same_optimizer=True)
    return engine.loss_scale


def wrong_label(trainer):
    """What is said of a batch with a label that no classifier has."""
    batch = next(trainer.reader)
    batch.labels[1] = 99
    try:
        trainer.stepper.step(batch, 0)
    except DataError as error:
        return str(error)


def record(configs, file):
    """On a rank: all trainings, one after the other, and what was seen of them."""
    whole, stopped, plain, clipped, pieces, bad = configs
    ranks, seen = join(), {}

    trainer = trainer_of(whole, ranks)
    step_of, averages, weights = trainer.stepper.step, [], []

    def step(batch, number):
        averages.append({name: value.clone() for name, value in trainer.average.full().items()})
        outcome = step_of(batch, number)  # and then the average takes these weights in
        weights.append({name.removeprefix("network."): value for name, value in weights_of(trainer).items()})
        return outcome

    trainer.stepper.step = step
    trainer.run()
    seen["averages"], seen["weights"] = averages, weights

    with contextlib.suppress(Interrupted):
        trainer_of(stopped, ranks, steps=3).run()
    trainer_of(stopped, ranks, resume=True).run()

    seen["plain"], seen["clipped"] = one_step(plain, ranks), one_step(clipped, ranks)
    seen["pieces"] = one_step(pieces, ranks, SCALE)

    trainer = trainer_of(bad, ranks)
    seen["wrong label"] = wrong_label(trainer)
    seen["scale"] = scale_after_a_resume(trainer)
    trainer.engine._deepspeed.torch_autocast_z0_gradscaler = None
    trainer.network.global_branch.norm.weight.data[0] = float("nan")
    seen["before"] = {name: buffer.clone() for name, buffer in trainer.network.named_buffers()}
    try:
        trainer.run()
    except KeyreidError as error:
        seen["said"] = str(error)
    seen["after"] = dict(trainer.network.named_buffers())
    seen["momenta"] = momenta_of(trainer)
    torch.save(seen, file)
    leave()


@pytest.fixture(scope="module")
def recorded(shards, tmp_path_factory):
    root = tmp_path_factory.mktemp("one rank")
    settings = {
        "whole": WHOLE,
        "stopped": WHOLE,
        "plain": {**ONE_STEP, "training": {"zero_stage": 0}},
        "clipped": {**ONE_STEP, "training": {"zero_stage": 0, "clip_gradient_norm": LIMIT}},
        "pieces": {**ONE_STEP, "training": {"zero_stage": 0, "accumulation": 2}},
        "bad": {**ONE_STEP, "training": {"zero_stage": 0, "max_bad_steps": 2}},
    }
    configs = [toy_config(shards, root / name, **sections) for name, sections in settings.items()]
    on_ranks(first_of, configs[0], 1, configs, root / "seen.pt")
    return configs, torch.load(root / "seen.pt", weights_only=False)


def first_of(_config, configs, file):
    record(configs, file)


def test_a_run_that_was_stopped_ends_as_one_that_was_not(recorded):
    whole, stopped, *_ = recorded[0]
    ours, theirs = newest_tensors(stopped), newest_tensors(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert any("centres" in name for name in ours)
    assert any("momentum_buffer" in name for name in ours)
    assert logged(stopped, "train/loss") == logged(whole, "train/loss")


def test_the_average_follows_the_weights(recorded):
    _, seen = recorded
    for before, weights, after in zip(seen["averages"], seen["weights"], seen["averages"][1:], strict=False):
        for name, average in after.items():
            expected = DECAY * before[name] + (1 - DECAY) * weights[name]
            torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-7)
    assert len(seen["averages"]) == 6


def test_the_average_is_judged(recorded, shards):
    whole = recorded[0][0]
    network, _ = load_trained(find_weights(whole.run_dir, best=False, averaged=True))
    judged = Vectors.load(whole.run_dir / "evaluation" / "vectors.parquet")
    there = ShardSet.open(shards)
    rows = extract(network, there, [there.position_of(key) for key in judged.keys[:3].tolist()], whole)
    np.testing.assert_allclose(judged.vectors[:3], rows.vectors, rtol=1e-3, atol=1e-4)


def test_the_best_is_the_first_of_the_highest_scores(recorded):
    whole = recorded[0][0]
    scores = dict(logged(whole, "test/torchreid/mAP"))
    assert list(scores) == [2, 4, 6]
    assert len(set(scores.values())) > 1
    root = whole.run_dir / "checkpoints"
    state = checkpoints.read_state(checkpoints.named(root, "latest"))
    assert (state.best_step, state.best_score) == (max(scores, key=scores.get), max(scores.values()))
    assert checkpoints.named(root, "best").name == checkpoints.folder_name(state.best_step)


def test_gradients_are_clipped_to_the_limit(recorded):
    plain, clipped = recorded[1]["plain"], recorded[1]["clipped"]
    norm = torch.stack([gradient.square().sum() for gradient in plain["gradients"].values()]).sum().sqrt().item()
    assert norm > 2 * LIMIT
    assert plain["norm"] == pytest.approx(norm, rel=1e-4)
    assert clipped["norm"] == pytest.approx(norm, rel=1e-4)  # as it was before
    for name, gradient in clipped["gradients"].items():
        torch.testing.assert_close(gradient, plain["gradients"][name] * LIMIT / norm, rtol=1e-3, atol=1e-6)


def test_micro_batches_and_a_loss_scale_change_no_gradient(recorded):
    plain, pieces = recorded[1]["plain"], recorded[1]["pieces"]
    assert pieces["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    for name, gradient in pieces["gradients"].items():
        torch.testing.assert_close(gradient, plain["gradients"][name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_loss_scale_is_resumed(recorded):
    assert recorded[1]["scale"] == SCALE


def test_bad_steps_change_nothing_and_end_the_run(recorded):
    seen = recorded[1]
    assert "2 steps in a row were not applied, the last with loss nan" in seen["said"]
    assert [name for name, value in seen["after"].items() if not torch.equal(value, seen["before"][name])] == []
    assert not any(momentum.any() for momentum in seen["momenta"].values())


def test_a_label_without_a_classifier_is_named(recorded):
    assert "label 99" in recorded[1]["wrong label"]


def test_stochastic_depth_is_drawn_for_each_step():
    paths = [stochastic_depth.ClipDropPath(rate) for rate in (0.1, 0.3)]
    first, again, next_step, other_seed = (
        stochastic_depth.draw(paths, seed, step, 2000, 4) for seed, step in ((5, 7), (5, 7), (5, 8), (6, 7))
    )
    for path, *draws in zip(paths, first, again, next_step, other_seed, strict=True):
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])
        assert not torch.equal(draws[0], draws[3])
        assert (draws[0] == 0).float().mean() == pytest.approx(path.probability, abs=0.02)
        assert draws[0].mean() == pytest.approx(1, abs=0.03)  # what is kept makes up for what is not
