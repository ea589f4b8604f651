"""How fast walkers are drawn, and how far raw pixels and colour histograms get on them.

    python benchmarks/walkers.py [--identities 200] [--test-share 0.25] [--seed 0]
    python benchmarks/walkers.py --dataset data/walkers    # retrieval alone, on walkers that are there already

Speed is frames per CPU-second of one process, drawing, encoding and writing. Retrieval is by protocol `torchreid` on
the test identities. A tracklet's descriptor is the mean over its frames. The last two lines say what can be learnt:
a linear metric (discriminant analysis, as re-identification did before deep networks) fitted on the training
identities, on the mean colours of an 8 x 16 grid standardised for each camera.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import scipy.linalg

from keyreid.datasets import open_dataset
from keyreid.datasets.frames import read_frame
from keyreid.datasets.tracklet import Tracklet
from keyreid.evaluation.protocols import Scores, Side, judge
from keyreid.synthetic.walkers import render


def main() -> None:
    """Measure, and print a Markdown table of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--identities", type=int, default=200)
    parser.add_argument("--test-share", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dataset", type=Path)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    if arguments.dataset is not None:
        print_retrieval(arguments.dataset)
        return
    with tempfile.TemporaryDirectory() as folder:
        print("| picture | frames | frames a CPU-second | bytes a frame |\n|---|---|---|---|")
        for height in (128, 256):
            print(speed(Path(folder) / f"speed{height}", height))
        root = Path(folder) / "walkers"
        render(root, arguments.identities, seed=arguments.seed, test_share=arguments.test_share, height=128, width=64)
        print()
        print_retrieval(root)


def print_retrieval(root: Path) -> None:
    """A table of what simple descriptors find among walkers."""
    tracklets = open_dataset("mars", root).tracklets
    print("| descriptor | mAP | rank-1 | rank-5 |\n|---|---|---|---|")
    for name, scores in retrieval(tracklets).items():
        cmc = scores.cmc(5)
        print(f"| {name} | {scores.mean_ap:.3f} | {cmc[0]:.3f} | {cmc[4]:.3f} |")
    print(f"\n{scores.valid_queries} valid queries, gallery of {scores.gallery} ({scores.distractors} distractors)")


def speed(root: Path, height: int) -> str:
    """A table row: 20 people drawn by this process."""
    start = time.process_time()
    render(root, 20, seed=1, height=height, width=height // 2)
    seconds = time.process_time() - start
    pictures = [path.stat().st_size for path in root.glob("bbox_*/*/*.jpg")]
    return f"| {height} x {height // 2} | {len(pictures)} | {len(pictures) / seconds:.0f} | {np.mean(pictures):.0f} |"


def retrieval(tracklets: Sequence[Tracklet]) -> dict[str, Scores]:
    """Scores of descriptors that know nothing of people, and of the linear metric."""
    parts = {split: [t for t in tracklets if t.split == split] for split in ("train", "query", "gallery")}
    pictures = {split: [_pictures(t) for t in part] for split, part in parts.items()}
    sides = {split: _side(part) for split, part in parts.items()}

    def score(describe: Callable[[np.ndarray], np.ndarray], metric: str = "euclidean") -> Scores:
        query, gallery = (np.array([_mean(describe, p) for p in pictures[split]]) for split in ("query", "gallery"))
        return judge(_distances(query, gallery, metric), sides["query"], sides["gallery"], "torchreid")

    results = {
        "raw pixels, 32 x 64": score(lambda picture: _small(picture, 32, 64)),
        "raw pixels, each channel standardised": score(_standardised),
        "colour histogram (HSV 12 x 4 x 4)": score(lambda picture: histogram(picture, 1), "manhattan"),
        "colour histograms of six stripes": score(lambda picture: histogram(picture, 6), "manhattan"),
    }
    grids = {split: np.array([_mean(lambda p: _small(p, 8, 16), p) for p in part]) for split, part in pictures.items()}
    for camera in np.unique(sides["train"].cameras):
        own = grids["train"][sides["train"].cameras == camera]
        for split, grid in grids.items():
            rows = sides[split].cameras == camera
            grid[rows] = (grid[rows] - own.mean(axis=0)) / own.std()
    project = _discriminant(grids["train"], sides["train"].identities)
    for name, matrix in (
        ("colour grid, standardised by camera", np.eye(len(project))),
        ("the same, linear metric learnt", project),
    ):
        query, gallery = (_unit(grids[split] @ matrix) for split in ("query", "gallery"))
        results[name] = judge(_distances(query, gallery, "euclidean"), sides["query"], sides["gallery"], "torchreid")
    return results


def _pictures(tracklet: Tracklet) -> np.ndarray:
    frames = tracklet.frames[:: max(len(tracklet.frames) // 6, 1)]
    return np.stack([cv2.imdecode(np.frombuffer(read_frame(f)[0], np.uint8), cv2.IMREAD_COLOR) for f in frames])


def _side(tracklets: Sequence[Tracklet]) -> Side:
    return Side(np.array([t.identity for t in tracklets]), np.array([t.camera for t in tracklets]))


def _mean(describe: Callable[[np.ndarray], np.ndarray], pictures: np.ndarray) -> np.ndarray:
    return np.mean([describe(picture) for picture in pictures], axis=0)


def _small(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA).astype(np.float64).ravel()


def _standardised(picture: np.ndarray) -> np.ndarray:
    small = _small(picture, 32, 64).reshape(-1, 3)
    return ((small - small.mean(axis=0)) / (small.std(axis=0) + 1)).ravel()


def histogram(picture: np.ndarray, stripes: int) -> np.ndarray:
    """HSV histograms (12 x 4 x 4) of horizontal stripes, joined; each sums to 1."""
    hsv = cv2.cvtColor(picture, cv2.COLOR_BGR2HSV)
    counts = [
        cv2.calcHist([np.ascontiguousarray(stripe)], [0, 1, 2], None, [12, 4, 4], [0, 180, 0, 256, 0, 256]).ravel()
        for stripe in np.array_split(hsv, stripes)
    ]
    return np.concatenate([count / count.sum() for count in counts])


def _distances(query: np.ndarray, gallery: np.ndarray, metric: str) -> np.ndarray:
    if metric == "manhattan":
        return np.stack([np.abs(gallery - row).sum(axis=1) for row in query])
    return np.stack([np.linalg.norm(gallery - row, axis=1) for row in query])


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _discriminant(vectors: np.ndarray, identities: np.ndarray) -> np.ndarray:
    """[D, 60]: directions that vary between identities and not within them."""
    people, place = np.unique(identities, return_inverse=True)
    means = np.stack([vectors[identities == person].mean(axis=0) for person in people])
    within = np.cov((vectors - means[place]).T)
    within += 0.3 * np.trace(within) / len(within) * np.eye(len(within))
    strength, directions = scipy.linalg.eigh(np.cov(means.T), within)
    return directions[:, -60:] * np.sqrt(strength[-60:])


if __name__ == "__main__":
    main()
