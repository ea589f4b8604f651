"""The format as others read it: tar, webdataset, DALI, any PNG decoder."""

from __future__ import annotations

import io
import json
import subprocess
import zlib

import cv2
import numpy as np
import pytest
import webdataset
from packed import make_dataset, pack_dataset, read_named
from PIL import Image

from keyreid.errors import DataError
from keyreid.pose.heatmaps import render_tiles
from keyreid.shards import members
from keyreid.shards.shard_set import ShardSet


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple:
    root = tmp_path_factory.mktemp("format")
    dataset = make_dataset(root / "source", identities=4)
    return dataset, pack_dataset(dataset, root / "source", root / "shards"), root / "shards"


def test_tar_lists_and_extracts_every_frame_byte_for_byte(packed, tmp_path):
    dataset, _, folder = packed
    for tar in sorted(folder.glob("*.tar")):
        subprocess.run(["tar", "-xf", tar, "-C", tmp_path], check=True)
    for tracklet in dataset.tracklets:
        for number, frame in enumerate(tracklet.frames):
            assert (tmp_path / f"{tracklet.key}.f{number:04d}.jpg").read_bytes() == frame.path.read_bytes()
        described = json.loads((tmp_path / f"{tracklet.key}.json").read_text())
        assert described["identity"] == tracklet.identity
        assert described["camera"] == tracklet.camera
        assert described["source"]["files"] == [frame.path.name for frame in tracklet.frames]
        keypoints = np.load(tmp_path / f"{tracklet.key}.kp.npy", allow_pickle=False)
        np.testing.assert_array_equal(keypoints, tracklet.keypoints)


def test_webdataset_reads_whole_tracklets_in_order(packed):
    dataset, _, folder = packed
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == [tracklet.key for tracklet in dataset.tracklets]
    for sample, tracklet in zip(samples, dataset.tracklets, strict=True):
        names = [name for name in sample if not name.startswith("__")]
        assert len(names) == members.members_of(len(tracklet.frames))
        assert sample["f0001.jpg"] == tracklet.frames[1].path.read_bytes()


def test_dali_reads_the_shards_by_its_own_webdataset_reader(packed):
    dali = pytest.importorskip("nvidia.dali")
    dataset, shards, folder = packed
    paths = [str(path) for path in sorted(folder.glob("*.tar"))]

    @dali.pipeline_def(batch_size=len(dataset.tracklets), num_threads=1, device_id=None)
    def pipeline():
        picture, heatmap = dali.fn.readers.webdataset(
            paths=paths, ext=["f0001.jpg", "f0001.hm.png"], missing_component_behavior="error"
        )
        return picture, dali.fn.decoders.image(heatmap, output_type=dali.types.GRAY)

    pictures, heatmaps = pipeline().run()
    for position, tracklet in enumerate(dataset.tracklets):
        assert pictures.at(position).tobytes() == tracklet.frames[1].path.read_bytes()
        tiles = heatmaps.at(position)[..., 0].reshape(64, 6, 32).transpose(1, 0, 2)
        np.testing.assert_array_equal(tiles, shards.heatmaps(position, 1))


def test_heatmap_pictures_are_lossless_and_plain_png():
    keypoints = np.random.default_rng(0).uniform((0, 0, 0), (128, 256, 1), (5, 17, 3))
    for tiles in render_tiles(keypoints, 128, 256):
        content = members.encode_tiles(tiles)
        flat = tiles.transpose(1, 0, 2).reshape(64, -1)
        np.testing.assert_array_equal(members.decode_tiles(content, 6), tiles)
        np.testing.assert_array_equal(cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED), flat)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), flat)
        for level in (0, 9):  # whoever else wrote it
            other = cv2.imencode(".png", flat, [cv2.IMWRITE_PNG_COMPRESSION, level])[1].tobytes()
            np.testing.assert_array_equal(members.decode_tiles(other, 6), tiles)


@pytest.mark.parametrize("damage", ["cut", "size", "bomb", "empty"])
def test_heatmap_pictures_that_are_none_are_refused(damage):
    tiles = np.zeros((6, 64, 32), np.uint8)
    content = {
        "cut": members.encode_tiles(tiles)[:-20],
        "size": members.encode_tiles(tiles[:5]),
        "bomb": members.encode_tiles(tiles)[:33]
        + members.png_chunk(b"IDAT", zlib.compress(bytes(10_000_000)))
        + members.png_chunk(b"IEND", b""),
        "empty": b"",
    }[damage]
    if damage == "bomb":  # only as much as is wanted is inflated
        assert members.decode_tiles(content, 6).shape == (6, 64, 32)
        return
    with pytest.raises(ValueError):
        members.decode_tiles(content, 6)


def test_heatmaps_take_a_five_hundredth_of_the_published_files(packed):
    _, shards, _ = packed
    counts = shards.card["counts"]
    assert counts["heatmap_bytes"] / counts["frames"] <= 6 * 256 * 128 * 8 / 500


def test_frames_beyond_9999_keep_their_order_and_names():
    assert members.member_name(members.members_of(12345) - 2, "jpg") == "f12344.jpg"
    assert members.member_name(3, "png") == "f0000.hm.png"


@pytest.mark.parametrize("key", ["", "a.b", "../a", "a/b", "x" * 81, "-a"])
def test_keys_that_are_no_safe_names_are_refused(key):
    with pytest.raises(DataError, match="key"):
        members.check_key(key)


def test_the_index_knows_every_member(packed):
    dataset, shards, folder = packed
    for position, tracklet in enumerate(dataset.tracklets):
        record = shards.tracklets[position]
        content = (folder / shards.card["shards"][record.shard]["file"]).read_bytes()
        assert (record.key, record.identity, record.camera) == (tracklet.key, tracklet.identity, tracklet.camera)
        assert record.frames == len(tracklet.frames)
        picture, heatmap = (read_named(shards, position, name) for name in ("f0001.jpg", "f0001.hm.png"))
        assert picture == tracklet.frames[1].path.read_bytes()
        assert content.count(picture) == 1
        assert heatmap in content
        assert (record.sizes == (32, 64)).all()
        np.testing.assert_array_equal(shards.keypoints(position), tracklet.keypoints)


def test_an_index_or_card_of_another_version_is_refused(packed, tmp_path):
    _, _, folder = packed
    card = json.loads((folder / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps(card | {"format": "keyreid-dataset/2"}))
    with pytest.raises(DataError, match="keyreid-dataset/1"):
        ShardSet.open(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps(card | {"shards": [card["shards"][0] | {"file": "../x.tar"}]}))
    with pytest.raises(DataError, match="not the name of a shard"):
        ShardSet.open(tmp_path)


def test_nothing_packed_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match="keyreid shard"):
        ShardSet.open(tmp_path)
    with pytest.raises(DataError, match="keyreid shard"):
        ShardSet.open(tmp_path / "absent")
