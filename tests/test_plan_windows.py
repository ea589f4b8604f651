"""Windows: lanes walk through whole shards; each tracklet's turn, the same order for any ranks, resumed anywhere."""

from __future__ import annotations

from dataclasses import fields
from itertools import islice

import numpy as np
import pytest
from packed import make_config, make_dataset, pack_dataset
from typer.testing import CliRunner

from keyreid.cli import app
from keyreid.errors import ConfigError
from keyreid.shards.batch import ClipPlan
from keyreid.shards.index_file import ShardIndex
from keyreid.shards.members import SPLITS
from keyreid.shards.plan import TrainingPlan
from keyreid.shards.set_index import SetIndex
from keyreid.shards.shard_set import ShardSet
from keyreid.shards.storage import LocalShardFiles

P, K = 8, 3
all_lanes = pytest.mark.parametrize("lanes", [1, 2, 4])


def made_set(shards: int = 24, identities: int = 6, seed: int = 0, cut: bool = False) -> ShardSet:
    """So many shards of so many identities of 1 to 9 tracklets, and two of a test set; cut: one identity is in two."""
    rng = np.random.default_rng(seed)
    pieces, names = [], rng.permutation(shards * identities + 20)
    for number in range(shards + 2):
        own = names[number * identities : (number + 1) * identities]
        if cut and number == 1:
            own[0] = names[0]
        people = np.repeat(own, rng.integers(1, 10, identities))
        total, frames = len(people), rng.integers(2, 30, len(people))
        split = np.full(total, SPLITS.index("train" if number < shards else "gallery"), "u1")
        members = int((2 + 2 * frames).sum())
        of_members = {name: np.zeros(members, kind) for name, kind in (("offset", "i8"), ("size", "u4"), ("crc", "u4"))}
        of_frames = {name: np.zeros(frames.sum(), "u2") for name in ("picture", "width", "height", "visible")}
        keys = np.array([f"s{number}t{row}" for row in range(total)])
        columns = keys, people, rng.integers(1, 4, total), split, frames
        pieces.append(ShardIndex({"parts": 6}, *columns, **of_members, **of_frames))
    card = {"cameras": [1, 2, 3], "splits": [], "query_camera": None, "shards": []}
    return ShardSet("made", card, SetIndex.joined(pieces), LocalShardFiles([]))


def plan(lanes: int, window: int = 12, shards: ShardSet | None = None, **data) -> TrainingPlan:
    settings = {"identities": P, "tracklets": K, "lanes": lanes, "window": window} | data
    config = make_config("x", **{f"data__{name}": value for name, value in settings.items()})
    return TrainingPlan(shards or made_set(), config.data, config.clip, 5)


def same(one: list[ClipPlan], other: list[ClipPlan]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for a, b in pairs for f in fields(ClipPlan))


@all_lanes
@pytest.mark.parametrize("sampler", ["identity", "frames", "camera"])
def test_each_tracklet_has_its_turn_and_steps_are_full(lanes, sampler):
    shards = made_set()
    order = plan(lanes, shards=shards, sampler=sampler)
    train = shards.select("train")
    for epoch in range(3):
        steps = [order.step(epoch, step) for step in range(order.steps_per_epoch)]
        seen = np.unique([clip.tracklet for clips in steps for clip in clips])
        assert sampler != "identity" or seen.tolist() == train.tolist()
        for clips in steps:
            labels = np.array([clip.label for clip in clips]).reshape(P, K)
            assert (labels == labels[:, :1]).all()
            assert len(np.unique(labels[:, 0])) == P
    # Identities come about as often as without windows: what fills a window's last step is all that is more.
    whole = plan(lanes, window=0, shards=shards).steps_per_epoch
    assert whole <= order.steps_per_epoch <= 1.35 * whole


@all_lanes
def test_a_step_reads_from_its_window_alone_and_each_shard_is_of_one_window(lanes):
    shards = made_set()
    order = plan(lanes, shards=shards)
    for epoch in range(2):
        last: list[tuple[list[int], list[int]]] = [([], [])] * lanes
        walked: list[list[int]] = [[] for _ in range(lanes)]
        for step in range(order.steps_per_epoch):
            clips = order.step(epoch, step)
            for lane in range(lanes):
                now, then = order.places(epoch, step, lane, lanes)
                own = clips[lane * len(clips) // lanes : (lane + 1) * len(clips) // lanes]
                assert {int(shards.index.shard(clip.tracklet)) for clip in own} <= set(now)
                assert 2 <= len(now) <= 3  # 12 identities of shards of 6
                if now != last[lane][0]:
                    walked[lane] += now
                    assert now == last[lane][1] or step == 0
                last[lane] = now, then
        assert sorted(shard for lane in walked for shard in lane) == list(range(24))
        assert max(map(len, walked)) - min(map(len, walked)) <= 1


def test_lanes_and_windows_change_from_epoch_to_epoch_and_with_the_seed():
    order = plan(2)
    walks = [tuple(order.places(epoch, 0, 0, 2)[0]) for epoch in range(6)]
    assert len(set(walks)) == 6
    alone = [frozenset(plan(1).places(epoch, 0)[0]) for epoch in range(6)]  # shards of any size, also with one lane
    assert len(set(alone)) == 6
    config = make_config("x", data__identities=P, data__tracklets=K, data__lanes=2, data__window=12)
    assert TrainingPlan(made_set(), config.data, config.clip, 6).places(0, 0)[0] != order.places(0, 0)[0]


@all_lanes
def test_any_ranks_and_any_start_give_the_same_order(lanes):
    order = plan(lanes)
    total = 2 * order.steps_per_epoch
    expected = list(islice(order.batches(0, 0), total))
    for world_size in (1, 2, 4, 8):
        for first in (0, 17, order.steps_per_epoch - 1):  # in the middle of a window
            epoch, step = divmod(first, order.steps_per_epoch)
            ranks = [islice(plan(lanes).batches(epoch, step, r, world_size), 40) for r in range(world_size)]
            for number, parts in enumerate(zip(*ranks, strict=True), first):
                assert same([clip for part in parts for clip in part], expected[number])


class Files:
    """Notes what it is told."""

    def __init__(self):
        self.told = []

    def prefetch(self, numbers):
        self.told.append(("fetch", numbers))

    def drop(self, numbers):
        self.told.append(("drop", numbers))


def test_shards_are_fetched_a_window_ahead_and_let_go_when_readers_are_over_it():
    order, files = plan(2, workers=1, prefetch=1), Files()
    behind = 4  # batches that readers may be behind
    batches, here = order.batches(0, 0, 1, 2, files=files), set()
    for number in range(2 * order.steps_per_epoch):
        next(batches)
        for what, shards in files.told:
            here = here | set(shards) if what == "fetch" else here - set(shards)
        files.told.clear()
        places = [
            order.places(*divmod(step, order.steps_per_epoch), 1, 2)
            for step in range(max(0, number - behind + 1), number + 1)
        ]
        assert here == {shard for now, _ in places for shard in now} | set(places[-1][1])
    none = Files()
    list(islice(plan(2, window=0).batches(0, 0, files=none), 3))
    assert not none.told


def test_sets_that_windows_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"1 of 143 training identities have tracklets in several shards.*--order"):
        plan(1, shards=made_set(cut=True))
    with pytest.raises(ConfigError, match="only 3 shards hold training tracklets"):
        plan(4, shards=made_set(shards=3))
    with pytest.raises(ConfigError, match="a window may hold 6 identities, a lane's step takes 8"):
        plan(1, window=6)


def test_inspect_says_what_a_setting_reads(tmp_path):
    dataset = make_dataset(tmp_path / "source", identities=24)
    pack_dataset(dataset, tmp_path / "source", tmp_path / "shards", 100_000, order=3)
    (tmp_path / "toy.yaml").write_text("data: {shards: x, identities: 4, tracklets: 2, lanes: 2, window: 4}\n")

    def inspect(*options: str) -> str:
        words = ["inspect", str(tmp_path / "shards"), "--config", str(tmp_path / "toy.yaml"), *options]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        return result.output

    shards = ShardSet.open(tmp_path / "shards")
    said = inspect()
    config = make_config(shards.location, data__identities=4, data__tracklets=2, data__lanes=2, data__window=4)
    order = TrainingPlan(shards, config.data, config.clip, config.seed)
    walks = [order.windows(0, lane) for lane in range(2)]
    size = [shard["bytes"] for shard in shards.card["shards"]]
    epoch = max(sum(size[shard] for window in walk for shard in window.shards) for walk in walks)
    assert f"2 lanes of 2 identities x 2 tracklets, {order.steps_per_epoch} steps an epoch" in said
    counts = sorted(window.identities for walk in walks for window in walk)
    assert f"with {counts[0]} to {counts[-1]} identities" in said
    assert f"{epoch / 1e9:.3g} GB an epoch" in said
    assert "no windows: each step draws from all" in inspect("--set", "data.window=0")
