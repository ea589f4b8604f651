"""Heatmaps and keypoints: how quick and how right.

    python benchmarks/pose.py heatmaps              # ours against the described renderer, one frame at a time
    python benchmarks/pose.py network WALKERS KEYPOINTS    # `keyreid pose` over a folder of walkers: frames a second

Run with OMP_NUM_THREADS=1. Ratios come from alternating runs of both sides in one process; the median is printed.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import cv2
import numpy as np

from keyreid.pose.heatmaps import render_heatmaps, render_tiles
from keyreid.pose.parts import part_joints

FRAMES, ROUNDS = 100, 9


def walker_like_keypoints(frames: int) -> np.ndarray:
    """Standing people that fill a picture of 128 x 256; a joint in ten is not found."""
    rng = np.random.default_rng(0)
    heights = np.array([20, 17, 17, 19, 19, 50, 50, 88, 88, 120, 120, 125, 125, 178, 178, 230, 230])
    columns = np.array([64, 67, 61, 71, 57, 82, 46, 90, 38, 92, 36, 76, 52, 76, 52, 76, 52])
    keypoints = np.stack([columns, heights, np.ones(17)], axis=1) + rng.normal(0, 5, (frames, 17, 3)) * [1, 1, 0]
    keypoints[..., 2] = rng.random((frames, 17)) > 0.1
    return keypoints.astype(np.float32)


def full_picture(keypoints: np.ndarray, width: int, height: int) -> np.ndarray:
    """One frame in plain numpy: every joint's Gaussian over the whole picture, float64."""
    radius = int(width / 11)
    deviation = (2 * radius + 1) / 4
    rows, columns = np.mgrid[:height, :width]
    heatmaps = np.zeros((6, height, width))
    for part, joints in enumerate(part_joints(6)):
        for x, y, confidence in keypoints[list(joints)].tolist():
            if confidence > 0.1 and 0 <= int(x) < width and 0 <= int(y) < height:
                dx, dy = columns - int(x), rows - int(y)
                gaussian = np.exp(-(dx**2 + dy**2) / (2 * deviation**2))
                heatmaps[part] = np.maximum(heatmaps[part], gaussian * ((abs(dx) <= radius) & (abs(dy) <= radius)))
    return heatmaps


def windowed(keypoints: np.ndarray, width: int, height: int) -> np.ndarray:
    """One frame as the published pipeline describes it: a kernel cut to the picture for every joint, float64."""
    radius = int(width / 11)
    side = np.exp(-0.5 * (np.arange(-radius, radius + 1) / ((2 * radius + 1) / 4)) ** 2)
    kernel = np.outer(side, side)
    heatmaps = np.zeros((6, height, width))
    for part, joints in enumerate(part_joints(6)):
        heatmap = np.zeros((height, width))
        for x, y, confidence in keypoints[list(joints)].tolist():
            x, y = int(x), int(y)
            if confidence > 0.1 and 0 <= x < width and 0 <= y < height:
                top, bottom, left, right = max(0, y - radius), y + radius + 1, max(0, x - radius), x + radius + 1
                window = heatmap[top:bottom, left:right]
                cut = kernel[top - y + radius :, left - x + radius :][: window.shape[0], : window.shape[1]]
                heatmap[top:bottom, left:right] = np.maximum(window, cut)
        heatmaps[part] = heatmap
    return heatmaps


def patches_of(heatmaps: np.ndarray) -> np.ndarray:
    """The mean over 16 x 16 pixels of full heatmaps [6, 256, 128]."""
    return heatmaps.reshape(6, 16, 16, 8, 16).mean((2, 4))


def heatmaps() -> None:
    """Time every way, interleaved, on one core."""
    keypoints = walker_like_keypoints(FRAMES)
    tile_strip = np.hstack(list(render_tiles(keypoints[:1], 128, 256)[0]))
    ways = {
        "whole pictures, a frame at a time, plain numpy": lambda: [full_picture(k, 128, 256) for k in keypoints],
        "windows, a frame at a time, plain numpy": lambda: [windowed(k, 128, 256) for k in keypoints],
        "  the same, pooled to the patch grid": lambda: [patches_of(windowed(k, 128, 256)) for k in keypoints],
        "render_heatmaps (float32 [6, 256, 128])": lambda: render_heatmaps(keypoints, 128, 256),
        "render_tiles (uint8 [6, 64, 32])": lambda: render_tiles(keypoints, 128, 256),
        "PNG of a frame's tiles": lambda: [cv2.imencode(".png", tile_strip) for _ in range(FRAMES)],
    }
    seconds = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.process_time()
            way()
            seconds[name].append((time.process_time() - start) / FRAMES)
    slowest = statistics.median(next(iter(seconds.values())))
    for name, times in seconds.items():
        middle = statistics.median(times)
        print(f"{name:50} {middle * 1e6:8.0f} us a frame, {slowest / middle:6.1f} times the first")


def network(walkers: Path, keypoints: Path) -> None:
    """Frames a second of the whole of `keyreid pose`, and of its parts, with the walkers' network on one core."""
    from keyreid.datasets import open_dataset
    from keyreid.pose import pifpaf
    from keyreid.pose.estimate import PoseSettings, PoseWork, estimate
    from keyreid.pose.pictures import decode, fit

    start = time.monotonic()
    summary = estimate(open_dataset("mars", walkers), keypoints, PoseSettings(long_edge=128), PoseWork(workers=1))
    print(f"keyreid pose: {summary.frames} frames, {summary.frames / (time.monotonic() - start):.1f} frames a second")
    decoder = pifpaf.PoseDecoder(pifpaf.load_network(pifpaf.WALKERS)[0])
    files = sorted(walkers.glob("bbox_test/*/*.jpg"))[:64]
    start = time.process_time()
    pictures = np.stack([fit(decode(path.read_bytes()), 128).pixels for path in files])
    read = time.process_time()
    decoder.pictures(pictures)
    print(f"read and fit {(read - start) / 64 * 1e3:.2f} ms a frame; network and decoder "
          f"{(time.process_time() - read) / 64 * 1e3:.2f} ms")  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["heatmaps"]:
        heatmaps()
    else:
        network(Path(sys.argv[2]), Path(sys.argv[3]))
