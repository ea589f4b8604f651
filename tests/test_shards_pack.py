"""Packing: the same bytes however the work is shared or interrupted, bad input refused by name."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
from packed import make_dataset, pack_dataset, read_named

from keyreid.datasets.frames import frame_hashes
from keyreid.datasets.tracklet import Dataset, Frame
from keyreid.errors import DataError, KeyreidError
from keyreid.pose import heatmap_files, keypoint_files
from keyreid.pose.heatmaps import render_heatmaps, render_tiles
from keyreid.shards import pack as packing
from keyreid.shards.layout import plan_shards
from keyreid.shards.members import MAX_KEY_LENGTH
from keyreid.shards.pack import check_destination, finish, missing, pack
from keyreid.shards.shard_set import ShardSet
from keyreid.shards.writer import PackSettings


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> tuple[Dataset, Path]:
    root = tmp_path_factory.mktemp("source")
    return make_dataset(root), root


def contents(folder: Path) -> dict[str, bytes]:
    """All that was packed: not locks, nor the columns, which follow from the rest and from its time."""
    paths = (path for path in sorted(folder.iterdir()) if path.suffix in (".tar", ".npz", ".json"))
    return {path.name: path.read_bytes() for path in paths if path.name[0] != "."}


def planned(source, target: int = 150_000, **settings):
    dataset, root = source
    return plan_shards(dataset, PackSettings(root, **settings), target)


def test_the_bytes_do_not_depend_on_processes_shares_or_time(source, tmp_path):
    plan = planned(source)
    assert len(plan.shards) > 3
    pack(plan, tmp_path / "one", quiet=True)
    finish(plan, tmp_path / "one")
    time.sleep(1.1)  # a tar counts whole seconds
    pack(plan, tmp_path / "three", processes=3, quiet=True)
    finish(plan, tmp_path / "three")
    for share in (2, 0, 1):
        assert sum(pack(planned(source), tmp_path / "shares", share=(share, 3), quiet=True)) >= 1
    finish(plan, tmp_path / "shares")
    assert contents(tmp_path / "one") == contents(tmp_path / "three") == contents(tmp_path / "shares")


def test_shards_have_about_the_size_that_is_asked_for(source, tmp_path):
    plan = planned(source, target=200_000)
    pack(plan, tmp_path, quiet=True)
    sizes = [(tmp_path / name).stat().st_size for name, _ in plan.shards][:-1]
    assert min(sizes) > 0.6 * 200_000
    assert max(sizes) < 1.4 * 200_000


def test_the_card_appears_only_when_every_shard_is_there(source, tmp_path):
    plan = planned(source)
    pack(plan, tmp_path, share=(0, 2), quiet=True)
    names = [name for name, _ in plan.shards]
    assert missing(plan, tmp_path) == names[1::2]
    with pytest.raises(DataError, match=names[1]):
        finish(plan, tmp_path)
    with pytest.raises(DataError, match="packing has not finished"):
        ShardSet.open(tmp_path)
    assert pack(plan, tmp_path, share=(1, 2), quiet=True) == (len(names[1::2]), 0)
    finish(plan, tmp_path)
    assert len(ShardSet.open(tmp_path)) == len(source[0].tracklets)


def test_whole_shards_are_kept_and_others_packed_again(source, tmp_path):
    plan = planned(source)
    pack(plan, tmp_path, quiet=True)
    finish(plan, tmp_path)
    before = contents(tmp_path)
    names = [name for name, _ in plan.shards]
    (tmp_path / names[0]).unlink()
    with (tmp_path / names[1]).open("r+b") as file:
        file.truncate(1000)
    (tmp_path / names[2]).with_suffix(".index.npz").write_bytes(b"not an index")
    for path, place in ((tmp_path / names[3], 5000), ((tmp_path / names[4]).with_suffix(".index.npz"), 10)):
        content = bytearray(path.read_bytes())
        content[place] ^= 1  # sizes stay; in the index it is the time of a zip entry, which nobody reads
        path.write_bytes(content)
    assert pack(planned(source), tmp_path, quiet=True) == (5, len(names) - 5)
    assert not (tmp_path / "dataset.json").exists()  # until all is whole again
    finish(plan, tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("change", ["keypoints", "identity", "parts"])
def test_shards_of_other_data_or_settings_are_not_kept(source, tmp_path, change):
    dataset, root = source
    pack(planned(source), tmp_path, quiet=True)
    first = dataset.tracklets[0]
    changed = {
        "keypoints": (replace(first, keypoints=first.keypoints + np.float32((1, 1, 0))), 6),
        "identity": (replace(first, identity=99), 6),
        "parts": (first, 4),
    }[change]
    other = Dataset("toy", (changed[0], *dataset.tracklets[1:]))
    plan = plan_shards(other, PackSettings(root, parts=changed[1]), 150_000)
    written, kept = pack(plan, tmp_path, quiet=True)
    assert (written, kept) == ((len(plan.shards), 0) if change == "parts" else (1, len(plan.shards) - 1))


def test_killed_packing_goes_on_to_identical_bytes(source, tmp_path):
    plan = planned(source, target=60_000)
    pack(plan, tmp_path / "whole", quiet=True)
    finish(plan, tmp_path / "whole")
    (tmp_path / "plan").write_bytes(pickle.dumps(plan))
    script = (
        "import pickle, sys, time; from pathlib import Path\n"
        "from keyreid.datasets import frames; from keyreid.shards.pack import pack\n"
        "read = frames.read_frame\n"
        "def slowly(frame): time.sleep(0.002); return read(frame)\n"
        "frames.read_frame = slowly\n"
        "pack(pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2]), quiet=True)\n"
    )
    out = tmp_path / "killed"
    out.mkdir()
    for _ in range(2):
        before = len(list(out.glob("*.tar")))
        child = subprocess.Popen([sys.executable, "-c", script, tmp_path / "plan", out])
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                if len(list(out.glob("*.tar"))) > before and list(out.glob(".*.partial")):
                    child.send_signal(signal.SIGSTOP)
                    os.waitpid(child.pid, os.WUNTRACED)
                    if list(out.glob(".*.partial")):
                        break  # it stands still in the middle of a shard
                    child.send_signal(signal.SIGCONT)
                time.sleep(0.002)
        finally:
            child.kill()
            child.wait()
        assert list(out.glob(".*.partial"))
    done = len(list(out.glob("*.tar")))
    assert 1 < done < len(plan.shards)
    assert pack(planned(source, target=60_000), out, quiet=True)[1] >= done - 1
    finish(plan, out)
    assert contents(out) == contents(tmp_path / "whole")


def test_workers_end_when_the_packer_is_killed():
    """Others would go on, and write beside the packing that is started again."""
    script = (
        "import os, time; from concurrent.futures import ProcessPoolExecutor; from multiprocessing import get_context\n"
        "from keyreid.processes import end_with_parent\n"
        "pool = ProcessPoolExecutor(1, get_context('forkserver'), end_with_parent)\n"
        "print(pool.submit(os.getpid).result(), flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(child.stdout.readline()))
    child.kill()
    child.wait()
    child.stdout.close()
    gone = psutil.wait_procs([worker], timeout=10)[0]
    assert gone or worker.status() == psutil.STATUS_ZOMBIE  # of a container whose first process reaps nobody


def test_what_cannot_be_written_is_named(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyreidError, match="file: cannot be written: "):
        pack(planned(source), tmp_path / "file", quiet=True)


def test_finished_shards_of_another_dataset_are_not_replaced(source, tmp_path):
    dataset, root = source
    pack_dataset(dataset, root, tmp_path)
    check_destination(planned(source), tmp_path)
    with pytest.raises(DataError, match="another dataset"):
        check_destination(plan_shards(dataset, PackSettings(root / "elsewhere")), tmp_path)


def test_a_full_disk_is_noticed_before_packing(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(DataError, match="free; make room"):
        pack(planned(source), tmp_path, quiet=True)
    assert not list(tmp_path.glob("*.tar"))


@pytest.mark.parametrize("damage", ["missing", "text", "cut", "empty"])
def test_a_picture_that_cannot_be_read_is_named_and_leaves_no_shard(tmp_path, damage):
    dataset = make_dataset(tmp_path / "source", identities=2)
    path = dataset.tracklets[3].frames[1].path
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"text": b"<html>" * 50, "cut": content[: len(content) // 2], "empty": b""}[damage])
    with pytest.raises(DataError) as caught:
        pack(plan_shards(dataset, PackSettings(tmp_path / "source")), tmp_path / "out", quiet=True)
    assert str(path) in str(caught.value)
    assert list(tmp_path.glob("out/*")) == []


def test_a_bad_picture_found_by_another_process_is_named_too(tmp_path):
    dataset = make_dataset(tmp_path / "source", identities=4)
    dataset.tracklets[9].frames[0].path.write_bytes(b"none")
    plan = plan_shards(dataset, PackSettings(tmp_path / "source"), 60_000)
    with pytest.raises(DataError, match=str(dataset.tracklets[9].frames[0].path)):
        pack(plan, tmp_path / "out", processes=2, quiet=True)


def test_keypoint_files_take_the_place_of_the_datasets_own(source, tmp_path):
    dataset, root = source
    rng = np.random.default_rng(3)
    for tracklet in dataset.tracklets:
        keypoints = rng.uniform(0, (30, 30, 1), (len(tracklet.frames), 17, 3)).astype(np.float32)
        names = tuple(frame.path.name for frame in tracklet.frames)
        hashes = frame_hashes(tracklet.frames)
        file = keypoint_files.KeypointFile(keypoints, np.ones(len(names), np.float32), names, {}, hashes)
        keypoint_files.save(keypoint_files.path_of(tmp_path / "kp", tracklet.key), file)
    shards = pack_dataset(dataset, root, tmp_path / "out", keypoints=tmp_path / "kp")
    np.testing.assert_array_equal(shards.keypoints(len(dataset.tracklets) - 1), keypoints)
    np.testing.assert_array_equal(shards.heatmaps(len(shards) - 1, 1), render_tiles(keypoints, 32, 64)[1])
    key = dataset.tracklets[5].key
    keypoint_files.path_of(tmp_path / "kp", key).unlink()
    with pytest.raises(DataError, match=key):
        pack_dataset(dataset, root, tmp_path / "other", keypoints=tmp_path / "kp")


def test_published_heatmap_files_are_pooled_to_tiles(source, tmp_path):
    dataset, root = source
    for tracklet in dataset.tracklets:
        for frame, keypoints in zip(tracklet.frames, tracklet.keypoints, strict=True):
            path = tmp_path / "npy" / frame.path.relative_to(root).with_suffix(".npy")
            path.parent.mkdir(parents=True, exist_ok=True)
            scaled = keypoints * np.array([4, 4, 1], np.float32)
            np.save(path, render_heatmaps(scaled[None], 128, 256)[0].astype(np.float64))
    bare = Dataset("toy", tuple(replace(tracklet, keypoints=None) for tracklet in dataset.tracklets))
    shards = pack_dataset(bare, root, tmp_path / "out", heatmaps=tmp_path / "npy")
    for position in (0, 7):
        tracklet = dataset.tracklets[position]
        expected = render_tiles(tracklet.keypoints, 32, 64)
        difference = shards.heatmaps(position, 0).astype(int) - expected[0]
        assert np.abs(difference).max() <= 1
        assert (shards.tracklets[position].visible[0] == expected[0].any((1, 2))).all()
    imported = tmp_path / "imported"
    for tracklet in dataset.tracklets:
        heatmaps = [np.load(tmp_path / "npy" / f.path.relative_to(root).with_suffix(".npy")) for f in tracklet.frames]
        names, hashes = keypoint_files.frame_names(tracklet), frame_hashes(tracklet.frames)
        heatmap_files.save(heatmap_files.path_of(imported, tracklet.key), heatmaps, names, {}, hashes)
    again = pack_dataset(bare, root, tmp_path / "again", heatmaps=imported)
    np.testing.assert_array_equal(again.heatmaps(7, 1), shards.heatmaps(7, 1))
    np.save(path, np.full((6, 256, 128), 2.0))
    with pytest.raises(DataError, match=path.name):
        pack_dataset(bare, root, tmp_path / "other", heatmaps=tmp_path / "npy")
    path.unlink()
    with pytest.raises(DataError, match=path.name):
        pack_dataset(bare, root, tmp_path / "other", heatmaps=tmp_path / "npy")


def test_no_keypoints_are_zeros_and_counted(source, tmp_path):
    dataset, root = source
    bare = Dataset("toy", tuple(replace(tracklet, keypoints=None) for tracklet in dataset.tracklets))
    shards = pack_dataset(bare, root, tmp_path / "out")
    assert shards.card["counts"]["frames_with_keypoints"] == 0
    assert not shards.heatmaps(3, 0).any()
    assert not shards.index.seen(slice(None)).any()


def test_tiny_pictures_and_jpegs_with_more_behind_their_end_are_packed(tmp_path):
    dataset = make_dataset(tmp_path / "source", identities=1, tracklets=2)
    tiny = tmp_path / "tiny.png"
    cv2.imwrite(str(tiny), np.full((1, 3, 3), 7, np.uint8))
    path = dataset.tracklets[0].frames[1].path
    path.write_bytes(path.read_bytes() + bytes(500))
    frames = (dataset.tracklets[0].frames[1], Frame(tiny))
    odd = Dataset("odd", (replace(dataset.tracklets[0], frames=frames, keypoints=None),))
    shards = pack_dataset(odd, tmp_path, tmp_path / "out")
    assert shards.index.sizes(slice(None)).tolist() == [[32, 64], [3, 1]]
    assert read_named(shards, 0, "f0000.jpg") == path.read_bytes()
    cv2.imwrite(str(tiny), np.zeros((1, 65536), np.uint8))
    with pytest.raises(DataError, match=r"tiny\.png: 65536 x 1 pixels: more than 65535"):
        pack_dataset(odd, tmp_path, tmp_path / "wide")


def test_png_is_kept_or_made_jpeg(tmp_path):
    dataset = make_dataset(tmp_path / "source", identities=2, suffix=".png")
    kept = pack_dataset(dataset, tmp_path / "source", tmp_path / "png")
    path = dataset.tracklets[2].frames[1].path
    assert read_named(kept, 2, "f0001.png") == path.read_bytes()
    made = pack_dataset(dataset, tmp_path / "source", tmp_path / "jpeg", image="jpeg", quality=92)
    picture = cv2.imdecode(np.frombuffer(read_named(made, 2, "f0001.jpg"), np.uint8), cv2.IMREAD_COLOR_RGB)
    np.testing.assert_array_equal(made.picture(2, 1), picture)
    original = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    assert np.abs(picture.astype(int) - original).mean() < 4
    assert made.card["settings"]["quality"] == 92
    with pytest.raises(KeyError, match=r"f0001\.png"):
        read_named(made, 2, "f0001.png")


def test_unequal_sizes_and_boxes_and_names(tmp_path):
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 255, (300, 400, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "street.png"), whole)
    dataset = make_dataset(tmp_path / "source", identities=2)
    box = Frame(tmp_path / "street.png", box=(10.0, 20.0, 50.0, 120.0))
    first = replace(dataset.tracklets[0], frames=(*dataset.tracklets[0].frames, box), keypoints=None)
    named = Dataset("own", (first, *dataset.tracklets[1:]), names={"identity": {"anna": 0, "björn": 1}})
    shards = pack_dataset(named, tmp_path, tmp_path / "out")
    last = len(first.frames) - 1
    assert shards.tracklets[0].sizes[-1].tolist() == [50, 120]
    np.testing.assert_array_equal(shards.picture(0, last), whole[20:140, 10:60, ::-1])
    described = shards.metadata(0)
    assert described["sizes"][-1] == [50, 120]
    assert described["boxes"][-1] == [10, 20, 50, 120]
    assert shards.card["names"]["identity"]["björn"] == 1


def test_keys_that_do_not_fit_a_tar_header_are_refused(source, tmp_path):
    dataset, root = source
    long = Dataset("toy", (replace(dataset.tracklets[0], key="k" * 81),))
    with pytest.raises(DataError, match="1 to 80"):
        pack_dataset(long, root, tmp_path)
    assert MAX_KEY_LENGTH + len(".f99999.hm.png") <= 100
