"""The index of a whole set: one mapped file, made once, the same as the indices beside the shards."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from packed import make_dataset, pack_dataset
from safetensors import safe_open

from keyreid.errors import DataError
from keyreid.shards import members
from keyreid.shards.index_file import read_index
from keyreid.shards.set_index import FILE, SetIndex
from keyreid.shards.shard_set import ShardSet
from keyreid.shards.verify import verify


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("index")
    pack_dataset(make_dataset(root / "source"), root / "source", root / "shards")
    return root / "shards"


@pytest.fixture
def folder(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "shards", ignore=shutil.ignore_patterns(FILE))


def test_it_says_what_the_indices_beside_the_shards_say(folder):
    shards = ShardSet.open(folder)
    indices = [read_index(folder / shard["index"]) for shard in shards.card["shards"]]
    assert len(indices) > 2
    position = 0
    for number, index in enumerate(indices):
        for row, key in enumerate(index.key.tolist()):
            record, first = shards.tracklets[position], index.first_frame[row]
            own = slice(first, first + index.frames[row])
            assert (record.key, record.shard, shards.position_of(key)) == (key, number, position)
            assert (record.identity, record.camera, record.frames) == (
                *(index.identity[row], index.camera[row], index.frames[row]),
            )
            assert record.split == members.SPLITS[index.split[row]]
            np.testing.assert_array_equal(record.sizes, np.stack([index.width[own], index.height[own]], 1))
            seen = index.visible[own, None] >> np.arange(6) & 1
            np.testing.assert_array_equal(record.visible, seen.astype(bool))
            at = slice(index.first_member[row], index.first_member[row] + members.members_of(record.frames))
            found = shards.index.members(position, 0, at.stop - at.start)
            assert found == list(
                zip(*(getattr(index, name)[at].tolist() for name in ("offset", "size", "crc")), strict=True)
            )
            assert shards.index.members(position, 3, 2) == found[3:5]
            names = [shards.index.member_name(position, n) for n in range(at.stop - at.start)]
            assert names == [index.member_name(row, n) for n in range(at.stop - at.start)]
            position += 1
    assert position == len(shards) == len(shards.tracklets)


def test_people_and_keys_are_found(folder):
    shards = ShardSet.open(folder)
    index = shards.index
    assert index.identities.tolist() == sorted(set(shards.identities.tolist()))
    for row, identity in enumerate(index.identities.tolist()):
        assert index.of_identities(np.array([row])).tolist() == np.flatnonzero(shards.identities == identity).tolist()
    assert index.of_identities(np.array([2, 0])).tolist() == [
        *np.flatnonzero(shards.identities == 2),
        *np.flatnonzero(shards.identities == 0),
    ]
    keys = index.keys().tolist()
    some = [keys[3], "nobody", keys[0], "zzz", keys[3] + "x", "ä", ""]
    assert index.find(some).tolist() == [3, -1, 0, -1, -1, -1, -1]
    with pytest.raises(DataError, match="no tracklet has the key nobody"):
        shards.position_of("nobody")


def test_others_read_the_file_as_safetensors(folder):
    shards = ShardSet.open(folder)
    with safe_open(folder / FILE, "np") as file:
        np.testing.assert_array_equal(file.get_tensor("identity"), shards.identities)
        np.testing.assert_array_equal(file.get_tensor("crc"), shards.index.crc)


def test_it_is_made_once_and_workers_get_its_path(folder):
    shards = ShardSet.open(folder)
    made = (folder / FILE).stat()
    again = ShardSet.open(folder)
    shards.split_number, shards.holdout = 0, 0.5
    sent = pickle.dumps(shards)
    assert len(sent) < len(pickle.dumps(shards.card)) + 1000
    there = pickle.loads(sent)
    assert there.holdout == 0.5
    for other in (again, there):
        assert (other.index.path, other.index.keys().tolist()) == (folder / FILE, shards.index.keys().tolist())
        with pytest.raises(ValueError, match="read-only"):
            other.index.identity[0] = 1
    assert (folder / FILE).stat().st_ino == made.st_ino


def test_many_processes_that_open_it_first_make_one(folder):
    code = f"from keyreid.shards.shard_set import ShardSet; print(ShardSet.open({str(folder)!r}).index.key.sum())"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(4)]
    assert len({process.communicate()[0] for process in processes}) == 1
    assert {process.returncode for process in processes} == {0}
    assert not [path for path in folder.iterdir() if path.suffix == ".partial"]


@pytest.mark.parametrize("damage", ["cut", "header", "garbage", "empty", "of another version", "a pipe"])
def test_a_file_that_cannot_be_it_is_made_anew(folder, damage, monkeypatch):
    whole = ShardSet.open(folder).index.keys().tolist()
    path = folder / FILE
    content = path.read_bytes()
    other = content.replace(b"keyreid-columns/1", b"keyreid-columns/0")
    if damage == "a pipe":
        path.unlink()
        os.mkfifo(path)
        assert ShardSet.open(folder).index.keys().tolist() == whole
        return
    path.write_bytes(
        {
            "cut": content[:-9],
            "header": b"\xff" * 8 + content[8:],
            "garbage": b"none",
            "empty": b"",
            "of another version": other,
        }[damage]
    )
    assert ShardSet.open(folder).index.keys().tolist() == whole
    assert path.read_bytes() == content


def test_shards_packed_anew_get_another_and_who_has_the_old_one_keeps_it(folder, tmp_path):
    shards = ShardSet.open(folder)
    before, sent = shards.index.keys().tolist(), pickle.dumps(shards.index)
    pack_dataset(make_dataset(tmp_path / "other", identities=4), tmp_path / "other", tmp_path / "new")
    for path in (tmp_path / "new").iterdir():
        path.replace(folder / path.name)  # as packing does
    assert len(ShardSet.open(folder)) == 16
    assert shards.index.keys().tolist() == before
    with pytest.raises(DataError, match="packed anew while they were used"):
        pickle.loads(sent)


def test_a_flipped_bit_in_it_is_found(folder):
    ShardSet.open(folder)
    content = bytearray((folder / FILE).read_bytes())
    content[-5] ^= 4
    (folder / FILE).write_bytes(content)
    assert [str(problem) for _, found in verify(folder) for problem in found] == [
        f"{FILE}: its SHA-256 is not the one it states; delete it, it is made anew"
    ]
    (folder / FILE).unlink()
    assert not [problem for _, found in verify(folder) for problem in found]


def test_beside_shards_that_cannot_be_written_to_it_lies_in_the_cache(folder, tmp_path, monkeypatch):
    denied = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder and denied(path, mode))  # as root all may
    index = ShardSet.open(folder, cache_dir=tmp_path / "cache").index
    assert not (folder / FILE).exists()
    assert index.path.is_relative_to(tmp_path / "cache") and index.path.is_file()


def test_two_shards_with_a_key_and_parts_that_differ_are_refused(folder):
    indices = [read_index(path) for path in sorted(folder.glob("*.npz"))]
    with pytest.raises(ValueError, match=f"same key, {indices[0].key[0]}"):
        SetIndex.joined([indices[0], indices[0]])
