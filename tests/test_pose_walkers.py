"""The small network for rendered walkers: the weights in the repository, and the script that makes such."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from keyreid.pose import pifpaf
from keyreid.pose.parts import KEYPOINT_FLIP
from keyreid.pose.small_net import SmallNet
from keyreid.synthetic import pose_training as walkers_training

needs_pifpaf = pytest.mark.skipif(find_spec("openpifpaf") is None, reason="no OpenPifPaf: run launch/install-pose")


def test_grid_is_the_one_that_openpifpaf_expects():
    with torch.inference_mode():
        features = SmallNet().eval()(torch.zeros(1, 3, 129, 65))
    assert features.shape == (1, SmallNet.out_features, 17, 9)


def test_weights_are_small_enough_to_keep():
    assert pifpaf.WALKERS_WEIGHTS.stat().st_size < 5e6


@needs_pifpaf
@pytest.mark.slow
@pytest.mark.parametrize("height", [256, 128])
def test_finds_people_that_training_never_saw(height):
    """The goal: at least nine of ten joints, hidden ones too, within 5 % of the height, by the real decoder."""
    accuracy = walkers_training.judge(pifpaf.WALKERS_WEIGHTS, height, pictures=120)
    assert accuracy["pck_0.05"] >= 0.9
    assert accuracy["pck_0.05_in_plain_sight"] >= 0.9


@needs_pifpaf
def test_moved_pictures_keep_their_joints_in_place():
    """A bright dot at a joint is where the moved joint is."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        picture = np.zeros((256, 128, 3), np.uint8)
        picture[100:103, 60:63] = 255
        keypoints = np.tile(np.array([61, 101, 1.0]), (17, 1))
        moved, joints = walkers_training._move(picture, keypoints, rng)
        rows, columns = np.nonzero(moved[40:200, 30:100].min(2) > 100)
        if len(rows):
            assert abs(columns.mean() + 30 - joints[0, 0]) < 1
            assert abs(rows.mean() + 40 - joints[0, 1]) < 1


@needs_pifpaf
def test_mirrored_fields_are_those_of_the_mirrored_person():
    rng = np.random.default_rng(0)
    network = pifpaf.build_network(pifpaf.WALKERS, walkers_training.UPSAMPLE)
    encode, skeleton = pifpaf.Encoder(network), np.array(network.head_metas[1].skeleton) - 1
    keypoints = np.column_stack([rng.uniform(8, 56, 17), rng.uniform(8, 120, 17), np.ones(17)]).astype(np.float32)
    keypoints[3, 2] = 0
    mirrored = keypoints[KEYPOINT_FLIP] * [-1, 1, 1] + [64, 0, 0]
    fields = walkers_training.mirror([field[None] for field in encode(keypoints, 65, 129)], skeleton)
    for field, expected in zip(fields, encode(mirrored.astype(np.float32), 65, 129), strict=True):
        np.testing.assert_allclose(field[0], expected, atol=1e-5, equal_nan=True)


@needs_pifpaf
@pytest.mark.slow
def test_training_learns(tmp_path, capsys):
    """A few steps on a few pictures: the loss falls, and what is written loads and decodes."""
    settings = walkers_training.TrainingSettings(pictures=48, epochs=4, batch=8)
    results = walkers_training.train(tmp_path / "w.safetensors", settings, held_out=24)
    losses = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert len(losses) == 4
    assert losses[-1] < 0.8 * losses[0]
    assert set(results) == {256, 128}
