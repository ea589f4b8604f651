"""Windows of a set behind a web server: each shard comes once an epoch, through a cache of a tenth of the set."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from packed import make_config, make_dataset, pack_dataset

from keyreid.shards import open_reader
from keyreid.shards.plan import TrainingPlan
from keyreid.shards.shard_set import ShardSet

pytest.importorskip("aiohttp", reason="keyreid[remote] is not installed")
from shard_server import Server

SHARDS = 60  # about, of one or two identities of six tracklets each, all of the training set


@pytest.fixture(scope="module")
def far(tmp_path_factory):
    root = tmp_path_factory.mktemp("far")
    dataset = make_dataset(root / "source", identities=SHARDS * 2, tracklets=6, frames=(1, 2))
    dataset = replace(dataset, tracklets=tuple(replace(tracklet, split="train") for tracklet in dataset.tracklets))
    pack_dataset(dataset, root / "source", root / "shards", 65_000, order=1)
    server = Server(root / "shards")
    yield server
    server.close()


def settings(far, cache, **data):
    size = sum(shard["bytes"] for shard in ShardSet.open(far.folder).card["shards"])
    own = {"identities": 2, "tracklets": 2, "window": 2, "cache_dir": str(cache), "workers": 1, "prefetch": 1, **data}
    own["cache_gigabytes"] = size / 10 / 1e9
    return make_config(far.url, **{f"data__{name}": value for name, value in own.items()}), size


def test_an_epoch_fetches_the_set_once_through_a_cache_of_a_tenth(far, tmp_path):
    config, size = settings(far, tmp_path)
    shards = ShardSet.from_config(config.data)
    plan = TrainingPlan(shards, config.data, config.clip, 3)
    of_shard = {shard["file"]: shard["bytes"] for shard in shards.card["shards"]}
    train = {int(shards.index.shard(position)) for position in shards.select("train")}
    assert len(plan.windows(0, 0)) > 8
    far.requests.clear()
    batches = plan.batches(0, 0, files=shards.files)
    reader = open_reader(shards, batches, config, workers=0)
    seen = set()
    for epoch in range(2):
        for _ in range(plan.steps_per_epoch):
            seen.update(next(reader).keys)
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.tar")) <= size / 10
        fetched = {name: count for name, count in far.requests.items() if name in of_shard}
        total = sum(of_shard[name] * count for name, count in fetched.items())
        assert sum(of_shard[shards.card["shards"][number]["file"]] for number in train) <= total
        assert total <= 1.1 * (epoch + 1) * size
    assert len(seen) == len(shards.select("train"))
    reader.close()


@pytest.mark.slow
def test_ranks_workers_and_a_resumed_run_read_the_same_batches(far, tmp_path):
    config, _ = settings(far, tmp_path, lanes=2)
    shards = ShardSet.from_config(config.data)
    plan = TrainingPlan(shards, config.data, config.clip, 3)
    first = next(w.start for w in plan.windows(0, 0) if w.start) + 1  # in the middle of a window
    found = {}
    for ranks, workers in ((1, 4), (2, 2), (4, 1)):
        for start in (0, first):
            parts = []
            for rank in range(ranks):
                batches = plan.batches(0, start, rank, ranks, files=shards.files)
                reader = open_reader(shards, batches, config, workers=workers)
                parts.append(list(islice(reader, 8)))
                reader.close()
            for step, of_step in enumerate(zip(*parts, strict=True), start):
                keys = [key for batch in of_step for key in batch.keys]
                pictures = np.concatenate([batch.images.numpy() for batch in of_step])
                before = found.setdefault(step, (keys, pictures))
                assert before[0] == keys
                np.testing.assert_array_equal(before[1], pictures)
    assert len(found) > 8
