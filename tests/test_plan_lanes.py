"""Lanes of a batch: identities of their own, each tracklet's turn in each, the same for any ranks, planned apart."""

from __future__ import annotations

from dataclasses import fields
from itertools import combinations, islice

import numpy as np
import pytest
from packed import index_only, make_config

from keyreid.errors import ConfigError
from keyreid.shards import plan as plan_module
from keyreid.shards.batch import ClipPlan
from keyreid.shards.plan import SAMPLERS, TrainingPlan

P, K = 8, 3
SIZES = np.r_[1:25, [2] * 40, [40]]  # tracklets of 65 identities
some_lanes = pytest.mark.parametrize("lanes", [2, 4])
all_samplers = pytest.mark.parametrize("sampler", ["identity", "frames", "camera"])


def plan(lanes: int, sampler: str = "identity", sizes: np.ndarray = SIZES, seed: int = 5, **data) -> TrainingPlan:
    rng = np.random.default_rng(0)
    total = sizes.sum()
    shards = index_only(np.repeat(np.arange(len(sizes)), sizes), rng.integers(1, 5, total), rng.integers(2, 60, total))
    settings = {"identities": P, "tracklets": K, "sampler": sampler, "lanes": lanes} | data
    config = make_config("x", **{f"data__{name}": value for name, value in settings.items()})
    return TrainingPlan(shards, config.data, config.clip, seed)


def epoch_of(order: TrainingPlan, epoch: int, name: str = "label") -> np.ndarray:
    """Labels or tracklets of an epoch: [steps, P, K]."""
    steps = [[getattr(clip, name) for clip in order.step(epoch, step)] for step in range(order.steps_per_epoch)]
    return np.array(steps).reshape(order.steps_per_epoch, P, -1)


def members(order: TrainingPlan, lanes: int, epoch: int) -> list[set[int]]:
    """The identities of each lane in an epoch."""
    return [set(part.ravel().tolist()) for part in np.split(epoch_of(order, epoch), lanes, axis=1)]


def same(one: list[ClipPlan], other: list[ClipPlan]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for a, b in pairs for f in fields(ClipPlan))


class Once:
    """Each identity once an epoch, less those that do not fill the last step; notes what it is made for and asked."""

    made: list[list[int]]  # the first tracklet of each identity
    asked: list[tuple[int, int, int]]

    def __init__(self, tracklets, data, seed):
        self.rows, self.data = tracklets.start, data
        self.steps_per_epoch = len(tracklets.count) // data.identities
        self.made.append(tracklets.position[tracklets.start].tolist())

    def steps(self, epoch, first, last):
        self.asked.append((epoch, first, last))
        wide = self.data.identities
        return self.rows[first * wide : last * wide].repeat(self.data.tracklets).reshape(last - first, -1)


@pytest.fixture
def once(monkeypatch):
    """`Once` as the sampler `identity`."""
    monkeypatch.setattr(Once, "made", [], raising=False)
    monkeypatch.setattr(Once, "asked", [], raising=False)
    monkeypatch.setitem(SAMPLERS, "identity", Once)
    return Once


@some_lanes
@all_samplers
def test_every_step_has_p_identities_of_k_tracklets(lanes, sampler):
    order = plan(lanes, sampler)
    for epoch in range(2):
        labels = epoch_of(order, epoch)
        assert labels.shape == (order.steps_per_epoch, P, K)
        assert (labels == labels[:, :, :1]).all()
        assert (np.diff(np.sort(labels[:, :, 0])) > 0).all()
        tracklets = np.sort(epoch_of(order, epoch, "tracklet"))
        different = 1 + (np.diff(tracklets) > 0).sum(2)
        assert sampler == "camera" or (different == np.minimum(K, SIZES[labels[:, :, 0]])).all()


@some_lanes
@all_samplers
def test_each_identity_is_in_one_lane_of_an_epoch_and_in_others_of_the_next(lanes, sampler):
    order = plan(lanes, sampler)
    parts = [members(order, lanes, epoch) for epoch in range(2)]
    for part in parts:
        assert sum(map(len, part)) == len(set.union(*part)) == len(SIZES)
        assert max(map(len, part)) - min(map(len, part)) <= 1
    assert not {frozenset(part) for part in parts[0]} & {frozenset(part) for part in parts[1]}


@some_lanes
def test_every_tracklet_has_its_turn_in_an_epoch(lanes):
    order, whole = plan(lanes), plan(1)
    for epoch in range(3):
        seen = np.bincount(epoch_of(order, epoch, "tracklet").ravel(), minlength=SIZES.sum())
        assert seen.min() == 1
    # What fills the lighter lanes is no more than the largest identity's 14 groups.
    assert whole.steps_per_epoch <= order.steps_per_epoch <= whole.steps_per_epoch + 14 / (P // lanes)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 12, 24])
@some_lanes
def test_ranks_cut_the_same_global_batch(lanes, world_size):
    sizes = np.full(600, 2)
    order = plan(lanes, sizes=sizes)
    assert order.steps_per_epoch == 75  # a block and the next one
    for first in (63, 74):
        ranks = [islice(plan(lanes, sizes=sizes).batches(0, first, rank, world_size), 2) for rank in range(world_size)]
        for number, parts in enumerate(zip(*ranks, strict=True), first):
            assert {len(part) for part in parts} == {P * K // world_size}  # of 12 and 24 ranks, parts of a group
            assert same([clip for part in parts for clip in part], order.step(*divmod(number, 75)))


@some_lanes
def test_any_step_at_once_and_resuming_in_the_middle(lanes):
    order = plan(lanes)
    length = order.steps_per_epoch
    whole = list(islice(order.batches(0, 0, 1, 4), 2 * length + 3))
    for done in (1, length - 1, length, length + 7, 2 * length):
        epoch, step = divmod(done, length)
        assert same(next(plan(lanes).batches(epoch, step, 1, 4)), whole[done])
        assert same(plan(lanes).step(epoch, step)[6:12], whole[done])
    assert not same(plan(lanes, seed=6).step(0, 0), order.step(0, 0))


@some_lanes
@pytest.mark.parametrize("sizes", [np.full(24, 4), np.arange(1, 25)], ids=["equal", "distinct"])
def test_two_identities_meet_in_a_lane_about_as_often_as_others(once, lanes, sizes):
    """Neighbours of distinct sizes are in one block in every epoch, which leaves them less room to meet."""
    order, epochs = plan(lanes, sizes=sizes), 300
    once.made.clear()
    for epoch in range(epochs):
        order.step(epoch, 0)
    meetings = dict.fromkeys(combinations((np.cumsum(sizes) - sizes).tolist(), 2), 0)
    assert len(once.made) == lanes * epochs
    for part in once.made:
        for pair in combinations(part, 2):
            meetings[pair] += 1
    least, most = 1 / (2 * lanes - 1), 1 / lanes
    if (sizes == 4).all():
        least = most = (24 / lanes - 1) / 23
    spread = 4 * np.sqrt(most * (1 - most) * epochs)
    assert least * epochs - spread < min(meetings.values())
    assert max(meetings.values()) < most * epochs + spread


def test_frames_and_their_changes_are_drawn_anew_for_each_group_and_block():
    order = plan(4, sizes=np.full(1200, 2))
    crops = [clip.crop for step in (0, 64, 128) for clip in order.step(0, step)]
    assert len({crop.tobytes() for crop in crops}) == len(crops)


def test_a_rank_plans_its_own_lane_and_groups_alone(once, monkeypatch):
    drawn, augment = [], plan_module._augment
    monkeypatch.setattr(plan_module, "_augment", lambda *a: drawn.append(a[1][0]) or augment(*a))
    order = plan(4, sizes=np.full(1200, 2))
    once.made.clear()
    list(islice(order.batches(0, 0, 5, 8), 64))
    assert [len(part) for part in once.made] == [300]
    assert drawn == [64 * K]


@pytest.mark.parametrize(
    ("lanes", "steps", "tracklets", "frames", "crops"),
    [
        (2, 22, [68, 70, 77, 398, 399, 400], [89, 55, 6, 119, 74, 104], [9, 0, -13, -4, -10, -3]),
        (4, 26, [391, 385, 382, 365, 364, 365], [104, 11, 37, 89, 103, 93], [8, 10, -5, 11, 0, 0]),
    ],
)
def test_the_order_of_lanes_is_kept(lanes, steps, tracklets, frames, crops):
    """So that a run that began with an earlier version resumes in the same order."""
    order = plan(lanes)
    assert order.steps_per_epoch == steps
    clips = order.step(1, 2)[-6:]
    assert [clip.tracklet for clip in clips] == tracklets
    assert [clip.frames.sum() for clip in clips] == frames
    assert [clip.crop.sum() for clip in clips] == crops


def test_a_lane_of_fewer_steps_goes_on_with_another_shuffle(once):
    order = plan(4, sizes=np.full(22, 2))  # lanes of 6, 6, 5 and 5 identities
    assert order.steps_per_epoch == 3
    labels = epoch_of(order, 1)[:, :, 0]
    assert once.asked == [(1, 0, 3)] * 2 + [(1, 0, 2), (1 + 2**32, 0, 1)] * 2
    assert (labels[2, 4:] == labels[0, 4:]).all()


def test_a_lane_of_more_steps_than_the_heaviest_is_refused(once, monkeypatch):
    class Backwards(Once):
        def __init__(self, tracklets, data, seed):
            super().__init__(tracklets, data, seed)
            self.steps_per_epoch = 10 - len(tracklets.count)

    monkeypatch.setitem(SAMPLERS, "identity", Backwards)
    order = plan(4, sizes=np.full(22, 2))
    with pytest.raises(ValueError, match="lane 2 of epoch 1 5 steps an epoch, the heaviest that can be 4"):
        next(order.batches(1, 0, 2, 4))


def test_lanes_that_do_not_divide_the_identities_are_refused():
    with pytest.raises(ConfigError, match=r"data\.lanes=3 does not divide data\.identities=8"):
        plan(3)
