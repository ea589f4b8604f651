"""`keyreid pose`: whole tracklets, the same files however the work was cut or stopped, and faults that are named."""

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from keyreid.datasets.tracklet import Dataset, Frame, Tracklet
from keyreid.errors import ConfigError, DataError
from keyreid.pose import keypoint_files, pifpaf
from keyreid.pose.estimate import PoseSettings, PoseWork, estimate

pytestmark = pytest.mark.skipif(find_spec("openpifpaf") is None, reason="no OpenPifPaf: run launch/install-pose")
SETTINGS = PoseSettings(long_edge=128)
ONE_PROCESS = PoseWork(batch_size=4, workers=0)


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    """Rendered walkers: a few tracklets of a few frames."""
    from keyreid.synthetic.walkers import render

    root = tmp_path_factory.mktemp("walkers")
    render(root, 2, 2, 5, frames=(5, 6), tracklets=1, distractors=1, junk=1, quiet=True)
    return root


@pytest.fixture(scope="module")
def dataset(people) -> Dataset:
    from keyreid.datasets import open_dataset

    return open_dataset("mars", people)


@pytest.fixture(scope="module")
def whole_run(dataset, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole")
    summary = estimate(dataset, out, SETTINGS, ONE_PROCESS)
    assert summary.tracklets == len(dataset.tracklets)
    assert summary.frames == sum(len(tracklet.frames) for tracklet in dataset.tracklets)
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_hold_what_they_say(dataset, whole_run, tmp_path):
    tracklet = dataset.tracklets[0]
    (tmp_path / "k.npz").write_bytes(whole_run[f"{tracklet.key}.npz"])
    file = keypoint_files.load(tmp_path / "k.npz")
    assert file.frame_names == tuple(frame.path.name for frame in tracklet.frames)
    assert file.keypoints.shape == (len(tracklet.frames), 17, 3)
    assert ((file.scores > 0) == (file.keypoints[..., 2] > 0).any(1)).all()
    assert (file.keypoints[..., 0] < 128).all()
    assert (file.keypoints[..., 1] < 256).all()
    assert (file.keypoints >= 0).all()
    assert file.provenance["checkpoint"] == "walkers"
    assert len(file.provenance["checkpoint_sha256"]) == 64
    assert file.provenance["unreadable"] == []


def test_two_shares_with_reader_processes_equal_one_run(dataset, whole_run, tmp_path):
    work = PoseWork(batch_size=4, workers=2)
    summaries = [estimate(dataset, tmp_path, SETTINGS, work, share=(i, 2)) for i in range(2)]
    assert all(summary.tracklets for summary in summaries)
    assert sum(summary.tracklets for summary in summaries) == len(dataset.tracklets)
    assert contents(tmp_path) == whole_run


@pytest.mark.slow
def test_two_devices_equal_one(dataset, whole_run, tmp_path):
    estimate(dataset, tmp_path, SETTINGS, PoseWork(batch_size=4, workers=0, devices=("cpu", "cpu")))
    assert contents(tmp_path) == whole_run


@pytest.mark.slow
def test_killed_and_started_again_equals_one_run(people, dataset, whole_run, tmp_path):
    """The command, killed hard once it has written a tracklet, leaves whole files alone and then finishes."""
    command = [sys.executable, "-m", "keyreid.cli", "pose", "mars", str(people), "--out", str(tmp_path)]
    command += ["--batch-size", "4", "--workers", "0", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("*.npz")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = {path.name for path in tmp_path.glob("*.npz")}
    assert 0 < len(done) < len(dataset.tracklets), "the run was not killed in the middle"
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"{len(dataset.tracklets) - len(done)} tracklets written, {len(done)} were there" in result.stdout
    whole = {name: data for name, data in contents(tmp_path).items() if not name.endswith(".partial")}
    assert whole == whole_run


def test_other_settings_are_not_mixed(dataset, tmp_path):
    first = Dataset("one", dataset.tracklets[:1])
    estimate(first, tmp_path, SETTINGS, ONE_PROCESS)
    assert estimate(first, tmp_path, SETTINGS, ONE_PROCESS).there == 1
    with pytest.raises(ConfigError, match=r"long_edge was 128, now 320.*another --out"):
        estimate(first, tmp_path, PoseSettings(long_edge=320), ONE_PROCESS)
    (tmp_path / "pose.json").unlink()
    with pytest.raises(ConfigError, match="not made by `keyreid pose`"):
        estimate(first, tmp_path, SETTINGS, ONE_PROCESS)
    with pytest.raises(ConfigError, match="--device gpu7"):
        estimate(first, tmp_path, SETTINGS, PoseWork(devices=("gpu7",)))
    with pytest.raises(ConfigError, match="share 2/2"):
        estimate(first, tmp_path, SETTINGS, ONE_PROCESS, share=(2, 2))


def test_frames_that_cannot_be_read_are_named_and_counted(dataset, tmp_path):
    """Gone, cut, of another kind, and too small: zeros for those frames, the others as without them."""
    source = dataset.tracklets[0]
    paths = [tmp_path / f"{i}.jpg" for i in range(5)]
    for path, frame in zip(paths, source.frames, strict=False):
        path.write_bytes(frame.path.read_bytes())
    paths[0].unlink()
    paths[1].write_text("no picture")
    cv2.imwrite(str(paths[2].with_suffix(".png")), np.zeros((1, 9, 3), np.uint8))
    paths[2] = paths[2].with_suffix(".png")
    broken = Dataset("broken", (Tracklet("a", 1, 1, "train", tuple(Frame(path) for path in paths)),))

    summary = estimate(broken, tmp_path / "out", SETTINGS, ONE_PROCESS)
    assert (summary.frames, len(summary.unreadable)) == (5, 3)
    for path, fault in zip(paths[:3], summary.unreadable, strict=True):
        assert str(path) in fault
    file = keypoint_files.load(tmp_path / "out/a.npz")
    assert file.provenance["unreadable"] == [0, 1, 2]
    assert not file.keypoints[:3].any()
    assert file.keypoints[3:].any((1, 2)).all()

    with pytest.raises(DataError, match="more than --max-unreadable allows"):
        estimate(broken, tmp_path / "strict", SETTINGS, PoseWork(batch_size=4, workers=0, max_unreadable=2))
    assert not list((tmp_path / "strict").glob("*.npz"))


@pytest.fixture(scope="module")
def random_network(tmp_path_factory) -> str:
    """A network with random weights, but sure of itself: it finds people all over every picture."""
    torch.manual_seed(0)
    network = pifpaf.build_network(pifpaf.WALKERS)
    for head in network.head_nets:
        confidence, scale = slice(1, None, head.n_components), slice(head.n_components - 1, None, head.n_components)
        head.conv.bias.data[confidence] = 3.0
        head.conv.bias.data[scale] = 3.0
        head.conv.weight.data *= 3.0
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    pifpaf.save_weights(network, path)
    return str(path)


@pytest.mark.parametrize("long_edge", [None, 129])
def test_real_streets(shared, tmp_path, random_network, long_edge):
    """Boxes of 20 pixels and boxes that leave the picture: right shapes, and no coordinate leads out of the crop."""
    from keyreid.datasets import open_dataset
    from keyreid.datasets.frames import read_frame
    from keyreid.pose.pictures import decode

    streets = open_dataset("mot", shared / "data/mot17_mini/train")
    frames = [frame for tracklet in streets.tracklets for frame in tracklet.frames]
    small = [f for f in frames if min(f.box[2:]) <= 24][:6]
    cut = [f for f in frames if f.box[0] < 0 or f.box[1] < 0][:12]
    assert cut
    tracklets = (*streets.tracklets[:2], Tracklet("edge", 1, 1, "all", (*cut, *small)))
    tiny = tuple(
        Frame(f.path, (f.box[0], f.box[1], width, 20)) for f, width in zip(frames[:3], (8, 20, 20), strict=True)
    )
    chosen = Dataset("streets", (*tracklets, Tracklet("tiny", 2, 1, "all", tiny)))
    summary = estimate(chosen, tmp_path, PoseSettings(random_network, long_edge), PoseWork(batch_size=8, workers=0))
    assert (summary.tracklets, summary.unreadable) == (4, [])
    assert summary.empty < 0.5 * summary.frames
    for tracklet in chosen.tracklets:
        file = keypoint_files.load(tmp_path / f"{tracklet.key}.npz")
        assert file.keypoints.shape == (len(tracklet.frames), 17, 3)
        for frame, keypoints in zip(tracklet.frames, file.keypoints, strict=True):
            height, width = decode(read_frame(frame)[0]).shape[:2]
            assert (keypoints >= 0).all()
            assert (keypoints[:, 0] < width).all()
            assert (keypoints[:, 1] < height).all()
