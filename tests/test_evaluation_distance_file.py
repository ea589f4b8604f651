"""`keyreid evaluate --distance`: any matrix is judged, and what does not fit is refused in words."""

import json
import pickle

import numpy as np
import pytest
from typer.testing import CliRunner

from keyreid.cli import app
from keyreid.errors import ConfigError, DataError
from keyreid.evaluation.distance_file import judge_file
from keyreid.evaluation.protocols import PROTOCOLS, Side, judge


def arrays(seed=0, queries=20, gallery=60):
    rng = np.random.default_rng(seed)
    return {
        "distance": rng.random((queries, gallery), dtype=np.float32),
        "query_ids": rng.integers(1, 8, queries),
        "gallery_ids": rng.integers(-1, 8, gallery),
        "query_cameras": rng.integers(1, 4, queries),
        "gallery_cameras": rng.integers(1, 4, gallery),
        "query_frames": rng.integers(1, 6, queries),
        "gallery_frames": rng.integers(1, 6, gallery),
    }


def saved(path, **changes):
    made = arrays() | changes
    np.savez(path, **{name: array for name, array in made.items() if array is not None})
    return path


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_command_prints_and_writes_what_the_protocol_says(tmp_path, protocol):
    path = saved(tmp_path / "made.npz")
    out = tmp_path / "deep" / "scores.json"
    run = CliRunner().invoke(app, ["evaluate", "--distance", str(path), "--protocol", protocol, "--json", str(out)])
    assert run.exit_code == 0, run.output
    made = arrays()
    sides = [
        Side(made[f"{side}_ids"], made[f"{side}_cameras"], made[f"{side}_frames"]) for side in ("query", "gallery")
    ]
    expected = judge(made["distance"], *sides, protocol).as_dict()
    written = json.loads(out.read_text())
    assert {name: written[name] for name in expected} == expected
    assert written["protocols"] == {protocol: expected}
    assert written["metrics"][f"{protocol}/mAP"] == expected["mAP"]
    head, line = run.output.splitlines()[:2]
    assert head.split()[:4] == ["data", "set", "protocol", "mAP"]
    assert line.split()[:3] == ["made", protocol, f"{100 * expected['mAP']:.2f}"]
    assert ("only to compare" in run.output) == (protocol == "released")
    assert ("counts as wrong answers" in run.output) == (protocol != "official")


def test_several_protocols_are_lines_of_one_table(tmp_path):
    path = saved(tmp_path / "made.npz")
    arguments = ["evaluate", "--distance", str(path), "--protocol", "inclusive", "--protocol", "official"]
    run = CliRunner().invoke(app, arguments)
    assert [line.split()[1] for line in run.output.splitlines()[1:3]] == ["inclusive", "official"]
    assert list(judge_file(path, ["inclusive", "official"])["protocols"]) == ["inclusive", "official"]


@pytest.mark.parametrize("dtype", ["float64", "float16", ">f4", "int16", "uint8", "int64", "bool"])
def test_any_real_type_of_distance(tmp_path, dtype):
    distance = (arrays()["distance"] * 200).astype(dtype)
    result = judge_file(saved(tmp_path / "a.npz", distance=distance), ["torchreid"])
    plain = judge_file(saved(tmp_path / "b.npz", distance=distance.astype(np.float64)), ["torchreid"])
    assert result["protocols"] == plain["protocols"]


def test_whole_numbers_stored_as_floats_and_frames_that_are_not_needed(tmp_path):
    made = arrays()
    changes = {name: made[name].astype(np.float64) for name in made if name != "distance"}
    as_floats = judge_file(saved(tmp_path / "made.npz", **changes), ["released"])
    assert as_floats == judge_file(saved(tmp_path / "made.npz"), ["released"])
    saved(tmp_path / "made.npz", query_frames=None, gallery_frames=np.zeros(3))
    assert judge_file(tmp_path / "made.npz", ["torchreid"])["queries"] == 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_ids": np.zeros(7, int)}, r"distance \(20, 60\) and query_ids \(7,\) do not fit each other"),
        ({"gallery_cameras": np.zeros((60, 1), int)}, r"distance \(20, 60\) and gallery_cameras \(60, 1\)"),
        ({"gallery_frames": np.ones(61, int)}, r"distance \(20, 60\) and gallery_frames \(61,\)"),
        ({"distance": np.zeros(20)}, r"distance \(20,\) is not a matrix"),
        ({"distance": np.zeros((0, 60))}, r"distance \(0, 60\) is empty"),
        ({"distance": np.full((20, 60), np.nan)}, r"distance\[0, 0\] is not a number"),
        ({"distance": np.zeros((20, 60), complex)}, "distance is complex128, not real numbers"),
        ({"query_ids": np.linspace(0, 1, 20)}, "query_ids is float64; whole numbers are needed"),
        ({"query_cameras": np.full(20, "one")}, "query_cameras is <U3; whole numbers are needed; number the names"),
        ({"query_ids": np.full(20, 1e300)}, "query_ids holds 1e\\+300, which is too large"),
        ({"gallery_ids": np.full(60, 2**63, np.uint64)}, "gallery_ids holds 9223372036854775808, which is too large"),
        ({"gallery_ids": np.array([{}] * 60, object)}, "not an .npz file of plain arrays: Object arrays"),
        ({"query_frames": None}, "lacks query_frames; it has distance, "),
        ({"query_frames": np.zeros(20, int)}, "query_frames holds 0; a tracklet has at least one frame"),
        ({"gallery_ids": np.full(60, 99)}, "no query has a match under protocol released"),
    ],
)
def test_arrays_that_cannot_be_judged(tmp_path, changes, message):
    path = saved(tmp_path / "made.npz", **changes)
    with pytest.raises(DataError, match=message) as error:
        judge_file(path, ["released"])
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kind", ["absent", "folder", "empty", "text", "pickle", "npy", "cut", "changed"])
def test_files_that_are_none(tmp_path, kind):
    path = tmp_path / "made.npz"
    if kind == "folder":
        path.mkdir()
    elif kind in ("empty", "text"):
        path.write_text("" if kind == "empty" else "no matrix")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"distance": 1}))
    elif kind == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros((2, 2)))
    elif kind != "absent":
        content = bytearray(saved(path).read_bytes())
        content[200] ^= 255
        path.write_bytes(content if kind == "changed" else content[:-300])
    with pytest.raises(DataError, match=r"made\.npz: ") as error:
        judge_file(path, ["torchreid"])
    assert "unsafely" not in str(error.value)  # numpy takes what it does not know for a pickle, and says how to load it


def test_command_line_refusals(tmp_path):
    path = saved(tmp_path / "made.npz")
    for arguments, message in (
        (["--distance", str(path), "--protocol", "market"], "unknown protocol 'market'; there are torchreid, official"),
        (["--distance", str(path), "--shards", "s", "--all-splits"], "does not go with --all-splits, --shards"),
        ([], "name a run, checkpoint or weights; or --vectors FILE with --shards"),
    ):
        run = CliRunner().invoke(app, ["evaluate", *arguments])
        assert isinstance(run.exception, ConfigError)
        assert message in str(run.exception)
