"""Keypoints and heatmaps are joined to the pictures that they were found in, and to no others."""

import json
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
from packed import make_dataset, pack_dataset

from keyreid.datasets import open_dataset
from keyreid.datasets.frames import frame_hashes
from keyreid.datasets.tracklet import Dataset
from keyreid.errors import DataError
from keyreid.pose import heatmap_files, imports, keypoint_files
from keyreid.shards.layout import plan_shards
from keyreid.shards.pack import pack
from keyreid.shards.writer import PackSettings


def paint(path: Path, value: int, size: tuple[int, int] = (32, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((size[1], size[0], 3), value, np.uint8))


def find(dataset: Dataset, out: Path, recorded: bool = True) -> None:
    """Keypoint files as `keyreid pose` writes them, or as the version before it did, which did not record pictures."""
    for tracklet in dataset.tracklets:
        keypoints = np.full((len(tracklet.frames), 17, 3), 0.5, np.float32)
        names = keypoint_files.frame_names(tracklet)
        hashes = frame_hashes(tracklet.frames) if recorded else ()
        file = keypoint_files.KeypointFile(keypoints, keypoints[:, 0, 2], names, {"tool": "test"}, hashes)
        keypoint_files.save(keypoint_files.path_of(out, tracklet.key), file)


def packs(dataset: Dataset, folder: Path, **kinds: Path) -> None:
    kinds = kinds or {"keypoints": folder / "kp"}
    pack_dataset(dataset, folder, folder / f"shards{len(list(folder.iterdir()))}", **kinds)


@pytest.fixture
def people(tmp_path) -> Path:
    """Two people of two pictures, all of whose files have the same names."""
    for number, person in enumerate(("ada", "bob")):
        for frame in range(2):
            paint(tmp_path / "people" / "cam" / person / "1" / f"{frame:04d}.jpg", 100 * number + 30 * frame)
    return tmp_path / "people"


def test_own_keypoints_are_packed(people, tmp_path):
    dataset = open_dataset("folder", people)
    find(dataset, tmp_path / "kp")
    packs(dataset, tmp_path)


def test_keypoints_of_another_person_are_refused(people, tmp_path):
    """The keys change hands, and so do the files: names of frames, count and key all agree."""
    dataset = open_dataset("folder", people)
    find(dataset, tmp_path / "kp")
    one, other = (keypoint_files.path_of(tmp_path / "kp", tracklet.key) for tracklet in dataset.tracklets)
    one.rename(tmp_path / "spare"), other.rename(one), (tmp_path / "spare").rename(other)
    with pytest.raises(DataError) as refused:
        packs(dataset, tmp_path)
    for named in (str(one), dataset.tracklets[0].key, str(dataset.tracklets[0].frames[0].path), "another picture"):
        assert named in str(refused.value)


@pytest.mark.parametrize("change", ["content", "size", "order", "added", "renamed"])
def test_keypoints_of_other_frames_are_refused(people, tmp_path, change):
    find(open_dataset("folder", people), tmp_path / "kp")
    first, second = sorted((people / "cam/ada/1").iterdir())
    if change == "content":
        paint(second, 200)
    elif change == "size":
        paint(second, 30, (32, 80))
    elif change == "order":
        first.rename(tmp_path / "spare"), second.rename(first), (tmp_path / "spare").rename(second)
    elif change == "added":
        first.rename(first.with_name("0002.jpg"))  # as many as before
    else:
        second.rename(second.with_name("0001x.jpg"))
    with pytest.raises(DataError, match=r"kp/ada_cam_1\.npz: was made from "):
        packs(open_dataset("folder", people), tmp_path)


def street(tmp_path: Path) -> Path:
    """A MOTChallenge sequence: a box that walks through noise."""
    rng = np.random.default_rng(0)
    (tmp_path / "street/img1").mkdir(parents=True)
    (tmp_path / "street/gt").mkdir()
    for number in range(1, 4):
        picture = rng.integers(0, 255, (200, 300, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / f"street/img1/{number:06d}.jpg"), picture)
    lines = (f"{number},1,{40 + number},50,40,100,1,1,1\n" for number in range(1, 4))
    (tmp_path / "street/gt/gt.txt").write_text("".join(lines))
    return tmp_path / "street"


def test_keypoints_of_other_boxes_are_refused(tmp_path):
    place = street(tmp_path)
    find(open_dataset("mot", place), tmp_path / "kp")
    packs(open_dataset("mot", place), tmp_path)
    with pytest.raises(DataError, match=r"kp/street_1_0\.npz: was made from 000001\.jpg@41,50,40,100, which is not"):
        packs(open_dataset("mot", place, padding=0.5), tmp_path)
    cv2.imwrite(str(place / "img1/000002.jpg"), np.zeros((200, 300, 3), np.uint8))  # boxes and names stay
    with pytest.raises(DataError, match=r"frame 1 of tracklet street_1_0"):
        packs(open_dataset("mot", place), tmp_path)


def test_the_same_picture_twice_confuses_nothing(tmp_path):
    dataset = make_dataset(tmp_path / "source", identities=1, tracklets=1, frames=(3, 3))
    tracklet = dataset.tracklets[0]
    twice = Dataset("toy", (replace(tracklet, frames=(*tracklet.frames, tracklet.frames[0]), keypoints=None),))
    tracklet.frames[1].path.write_bytes(tracklet.frames[2].path.read_bytes())
    find(twice, tmp_path / "kp")
    packs(twice, tmp_path)


def test_files_of_the_version_before_are_joined_by_names_where_names_tell(people, tmp_path, caplog):
    place = street(tmp_path)
    find(open_dataset("mot", place), tmp_path / "kp", recorded=False)
    packs(open_dataset("mot", place), tmp_path)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "1 keypoint files of an earlier version do not say which pictures" in line
    with pytest.raises(DataError, match="was made from 000001"):
        packs(open_dataset("mot", place, padding=0.5), tmp_path)

    find(open_dataset("folder", people), tmp_path / "old", recorded=False)
    with pytest.raises(DataError, match=r"old/ada_cam_1\.npz: does not say which pictures.*delete it and run"):
        packs(open_dataset("folder", people), tmp_path, keypoints=tmp_path / "old")


@pytest.mark.parametrize("kind", ["pose", "npy"])
def test_imports_are_joined_by_their_pictures(people, tmp_path, kind):
    dataset = open_dataset("folder", people)
    for tracklet in dataset.tracklets:
        for frame in tracklet.frames:
            path = tmp_path / "tree" / frame.path.relative_to(people).with_suffix(f".{kind}")
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "pose":
                path.write_text(json.dumps(np.full((17, 3), 0.5).tolist()))
            else:
                np.save(path, np.full((6, 64, 32), 0.5))
    read = imports.import_poses if kind == "pose" else imports.import_heatmaps
    read(dataset, people, tmp_path / "tree", tmp_path / "kp")
    taken = {"keypoints" if kind == "pose" else "heatmaps": tmp_path / "kp"}
    packs(dataset, tmp_path, **taken)
    imports.export_tree(dataset, people, tmp_path / "kp", tmp_path / "back", kind)
    if kind == "npy":
        file = heatmap_files.path_of(tmp_path / "kp", dataset.tracklets[1].key)
        assert heatmap_files.load(file, dataset.tracklets[1], frame_hashes(dataset.tracklets[1].frames))
    paint(dataset.tracklets[1].frames[1].path, 250)
    for join in (
        lambda: packs(dataset, tmp_path, **taken),
        lambda: imports.export_tree(dataset, people, tmp_path / "kp", tmp_path / "again", kind),
    ):
        with pytest.raises(DataError, match="was made from another picture than frame 1 of tracklet bob_cam_1"):
            join()


def test_the_keypoints_of_rendered_walkers_are_joined(tmp_path):
    from keyreid.synthetic.walkers import render

    render(tmp_path / "w", 2, 2, 2, frames=(2, 2), tracklets=1, distractors=0, junk=0, quiet=True)
    dataset = open_dataset("mars", tmp_path / "w")
    packs(dataset, tmp_path, keypoints=tmp_path / "w/keypoints")
    paint(dataset.tracklets[0].frames[0].path, 9)
    with pytest.raises(DataError, match="another picture"):
        packs(dataset, tmp_path, keypoints=tmp_path / "w/keypoints")


def test_finished_shards_of_older_pictures_are_packed_again(people, tmp_path):
    plan = plan_shards(open_dataset("folder", people), PackSettings(people), 1)
    assert pack(plan, tmp_path / "out", quiet=True) == (2, 0)
    assert pack(plan, tmp_path / "out", quiet=True) == (0, 2)
    path = people / "cam/bob/1/0001.jpg"
    before = path.stat()
    paint(path, 1)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as `cp -p` and `rsync -t` do
    assert pack(plan, tmp_path / "out", quiet=True) == (1, 1)
    assert pack(plan, tmp_path / "out", quiet=True) == (0, 2)


@pytest.mark.skipif(find_spec("openpifpaf") is None, reason="no OpenPifPaf: run launch/install-pose")
def test_pose_finds_changed_crops_again(people, tmp_path):
    from keyreid.pose.estimate import PoseSettings, PoseWork, estimate

    def pose() -> tuple[int, int, int]:
        summary = estimate(open_dataset("folder", people), tmp_path / "kp", PoseSettings(), PoseWork(workers=0))
        return summary.tracklets, summary.changed, summary.there

    (people / "cam/bob/1/0000.jpg").write_bytes(b"no picture")
    assert pose() == (2, 0, 0)
    assert pose() == (0, 0, 2)
    paint(people / "cam/bob/1/0000.jpg", 7)  # mended
    assert pose() == (1, 1, 1)
    packs(open_dataset("folder", people), tmp_path)
    paint(people / "cam/ada/1/0001.jpg", 8)
    file = tmp_path / "kp/bob_cam_1.npz"
    file.write_bytes(file.read_bytes()[:100])
    assert pose() == (2, 2, 0)
    assert pose() == (0, 0, 2)
    packs(open_dataset("folder", people), tmp_path)
