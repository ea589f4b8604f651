"""Sets of shards whose hashes agree and whose content is forged: every form is a finding, none ends the search."""

from __future__ import annotations

import json
import os
import resource
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from damages import agree, npy, npy_header, rewrite, write_card
from packed import make_config, make_dataset, pack_dataset
from typer.testing import CliRunner

from keyreid.cli import app
from keyreid.errors import DataError
from keyreid.shards import members, open_reader
from keyreid.shards import verify as verifying
from keyreid.shards.index_file import read_index
from keyreid.shards.plan import evaluation_clips
from keyreid.shards.shard_set import ShardSet
from keyreid.shards.verify import verify
from keyreid.shards.writer import kept

DEEP = "[" * 100_000
HUGE = 1_000_000_000_000


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("forged")
    dataset = make_dataset(root / "source", identities=4, tracklets=2, frames=(2, 3))
    pack_dataset(dataset, root / "source", root / "shards", target_bytes=40_000)
    return root / "shards"


@pytest.fixture
def folder(packed, tmp_path) -> Path:
    """A copy whose last shard has a flipped byte, which must be found whatever the first does."""
    shutil.copytree(packed, tmp_path / "shards")
    last = sorted((tmp_path / "shards").glob("*.tar"))[-1]
    content = bytearray(last.read_bytes())
    content[600] ^= 4
    last.write_bytes(content)
    return tmp_path / "shards"


def findings(folder: Path) -> list[str]:
    """All but those of the last shard, which must be there."""
    found = [str(problem) for _, problems in verify(folder, 2) for problem in problems]
    last = sorted(folder.glob("*.tar"))[-1].name
    assert any(last in line for line in found), "the damage of another shard was lost"
    return [line for line in found if last not in line]


def json_of(change) -> bytes:
    """A change of a tracklet's JSON."""
    return lambda content: json.dumps(json.loads(content) | change).encode()


def raw(content: bytes):
    return lambda _: content


F4 = "{{'descr': '{}', 'fortran_order': False, 'shape': {}, }}\n"
MEMBERS = {
    "deep JSON": ("json", raw(DEEP.encode())),
    "deep objects": ("json", raw(b'{"a":' * 100_000)),
    "a huge number": ("json", raw(b'{"key": ' + b"9" * 5000 + b"}")),
    "a large number": ("json", json_of({"camera": 10**400})),
    "NaN": ("json", json_of({"camera": float("nan")})),
    "infinite": ("json", json_of({"frames": float("inf")})),
    "text for a number": ("json", json_of({"camera": "1"})),
    "true for 1": ("json", json_of({"camera": True})),
    "a float": ("json", json_of({"identity": 0.0})),
    "a list": ("json", raw(b"[]")),
    "null": ("json", raw(b"null")),
    "no key": ("json", raw(b"{}")),
    "not UTF-8": ("json", raw(b'{"key": "\xff\xfe"}')),
    "half a character": ("json", json_of({"key": "\ud800"})),
    "no source": ("json", json_of({"source": {}})),
    "a source that is a number": ("json", json_of({"source": {"files": [1]}})),
    "no frame numbers": ("json", json_of({"video_frames": []})),
    "a scalar": ("kp.npy", raw(npy(np.float32(3)))),
    "objects": ("kp.npy", raw(npy(np.array([{}], object)))),
    "huge": ("kp.npy", raw(npy_header(F4.format("<f4", f"({HUGE}, 17, 3)")))),
    "huge in each": ("kp.npy", raw(npy_header(F4.format("<f4", f"({2**62}, {2**62}, {2**62})")))),
    "wraps to nothing": ("kp.npy", raw(npy_header(F4.format("<f4", f"({2**32}, {2**32}, 0)")))),
    "negative": ("kp.npy", raw(npy_header(F4.format("<f4", "(-1, 17, 3)"), bytes(2 * 17 * 12)))),
    "a deep header": ("kp.npy", raw(npy_header("(" * 9000))),
    "a header of signs": ("kp.npy", raw(npy_header("-" * 9000 + "1"))),
    "a strange type": ("kp.npy", raw(npy_header(F4.format("<V0", "(1,)")))),
    "version 9": ("kp.npy", raw(b"\x93NUMPY\x09\x00" + bytes(100))),
    "empty": ("kp.npy", raw(b"x")),
    "text": ("kp.npy", raw(npy(np.array(["a"])))),
    "a cut picture": ("f0000.jpg", lambda content: content[:200]),
    "a picture of zeros": ("f0000.jpg", raw(bytes(5000))),
    "a picture that is a PNG": ("f0000.jpg", raw(members.encode_tiles(np.zeros((6, 64, 32), np.uint8)))),
    "a segment that lies": ("f0000.jpg", raw(b"\xff\xd8\xff\xc0\x00\x02\xff\xd9")),
    "heatmaps of other sizes": ("f0000.hm.png", raw(members.encode_tiles(np.zeros((5, 64, 32), np.uint8)))),
    "heatmaps that are none": ("f0000.hm.png", raw(b"\x89PNG\r\n\x1a\n" + b"\xff" * 60)),
}


@pytest.mark.parametrize("form", MEMBERS)
def test_a_forged_member_is_found_and_named_by_verifying_and_by_reading(folder, form):
    name, forged = MEMBERS[form]
    first = ShardSet.open(folder).tracklets[0].key
    rewrite(folder, lambda full, content, _: forged(content) if full == f"{first}.{name}" else None)
    found = findings(folder)
    assert found
    assert all("toy-00000.tar" in line for line in found)
    assert any(f"{first}.{name}: " in line for line in found)
    shards = ShardSet.open(folder)
    read = {"json": shards.metadata, "kp.npy": shards.keypoints}.get(name)
    if read is None:
        read = lambda p: shards.heatmaps(p, 0) if "hm" in name else shards.picture(p, 0)  # noqa: E731
    if form not in ("true for 1", "a picture that is a PNG"):  # read as what they are
        with pytest.raises(DataError, match=f"toy-00000.tar: tracklet {first}: member {name}"):
            read(0)


@pytest.mark.parametrize("reader", ["plain", "dali"])
@pytest.mark.parametrize("form", ["a cut picture", "a segment that lies", "heatmaps that are none"])
def test_the_readers_name_a_forged_sample(folder, reader, form):
    name, forged = MEMBERS[form]
    first = ShardSet.open(folder).tracklets[0].key
    rewrite(folder, lambda full, content, _: forged(content) if full == f"{first}.{name}" else None)
    shards = ShardSet.open(folder)
    opened = open_reader(
        shards, iter([evaluation_clips(shards, [0], 4)]), make_config(folder, data__reader=reader), workers=0
    )
    with pytest.raises(DataError, match=f"toy-00000.tar: tracklet {first}: member {name}"):
        next(opened)
    opened.close()


def set_to(name: str, place: int, value: int):
    def change(arrays, _):
        arrays[name] = arrays[name].copy()
        arrays[name][place] = value

    return change


def array(name: str, forged):
    def change(arrays, _):
        arrays[name] = forged(arrays[name]) if callable(forged) else forged

    return change


def header(**values):
    return lambda _, header: header.update(values)


def moved(*by: int):
    """The first frame counts changed so that the sum stays: by wrapping around, or by a negative one."""

    def change(arrays, _):
        frames = arrays["frames"].copy()
        for tracklet, number in enumerate(by):
            frames[tracklet] += number
        assert frames.sum() == arrays["frames"].sum()
        arrays["frames"] = frames

    return change


INDICES = {
    "negative frames": set_to("frames", 0, -5),
    "no frames": set_to("frames", 0, 0),
    "frames that wrap": moved(2**63 - 9, 2**63 - 9, 18),
    "frames that cancel": moved(10, -10),
    "frames of another": set_to("frames", 0, 3 * 10**9),
    "a negative offset": set_to("offset", 3, -512),
    "a huge offset": set_to("offset", 3, 2**63 - 1),
    "a gap": set_to("offset", 3, 10**12),
    "a huge size": set_to("size", 3, 2**32 - 1),
    "a picture of no width": set_to("width", 0, 0),
    "a strange split": set_to("split", 0, 9),
    "a strange picture": set_to("picture", 0, 9),
    "a float column": array("identity", lambda column: column.astype(float)),
    "a column of objects": array("identity", lambda column: column.astype(object)),
    "a column too short": array("crc", lambda column: column[:-1]),
    "a square column": array("crc", lambda column: column.reshape(2, -1)),
    "a scalar column": array("frames", np.int64(3)),
    "a huge column": array("frames", npy_header(F4.format("<i8", f"({HUGE},)"))),
    "scalar keys": array("key", np.array("a")),
    "keys that are bytes": array("key", lambda column: column.astype("S")),
    "keys that are numbers": array("key", lambda column: np.arange(len(column))),
    "keys that are no characters": array(
        "key", lambda column: npy_header(F4.format("<U1", f"({len(column)},)"), b"\xff" * 4 * len(column))
    ),
    "the same key twice": array("key", lambda column: np.repeat(column[:1], len(column))),
    "a key that leads out": array("key", lambda column: np.array(["../../evil", *column[1:]])),
    "an absolute key": array("key", lambda column: np.array(["/etc/passwd", *column[1:]])),
    "a long key": array("key", lambda column: np.array(["a" * 100_000, *column[1:]])),
    "an empty key": array("key", lambda column: np.array(["", *column[1:]])),
    "one array more": array("other", np.arange(3)),
    "one array less": lambda arrays, _: arrays.pop("crc"),
    "no tracklets": lambda arrays, _: arrays.update(
        {name: arrays[name][:0] for name in list(arrays) if name != "header"}
    ),
    "a header that is deep": array("header", npy(np.frombuffer(DEEP.encode(), "u1"))),
    "a header that is a list": array("header", npy(np.frombuffer(b"[]", "u1"))),
    "a header that is no JSON": array("header", npy(np.frombuffer(b"\xff{", "u1"))),
    "no parts": lambda _, header: header.pop("parts"),
    "parts that are a list": header(parts=[6]),
    "parts that are true": header(parts=True),
    "parts that are infinite": header(parts=float("inf")),
    "7 parts": header(parts=7),
    "10^30 bytes": header(bytes=10**30),
    "a few bytes": header(bytes=1024),
    "another shard": header(shard="../toy-00001.tar"),
    "no settings": header(settings=None),
}


@pytest.mark.parametrize("form", INDICES)
def test_a_forged_index_is_found_and_does_not_open(folder, form):
    agree(folder, INDICES[form])
    found = findings(folder)
    assert found
    assert all("toy-00000." in line for line in found)
    with pytest.raises(DataError, match=r"toy-00000\.index\.npz"):
        ShardSet.open(folder)
    for every_byte in (False, True):
        assert not kept(folder / "toy-00000.tar", "of other settings", every_byte)


def test_any_bit_of_an_index_may_be_flipped(folder):
    path = sorted(folder.glob("*.index.npz"))[0]
    whole = path.read_bytes()
    settings = read_index(path).header["settings"]
    assert kept(path.with_name("toy-00000.tar"), settings, every_byte=True)
    directory = whole.rindex(b"PK\x01\x02", 0, whole.index(b"PK\x01\x02") + 4)
    places = [*range(directory, len(whole), 3), *range(0, directory, 500)]
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        assert not kept(path.with_name("toy-00000.tar"), settings), place
        if place % 200 == 0:
            assert any(path.name in line for line in findings(folder)), place


CARDS = {
    "no cameras": {"cameras": []},
    "cameras that are lists": {"cameras": [[1]]},
    "cameras that are huge": {"cameras": [10**30]},
    "a camera that is NaN": {"cameras": [float("nan")]},
    "counts that are texts": {"counts": {"tracklets": "8"}},
    "no frames": {
        "counts": {"tracklets": 1, "frames": 0, "identities": 1, "frames_with_keypoints": 0, "heatmap_bytes": 0}
    },
    "splits that are none": {"splits": [{"train": "all"}]},
    "no query camera": {"query_camera": "first"},
    "names that are none": {"names": {"identity": ["Anna"]}},
    "a source without a folder": {"source": {"dataset": "mars"}},
    "settings that are none": {"settings": {}},
    "no shards": {"shards": []},
    "a format that is deep": {"format": [[[]]]},
    "a strange name": {"name": 7},
}


@pytest.mark.parametrize("form", CARDS)
def test_a_forged_card_is_refused_with_its_name(folder, form):
    write_card(folder, json.loads((folder / "dataset.json").read_text()) | CARDS[form])
    for check in (ShardSet.open, lambda path: list(verify(path))):
        if form == "no cameras" and check is not ShardSet.open:  # each shard is whole
            continue
        with pytest.raises(DataError, match=r"dataset\.json: |cameras"):
            check(folder)


def change_shard(**values):
    return lambda card: card["shards"][0].update(values)


@pytest.mark.parametrize(
    "change",
    [
        change_shard(bytes=-1),
        change_shard(bytes=10**400),
        change_shard(bytes=True),
        change_shard(file="../toy-00000.tar"),
        change_shard(file="/etc/passwd"),
        change_shard(file="dataset.json"),
        change_shard(file="a" * 300 + ".tar"),
        change_shard(index="toy-00000.tar"),
        change_shard(sha256=None),
        lambda card: card["shards"].append(card["shards"][0]),
    ],
)
def test_a_forged_shard_of_the_card_is_refused(folder, change):
    card = json.loads((folder / "dataset.json").read_text())
    change(card)
    write_card(folder, card)
    for check in (ShardSet.open, lambda path: list(verify(path))):
        with pytest.raises(DataError, match=r"dataset\.json: the card is damaged"):
            check(folder)


@pytest.mark.parametrize("content", [DEEP.encode(), b'{"format": "\\ud800"}', b"\xff", b"null", b"9" * 5000, b""])
def test_a_card_that_is_none_is_refused(folder, content):
    (folder / "dataset.json").write_bytes(content)
    for check in (ShardSet.open, lambda path: list(verify(path))):
        with pytest.raises(DataError, match=r"dataset\.json: "):
            check(folder)


def test_shards_that_do_not_fit_each_other_are_found(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "shards")
    folder = tmp_path / "shards"
    second = read_index(folder / "toy-00001.index.npz").key[0]
    first = ShardSet.open(folder).tracklets[0].key

    def renamed(full, content, member):
        if full.startswith(first):
            member.name = full.replace(first, second)
        return json.dumps(json.loads(content) | {"key": second}).encode() if full == f"{first}.json" else None

    rewrite(folder, renamed)
    agree(folder, lambda arrays, _: arrays.update(key=np.array([second, *arrays["key"][1:]])))
    found = [str(problem) for _, problems in verify(folder) for problem in problems]
    assert len(found) == 1
    assert "tracklet of the same key" in found[0]


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"x", b"g", b"L", b"S"],
)
def test_members_of_every_other_kind_are_found_where_all_hashes_agree(folder, kind):
    path = folder / "toy-00000.tar"
    content = bytearray(path.read_bytes())
    block = tarfile.TarInfo.frombuf(bytes(content[:512]), "utf-8", "strict")
    block.type, block.linkname = kind, "/etc/passwd"
    content[:512] = block.tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(content)
    agree(folder)
    assert any("not that of a plain file" in line for line in findings(folder))


@pytest.mark.parametrize("what", ["a pipe", "a folder", "sparse"])
@pytest.mark.parametrize("name", ["toy-00000.tar", "toy-00000.index.npz"])
def test_a_file_that_is_none_is_found_at_once(folder, what, name):
    path = folder / name
    path.unlink()
    if what == "a pipe":
        os.mkfifo(path)
    elif what == "a folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(3 << 30)
    if (what, name) != ("sparse", "toy-00000.tar"):  # 3 GB are hashed in seconds
        assert any(name in line for line in findings(folder))
    with pytest.raises(DataError, match=name):
        ShardSet.open(folder)


def test_the_command_reports_every_finding_and_fails(folder):
    agree(folder, INDICES["a gap"])
    result = CliRunner().invoke(app, ["inspect", str(folder), "--verify"])
    assert result.exit_code == 1
    assert "toy-00000.index.npz" in result.output
    assert sorted(folder.glob("*.tar"))[-1].name in result.output


def test_nothing_is_allocated_because_a_header_says_so(folder):
    """Keypoints that claim 4 GB are refused within 1 GB of address space beyond what is in use."""
    content = npy_header(F4.format("<f4", f"({10**9},)"))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), hard))
    try:
        with pytest.raises(ValueError, match="its header says"):
            members.decode_keypoints(content, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_disk_that_fails_is_a_finding(folder):
    """As /proc/self/mem does at byte 0."""
    for name in ("toy-00000.index.npz", "toy-00000.tar"):
        (folder / name).unlink()
        (folder / name).symlink_to("/proc/self/mem")
    found = findings(folder)
    assert all(any(name in line for line in found) for name in ("toy-00000.index.npz", "toy-00000.tar"))


def test_unforeseen_errors_are_findings_after_those_before_them(folder, monkeypatch):
    walk = verifying._walk

    def breaks(file, size, name, index):
        yield from walk(file, size, name, index)
        if name == "toy-00000.tar":
            raise RecursionError("deep")

    monkeypatch.setattr(verifying, "_walk", breaks)
    (folder / "toy-00000.tar").write_bytes((folder / "toy-00000.tar").read_bytes() + b"x")
    assert any("RecursionError: deep" in line for line in findings(folder))
    assert any("SHA-256" in line for line in findings(folder))
