"""Remote shards: fetched once, verified, shared, bounded; a server that fails is tried again and then named."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from packed import make_config, make_dataset, pack_dataset

from keyreid.errors import DataError
from keyreid.files import sha256
from keyreid.shards import open_reader, remote, transfer
from keyreid.shards.card import card_digest, encode_card, read_card
from keyreid.shards.plan import evaluation_clips
from keyreid.shards.shard_set import ShardSet

aiohttp = pytest.importorskip("aiohttp", reason="keyreid[remote] is not installed")
from shard_server import Server, in_pieces, redirect  # noqa: E402

FETCH = (
    "import sys; from keyreid.shards.shard_set import ShardSet\n"
    "shards = ShardSet.open(sys.argv[1], sys.argv[2])\n"
    "for p, record in enumerate(shards.tracklets): shards.read_frame(p, 0)\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("remote")
    pack_dataset(make_dataset(root / "source", identities=4), root / "source", root / "shards", 60_000)
    return root / "shards"


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setattr(transfer, "FIRST_WAIT_SECONDS", 0.01)
    server = Server(folder)
    yield server
    server.close()


@pytest.fixture
def impatient(monkeypatch):
    """Transfers that are ended when no byte comes for half a second; of aiohttp's own accord, after one second."""
    from fsspec.implementations.http import HTTPFileSystem

    monkeypatch.setattr(transfer, "IDLE_SECONDS", 0.5)
    monkeypatch.setattr("aiohttp.client.DEFAULT_TIMEOUT", aiohttp.ClientTimeout(total=1))
    HTTPFileSystem.clear_instance_cache()
    yield
    HTTPFileSystem.clear_instance_cache()


def everything(shards: ShardSet) -> list[bytes]:
    return [
        b"".join(shards.read_frame(p, f)) for p, record in enumerate(shards.tracklets) for f in range(record.frames)
    ]


def test_shards_come_whole_when_they_are_first_read_and_only_once(folder, server, tmp_path):
    shards = ShardSet.open(server.url, tmp_path)
    assert not any(name.endswith(".tar") for name in server.requests)
    shards.read_frame(0, 0)
    assert [name for name in server.requests if name.endswith(".tar")] == ["toy-00000.tar"]
    assert everything(shards) == everything(ShardSet.open(folder))
    assert everything(ShardSet.open(server.url, tmp_path)) == everything(shards)
    assert {count for name, count in server.requests.items() if name != "dataset.json"} == {1}


@pytest.mark.parametrize("reader", ["dali", "plain", "stream"])
def test_readers_read_remote_shards(folder, server, tmp_path, reader):
    local, shards = ShardSet.open(folder), ShardSet.open(server.url, tmp_path)
    clips = evaluation_clips(local, np.concatenate([local.select(split) for split in ("query", "gallery", "train")]), 4)
    batches = [clips[start : start + 8] for start in range(0, len(clips), 8)]
    config = make_config(server.url, data__reader=reader)
    opened = open_reader(shards, iter(batches), config)
    expected = open_reader(local, iter(batches), make_config(folder))
    for one, other in zip(opened, expected, strict=True):
        assert one.keys == other.keys
        assert (one.images == other.images).all()
        assert (one.guidance == other.guidance).all()
    opened.close()
    expected.close()
    on_disk = list(tmp_path.glob("*/*.tar"))
    assert len(on_disk) == (0 if reader == "stream" else len(local.card["shards"]))


def test_two_processes_fetch_a_shard_once(folder, server, tmp_path):
    children = [subprocess.Popen([sys.executable, "-c", FETCH, server.url, tmp_path]) for _ in range(2)]
    assert [child.wait(timeout=300) for child in children] == [0, 0]
    assert {count for name, count in server.requests.items() if name.endswith(".tar")} == {1}


def test_the_cache_keeps_its_bound_and_drops_what_was_used_longest_ago(folder, server, tmp_path):
    sizes = [shard["bytes"] for shard in ShardSet.open(folder).card["shards"]]
    bound = sum(sizes[:3]) * 1.05
    shards = ShardSet.open(server.url, tmp_path, bound / 1e9, remote="shards")
    first_of = {record.shard: p for p, record in reversed(list(enumerate(shards.tracklets)))}
    for number in (0, 1, 2):
        shards.read_frame(first_of[number], 0)
        path = next(tmp_path.glob(f"*/toy-0000{number}.tar"))
        os.utime(path, (number, number) if number else (9, 9))  # shard 0 was used last
    shards.read_frame(first_of[3], 0)
    assert sorted(path.name[4:9] for path in tmp_path.glob("*/*.tar")) == ["00000", "00002", "00003"]
    for number in first_of:
        shards.read_frame(first_of[number], 0)
        assert sum(path.stat().st_size for path in tmp_path.glob("*/*.tar")) <= bound
    assert everything(shards) == everything(ShardSet.open(folder))


def test_a_server_that_fails_for_a_while_is_tried_again(folder, server, tmp_path):
    name = "toy-00000.tar"
    content = (folder / name).read_bytes()
    damaged = content[:700] + b"x" + content[701:]
    server.answers[name] = [503, content[:1000], damaged]
    ShardSet.open(server.url, tmp_path).read_frame(0, 0)
    assert server.requests[name] == 4
    fetched = next(tmp_path.glob(f"*/{name}"))
    assert hashlib.sha256(fetched.read_bytes()).hexdigest() == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([500] * 9, "given up after 4 tries"),
        ([b"x" * 100] * 9, "its SHA-256 is not that of the card"),
        ([b"x" * 10_000_000], "is larger than"),
        ([404], "FileNotFoundError"),
    ],
)
def test_what_cannot_be_fetched_is_named_and_leaves_nothing(server, tmp_path, answers, words):
    server.answers["toy-00000.tar"] = answers
    shards = ShardSet.open(server.url, tmp_path)
    with pytest.raises(DataError, match=f"{server.url}/toy-00000.tar.*{words}"):
        shards.read_frame(0, 0)
    assert not list(tmp_path.glob("*/*.tar")) + list(tmp_path.glob("*/.*partial"))


def test_a_shard_that_takes_longer_than_any_limit_of_the_client_comes_whole(folder, server, impatient, tmp_path):
    server.answers["toy-00000.tar"] = [in_pieces(12, 0.15)]
    ShardSet.open(server.url, tmp_path).read_frame(0, 0)
    assert server.requests["toy-00000.tar"] == 1
    assert next(tmp_path.glob("*/toy-00000.tar")).read_bytes() == (folder / "toy-00000.tar").read_bytes()


def test_a_streamed_shard_may_take_as_long(folder, server, impatient):
    files = remote.StreamedShardFiles([f"{server.url}/toy-00000.tar"])
    content = (folder / "toy-00000.tar").read_bytes()
    server.answers["toy-00000.tar"] = [200, in_pieces(12, 0.15)]  # it is asked for its size first
    assert files.read(0, 600, len(content) - 600) == content[-600:]
    files.close()


def test_a_stream_that_ends_early_is_opened_again(folder, server, impatient):
    files = remote.StreamedShardFiles([f"{server.url}/toy-00000.tar"])
    content = (folder / "toy-00000.tar").read_bytes()
    server.answers["toy-00000.tar"] = [in_pieces(4, 0.01, stop=2), in_pieces(4, 0.01, stop=1, hang=True)]
    assert files.read(0, 600, len(content) - 600) == content[-600:]
    server.answers["toy-00000.tar"] = [503] * 99
    files.close()
    with pytest.raises(DataError, match=r"toy-00000\.tar: .*given up after 4 tries"):
        files.read(0, 600, 0)


def test_a_server_that_cuts_off_or_hangs_is_tried_again_from_the_beginning(folder, server, impatient, tmp_path):
    server.answers["toy-00000.tar"] = [in_pieces(4, 0.01, stop=3), in_pieces(4, 0.01, stop=1, hang=True)]
    ShardSet.open(server.url, tmp_path).read_frame(0, 0)
    assert server.requests["toy-00000.tar"] == 3
    assert next(tmp_path.glob("*/toy-00000.tar")).read_bytes() == (folder / "toy-00000.tar").read_bytes()


@pytest.mark.parametrize("stop", [0, 2])
def test_a_server_that_hangs_for_ever_is_named(server, impatient, tmp_path, stop):
    server.answers["toy-00000.tar"] = [in_pieces(4, 0.01, stop=stop, hang=True)] * 9
    shards = ShardSet.open(server.url, tmp_path)
    with pytest.raises(
        DataError, match=rf"{server.url}/toy-00000\.tar: no byte came for 0\.5 s; given up after 4 tries"
    ):
        shards.read_frame(0, 0)
    assert not list(tmp_path.glob("*/*.tar")) + list(tmp_path.glob("*/.*partial"))


def test_what_a_killed_process_left_half_fetched_is_in_nobodys_way(folder, server, tmp_path):
    name = "toy-00000.tar"
    server.answers[name] = [in_pieces(4, 0.01, stop=2, hang=True)]
    child = subprocess.Popen([sys.executable, "-c", FETCH, server.url, tmp_path])
    while not any(path.stat().st_size for path in tmp_path.glob(f"*/.{name}*.partial")):
        time.sleep(0.05)
    child.kill()
    child.wait()
    (left,) = tmp_path.glob(f"*/.{name}*.partial")
    ShardSet.open(server.url, tmp_path).read_frame(0, 0)
    assert next(tmp_path.glob(f"*/{name}")).read_bytes() == (folder / name).read_bytes()
    assert not left.exists()


def test_the_cache_removes_what_nobody_fetches_any_more_and_nothing_else(server, tmp_path):
    shards = ShardSet.open(server.url, tmp_path)
    left, fetched = (next(tmp_path.glob("*/")) / f".other-0000{n}.tar.{n}.partial" for n in (1, 2))
    for path in (left, fetched):
        path.write_bytes(b"half")
    with FileLock(fetched.with_name("other-00002.tar.lock")):
        shards.read_frame(0, 0)
    assert (left.exists(), fetched.exists()) == (False, True)


def test_a_server_that_trickles_is_given_up(server, monkeypatch, tmp_path):
    monkeypatch.setattr(transfer, "PATIENCE_SECONDS", 0.5)
    server.answers["toy-00000.tar"] = [in_pieces(1000, 0.1)] * 9
    shards = ShardSet.open(server.url, tmp_path)
    with pytest.raises(DataError, match=rf"{server.url}/toy-00000\.tar: it comes too slowly; given up"):
        shards.read_frame(0, 0)
    assert not list(tmp_path.glob("*/*.tar")) + list(tmp_path.glob("*/.*partial"))


def test_a_redirect_is_followed_to_another_host_and_not_in_a_circle(folder, server, tmp_path):
    other = Server(folder)
    server.answers["toy-00000.tar"] = [redirect(f"{other.url.replace('127.0.0.1', 'localhost')}/toy-00000.tar")]
    server.answers["toy-00001.tar"] = [redirect("toy-00001.tar")] * 99
    shards = ShardSet.open(server.url, tmp_path)
    assert shards.read_frame(0, 0) == ShardSet.open(folder).read_frame(0, 0)
    assert other.requests["toy-00000.tar"] == 1
    other.close()
    with pytest.raises(DataError, match=rf"{server.url}/toy-00001\.tar: TooManyRedirects.*given up after 4 tries"):
        shards.files.read(1, 10, 0)


def test_what_a_server_refuses_is_not_asked_for_again(server, tmp_path):
    server.answers["toy-00000.tar"] = [403]
    with pytest.raises(DataError, match=r"toy-00000\.tar: ClientResponseError: 403"):
        ShardSet.open(server.url, tmp_path).read_frame(0, 0)
    assert server.requests["toy-00000.tar"] == 1


# ---------------------------------------------------------------------------------------------- opening a set


def test_the_processes_of_a_machine_fetch_and_check_a_set_once(folder, server, tmp_path):
    opening = "import sys; from keyreid.shards.shard_set import ShardSet; ShardSet.open(sys.argv[1], sys.argv[2])"
    children = [subprocess.Popen([sys.executable, "-c", opening, server.url, tmp_path]) for _ in range(3)]
    assert [child.wait(timeout=300) for child in children] == [0] * 3
    assert server.requests == dict.fromkeys((path.name for path in folder.glob("*.[jn]*")), 1)


def test_who_opens_a_set_later_reads_no_index_to_check_it(server, tmp_path, monkeypatch):
    folder, _ = remote.open_remote(server.url, tmp_path)
    hashed = []
    monkeypatch.setattr(remote, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    remote.open_remote(server.url, tmp_path)
    assert hashed == ["dataset.json"]
    changed = folder / "toy-00001.index.npz"
    changed.write_bytes(b"x" * changed.stat().st_size)
    remote.open_remote(server.url, tmp_path)
    assert ShardSet.open(server.url, tmp_path).card["shards"][1]["index_sha256"] == sha256(changed)
    assert server.requests[changed.name] == 2


def test_a_card_that_changes_is_seen_by_the_next_run_and_not_by_a_rank_that_starts_late(folder, server, tmp_path):
    place, _ = remote.open_remote(server.url, tmp_path)
    card = read_card(folder) | {"name": "grown"}
    server.answers["dataset.json"] = [encode_card(card | {"card_sha256": card_digest(card)})]
    assert ShardSet.open(server.url, tmp_path).card["name"] == "toy"
    stamp = place / ".verified.json"
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"asked": 0}))
    assert ShardSet.open(server.url, tmp_path).card["name"] == "grown"


# ---------------------------------------------------------------------------------------------- ahead and let go


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def cached(folder: Path) -> list[int]:
    return sorted(int(path.name[4:9]) for path in folder.glob("*/*.tar"))


def test_shards_are_fetched_ahead_and_let_go_within_the_bound(folder, server, tmp_path):
    sizes = [shard["bytes"] for shard in ShardSet.open(folder).card["shards"]]
    bound = 3.2 * max(sizes) / 1e9
    files, others = (ShardSet.open(server.url, tmp_path, bound, remote="shards").files for _ in range(2))
    files.prefetch([0, 1])
    wait_for(lambda: cached(tmp_path) == [0, 1])
    files.prefetch([1, 2, 3])  # the fourth would need the room of one that is wanted
    wait_for(lambda: cached(tmp_path) == [0, 1, 2] and not prefetching())
    files.drop([1])
    files.prefetch([3])
    wait_for(lambda: cached(tmp_path) == [0, 2, 3])
    content = (folder / "toy-00001.tar").read_bytes()
    assert files.read(1, 100, 600) == content[600:700]  # it is read all the same, and nothing is in its way
    assert len(cached(tmp_path)) == 3
    assert server.requests["toy-00003.tar"] == server.requests["toy-00000.tar"] == 1
    there = cached(tmp_path)
    files.drop([1])  # used last, and the first to go all the same
    others.read(({0, 1, 2, 3} - set(there)).pop(), 100, 600)
    assert cached(tmp_path) == [0, 2, 3]


def prefetching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "keyreid-prefetch"]


def test_what_cannot_be_fetched_ahead_is_said_by_the_read(server, tmp_path):
    server.answers["toy-00000.tar"] = [500] * 8
    files = ShardSet.open(server.url, tmp_path).files
    files.prefetch([0])
    wait_for(lambda: not prefetching())
    with pytest.raises(DataError, match=r"toy-00000\.tar: ClientResponseError: 500.*given up after 4 tries"):
        files.read(0, 10, 0)
    assert len(files.read(0, 10, 0)) == 10


def test_a_process_that_fetches_ahead_can_end(server, tmp_path):
    server.answers["toy-00000.tar"] = [in_pieces(4, 0.01, stop=2, hang=True)]
    program = (
        "import sys, time; from pathlib import Path; from keyreid.shards.shard_set import ShardSet\n"
        "ShardSet.open(sys.argv[1], sys.argv[2]).files.prefetch([0])\n"
        "while not any(path.stat().st_size for path in Path(sys.argv[2]).glob('*/.*.tar.*partial')): time.sleep(0.02)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, server.url, tmp_path], timeout=50).returncode == 0


def test_the_bound_holds_while_many_processes_fetch_and_each_reads_what_was_packed(folder, server, tmp_path):
    """Each reads the shards in another order, from a cache with room for two."""
    shards = ShardSet.open(folder).card["shards"]
    bound = 2.1 * max(shard["bytes"] for shard in shards)
    program = (
        "import random, sys, zlib; from keyreid.shards.shard_set import ShardSet\n"
        "shards = ShardSet.open(sys.argv[1], sys.argv[2], float(sys.argv[3]), 'shards')\n"
        "order = list(range(len(shards))); random.Random(sys.argv[4]).shuffle(order)\n"
        "print(sorted((p, zlib.crc32(b''.join(shards.read_frame(p, 0)))) for p in order))\n"
    )
    arguments = [program, server.url, tmp_path, str(bound / 1e9)]
    children = [
        subprocess.Popen([sys.executable, "-c", *arguments, str(n)], stdout=subprocess.PIPE, text=True)
        for n in range(4)
    ]
    while any(child.poll() is None for child in children):
        with FileLock(tmp_path / "room.lock"):  # nothing goes, and nothing new comes
            sizes = [path.stat().st_size for path in tmp_path.glob("*/*.tar")]
            for path in tmp_path.glob("*/.*.tar.*.partial"):
                with contextlib.suppress(FileNotFoundError):  # it was finished
                    sizes.append(path.stat().st_size)
        assert sum(sizes) <= bound
    whole = ShardSet.open(folder)
    expected = [(p, zlib.crc32(b"".join(whole.read_frame(p, 0)))) for p in range(len(whole))]
    assert [child.communicate()[0].strip() for child in children] == [str(expected)] * 4


def test_a_cache_smaller_than_a_shard_is_refused(server, tmp_path):
    shards = ShardSet.open(server.url, tmp_path, 1e-6, "shards")
    with pytest.raises(DataError, match=r"data\.cache_gigabytes=1e-06 is less than .*data\.remote=ranges"):
        shards.read_frame(0, 0)


def test_a_set_that_is_not_there_is_named(server, tmp_path):
    with pytest.raises(DataError, match="Protocol not known: nosuch"):
        ShardSet.open("nosuch://bucket/set", tmp_path / "cache")
    with pytest.raises(DataError, match=f"{server.url}/none/dataset.json"):
        ShardSet.open(f"{server.url}/none", tmp_path)


def test_a_stream_goes_forward_and_opens_again_for_what_lies_far_behind(folder, monkeypatch):
    monkeypatch.setattr(remote, "_STREAM_BYTES", 1000)
    monkeypatch.setattr(remote, "_STREAM_KEPT", 5000)
    path = folder / "toy-00000.tar"
    content, files = path.read_bytes(), remote.StreamedShardFiles([str(path)])
    for offset in (0, 512, 3000, 1024, 20_000, 18_000, 700, len(content) - 10):
        assert files.read(0, 600, offset) == content[offset : offset + 600]
    files.close()
