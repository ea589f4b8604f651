"""Formulas of what a step's heads and losses cost, against what is counted on ranks, and against what is held."""

from __future__ import annotations

import json

import pytest
import torch.distributed as dist
from heads_alone import OneOf, batch, recipe, stepper
from training_runs import run, toy_config, toy_shards

from keyreid.distributed.ranks import join, leave
from keyreid.errors import ConfigError
from keyreid.training.costs import described, memory, messages
from keyreid.training.run import describe_plan

WIDTH, CLIPS = 16, 8  # clips of a rank
FORMS = {  # of R ranks: lanes, compare, precision
    "batch": lambda ranks: (1, "batch", "fp32"),
    "batch in bf16": lambda ranks: (1, "batch", "bf16"),
    "lanes of two ranks": lambda ranks: (ranks // 2, "lane", "fp32"),
    "a lane a rank": lambda ranks: (ranks, "lane", "fp32"),
    "two lanes a rank": lambda ranks: (2 * ranks, "lane", "bf16"),
    "lanes, all compared": lambda ranks: (ranks, "batch", "fp32"),
}


def counted(config, folder) -> None:
    """Write down each collective of a step of each form: kind, ranks, bytes as in costs.Message."""
    ranks, found = join(), {}

    def count(name, kind, counts):
        plain = getattr(dist, name)

        def collective(*inputs, **named):
            group = named.get("group") or next((of for of in inputs if isinstance(of, dist.ProcessGroup)), None)
            heard.append([kind, dist.get_world_size(group), counts(inputs)])
            return plain(*inputs, **named)

        setattr(dist, name, collective)

    heard: list = []
    count("all_gather_single", "gather", lambda inputs: inputs[1].nbytes)
    count("all_reduce", "sum", lambda inputs: inputs[0].nbytes)
    count("all_to_all_single", "exchange", lambda inputs: inputs[0].nbytes)
    for form, layout in FORMS.items():
        config = recipe(CLIPS * ranks.world_size, *layout(ranks.world_size))
        steps = stepper(config, WIDTH, config.data.identities, ranks)
        heard.clear()
        assert steps.step(batch(config, ranks), 0).applied
        found[form] = list(heard)
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found))
    leave()


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)])
def test_bytes_that_a_rank_receives(ranks, tmp_path):
    run(counted, recipe(16, output=str(tmp_path)), ranks, tmp_path)
    for rank in range(ranks):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for form, layout in FORMS.items():
            expected = messages(recipe(CLIPS * ranks, *layout(ranks)), WIDTH, ranks)
            said = sorted([of.kind, of.ranks, of.size] for of in expected)
            assert sorted(found[form]) == said, (rank, form)


def received(ranks: int, form: str, what: str = "") -> int:
    config = recipe(CLIPS * ranks, *FORMS[form](ranks))
    return sum(of.received for of in messages(config, WIDTH, ranks) if what in of.what)


def test_what_does_not_grow():
    """The formulas that are counted above: lanes receive the same on any ranks, batches half of it in bf16."""
    least = {"lanes of two ranks": 4, "a lane a rank": 2, "two lanes a rank": 2}  # a single lane lends no centres
    for form, ranks in least.items():
        assert received(8, form) == pytest.approx(received(ranks, form), rel=0.02), form
    assert received(64, "lanes of two ranks", "features") == received(2, "lanes of two ranks", "features")
    assert received(8, "batch", "features") == 7 * received(2, "batch", "features")
    known = CLIPS * 7 * (4 * 6 + 8)  # visibility and labels
    assert received(8, "batch in bf16", "features") - known == (received(8, "batch", "features") - known) / 2
    assert messages(recipe(64), WIDTH, 1) == []


def test_it_is_said_before_the_first_step(tmp_path):
    plan = describe_plan(toy_config(toy_shards(tmp_path), tmp_path), 2)
    assert "heads and losses: at most" in plan and "on 2 rank(s)" in plan
    line = described(recipe(1024), 768, 625, 8)
    assert "on 8 rank(s)" in line and "gathered features: 78.7" in line
    with pytest.raises(ConfigError, match=r"data\.lanes=6 and 4 ranks"):
        described(recipe(48, 6, "lane"), 768, 625, 4)
    micro = memory(recipe(64, 4, "lane", training={"accumulation": 4}), 768, 625, 1)
    assert sum(micro.values()) < 0.4 * sum(memory(recipe(64, 4, "lane"), 768, 625, 1).values())


LANES = [((256, 4, "lane"), 4), ((256, 16, "lane"), 8), ((256, 4, "lane"), 8), ((64, 8, "lane"), 1)]  # and ranks


@pytest.mark.parametrize(
    ("case", "ranks", "width", "identities"),
    [
        *[(case, ranks, 96, 64) for case, ranks in LANES],
        *[((512, 1, "batch", precision), 8, 192, 64) for precision in ("fp32", "bf16")],
        ((512,), 32, 48, 64),  # few own rows
        ((64,), 1, 192, 64),
        ((64,), 8, 8, 20_000),  # logits
        ((64, 8, "lane"), 8, 8, 20_000),
        *[pytest.param((2048,), ranks, 768, 625, marks=pytest.mark.slow) for ranks in (1, 8)],
        pytest.param((1024, 1, "batch", "bf16"), 8, 768, 625, marks=pytest.mark.slow),
    ],
)
def test_bound_of_the_memory(case, ranks, width, identities):
    one = OneOf(recipe(*case), width, identities, ranks)
    try:
        log, without = one.held()
    finally:
        one.leave()
    peak, largest = log.peak(without), log.largest(without)
    config = recipe(*case)
    bound = sum(memory(config, width, identities, ranks).values())
    assert bound / 2 < peak <= bound, f"{peak / bound:.2f}"
    clips, features = config.data.batch_size, 4 * (width + 6 * 4 * width)
    # Distances and features of all clips, and logits, but nothing of both B x B and D.
    assert largest <= max(2 * clips * features, 8 * 6 * clips**2, 28 * clips * identities)
