"""Damage of every kind is found and named, by `verify` and when it is read; the source can be compared."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from damages import write_card
from packed import make_dataset, pack_dataset
from typer.testing import CliRunner

from keyreid.cli import app
from keyreid.datasets.tracklet import Dataset
from keyreid.errors import DataError
from keyreid.shards.index_file import encode_index, read_index
from keyreid.shards.members import members_of
from keyreid.shards.shard_set import ShardSet
from keyreid.shards.verify import compare, verify
from keyreid.shards.writer import PackSettings


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[Dataset, Path, Path]:
    root = tmp_path_factory.mktemp("verify")
    dataset = make_dataset(root / "source", identities=4, tracklets=2, frames=(2, 3))
    pack_dataset(dataset, root / "source", root / "shards", 40_000)
    return dataset, root / "source", root / "shards"


@pytest.fixture
def folder(packed, tmp_path) -> Path:
    """A copy that may be damaged."""
    shutil.copytree(packed[2], tmp_path / "shards")
    return tmp_path / "shards"


def problems(folder: Path) -> list[str]:
    return [str(problem) for _, found in verify(folder, 2) for problem in found]


def members(folder: Path, file: str) -> list[tuple[str, int, int]]:
    """Name, first byte (of the header) and last byte (with the padding) of each member."""
    with tarfile.open(folder / file) as tar:
        return [(m.name, m.offset, m.offset_data + -(-m.size // 512) * 512) for m in tar.getmembers()]


def at(folder: Path, file: str, place: int) -> str:
    return next((name for name, start, end in members(folder, file) if start <= place < end), "")


def test_whole_shards_have_no_problems(packed):
    assert problems(packed[2]) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_byte_is_found_and_its_member_named(packed, folder, seed):
    rng = np.random.default_rng(seed)
    files = sorted(path for path in folder.iterdir() if path.suffix == ".tar")
    path = files[rng.integers(len(files))]
    content = bytearray(path.read_bytes())
    place = int(rng.integers(len(content)))
    member = at(folder, path.name, place)
    content[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    found = problems(folder)
    assert found
    assert all(path.name in line for line in found)
    assert not member or any(member in line for line in found)
    _reading_names_it(packed, folder, path.name, place)


def _reading_names_it(packed, folder, file, place):
    """Every sample whose content is touched is named when it is read; every other one is read as it was."""
    whole, damaged = ShardSet.open(packed[2]), ShardSet.open(folder)
    touched = 0
    for position, record in enumerate(damaged.tracklets):
        for member in range(members_of(record.frames)):
            name = f"{record.key}.{damaged.index.member_name(position, member)}"
            try:
                assert damaged.read_member(position, member) == whole.read_member(position, member)
            except DataError as error:
                touched += 1
                assert file in str(error)
                assert record.key in str(error)
                assert name.partition(".")[2] in str(error)
    assert touched <= 1


@pytest.mark.parametrize("seed", range(20))
def test_a_truncation_is_found_and_the_set_does_not_open(packed, folder, seed):
    rng = np.random.default_rng(100 + seed)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".tar", ".npz"))
    path = files[rng.integers(len(files))]
    size = path.stat().st_size
    opened = ShardSet.open(folder)
    with path.open("r+b") as file:
        file.truncate(int(rng.integers(size)))
    assert any(path.name in line for line in problems(folder))
    with pytest.raises(DataError, match=path.name):
        ShardSet.open(folder)
    if path.suffix == ".tar":  # cut off while a training has it open
        left = path.stat().st_size
        for position, record in enumerate(opened.tracklets):
            if opened.shard_name(record.shard).endswith(path.name):
                ((offset, size, _),) = opened.index.members(position, 0, 1)
                if offset + size > left:
                    with pytest.raises(DataError, match=f"{record.key}.*ends .* bytes early"):
                        opened.metadata(position)


def test_a_missing_shard_index_or_card_is_named(folder):
    tar = sorted(folder.glob("*.tar"))[1]
    content = tar.read_bytes()
    tar.unlink()
    assert any(tar.name in line and "No such file" in line for line in problems(folder))
    with pytest.raises(DataError, match=f"{tar.name}: No such file"):
        ShardSet.open(folder)
    tar.write_bytes(content)
    index = tar.with_suffix(".index.npz")
    index.unlink()
    assert any(index.name in line for line in problems(folder))
    with pytest.raises(DataError, match=index.name):
        ShardSet.open(folder)


@pytest.mark.parametrize("seed", range(20))
def test_a_flip_or_cut_of_the_card_is_found_by_verifying_and_by_opening(folder, seed):
    rng = np.random.default_rng(200 + seed)
    content = bytearray((folder / "dataset.json").read_bytes())
    place = int(rng.integers(len(content) - 2))
    content[place] ^= 1 << int(rng.integers(8))
    (folder / "dataset.json").write_bytes(content if seed % 2 else content[:place])
    for check in (ShardSet.open, problems):
        with pytest.raises(DataError, match=r"dataset\.json: "):
            check(folder)


def test_a_card_that_lacks_something_is_damaged(folder):
    card = json.loads((folder / "dataset.json").read_text())
    for change in ({"shards": 5}, {"cameras": None}, {"shards": [{}]}, {"shards": [card["shards"][0] | {"bytes": ""}]}):
        write_card(folder, card | change)
        with pytest.raises(DataError, match=r"the card is damaged: .* is missing or no "):
            ShardSet.open(folder)


def test_an_index_of_another_shard_does_not_fit(folder):
    one, other = sorted(folder.glob("*.index.npz"))[:2]
    other.write_bytes(one.read_bytes())
    assert any(other.name in line for line in problems(folder))
    with pytest.raises(DataError, match="not the index that the card names"):
        ShardSet.open(folder)
    card = json.loads((folder / "dataset.json").read_text())
    card["shards"][1]["index_sha256"] = card["shards"][0]["index_sha256"]  # even if the card agrees
    write_card(folder, card)
    with pytest.raises(DataError, match="index of another shard"):
        ShardSet.open(folder)


def test_files_that_are_no_part_of_the_dataset_are_reported(folder):
    (folder / ".toy-00000.tar.17.partial").write_bytes(b"")
    assert problems(folder) == [
        ".toy-00000.tar.17.partial: is no part of the dataset; an older packing left it: delete it"
    ]


def forge(folder: Path, change) -> None:
    """Rewrite the first shard's members by `change(TarInfo)`, and make card and index agree with the new bytes."""
    path = sorted(folder.glob("*.tar"))[0]
    out = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as new:
        for number, member in enumerate(old.getmembers()):
            content = old.extractfile(member).read()
            if number == 3:
                change(member)
            new.addfile(member, io.BytesIO(content) if member.isreg() else None)
    path.write_bytes(out.getvalue())
    index = read_index(path.with_suffix(".index.npz"))
    header = index.header | {"bytes": len(out.getvalue()), "sha256": hashlib.sha256(out.getvalue()).hexdigest()}
    content = encode_index(replace(index, header=header))
    path.with_suffix(".index.npz").write_bytes(content)
    card = json.loads((folder / "dataset.json").read_text())
    card["shards"][0] |= {name: header[name] for name in ("bytes", "sha256")}
    card["shards"][0]["index_sha256"] = hashlib.sha256(content).hexdigest()
    write_card(folder, card)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("name", "../../evil.jpg", "names '../../evil.jpg'"),
        ("name", "/etc/evil", "names '/etc/evil'"),
        ("type", tarfile.SYMTYPE, "not that of a plain file"),
        ("type", tarfile.LNKTYPE, "not that of a plain file"),
        ("type", tarfile.CHRTYPE, "not that of a plain file"),
    ],
)
def test_hostile_members_are_refused_even_where_all_hashes_agree(folder, field, value, words):
    def change(member):
        setattr(member, field, value)
        if value in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member.linkname = "/etc/passwd"

    forge(folder, change)
    assert any(words in line for line in problems(folder))


def test_sizes_that_lie_are_refused(folder):
    path = sorted(folder.glob("*.tar"))[0]
    name, start, _ = members(folder, path.name)[2]
    with tarfile.open(path) as tar:
        header = tar.getmember(name)
    header.size = 8 << 30
    content = bytearray(path.read_bytes())
    content[start : start + 512] = header.tobuf(tarfile.GNU_FORMAT)[:512]
    path.write_bytes(content)
    assert any(name in line and "says 8589934592 bytes" in line for line in problems(folder))


def test_a_member_that_the_index_does_not_know_is_found(folder):
    path = sorted(folder.glob("*.tar"))[0]
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("hidden"), None)
    assert any("members that the index does not know" in line for line in problems(folder))


def test_indices_with_pickles_or_compressed_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", header=np.array([{"a": 1}], object), key=np.zeros(1))
    np.savez_compressed(tmp_path / "b.npz", header=np.zeros(1 << 20, "u1"))
    for name in ("a.npz", "b.npz"):
        with pytest.raises(DataError, match="not a shard index"):
            read_index(tmp_path / name)


def test_the_source_can_be_compared(packed):
    dataset, root, folder = packed
    shards, settings = ShardSet.open(folder), PackSettings(root)

    def differences(other: Dataset) -> list[str]:
        return [str(problem) for _, found in compare(shards, other, settings) for problem in found]

    assert differences(dataset) == []
    first, second, *rest = dataset.tracklets
    assert (
        "identity is 0, in the dataset 9" in differences(Dataset("toy", (replace(first, identity=9), second, *rest)))[0]
    )
    assert "was packed but" in differences(Dataset("toy", (second, *rest)))[0]
    assert "another order" in differences(Dataset("toy", (second, first, *rest)))[0]
    moved = replace(first, keypoints=first.keypoints + np.float32((1, 1, 0)))
    assert "kp.npy" in differences(Dataset("toy", (moved, second, *rest)))[0]
    swapped = replace(first, frames=first.frames[::-1])
    assert f"{first.key}.f0000.jpg" in differences(Dataset("toy", (swapped, second, *rest)))[0]


def test_the_command_packs_describes_verifies_and_draws(tmp_path):
    run = CliRunner().invoke
    make_dataset(tmp_path / "source", identities=3, tracklets=2)
    options = ["--option", "layout=tracklet", "--out", str(tmp_path / "out"), "--processes", "1"]
    result = run(app, ["shard", "folder", str(tmp_path / "source"), *options])
    assert result.exit_code == 0, result.output
    assert "NO KEYPOINTS" in result.output
    sheet = tmp_path / "sheet.png"
    checks = ["--verify", "--against", str(tmp_path / "source"), "--sheet", str(sheet)]
    result = run(app, ["inspect", str(tmp_path / "out"), *checks])
    assert result.exit_code == 0, result.output
    assert "1 shards are whole" in result.output
    assert "the same as" in result.output
    assert sheet.stat().st_size > 10_000
    tar = next((tmp_path / "out").glob("*.tar"))
    content = bytearray(tar.read_bytes())
    content[2000] ^= 1
    tar.write_bytes(content)
    result = run(app, ["inspect", str(tmp_path / "out"), "--verify"])
    assert result.exit_code == 1
    assert "SHA-256" in result.output


def test_verifying_needs_the_files_themselves():
    result = CliRunner().invoke(app, ["inspect", "http://127.0.0.1/shards", "--verify"])
    assert "reads a folder" in str(result.exception)


def test_bad_options_of_the_command_are_explained(tmp_path):
    make_dataset(tmp_path / "source", identities=2, tracklets=1)
    run = CliRunner().invoke
    for options, words in {
        ("--share", "3/3"): "I from 0 to N - 1",
        ("--option", "layout"): "NAME=VALUE",
        ("--option", "colour=red"): "has no option 'colour'",
        ("--option", "layout=[1"): "not YAML",
    }.items():
        result = run(app, ["shard", "folder", str(tmp_path / "source"), *options, "--out", str(tmp_path / "o")])
        assert result.exit_code != 0
        assert words in str(result.exception)
