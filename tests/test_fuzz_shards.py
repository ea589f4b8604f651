"""Any bytes as a card, an index, a member or a file of a checkpoint give a result, or an error that people can read."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from damages import MUTATIONS, damage, mutate, npy, zip_of
from fuzzing import fuzz
from hypothesis import strategies as st
from packed import make_dataset, pack_dataset

from keyreid.checkpoints import folder as checkpoints
from keyreid.checkpoints import manifest
from keyreid.checkpoints.folder import Snapshot, TrainingState
from keyreid.checkpoints.manifest import MANIFEST, STATE, TRAINING, WEIGHTS
from keyreid.checkpoints.weights_file import WeightsHeader, check_sha256, read_header, read_weights
from keyreid.config import ClipConfig, ModelConfig
from keyreid.errors import CheckpointError, DataError, KeyreidError
from keyreid.shards import members
from keyreid.shards.card import CARD_NAME, card_digest, encode_card, read_card
from keyreid.shards.index_file import encode_index, read_index
from keyreid.shards.set_index import FILE as COLUMNS
from keyreid.shards.set_index import SetIndex
from keyreid.shards.shard_set import ShardSet
from keyreid.shards.storage import LocalShardFiles
from keyreid.shards.verify import verify
from keyreid.shards.writer import kept

SHARDS, CHECKPOINT = "toy-00000", "step-00000007"

NASTY = st.sampled_from(
    [
        *(None, True, -1, 0, 2**31, 2**63, -(2**63), 10**30, 10**400, 1.5, float("nan"), float("inf"), "", "1"),
        *("../x", "/etc/passwd", "\ud800", "\0", "\x1b[2J", "x" * 5000, [], [[]], {}, {"a": {}}, [None], [10**30]),
    ]
)
VALUES = NASTY | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=3)
CHANGES = st.lists(
    st.tuples(st.sampled_from(MUTATIONS), st.integers(0, 1 << 20), st.integers(1, 600), st.binary(max_size=12)),
    min_size=1,
    max_size=3,
)
PLACES = st.lists(st.integers(0, 1 << 10), min_size=1, max_size=4)
DTYPES = ["<i8", "<i4", ">i8", "<f8", "u1", "<u2", "<u4", "O", "U1", "S3", "?", "<M8[s]", "V4"]
SHAPES = [(), (0,), (1,), (2, 2), (7,), (1000,), (3, 17, 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A set of shards, and a checkpoint in it."""
    root = tmp_path_factory.mktemp("fuzz")
    dataset = make_dataset(root / "source", identities=2, tracklets=2, frames=(2, 3))
    pack_dataset(dataset, root / "source", root / "shards", 30_000)
    header = WeightsHeader(ModelConfig(), ClipConfig(), [0, 1], [1, 2], {"dataset": "toy"})
    tensors = {"w": torch.arange(600.0), "b": torch.ones(3)}
    taken = Snapshot(TrainingState(step=7, best_score=0.5), header, tensors, tensors, {"momentum": torch.ones(50)})
    checkpoints.save(root / "checkpoints", taken)
    return root


def run(strategy: st.SearchStrategy, reader: Callable[[bytes], object]) -> None:
    """Give `reader` forged contents; it may raise a KeyreidError."""

    def accepts(content):
        try:
            reader(content)
        except KeyreidError as error:
            str(error).encode()

    fuzz(accepts, strategy)


def bytes_like(content: bytes) -> st.SearchStrategy[bytes]:
    """Mostly a whole file with a few changes, sometimes any bytes."""

    def changed(changes):
        result = content
        for change in changes:
            result = mutate(result, *change)
        return result

    return CHANGES.map(changed) | CHANGES.map(changed) | CHANGES.map(changed) | st.binary(max_size=300)


def json_like(values: dict, sign: Callable[[dict], bytes]) -> st.SearchStrategy[bytes]:
    """The JSON with one entry replaced or removed, signed again."""

    def changed(places, value, remove):
        result = copy.deepcopy(values)
        inner = result
        for number, place in enumerate(places):
            name = sorted(inner)[place % len(inner)] if isinstance(inner, dict) else place % len(inner)
            if number == len(places) - 1 or not isinstance(inner[name], dict | list) or not inner[name]:
                if remove:
                    del inner[name]
                else:
                    inner[name] = value
                break
            inner = inner[name]
        try:
            return sign(result)
        except ValueError:  # no such text can be written
            return json.dumps(result).encode()

    return st.builds(changed, PLACES, VALUES, st.booleans())


def index_like(path: Path) -> st.SearchStrategy[bytes]:
    """An index in which one array, one number, or one entry of the header is another."""
    with np.load(path) as opened:
        arrays = dict(opened)
    header = json.loads(arrays.pop("header").tobytes())
    plain = npy(np.frombuffer(json.dumps(header).encode(), "u1"))

    def number(name, place, value):
        changed = arrays[name].copy()
        changed[place % len(changed)] = value if changed.dtype.kind == "U" else value % (1 << 8 * changed.itemsize - 1)
        return zip_of({**arrays, name: changed, "header": plain})

    def other(name, dtype, shape):
        return zip_of({**arrays, "header": plain, name: np.zeros(shape, dtype)})

    def file(name, changes):
        content = npy(arrays[name])
        for change in changes:
            content = mutate(content, *change)
        return zip_of({**arrays, "header": plain, name: content})

    names = st.sampled_from(sorted(arrays))
    numbers = st.builds(number, names, st.integers(0, 99), st.integers(0, 300) | st.integers(-(2**63), 2**63 - 1))
    others = st.builds(other, names | st.just("header"), st.sampled_from(DTYPES), st.sampled_from(SHAPES))
    signed = json_like(header, lambda v: zip_of({**arrays, "header": npy(np.frombuffer(json.dumps(v).encode(), "u1"))}))
    return numbers | others | signed | st.builds(file, names, CHANGES)


def test_any_card(folder, tmp_path):
    path = Path(shutil.copy(folder / "shards" / CARD_NAME, tmp_path))
    index = SetIndex.joined([read_index(path) for path in sorted((folder / "shards").glob("*.npz"))])
    card = json.loads(path.read_bytes())
    card.pop("card_sha256")

    def reader(content):
        path.write_bytes(content)
        shards = ShardSet("toy", read_card(path.parent), index, LocalShardFiles([]))
        for split in ("train", "query", "holdout_query"):
            shards.select(split, holdout=0.5)

    def sign(values):
        return encode_card({**values, "card_sha256": card_digest(values)})

    signed = json_like(card, sign)
    run(signed | signed | bytes_like(path.read_bytes()), reader)


def test_any_index(folder, tmp_path):
    tar = shutil.copy(folder / "shards" / f"{SHARDS}.tar", tmp_path)
    path = Path(tar).with_suffix(".index.npz")
    whole = folder / "shards" / path.name
    settings_hash = read_index(whole).header["settings"]

    def reader(content):
        path.write_bytes(content)
        assert kept(Path(tar), settings_hash) in (True, False)
        encode_index(read_index(path)).strip()

    run(index_like(whole) | bytes_like(whole.read_bytes()), reader)


MEMBERS = {
    "json": (members.JSON, members.decode_tracklet),
    "keypoints": (members.KEYPOINTS, lambda content: members.decode_keypoints(content, 2)),
    "a picture": (2, members.decode_picture),
    "a picture's header": (2, lambda content: members.picture_size(content, "jpg")),
    "a PNG's header": (3, lambda content: members.picture_size(content, "png")),
    "heatmaps": (3, lambda content: members.decode_tiles(content, 6)),
}


@pytest.mark.parametrize("member", MEMBERS)
def test_any_member(folder, member):
    number, decode = MEMBERS[member]

    def reader(content):
        try:
            decode(content)
        except ValueError as error:
            raise DataError(str(error)) from None

    whole = ShardSet.open(folder / "shards").read_member(0, number)
    forged = bytes_like(whole)
    run(forged if member != "json" else forged | json_like(json.loads(whole), members.encode_json), reader)


CHECKPOINTS = {
    MANIFEST: lambda path: manifest.verify(path.parent),
    STATE: lambda path: checkpoints.read_state(path.parent),
    TRAINING: read_weights,
    WEIGHTS: lambda path: (read_header(path), check_sha256(path), read_weights(path)),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_any_file_of_a_checkpoint(folder, tmp_path, name):
    shutil.copytree(folder / "checkpoints" / CHECKPOINT, tmp_path / CHECKPOINT)
    path = tmp_path / CHECKPOINT / name
    forged = bytes_like(path.read_bytes())
    if path.suffix == ".json":
        forged |= json_like(json.loads(path.read_bytes()), lambda values: json.dumps(values).encode())

    def reader(content):
        path.write_bytes(content)
        CHECKPOINTS[name](path)

    run(forged, reader)


@pytest.mark.parametrize("name", [CARD_NAME, f"{SHARDS}.index.npz", STATE, MANIFEST])
def test_nesting_without_end(folder, tmp_path, name):
    kind = "shards" if name in (CARD_NAME, f"{SHARDS}.index.npz") else f"checkpoints/{CHECKPOINT}"
    shutil.copytree(folder / kind, tmp_path / "copy")
    (tmp_path / "copy" / name).write_bytes(b"[" * 200_000)
    if kind == "shards":
        with pytest.raises(DataError, match=name):
            ShardSet.open(tmp_path / "copy")
    else:
        assert name in manifest.verify(tmp_path / "copy")[0]
        if name == STATE:
            with pytest.raises(CheckpointError, match=name):
                checkpoints.read_state(tmp_path / "copy")


@pytest.mark.parametrize("count", [pytest.param(40, id="quick"), pytest.param(800, id="800", marks=pytest.mark.slow)])
def test_random_damages_are_all_found(folder, tmp_path, count):
    rng = np.random.default_rng(15)
    kinds: dict[str, int] = {}
    while sum(kinds.values()) < count:
        shards = rng.integers(3) > 0
        copied = tmp_path / "copy"
        source = folder / ("shards" if shards else f"checkpoints/{CHECKPOINT}")
        shutil.copytree(source, copied, ignore=shutil.ignore_patterns(COLUMNS, "*.lock"))  # are made anew
        done = damage(rng, copied, "*" if shards else "*.safetensors")
        if done is not None:
            assert found(copied, shards), done
            what = done.split()[0]
            kinds[what] = kinds.get(what, 0) + 1
        shutil.rmtree(copied)
    print(f"{sum(kinds.values())} damages, all found: {kinds}")


def found(copied: Path, shards: bool) -> list[str]:
    """What verifying says."""
    if not shards:
        return manifest.verify(copied)
    try:
        return [str(problem) for _, problems in verify(copied) for problem in problems]
    except DataError as error:
        return [str(error)]
