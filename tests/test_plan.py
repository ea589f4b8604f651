"""The order of an epoch: pure, fair, the same on any ranks; what a frame's changes look like; evaluation's clips."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from packed import index_only, make_config

from keyreid.errors import ConfigError, DataError
from keyreid.guidance import named
from keyreid.shards.plan import SAMPLERS, TrainingPlan, evaluation_clip_counts, evaluation_clips

FIELDS = ("tracklet", "label", "frames", "flip", "crop", "erase", "blank")


def mars_like(seed: int = 0):
    """Counts as in MARS's training set: 625 identities, 8,298 tracklets, 6 cameras, up to 270 tracklets an identity."""
    rng = np.random.default_rng(seed)
    weights = rng.lognormal(0, 0.8, 625)
    counts = 1 + rng.multinomial(8298 - 625, weights / weights.sum())
    identities = np.repeat(np.arange(625) * 2 + 1, counts)
    return index_only(identities, rng.integers(1, 7, 8298), rng.integers(2, 200, 8298))


def plan(shards, seed: int = 5, **overrides) -> TrainingPlan:
    config = make_config("x", data__identities=4, data__tracklets=4, **overrides)
    return TrainingPlan(shards, config.data, config.clip, seed)


def same(one, other) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


def test_a_step_is_a_pure_function_of_seed_epoch_and_step():
    shards = mars_like()
    steps = [(0, 0), (0, 70), (3, 5), (1, 300), (0, 70), (2, 129)]
    first = plan(shards)
    for epoch, step in steps:
        assert all(map(same, first.step(epoch, step), plan(shards).step(epoch, step)))
    changed = [plan(shards, 6).step(0, 70), first.step(1, 70), first.step(0, 71)]
    for other in changed:
        assert [clip.tracklet for clip in other] != [clip.tracklet for clip in first.step(0, 70)]


@pytest.mark.parametrize(
    ("sampler", "tracklets", "frames"),
    [
        ("identity", [8, 7, 35, 29, 27, 26], [52, 23, 42, 40, 24, 16]),
        ("frames", [40, 44, 9, 8, 29, 31], [30, 21, 51, 57, 42, 3]),
        ("camera", [15, 16, 9, 7, 42, 40], [43, 35, 51, 27, 19, 36]),
    ],
)
def test_the_order_is_that_of_version_0_1(sampler, tracklets, frames):
    """So that a run that began with an earlier version resumes in the same order."""
    rng = np.random.default_rng(0)
    identities = np.repeat(np.arange(9), np.arange(1, 10))
    shards = index_only(identities, rng.integers(1, 4, 45), rng.integers(1, 30, 45))
    config = make_config("x", data__identities=3, data__tracklets=2, data__sampler=sampler)
    order = TrainingPlan(shards, config.data, config.clip, seed=5)
    assert order.steps_per_epoch == 9
    clips = order.step(1, 2)
    assert [clip.tracklet for clip in clips] == tracklets
    assert [clip.frames.sum() for clip in clips] == frames
    assert [clip.crop.sum() for clip in clips] == [1, -2, -11, 5, 7, 4]
    assert [clip.erase.sum() for clip in clips] == [166, 226, 320, 76, 252, 56]


def test_a_sampler_of_ones_own_is_asked_for_each_block_and_checked(monkeypatch):
    class First:
        """The first tracklets of the first identities, in every step."""

        steps_per_epoch = 70

        def __init__(self, tracklets, data, seed):
            rows = tracklets.start[: data.identities, None] + np.arange(data.tracklets)
            self.rows = rows.reshape(-1)

        def steps(self, epoch, first, last):
            return np.stack([self.rows] * (last - first if epoch == 0 else 1))

    monkeypatch.setitem(SAMPLERS, "identity", First)
    order = plan(mars_like())
    assert order.steps_per_epoch == 70
    assert [clip.label for clip in order.step(0, 69)] == [label for label in range(4) for _ in range(4)]
    with pytest.raises(ValueError, match=r"the sampler gave \(1, 16\) tracklets, not \(64, 16\)"):
        order.step(1, 0)


@pytest.mark.parametrize("sampler", ["identity", "frames", "camera"])
def test_every_step_has_p_identities_of_k_tracklets(sampler):
    shards = mars_like()
    order = plan(shards, data__sampler=sampler)
    assert order.num_identities == 625
    for step in range(order.steps_per_epoch):
        clips = order.step(1, step)
        labels = [clip.label for clip in clips]
        assert labels == sorted(labels, key=labels.index)  # the K of an identity are together
        assert sorted(labels.count(label) for label in set(labels)) == [4, 4, 4, 4]
        assert all(shards.identities[clip.tracklet] == 2 * clip.label + 1 for clip in clips)


def test_every_tracklet_has_its_turn_in_an_epoch():
    shards = mars_like()
    order = plan(shards)
    for epoch in range(2):
        seen = np.bincount(
            [clip.tracklet for step in range(order.steps_per_epoch) for clip in order.step(epoch, step)], minlength=8298
        )
        assert seen.min() == 1
        # Twice: what fills an identity's last group and the last step.
        assert seen.sum() == order.steps_per_epoch * 16
        assert (seen > 2).mean() < 0.01
        assert order.steps_per_epoch * 16 < 1.2 * 8298


def test_identities_with_few_tracklets_repeat_them_evenly():
    shards = index_only(np.repeat(np.arange(8), [1, 2, 3, 4, 5, 6, 7, 30]), np.ones(58, int), np.full(58, 9))
    order = plan(shards)
    for step in range(order.steps_per_epoch):
        clips = order.step(0, step)
        for start in range(0, 16, 4):
            chosen = [clip.tracklet for clip in clips[start : start + 4]]
            available = (shards.identities == shards.identities[chosen[0]]).sum()
            assert len(set(chosen)) == min(4, available)


def test_more_groups_of_one_identity_than_the_others_can_match():
    shards = index_only(np.repeat([3, 5, 7, 9], [200, 1, 1, 1]), np.ones(203, int), np.full(203, 9))
    order = plan(shards)
    assert order.steps_per_epoch == 50
    for step in range(50):
        assert len({clip.label for clip in order.step(0, step)}) == 4


def test_the_deal_mixes_as_well_as_drawing_at_random():
    order = plan(mars_like())
    meetings = np.zeros((625, 625), int)
    for step in range(order.steps_per_epoch):
        labels = sorted({clip.label for clip in order.step(0, step)})
        meetings[np.ix_(labels, labels)] += 1
    pairs = meetings[np.triu_indices(625, 1)]
    # Random draws in proportion to the groups left give 0.020 here; a deal in rows, unmixed, gives 0.4.
    assert (pairs > 1).sum() / (pairs > 0).sum() < 0.04


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16])
def test_ranks_cut_the_same_global_batch(world_size):
    order = plan(mars_like())
    ranks = [islice(order.batches(0, 574, rank, world_size), 6) for rank in range(world_size)]
    whole = islice(plan(mars_like()).batches(0, 574), 6)
    for parts, batch in zip(zip(*ranks, strict=True), whole, strict=True):
        assert all(map(same, [clip for part in parts for clip in part], batch))


def test_resuming_at_any_step_goes_on_as_if_never_stopped():
    order = plan(mars_like())
    length = order.steps_per_epoch
    whole = list(islice(order.batches(0, 0), 2 * length + 3))
    for done in (1, 63, 64, length - 1, length, length + 70):
        epoch, step = divmod(done, length)
        resumed = next(plan(mars_like()).batches(epoch, step))
        assert all(map(same, resumed, whole[done]))


def test_epochs_may_be_shorter_or_longer_than_the_plans():
    order = plan(mars_like())
    short = list(islice(order.batches(0, 8, steps_per_epoch=10), 4))
    for batch, (epoch, step) in zip(short, [(0, 8), (0, 9), (1, 0), (1, 1)], strict=True):
        assert all(map(same, batch, order.step(epoch, step)))
    length = order.steps_per_epoch
    long = list(islice(order.batches(0, length - 1, steps_per_epoch=length + 5), 3))
    for batch, (epoch, step) in zip(long, [(0, length - 1), (1, 0), (1, 1)], strict=True):
        assert all(map(same, batch, order.step(epoch, step)))


def test_ranks_that_do_not_divide_the_batch_and_too_few_identities_are_refused():
    shards = mars_like()
    with pytest.raises(ConfigError, match="3 ranks do not divide the batch of 16"):
        next(plan(shards).batches(0, 0, 0, 3))
    with pytest.raises(ConfigError, match="3 training identities"):
        plan(index_only(np.array([1, 2, 3]), np.ones(3, int), np.ones(3, int)))
    with pytest.raises(DataError, match="no training tracklets"):
        plan(index_only(np.array([1, 2, 3]), np.ones(3, int), np.ones(3, int), split="query"))


def test_frames_come_from_equal_chunks_and_short_tracklets_repeat():
    totals = np.array([1, 2, 3, 4, 5, 7, 40, 41])
    shards = index_only(np.arange(8), np.ones(8, int), totals)
    order = plan(shards)
    drawn = {total: [] for total in totals.tolist()}
    for epoch in range(60):
        for step in range(order.steps_per_epoch):
            for clip in order.step(epoch, step):
                drawn[totals[clip.tracklet]].append(clip.frames)
    for total, frames in drawn.items():
        frames = np.array(frames)
        assert (np.diff(frames, axis=1) >= 0).all()
        for chunk in range(4):
            low = chunk * total // 4
            high = max(low + 1, (chunk + 1) * total // 4)
            assert set(frames[:, chunk].tolist()) <= set(range(low, high))
            if total <= 7:
                assert set(frames[:, chunk].tolist()) == set(range(low, high))
    assert drawn[1][0].tolist() == [0, 0, 0, 0]
    assert drawn[2][0].tolist() == [0, 0, 1, 1]


def test_changes_of_frames_have_the_published_distribution():
    order = plan(mars_like(), clip__height=256, clip__width=128, data__augment={})
    clips = [clip for step in range(200) for clip in order.step(0, step)]
    flip, crop, erase = (np.concatenate([getattr(clip, name) for clip in clips]) for name in ("flip", "crop", "erase"))
    assert abs(flip.mean() - 0.5) < 0.02
    assert (crop.min(), crop.max()) == (-10, 10)
    assert abs(crop.mean()) < 0.2
    erased = erase[erase[:, 2] > 0]
    assert abs(len(erased) / len(erase) - 0.5) < 0.02
    top, left, height, width = erased.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 256).all() and (left + width <= 128).all()
    area, aspect = height * width / (256 * 128), height / width
    assert area.min() > 0.018
    assert area.max() < 0.41
    assert aspect.max() < 3.5
    assert (erase[erase[:, 2] == 0] == 0).all()
    same_flip = np.array([clip.flip.all() or not clip.flip.any() for clip in clips]).mean()
    assert same_flip < 0.2  # each frame by itself


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_never_and_always_are_what_they_say(probability):
    augment = {"flip_probability": probability, "erase_probability": probability, "pad_pixels": 0}
    order = plan(mars_like(), clip__height=256, clip__width=128, data__augment=augment)
    for clip in order.step(0, 3):
        assert (clip.flip == bool(probability)).all()
        assert ((clip.erase[:, 2] > 0) == bool(probability)).all()
        assert not clip.crop.any()


def test_frames_sampler_prefers_long_tracklets():
    shards = mars_like()
    frames = np.array([record.frames for record in shards.tracklets])
    means = {}
    for sampler in ("identity", "frames"):
        order = plan(shards, data__sampler=sampler)
        chosen = [clip.tracklet for step in range(order.steps_per_epoch) for clip in order.step(0, step)]
        means[sampler] = frames[chosen].mean()
    assert means["frames"] > 1.15 * means["identity"]


def test_camera_sampler_takes_as_many_cameras_as_there_are():
    shards = mars_like()
    order = plan(shards, data__sampler="camera")
    for step in range(order.steps_per_epoch):
        clips = order.step(0, step)
        for start in range(0, 16, 4):
            chosen = [clip.tracklet for clip in clips[start : start + 4]]
            available = set(shards.cameras[shards.identities == shards.identities[chosen[0]]].tolist())
            assert len(set(shards.cameras[chosen].tolist())) == min(4, len(available))


def test_evaluation_covers_every_frame_once_in_order():
    shards = index_only(np.arange(5), np.ones(5, int), np.array([1, 4, 6, 9, 200]), split="query")
    clips = evaluation_clips(shards, range(5), 4)
    for position, total in enumerate([1, 4, 6, 9, 200]):
        own = [clip for clip in clips if clip.tracklet == position]
        frames = np.concatenate([clip.frames for clip in own])
        assert frames[:total].tolist() == list(range(total))
        assert len(frames) == -(-total // 4) * 4
    assert [clip.frames.tolist() for clip in clips if clip.tracklet == 2] == [[0, 1, 2, 3], [4, 5, 4, 5]]
    assert not any(clip.flip.any() or clip.crop.any() or clip.erase.any() or clip.blank.any() for clip in clips)
    assert {clip.label for clip in clips} == {-1}


def test_released_evaluation_stops_at_41_clips_and_blanks_the_fill():
    shards = index_only(np.arange(2), np.ones(2, int), np.array([6, 200]), split="query")
    clips = evaluation_clips(shards, [0, 1], 4, mode=named("released"))
    assert [clip.blank.tolist() for clip in clips[:2]] == [[False] * 4, [False, False, True, True]]
    assert len(clips) == 2 + 41


def test_evenly_spaced_evaluation_clips():
    shards = index_only(np.arange(2), np.ones(2, int), np.array([8, 400]), split="query")
    clips = evaluation_clips(shards, [0, 1], 4, clips=5)
    assert [clip.frames[0] for clip in clips] == [0, 4, 40, 120, 200, 280, 360]


@pytest.mark.parametrize("mode", ["aligned", "released"])
@pytest.mark.parametrize("clips", [None, 1, 5, 50])
def test_clips_are_counted_before_any_is_made(mode, clips):
    totals = np.array([1, 4, 6, 9, 200])
    shards = index_only(np.arange(5), np.ones(5, int), totals, split="query")
    made = evaluation_clips(shards, range(5), 4, clips, named(mode))
    counts = evaluation_clip_counts(totals, 4, clips, named(mode))
    assert counts.tolist() == np.bincount([clip.tracklet for clip in made]).tolist()


def test_splits_by_number_and_holdout():
    splits = [{"train": [0, 1, 2, 3], "test": [4, 5]}, {"train": [2, 3, 4, 5], "test": [0, 1]}]
    shards = index_only(np.repeat(np.arange(6), 2), np.tile([1, 2], 6), np.full(12, 9), splits, "all")
    assert shards.select("train", 0).tolist() == list(range(8))
    assert shards.select("query", 0).tolist() == [8, 10]
    assert shards.select("gallery", 1).tolist() == [1, 3]
    assert shards.training_identities(1, 0.0).tolist() == [2, 3, 4, 5]
    assert shards.training_identities(0, 0.5).tolist() == [0, 2]
    assert shards.select("holdout_query", 0, 0.5).tolist() == [2, 6]
    assert shards.select("holdout_gallery", 0, 0.5).tolist() == [3, 7]
    with pytest.raises(DataError, match="splits are 0 to 1"):
        shards.select("train", 2)


def test_holdout_never_touches_the_test_set_and_each_query_has_a_match():
    shards = mars_like()
    train, queries = shards.select("train", holdout=0.1), shards.select("holdout_query", holdout=0.1)
    gallery = shards.select("holdout_gallery", holdout=0.1)
    held = set(shards.identities[gallery].tolist())
    assert len(held) == round(0.1 * 625)
    assert not held & set(shards.identities[train].tolist())
    assert sorted([*train, *gallery]) == list(range(8298))
    for query in queries:
        others = (shards.identities[gallery] == shards.identities[query]) & (
            shards.cameras[gallery] != shards.cameras[query]
        )
        assert others.any()
    assert plan(shards, data__holdout=0.1).num_identities == 625 - len(held)
    with pytest.raises(DataError, match="no identities are held out"):
        shards.select("holdout_query")
