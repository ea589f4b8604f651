"""Readers and packing against a loader of the published design, on the same pictures, in one run.

    OMP_NUM_THREADS=1 python benchmarks/loader.py            # 2 GB of memory and 0.6 GB of disk, about 2 minutes

The published design: one PIL picture and one float64 6 x 256 x 128 `.npy` file a frame, torchvision transforms, float
pictures and full-size float heatmaps out, 2 DataLoader workers. Ours: shards, uint8 pictures and guidance at the patch
grid out; they are normalised and erased on the training device. All files are in the page cache; sides take turns, and
the median of their rounds is printed. CPU time is that of the process and all its workers.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from keyreid.config import Config, check_config
from keyreid.datasets import open_dataset
from keyreid.datasets.tracklet import Tracklet
from keyreid.pose.heatmaps import render_heatmaps
from keyreid.shards import open_reader
from keyreid.shards.layout import plan_shards
from keyreid.shards.pack import finish, pack
from keyreid.shards.plan import TrainingPlan
from keyreid.shards.shard_set import ShardSet
from keyreid.shards.writer import PackSettings, load_keypoints
from keyreid.synthetic.walkers import render

BATCH, FRAMES = 16, 4
WORKERS = 2
PUBLISHED_BYTES = 6 * 256 * 128 * 8  # of a frame's heatmaps


class PublishedDesign(Dataset):
    """T random frames of a tracklet: pictures and heatmaps from a file a frame, changed alike."""

    def __init__(self, tracklets: list[Tracklet], heatmaps: Path) -> None:
        self.tracklets, self.heatmaps = tracklets, heatmaps

    def __len__(self) -> int:
        return len(self.tracklets)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor, int, int, torch.Tensor]:
        tracklet = self.tracklets[number]
        bounds = np.linspace(0, len(tracklet.frames), FRAMES + 1)
        chosen = [random.randint(int(a), max(int(a), int(b) - 1)) for a, b in itertools.pairwise(bounds)]
        changed = [self._frame(tracklet.frames[frame].path) for frame in chosen]
        pictures, heatmaps, erased = zip(*changed, strict=True)
        return torch.stack(pictures), torch.stack(heatmaps), tracklet.identity, tracklet.camera, torch.tensor(erased)

    def _frame(self, path: Path) -> tuple[torch.Tensor, torch.Tensor, int]:
        picture = Image.open(path).convert("RGB")
        heatmap = torch.from_numpy(np.load(self.heatmaps / f"{path.stem}.npy")).float()
        picture = F.resize(picture, [256, 128], InterpolationMode.BICUBIC)
        heatmap = F.resize(heatmap, [256, 128], InterpolationMode.BILINEAR, antialias=False)
        if random.random() < 0.5:
            picture, heatmap = F.hflip(picture), F.hflip(heatmap)
        picture, heatmap = F.pad(picture, [10]), F.pad(heatmap, [10])
        top, left = random.randint(0, 20), random.randint(0, 20)
        picture, heatmap = F.crop(picture, top, left, 256, 128), F.crop(heatmap, top, left, 256, 128)
        picture = F.normalize(F.to_tensor(picture), [0.5] * 3, [0.5] * 3)
        heatmap = (heatmap - heatmap.min()) / (heatmap.max() - heatmap.min()).clamp_min(1e-6)
        heatmap = F.normalize(heatmap, [0.5] * 6, [0.5] * 6)
        erased = random.random() < 0.5
        if erased:
            height, width = random.randint(30, 150), random.randint(20, 100)
            top, left = random.randint(0, 256 - height), random.randint(0, 128 - width)
            picture[:, top : top + height, left : left + width] = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
            heatmap[:, top : top + height, left : left + width] = 0
        return picture, heatmap, int(erased)


def published(tracklets: list[Tracklet], heatmaps: Path) -> Iterator:
    """The published design, endless."""
    order = random.Random(0)
    batches = ([order.randrange(len(tracklets)) for _ in range(BATCH)] for _ in itertools.count())
    return iter(DataLoader(PublishedDesign(tracklets, heatmaps), batch_sampler=batches, num_workers=WORKERS))


def ours(shards: ShardSet, reader: str) -> Iterator:
    """One of our readers over an endless plan."""
    config = make_config(shards, reader)
    plan = TrainingPlan(shards, config.data, config.clip, seed=0)
    return open_reader(shards, plan.batches(0, 0), config)


def make_config(shards: ShardSet, reader: str) -> Config:
    """The published recipe with this reader."""
    data = {"shards": shards.location, "reader": reader, "workers": WORKERS}
    return check_config({"data": data}, "benchmark")


def cpu_seconds() -> float:
    """Of this process and all that it started and that still run."""
    own = psutil.Process()
    total = 0.0
    for process in (own, *own.children(recursive=True)):
        times = process.cpu_times()
        total += times.user + times.system
    return total


def measure(batches: Iterator, count: int) -> tuple[float, float]:
    """CPU milliseconds a clip and clips a second, after some batches to fill the queues."""
    for _ in range(6):
        next(batches)
    cpu, wall = cpu_seconds(), time.perf_counter()
    for _ in range(count):
        next(batches)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    if hasattr(batches, "close"):
        batches.close()
    return 1e3 * cpu / (count * BATCH), count * BATCH / wall


def measure_packing(dataset, settings: PackSettings, out: Path) -> float:
    """Frames packed in a second of CPU time, keypoints in memory."""
    plan = plan_shards(dataset, settings)
    start = time.process_time()
    pack(plan, out, quiet=True)
    seconds = time.process_time() - start
    return sum(len(tracklet.frames) for tracklet in dataset.tracklets) / seconds


def measure_planning() -> float:
    """Seconds of CPU time for the plan of an epoch of MARS's size."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from test_plan import mars_like, plan

    order = plan(mars_like(), clip__height=256, clip__width=128)
    start = time.process_time()
    for step in range(order.steps_per_epoch):
        order.step(0, step)
    return time.process_time() - start


def main() -> None:
    """Make the data, let the sides take turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=40, help="measured in each round")
    parser.add_argument("--walkers", type=Path, help="a folder that `keyreid walkers` wrote, instead of drawing one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        root = arguments.walkers or folder / "walkers"
        if arguments.walkers is None:
            render(root, 16, 4, 0, processes=1, frames=(12, 16), test_share=0.25, distractors=0, junk=0)
        dataset = open_dataset("mars", root)
        keypoints = PackSettings(root, root / "keypoints")
        tracklets = []
        for tracklet in dataset.tracklets:
            fields = {name: getattr(tracklet, name) for name in ("key", "identity", "camera", "split", "frames")}
            tracklets.append(Tracklet(**fields, keypoints=load_keypoints(tracklet, keypoints)))
        dataset = type(dataset)("walkers", tuple(tracklets))
        settings = PackSettings(root)
        rates = [measure_packing(dataset, settings, folder / f"packed{n}") for n in range(arguments.rounds)]
        finish(plan_shards(dataset, settings), folder / "packed0")
        shards = ShardSet.open(folder / "packed0")
        train = [tracklet for tracklet in dataset.tracklets if tracklet.split == "train"]
        (folder / "heatmaps").mkdir()
        for tracklet in train:
            heatmaps = render_heatmaps(tracklet.keypoints, 128, 256).astype(np.float64)
            for frame, heatmap in zip(tracklet.frames, heatmaps, strict=True):
                np.save(folder / "heatmaps" / f"{frame.path.stem}.npy", heatmap)

        results: dict[str, list[tuple[float, float]]] = {"published design": [], "dali": [], "plain": []}
        for _ in range(arguments.rounds):
            results["published design"].append(measure(published(train, folder / "heatmaps"), arguments.batches // 4))
            for reader in ("dali", "plain"):
                results[reader].append(measure(ours(shards, reader), arguments.batches))
        bytes_a_frame = shards.card["counts"]["heatmap_bytes"] / shards.card["counts"]["frames"]

    print(f"clips of {FRAMES} frames of 256 x 128, batches of {BATCH}, {WORKERS} workers, {arguments.rounds} rounds")
    print(f"{'':20}{'CPU-ms a clip':>15}{'less by':>10}{'clips/s':>10}{'more by':>10}")
    base = [statistics.median(values) for values in zip(*results["published design"], strict=True)]
    for name, values in results.items():
        cpu, rate = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"{name:20}{cpu:15.2f}{base[0] / cpu:10.1f}{rate:10.0f}{rate / base[1]:10.1f}")
    print(f"planning an epoch of MARS: {measure_planning():.3f} CPU-s")
    print(f"packing: {statistics.median(rates):.0f} frames a CPU-second")
    print(f"heatmaps: {bytes_a_frame:.0f} bytes a frame, {PUBLISHED_BYTES / bytes_a_frame:.0f} times less than .npy")


if __name__ == "__main__":
    main()
