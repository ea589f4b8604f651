"""Part heatmaps: the published numbers, an independent plain rendering, and the fast paths against it."""

import numpy as np
import pytest

from keyreid.errors import ConfigError
from keyreid.pose.heatmaps import render_heatmaps, render_tiles, visibility
from keyreid.pose.parts import flip_permutation, joint_parts, merged_parts, part_joints, part_names


def random_keypoints(frames: int, width: int, height: int, seed: int = 0) -> np.ndarray:
    """Joints in, at and outside the border, some of too low confidence, several close together."""
    rng = np.random.default_rng(seed)
    keypoints = rng.uniform([-0.2 * width, -0.1 * height, 0], [1.2 * width, 1.1 * height, 1], (frames, 17, 3))
    keypoints[:, 1] = keypoints[:, 0] + [3.3, -2.7, 0.0]
    keypoints[0, :, 2] = 0
    return keypoints.astype(np.float32)


def plain_heatmaps(keypoints: np.ndarray, width: int, height: int, parts: int) -> np.ndarray:
    """The definition, one pixel value at a time over the whole picture, in float64."""
    radius = int(width / 11)
    deviation = (2 * radius + 1) / 4
    rows, columns = np.mgrid[:height, :width]
    heatmaps = np.zeros((len(keypoints), len(part_joints(parts)), height, width))
    for frame, joints in zip(heatmaps, keypoints, strict=True):
        for part, numbers in enumerate(part_joints(parts)):
            for x, y, confidence in joints[list(numbers)].tolist():
                dx, dy = columns - int(x), rows - int(y)
                if confidence > 0.1 and 0 <= int(x) < width and 0 <= int(y) < height:
                    gaussian = np.exp(-(dx**2 + dy**2) / (2 * deviation**2))
                    near = (abs(dx) <= radius) & (abs(dy) <= radius)
                    frame[part] = np.maximum(frame[part], gaussian * near)
    return heatmaps


def test_equal_to_the_published_numbers(shared):
    with np.load(shared / "fixtures/heatmaps.npz") as published:
        for i in range(4):
            width, height = published[f"size_{i}"].tolist()
            rendered = render_heatmaps(published[f"keypoints_{i}"][None], width, height)[0]
            assert rendered.dtype == np.float32
            np.testing.assert_allclose(rendered, published[f"heatmap_{i}"], atol=1e-6)


@pytest.mark.parametrize("parts", [3, 4, 6])
@pytest.mark.parametrize(("width", "height"), [(128, 256), (57, 141), (9, 20)])
def test_rendering_equals_the_plain_definition(parts, width, height):
    keypoints = random_keypoints(6, width, height)
    rendered = render_heatmaps(keypoints, width, height, parts)
    np.testing.assert_allclose(rendered, plain_heatmaps(keypoints, width, height, parts), atol=1e-6)
    np.testing.assert_array_equal(visibility(keypoints, width, height, parts), rendered.max((2, 3)) > 0)


@pytest.mark.parametrize("parts", [3, 4, 6])
def test_tiles_are_rounded_area_means(parts):
    keypoints = random_keypoints(20, 128, 256, seed=1)
    plain = plain_heatmaps(keypoints, 128, 256, parts)
    exact = 255 * plain.reshape(20, -1, 64, 4, 32, 4).mean((3, 5))
    tiles = render_tiles(keypoints, 128, 256, parts)
    assert tiles.dtype == np.uint8
    decided = abs(exact % 1 - 0.5) > 1e-3  # a mean at the very border between two levels may go either way
    assert decided.mean() > 0.99
    np.testing.assert_array_equal(tiles[decided], np.floor(exact + 0.5)[decided])


def test_tiles_do_not_depend_on_the_frames_size():
    keypoints = random_keypoints(3, 128, 256)
    sizes = np.array([[128, 256], [64, 512], [256, 128]])
    scaled = keypoints * np.concatenate([sizes / [128, 256], np.ones((3, 1))], axis=1)[:, None]
    np.testing.assert_array_equal(
        render_tiles(scaled.astype(np.float32), sizes[:, 0], sizes[:, 1]), render_tiles(keypoints, 128, 256)
    )


def test_one_frame_leaves_nothing_on_the_next():
    keypoints = random_keypoints(5, 128, 256, seed=3)
    for render in (render_heatmaps, render_tiles):
        alone = np.concatenate([render(frame[None], 128, 256) for frame in keypoints])
        np.testing.assert_array_equal(render(keypoints, 128, 256), alone)


def test_missing_joints_and_no_frames():
    keypoints = np.full((1, 17, 3), np.nan, np.float32)
    keypoints[:, 5] = [40, 50, 0.1 + 1e-6]
    keypoints[:, 6] = [60, 50, np.float32(0.1)]
    keypoints[:, 0] = [np.inf, 5, 1]
    heatmaps = render_heatmaps(keypoints, 128, 256)
    assert np.argwhere(heatmaps == 1)[:, 1:].tolist() == [[1, 50, 40]]
    assert visibility(keypoints, 128, 256).tolist() == [[False, True, False, False, False, False]]
    assert render_tiles(np.zeros((0, 17, 3)), 128, 256).shape == (0, 6, 64, 32)
    with pytest.raises(ValueError, match="17"):
        render_heatmaps(np.zeros((17, 3)), 128, 256)


def test_groupings_are_consistent():
    assert part_names(6) == ("head", "torso", "left_arm", "right_arm", "left_leg", "right_leg")
    keypoints = random_keypoints(4, 128, 256, seed=4)
    six = render_heatmaps(keypoints, 128, 256)
    for parts in (3, 4, 6):
        assert sorted(j for joints in part_joints(parts) for j in joints) == list(range(17))
        assert [joint_parts(parts)[joints[0]] for joints in part_joints(parts)] == list(range(parts))
        united = np.stack([six[:, list(group)].max(1) for group in merged_parts(parts)], axis=1)
        np.testing.assert_array_equal(render_heatmaps(keypoints, 128, 256, parts), united)
    assert flip_permutation(6).tolist() == [0, 1, 3, 2, 5, 4]
    assert flip_permutation(3).tolist() == [0, 1, 2]
    with pytest.raises(ConfigError, match="3, 4 and 6"):
        part_names(5)


def test_a_mirrored_person_has_mirrored_heatmaps():
    from keyreid.pose.parts import KEYPOINT_FLIP

    keypoints = np.floor(random_keypoints(3, 128, 256, seed=5))
    keypoints[..., 2] = 1
    mirrored = keypoints[:, KEYPOINT_FLIP] * [-1, 1, 1] + [127, 0, 0]
    expected = render_heatmaps(keypoints, 128, 256)[:, flip_permutation(6), :, ::-1]
    np.testing.assert_array_equal(render_heatmaps(mirrored, 128, 256), expected)
