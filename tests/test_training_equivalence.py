"""One curve: whatever the ranks, the ZeRO stage and the micro-batches; and proof of what really runs."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from training_runs import run, toy_config, toy_shards

STEPS = 5
FILES = Path(__file__).parents[1] / "configs" / "deepspeed"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return toy_shards(tmp_path_factory.mktemp("data"))


def record(config, folder):
    """Train some steps on this rank and write down what it met and what came of it."""
    import deepspeed

    from keyreid.distributed.preemption import StopRequest
    from keyreid.distributed.ranks import join, leave
    from keyreid.shards.dali import DaliReader
    from keyreid.tracking import Tracker
    from keyreid.training.loop import Trainer

    ranks = join()
    trainer = Trainer(config, ranks, Tracker(config.tracking, Path(), Path(), "", enabled=False), StopRequest())
    trainer.engine.train()
    seen = {"losses": [], "norms": [], "keys": [], "pictures": []}
    for step in range(STEPS):
        batch = next(trainer.reader)
        trainer.schedule.step_update(step)
        outcome = trainer.stepper.step(batch, step)
        seen["losses"].append(outcome.loss)
        seen["norms"].append(outcome.gradient_norm)
        seen["keys"].append(batch.keys)
        seen["pictures"].append(hashlib.sha256(batch.images.numpy().tobytes()).hexdigest())
    weights = torch.cat([weight.flatten() for _, weight in trainer.engine.weights()])
    buffers = torch.cat([buffer.double().flatten() for _, buffer in trainer.engine.module.named_buffers()])
    seen["weights"] = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
    seen["sample"] = weights[:: max(1, len(weights) // 2000)].tolist()
    seen["buffers"] = buffers[:: max(1, len(buffers) // 2000)].tolist()
    seen["engine"] = isinstance(trainer.engine._deepspeed, deepspeed.DeepSpeedEngine)
    seen["dali"] = isinstance(trainer.reader, DaliReader)
    trainer.reader.close()
    (folder / f"{ranks.rank}.json").write_text(json.dumps(seen))
    leave()


@pytest.fixture(scope="module")
def recorded(shards, tmp_path_factory):
    """Records of all ranks for (ranks, ZeRO stage, micro-batches) and other settings, each trained once."""
    done = {}

    def get(ranks, stage, accumulation, **settings):
        key = ranks, stage, accumulation, *settings.items()
        if key not in done:
            folder = tmp_path_factory.mktemp("record")
            training = {"zero_stage": stage, "accumulation": accumulation, "clip_gradient_norm": 10.0, **settings}
            run(record, toy_config(shards, folder, training=training), ranks, folder)
            done[key] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
        return done[key]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "stage", "accumulation"),
    [(1, 0, 2), (1, 1, 1), (1, 2, 4), (1, 3, 1), (2, 0, 1), (2, 1, 2), (2, 2, 1), (2, 2, 2), (2, 3, 1), (2, 3, 2)],
)
def test_same_curve_weights_and_statistics(recorded, ranks, stage, accumulation):
    assert_same_curve(recorded(1, 0, 1)[0], recorded(ranks, stage, accumulation))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        (2, {"deepspeed": str(FILES / "zero2_offload.json")}),
        (3, {"deepspeed": str(FILES / "zero3_offload.json")}),
        (1, {"activation_checkpointing": True}),
    ],
)
def test_what_saves_memory_changes_nothing(recorded, stage, settings):
    assert_same_curve(recorded(1, 0, 1)[0], recorded(2, stage, 1, **settings))


def assert_same_curve(plain, others):
    for other in others:
        assert other["losses"] == pytest.approx(plain["losses"], rel=1e-5)
        assert other["norms"] == pytest.approx(plain["norms"], rel=1e-4)
        assert other["sample"] == pytest.approx(plain["sample"], abs=1e-5)
        assert other["buffers"] == pytest.approx(plain["buffers"], abs=1e-4)
    assert plain["losses"][0] != pytest.approx(plain["losses"][-1], rel=1e-3)  # it does learn


@pytest.mark.slow
def test_two_ranks_share_the_batch_and_agree_on_the_weights(recorded):
    alone, (first, second) = recorded(1, 0, 1)[0], recorded(2, 1, 2)
    for step in range(STEPS):
        assert first["keys"][step] + second["keys"][step] == alone["keys"][step]
    assert not set(first["pictures"]) & set(second["pictures"])
    assert first["weights"] == second["weights"]
    assert all(rank["engine"] and rank["dali"] for rank in (alone, first, second))
