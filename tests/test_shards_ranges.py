"""Ranges of remote shards: the bytes that were packed, in few requests, whatever the server does; and when they are."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from packed import make_config, make_dataset, pack_dataset

from keyreid.errors import DataError
from keyreid.shards import open_reader, remote, transfer
from keyreid.shards.cache import CachedShardFiles
from keyreid.shards.plan import evaluation_clips
from keyreid.shards.shard_set import ShardSet

pytest.importorskip("aiohttp", reason="keyreid[remote] is not installed")
from shard_server import Server, changed, in_pieces, redirect, whole

NAME = "toy-00000.tar"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ranges")
    pack_dataset(make_dataset(root / "source", identities=4), root / "source", root / "shards", 60_000)
    return root / "shards"


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setattr(transfer, "FIRST_WAIT_SECONDS", 0.01)
    server = Server(folder)
    yield server
    server.close()


@pytest.fixture
def shards(server, tmp_path) -> ShardSet:
    return ShardSet.open(server.url, tmp_path / "cache", remote="ranges")


@pytest.mark.parametrize("guidance_from", ["heatmaps", "keypoints"])
@pytest.mark.parametrize("reader", ["dali", "plain"])
def test_readers_read_ranges_and_keep_nothing(folder, server, shards, tmp_path, reader, guidance_from):
    local = ShardSet.open(folder)
    clips = evaluation_clips(local, range(len(local)), 4)
    batches = [clips[start : start + 8] for start in range(0, len(clips), 8)]
    asked = server.requests.total()
    settings = {"data__reader": reader, "data__guidance_from": guidance_from}
    opened = open_reader(shards, iter(batches), make_config(server.url, **settings))
    expected = open_reader(local, iter(batches), make_config(folder, **settings))
    for one, other in zip(opened, expected, strict=True):
        assert one.keys == other.keys
        assert (one.images == other.images).all()
        assert (one.guidance == other.guidance).all()
    opened.close()
    expected.close()
    assert not list(tmp_path.glob("**/*.tar"))
    assert server.requests.total() - asked <= len(batches) + len(local.card["shards"])  # clips here lie side by side


def test_a_batch_is_asked_for_at_once_and_what_is_near_in_one_request(folder, server, shards, monkeypatch):
    local = ShardSet.open(folder)
    frames = [(p, f) for p in range(len(local)) for f in (0, int(local.index.frames[p]) - 1)]
    for gap, requests in ((1 << 30, len(local.card["shards"])), (-1, len(set(frames)))):
        monkeypatch.setattr(remote, "GAP", gap)
        server.requests.clear()
        shards.ahead(frames, False)
        assert server.requests.total() == requests
        assert [shards.read_frame(*frame) for frame in frames] == [local.read_frame(*frame) for frame in frames]
        assert server.requests.total() == requests


def test_another_process_gets_a_set_that_reads(folder, shards):
    assert pickle.loads(pickle.dumps(shards)).read_frame(3, 1) == ShardSet.open(folder).read_frame(3, 1)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    "answer",
    [
        500,
        503,
        whole,
        b"<html>",
        changed(lambda body: body[:-1]),
        changed(lambda body: body + b"x"),
        changed(lambda body: bytes(byte ^ 1 for byte in body)),
        in_pieces(4, 0.01, stop=2),
        in_pieces(4, 0.01, stop=1, hang=True),
        redirect(NAME),
    ],
    ids=["500", "503", "whole", "page", "short", "long", "flipped", "cut off", "hangs", "redirects"],
)
def test_a_server_that_fails_once_is_asked_again(folder, server, shards, monkeypatch, answer, ahead):
    monkeypatch.setattr(transfer, "IDLE_SECONDS", 0.5)
    server.answers[NAME] = [answer]
    if ahead:
        shards.ahead([(0, 0), (0, 1)], True)
    assert shards.read_frame(0, 0) == ShardSet.open(folder).read_frame(0, 0)
    assert shards.read_frame(0, 1) == ShardSet.open(folder).read_frame(0, 1)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (500, "ClientResponseError: 500.*given up after 4 tries"),
        (404, "FileNotFoundError"),
        (whole, "the server sends the whole file where a range was asked for; given up after 4 tries"),
        (changed(lambda body: body[:-1]), "bytes came; given up after 4 tries"),
        (changed(lambda body: body[:700] + b"xxx" + body[703:]), r"member f0000\.jpg: its bytes are not those packed"),
        (in_pieces(4, 0.01, stop=1, hang=True), r"no byte came for 0\.5 s; given up after 4 tries"),
        (redirect(NAME), "TooManyRedirects.*given up after 4 tries"),
    ],
    ids=["500", "404", "whole", "short", "changed", "hangs", "circle"],
)
def test_a_server_that_fails_for_ever_is_named(server, shards, monkeypatch, answer, words):
    monkeypatch.setattr(transfer, "IDLE_SECONDS", 0.5)
    server.answers[NAME] = [answer] * 99
    with pytest.raises(DataError, match=rf"{server.url}/{NAME}.*{words}"):
        shards.read_frame(0, 0)


def test_a_server_that_trickles_is_given_up(server, shards, monkeypatch):
    monkeypatch.setattr(transfer, "PATIENCE_SECONDS", 0.5)
    server.answers[NAME] = [in_pieces(1000, 0.1)] * 9
    with pytest.raises(DataError, match="it comes too slowly; given up"):
        shards.read_frame(0, 0)


def test_a_batch_with_a_lost_shard_reads_the_rest(folder, server, shards):
    """What is missing is a fault of its frames alone."""
    server.answers[NAME] = [404] * 99
    local = ShardSet.open(folder)
    clips = evaluation_clips(local, range(len(local)), 4)
    lost, rest = ([clip for clip in clips if (local.tracklets[clip.tracklet].shard == 0) == gone] for gone in (1, 0))
    config = make_config(server.url, data__on_fault="skip")
    (batch,) = open_reader(shards, iter([rest]), config, workers=0)
    assert np.array_equal(batch.tracklets, [clip.tracklet for clip in rest])
    with pytest.raises(DataError, match=f"nothing is left to replace it.*{NAME}: FileNotFoundError"):
        next(open_reader(shards, iter([lost]), config, workers=0))
    server.answers[NAME] = [500] * 99
    with pytest.raises(DataError, match=f"{NAME}.*500.*given up"):  # not once for each frame
        next(open_reader(shards, iter([lost]), config, workers=0))


def test_auto_takes_shards_that_fit_the_cache_and_otherwise_ranges_if_there_are_any(server, tmp_path):
    size = sum(shard["bytes"] for shard in ShardSet.open(server.folder).card["shards"]) / 1e9
    index = "toy-00000.index.npz"

    def kind(place: str, gigabytes: float | None, how: str = "auto") -> type:
        return type(ShardSet.open(server.url, tmp_path / place, gigabytes, how).files)

    assert kind("a", None) is kind("a", size) is kind("a", size / 2, "shards") is CachedShardFiles
    assert server.requests[index] == 1
    assert kind("a", size / 2) is kind("a", size / 2) is kind("a", None, "ranges") is remote.RangeShardFiles
    assert server.requests[index] == 2  # whether there are ranges is asked once
    server.answers[index] = [503, whole, whole]
    remote.open_remote(server.url, tmp_path / "b")
    server.answers[index] = [503, whole]
    assert kind("b", size / 2) is CachedShardFiles
    with pytest.raises(DataError, match=r"does not send ranges of files; set data\.remote=shards"):
        kind("b", size / 2, "ranges")
