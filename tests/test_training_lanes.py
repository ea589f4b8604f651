"""Training by lanes: one curve whatever the ranks, the micro-batches and the ZeRO stage; other ranks resume it."""

import pytest
import torch
from training_runs import StopAfter, newest_tensors, run, state_of, stepping, toy_config, toy_shards, train

STEPS = 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return toy_shards(tmp_path_factory.mktemp("data"), identities=20)


def lanes(shards, folder, number, compare="lane", **training):
    training = {"clip_gradient_norm": 10.0, **training}
    data = {"identities": 8, "tracklets": 2, "lanes": number}
    return toy_config(shards, folder, data=data, loss={"compare": compare, "centre": 0.01}, training=training)


def record(config, folder):
    """Train some steps; the first rank writes down losses and all that would be saved, every rank what it holds."""
    losses, passes = [], 0
    with stepping(config) as trainer:
        features = type(trainer.network).features

        def counted(*inputs):
            nonlocal passes
            passes += 1
            return features(*inputs)

        type(trainer.network).features = counted
        for step in range(STEPS):
            trainer.schedule.step_update(step)
            losses.append(trainer.stepper.step(next(trainer.reader), step).loss)
        rows = trainer.engine.module.criterion.global_centres.shape[0]
        found = {"losses": torch.tensor(losses), "passes": torch.tensor(passes / STEPS), "rows": torch.tensor(rows)}
        torch.save(found | state_of(trainer), folder / f"{trainer.ranks.rank}.pt")


@pytest.fixture(scope="module")
def recorded(shards, tmp_path_factory):
    done = {}

    def get(ranks, number, compare="lane", **training):
        key = ranks, number, compare, *training.items()
        if key not in done:
            folder = tmp_path_factory.mktemp("record")
            run(record, lanes(shards, folder, number, compare, **training), ranks, folder)
            done[key] = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
        return done[key]

    return get


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one.keys() - {"passes", "rows"}:
        torch.testing.assert_close(other[name], one[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "number", "stage", "accumulation"),
    [(1, 4, 0, 2), (1, 2, 2, 4), (2, 4, 1, 1), (2, 4, 3, 2), (2, 2, 2, 1), (4, 2, 1, 1), (4, 2, 0, 2), (4, 4, 1, 1)],
)
def test_one_curve_by_lanes(recorded, ranks, number, stage, accumulation):
    alone = recorded(1, number)[0]
    first, *others = recorded(ranks, number, zero_stage=stage, accumulation=accumulation)
    assert_same(alone, first)
    whole = number % (ranks * accumulation) == 0  # micro-batches have whole lanes: one pass, else a second
    assert first["passes"] == accumulation * (1 if whole or accumulation == 1 else 2)
    assert sum(each["rows"] for each in (first, *others)) == alone["rows"]  # each centre has one owner
    assert all(torch.equal(each["losses"], first["losses"]) for each in others)


@pytest.mark.slow
def test_batches_of_lanes_may_compare_all(recorded):
    """`compare: batch` minimises another loss on the same clips; with one lane there is no difference."""
    alone, by_lane = recorded(1, 4, "batch")[0], recorded(1, 4)[0]
    assert_same(alone, recorded(2, 4, "batch")[0])
    assert alone["losses"][0] != by_lane["losses"][0]
    for name, value in recorded(1, 1)[0].items():
        assert torch.equal(value, recorded(1, 1, "batch")[0][name]), name


@pytest.mark.slow
def test_other_ranks_resume_a_run_by_lanes(shards, tmp_path):
    undisturbed = lanes(shards, tmp_path / "undisturbed", 4)
    run(train, undisturbed, 2)
    config = lanes(shards, tmp_path / "moved", 4)
    run(stopped, config, 4)
    run(train, config, 2)
    ours, theirs = newest_tensors(config), newest_tensors(undisturbed)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5)


def stopped(config):
    from keyreid.training.run import train

    train(config, stop=StopAfter(3))
