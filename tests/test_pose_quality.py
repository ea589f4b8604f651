"""The quality report: its numbers, its pictures, and what it says when there is nothing to report on."""

import html.parser
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from keyreid.datasets.tracklet import Dataset, Frame, Tracklet
from keyreid.errors import DataError
from keyreid.pose import keypoint_files
from keyreid.pose.drawing import draw_heatmaps, draw_skeleton
from keyreid.pose.keypoint_files import KeypointFile
from keyreid.pose.parts import KEYPOINT_NAMES
from keyreid.pose.quality import errors, pck, write_quality

FRAMES = 4


@pytest.fixture
def made(tmp_path) -> tuple[Dataset, Path, Path]:
    """Three tracklets of pictures; keypoints of two: true ones, and found ones that are 5 pixels off or missing."""
    rng = np.random.default_rng(0)
    tracklets = []
    for t in range(3):
        frames = []
        for f in range(FRAMES):
            path = tmp_path / f"<{t}>{f}.png"  # a name that HTML must not take for a tag
            cv2.imwrite(str(path), rng.integers(0, 256, (100, 50, 3), np.uint8))
            frames.append(Frame(path))
        tracklets.append(Tracklet(f"t{t}", t, 1, "train", tuple(frames)))
        if t == 2:
            continue
        true = rng.uniform([5, 5, 1], [40, 90, 1], (FRAMES, 17, 3)).astype(np.float32)
        found = true + np.array([3, 4, -0.2], np.float32)
        found[0] = 0
        found[1:, 9] = true[1:, 9]
        names = tuple(frame.path.name for frame in frames)
        for folder, keypoints in (("true", true), ("found", found)):
            file = KeypointFile(keypoints, keypoints[..., 2].mean(1), names, {"tool": "test"})
            keypoint_files.save(keypoint_files.path_of(tmp_path / folder, f"t{t}"), file)
    return Dataset("made", tuple(tracklets)), tmp_path / "found", tmp_path / "true"


def test_numbers(made, tmp_path):
    dataset, found, true = made
    numbers = write_quality(dataset, found, tmp_path / "report", samples=8, truth=true)
    assert json.loads((tmp_path / "report/report.json").read_text()) == numbers
    assert (numbers["tracklets"], numbers["tracklets_without_file"], numbers["frames"]) == (2, 1, 2 * FRAMES)
    assert numbers["frames_with_person"] == 0.75
    assert numbers["joints_a_frame"] == 17
    assert numbers["joint_visible"] == dict.fromkeys(KEYPOINT_NAMES, 0.75)
    accuracy = numbers["accuracy"]
    assert accuracy["median_pixels"] == pytest.approx(5)
    assert accuracy["pck_0.05_by_joint"]["left_wrist"] == 0.75  # exact where found
    assert accuracy["pck_0.05_by_joint"]["nose"] in (0, 0.75)  # 5 pixels are 5 % of the height, to a rounding


def test_page_and_pictures(made, tmp_path):
    dataset, found, _ = made
    write_quality(dataset, found, tmp_path / "report", samples=8)
    page = (tmp_path / "report/report.html").read_text()
    assert "&lt;0&gt;" in page
    assert "<0>" not in page
    sources = []

    class Images(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag == "img":
                sources.append(dict(attributes)["src"])

    Images().feed(page)
    assert sources == ["statistics.png", "contact.png"]
    for source in sources:
        picture = cv2.imread(str(tmp_path / "report" / source))
        assert picture is not None
        assert picture.std() > 10
    assert page.count("<li>") == 6


def test_nothing_to_report_is_an_error(made, tmp_path):
    dataset, found, _ = made
    with pytest.raises(DataError, match="no keypoint file of made"):
        write_quality(dataset, tmp_path, tmp_path / "report")
    longer = Tracklet("t0", 0, 1, "train", dataset.tracklets[0].frames * 2)
    with pytest.raises(DataError, match=r"t0\.npz: keypoints of 4 frames; its tracklet has 8"):
        write_quality(Dataset("made", (longer,)), found, tmp_path / "report")


def test_pck_counts_what_was_not_found_as_wrong():
    true, found = np.ones((1, 17, 3)), np.ones((1, 17, 3))
    true[0, 0, 2] = 0  # no truth: not judged
    found[0, 1, 2] = 0  # not found: wrong
    found[0, 2, 0] += 5.1
    distance = errors(found, true)
    assert np.isnan(distance[0, 0])
    assert np.isinf(distance[0, 1])
    assert pck(distance, np.array([100])) == pytest.approx(14 / 16)
    assert pck(distance, np.array([103])) == pytest.approx(15 / 16)


def test_drawings_show_joints_where_they_are():
    grey = np.full((64, 32, 3), 100, np.uint8)
    keypoints = np.zeros((17, 3), np.float32)
    keypoints[0] = [16, 20, 1]
    keypoints[5] = [10, 30, 0.1]  # too weak to be drawn
    drawn = draw_skeleton(grey, keypoints, scale=2)
    assert drawn.shape == (128, 64, 3)
    assert (drawn[41, 33] == [240, 228, 66]).all()
    assert (drawn[50:] == 100).all()
    heatmaps = draw_heatmaps(grey, keypoints)
    assert heatmaps[20, 16, 0] > 200
    assert (heatmaps[50:] == 55).all()
