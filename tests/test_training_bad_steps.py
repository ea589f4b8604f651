"""A step whose loss is not finite leaves no trace, whatever holds the gradients."""

from dataclasses import replace

import pytest
import torch
from training_runs import run, state_of, stepping, toy_config, toy_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return toy_shards(tmp_path_factory.mktemp("data"))


def record(config, folder, bad):
    """Three steps, before the second of which one goes wrong; all that would be saved after them."""
    with stepping(config) as trainer:
        for step in range(3):
            batch = next(trainer.reader)
            trainer.schedule.step_update(step)
            if step == 1 and bad:
                guidance = batch.guidance.clone()
                guidance[-1] = torch.nan  # of the last clip: with micro-batches, after those that were well
                outcome = trainer.stepper.step(replace(batch, guidance=guidance), step)
                assert not outcome.applied and outcome.norm is None
            assert trainer.stepper.step(batch, step).applied
        if state := state_of(trainer):
            torch.save(state, folder / f"{bad}.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "stage", "accumulation", "lanes"),
    [(1, 0, 2, 1), (2, 0, 1, 1), (2, 1, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2), (2, 3, 2, 1), (1, 3, 2, 2)],
)
def test_a_bad_step_leaves_no_trace(shards, tmp_path, ranks, stage, accumulation, lanes):
    training = {"zero_stage": stage, "accumulation": accumulation}
    config = toy_config(shards, tmp_path, training=training, data={"lanes": lanes}, loss={"compare": "lane"})
    for bad in (False, True):
        run(record, config, ranks, tmp_path, bad)
    without, with_it = (torch.load(tmp_path / f"{bad}.pt", weights_only=True) for bad in (False, True))
    assert without.keys() == with_it.keys()
    for name, value in without.items():
        assert torch.equal(value, with_it[name]), name
