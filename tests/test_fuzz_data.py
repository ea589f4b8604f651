"""Whatever bytes a dataset's files hold, a reader gives a result or a KeyreidError, within seconds."""

import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse
from fuzzing import fuzz
from hypothesis import strategies as st
from PIL import Image

from keyreid.datasets import open_dataset
from keyreid.datasets.folder import read_import_card
from keyreid.datasets.mars import read_index
from keyreid.errors import KeyreidError
from keyreid.pose import imports, keypoint_files

TOKENS = [
    b"nan",
    b"-1",
    b"1e999",
    b"9" * 25,
    b"\0",
    b"\xff\xfe",
    "①²１".encode(),
    b'"',
    b",",
    b"\n",
    b"..",
    b"/",
    b"[[",
]
TOKENS += [b"\xff\xff\xff\xff", b"\0\0\0\0", b"=", b"{", b"a" * 300, b"7.0", b"0-1C1T"]


def _mutated(content: bytes, seed: int) -> bytes:
    """A valid file with up to six changes: bytes changed, taken out, doubled or put in, or the end cut off."""
    rng, content = random.Random(seed), bytearray(content)
    for _ in range(rng.randint(1, 6)):
        at, length = rng.randrange(len(content) + 1), rng.choice([1, 1, 2, 4, 8, 40])
        match rng.randrange(6):
            case 0 if at < len(content):
                content[at] ^= 1 << rng.randrange(8)
            case 1:
                content[at : at + length] = rng.randbytes(length)
            case 2:
                del content[at : at + length]
            case 3:
                content[at:at] = content[at : at + length]
            case 4:
                content[at:at] = rng.choice(TOKENS)
            case 5 if rng.random() < 0.2:
                del content[at:]
    return bytes(content)


def _written(write: Callable[[io.BytesIO], object]) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def _mat(variable: str, value: object, compressed: bool = False) -> bytes:
    return _written(lambda stream: scipy.io.savemat(stream, {variable: value}, do_compression=compressed))


NAMES = [f"000{person}C{camera}T0001F00{frame}.jpg" for person in (1, 2) for camera in (1, 2) for frame in (1, 2)]
ROWS = np.array([[1, 2, 1, 1], [3, 4, 1, 2], [5, 6, 2, 1], [7, 8, 2, 2]])
CSV = "path,camera,identity,tracklet,frame\n0.jpg,east,Ada,1,1\n1.jpg,NA,None,1,2\n2.jpg,west,7.0,2,3\n3.jpg,w,,5,4\n"
GT = "".join(f"{t},{i},{10 * t},20,30,60,1,1,0.9\n" for t in range(1, 5) for i in (3, 7))
CARD = {"format": "keyreid-imported/1", "names": {"identity": {"Ada": 1, "7": 2}, "camera": {"Yard": 1}}}
CARD |= {"frames_per_second": {"Yard": 5.0}, "sources": {"yard": {"kind": "video", "file": "/yard.mp4"}}}
POSE = np.ones((17, 3), np.float32)


def _mars(root: Path) -> Path:
    for first, split in ((1, "train"), (3, "test")):
        for person in (first, first + 1):
            (root / f"bbox_{split}" / f"{person:04d}").mkdir(parents=True)
        (root / "info").mkdir(exist_ok=True)
        names = "\r\n".join(f"{int(name[:4]) + first - 1:04d}{name[4:]}" for name in NAMES)
        (root / "info" / f"{split}_name.txt").write_text(names)
        rows = ROWS + np.array([0, 0, first - 1, 0])
        scipy.io.savemat(root / "info" / f"tracks_{split}_info.mat", {f"track_{split}_info": rows})
    scipy.io.savemat(root / "info" / "query_IDX.mat", {"query_IDX": np.array([[1, 3]])})
    return root


def _mars_with(name: str) -> Callable:
    def prepare(root: Path):
        path = _mars(root) / "info" / name
        (root / "info" / name.removesuffix(".gz")).unlink()
        return path, lambda: open_dataset("mars", root)

    return prepare


def _index_with(name: str) -> Callable:
    def prepare(root: Path):
        return _mars(root) / "info" / name, lambda: read_index(root / "info")

    return prepare


def _table(name: str) -> Callable:
    def prepare(root: Path):
        for number in range(4):
            (root / f"{number}.jpg").touch()
        return root / name, lambda: open_dataset("folder", root / name)

    return prepare


def _sequence(name: str) -> Callable:
    def prepare(root: Path):
        (root / "S" / "img1").mkdir(parents=True)
        (root / "S" / "gt").mkdir()
        (root / "S" / "gt" / "gt.txt").write_text(GT)
        for frame in range(1, 5):
            Image.new("L", (8, 8)).save(root / "S" / "img1" / f"{frame:06d}.jpg")
        return root / "S" / name, lambda: open_dataset("mot", root / "S")

    return prepare


def _people(root: Path):
    for camera in (1, 2):
        for person in ("person001", "person002"):
            folder = root / "i-LIDS-VID" / "sequences" / f"cam{camera}" / person
            folder.mkdir(parents=True)
            (folder / "1.png").touch()
    return root / "splits.json", lambda: open_dataset("ilids_vid", root)


def _npz() -> bytes:
    arrays = {"keypoints": POSE[None], "scores": np.ones(1, np.float32), "frame_names": np.array(["1.jpg"])}
    return _written(lambda s: np.savez_compressed(s, **arrays, provenance=np.array(json.dumps({"tool": "t"}))))


def _read_with(read: Callable) -> Callable:
    return lambda root: (root / "file", lambda: read(root / "file"))


FRAME = pd.read_csv(io.StringIO(CSV))
MATS = [
    [["a", "b"]],
    [[{"x": 1}]],
    np.array([[1, "x"]], object),
    scipy.sparse.eye(4),
    ROWS * 1.5,
    ROWS.T,
    ROWS[0],
    "text",
]
MATS += [{"a": ROWS}, np.array([[np.nan] * 4]), ROWS * 1j, np.zeros((0, 4)), ROWS.astype(np.uint64) + 2**63]
READERS = {
    "mars index": (
        _index_with("tracks_train_info.mat"),
        [_mat("track_train_info", value, packed) for value in [ROWS, *MATS] for packed in (False, True)],
    ),
    "mars queries": (
        _index_with("query_IDX.mat"),
        [_mat("query_IDX", value) for value in ([[1, 3]], [[1.0], [3.0]], *MATS)],
    ),
    "mars names": (
        _mars_with("train_name.txt"),
        ["\r\n".join(NAMES).encode(), "\n".join(["0-1C1T0001F001.jpg"] * 8).encode()],
    ),
    "gzipped mars names": (_mars_with("train_name.txt.gz"), [gzip.compress("\r\n".join(NAMES).encode())]),
    "csv": (_table("people.csv"), [CSV.encode(), CSV.replace(",", ";").encode(), CSV.encode("utf-16")]),
    "parquet": (
        _table("people.parquet"),
        [_written(FRAME.to_parquet), _written(lambda s: FRAME.astype(str).to_parquet(s, compression=None))],
    ),
    "tracks": (
        _sequence("gt/gt.txt"),
        [GT.encode(), b"frame,id,left,top,w,h,score\n" + GT.replace(",1,1,0.9", ",1").encode(), b"1,-1,1,1,50,50\n"],
    ),
    "seqinfo": (
        _sequence("seqinfo.ini"),
        [b"[Sequence]\nname=S1\nimDir=img1\nframeRate=30\nseqLength=4\nimWidth=8\nimHeight=8\nimExt=.jpg\n"],
    ),
    "json splits": (_people, [b'[{"train": ["person001"], "test": ["person002"]}]', b"[" * 100_000]),
    "import card": (
        lambda root: (root / "imported.json", lambda: read_import_card(root)),
        [json.dumps(CARD).encode(), b"[" * 100_000],
    ),
    "keypoint file": (_read_with(keypoint_files.load), [_npz()]),
    "pose": (_read_with(imports._read_pose), [json.dumps(POSE.tolist()).encode(), b"[" * 100_000, b"[[1" + b"0" * 400]),
    "heatmap": (_read_with(imports._read_heatmap), [_written(lambda s: np.save(s, np.ones((6, 4, 2)))), _npz()]),
}


@pytest.mark.parametrize("name", READERS)
def test_any_bytes_give_a_result_or_an_error_that_says_why(name: str, tmp_path: Path) -> None:
    prepare, seeds = READERS[name]
    path, read = prepare(tmp_path)
    mutated = st.builds(_mutated, st.sampled_from(seeds), st.integers(0, 2**64))
    refused = []

    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            read()
            refused.append(False)
        except KeyreidError as error:
            refused.append(True)
            assert str(tmp_path) in str(error) or "two tracklets have the key" in str(error), error

    for seed in seeds:
        check(seed)
    fuzz(check, st.one_of(mutated, mutated, mutated, st.binary(max_size=400)))
    assert sum(refused) > len(refused) // 10
