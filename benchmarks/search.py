"""Search in 1,000,000 vectors of 768 numbers: time and memory of the exact search and of the index.

    python benchmarks/search.py --folder /tmp/search [--rows 1000000] [--kinds graph lists]

Vectors are drawn around `rows / 20` people's centres (a person's spread is half the people's), as embeddings lie; every
number is of one process; another one writes the file. Memory is the peak of resident memory so far, imports included.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from keyreid.embedding.vectors import VectorFiles, Vectors, VectorsAbout, description, matrix, write_vectors
from keyreid.retrieval.index import GalleryIndex
from keyreid.retrieval.search import SearchSettings, search

STEP = 10_000
TRACKLETS_A_PERSON = 20
SPREAD = 0.5


def tables(about: VectorsAbout, rows: int) -> Iterator:
    """Rows of a vector file."""
    people = rows // TRACKLETS_A_PERSON
    for start in range(0, rows, STEP):
        rng = np.random.default_rng([1, start])
        count = min(STEP, rows - start)
        person = rng.integers(0, people, count)
        # A person's centre follows from his number, so that none has to be kept.
        centres = np.stack([np.random.default_rng([0, p]).standard_normal(about.width, np.float32) for p in person])
        vectors = centres + SPREAD * rng.standard_normal((count, about.width), np.float32)
        cameras = rng.integers(1, 7, count)
        columns = {"key": [f"k{n}" for n in range(start, start + count)], "identity": person, "frames": [12] * count}
        columns |= {"camera": cameras, "camera_name": [f"camera {c}" for c in cameras]}
        yield Vectors(about, description(columns), vectors, np.ones((count, about.parts), np.float32)).table


def peak() -> float:
    """Peak resident memory of this process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measured(what: str, work) -> object:
    """Run, and print wall and CPU seconds and the peak so far."""
    wall, cpu = time.monotonic(), time.process_time()
    result = work()
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    print(f"{what}: {wall:.1f} s, {cpu:.1f} CPU-s, peak {peak():.2f} GB", flush=True)
    return result


def write(path: Path, about: VectorsAbout, rows: int) -> None:
    """Draw the vectors and write their file."""
    measured("write", lambda: write_vectors(path, about, tables(about, rows)))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--kinds", nargs="+", default=["lists"], choices=["graph", "lists"])
    options = parser.parse_args()
    about = VectorsAbout(options.width, 6, options.width, "benchmark", {"name": "b", "sha256": "b"}, fingerprint="b")
    path = options.folder / f"vectors-{options.rows}.parquet"
    if not path.exists():
        options.folder.mkdir(parents=True, exist_ok=True)
        writer = multiprocessing.get_context("spawn").Process(target=write, args=(path, about, options.rows))
        writer.start()
        writer.join()
    files = VectorFiles([path])
    print(f"{len(files)} x {about.width}, {path.stat().st_size / 1e9:.2f} GB; {torch.get_num_threads()} threads")
    print(f"imports: peak {peak():.2f} GB")
    asked = np.sort(np.random.default_rng(9).permutation(len(files))[: options.queries])
    for count in (1, options.queries):
        rows = asked[:count]
        exact = measured(
            f"exact, {count} queries", lambda rows=rows: list(search(files, rows, files, SearchSettings(10)))
        )
    vectors = matrix(files.take(asked, ["vector"])["vector"], about.width)
    truth = [{hit["row"] for hit in found.hits} for found in exact]
    for kind in options.kinds:
        indexed(kind, options.folder / f"{path.stem}-{kind}.faiss", files, vectors, asked, truth)
    print(f"all: peak {peak():.2f} GB")


def indexed(kind: str, path: Path, files: VectorFiles, vectors: np.ndarray, asked: np.ndarray, truth: list) -> None:
    """Build an index and search it, looking less and less far."""
    if not GalleryIndex.fits(path, files, "euclidean", kind):
        measured(f"build the {kind}", lambda: GalleryIndex.build(files, path, "euclidean", kind))
    print(f"{kind}: {path.stat().st_size / 1e9:.2f} GB")
    for share in (64, 16, 4):
        index = GalleryIndex(path, files, "euclidean")
        index.probes = max(1, (index.lists or 1024) // share)
        index.search(vectors[:1], 11)  # maps the file
        start = time.monotonic()
        _, rows = index.search(vectors, 11)
        each = (time.monotonic() - start) / len(vectors) * 1000
        found = [set(row.tolist()) - {own} for row, own in zip(rows, asked.tolist(), strict=True)]
        recall = np.mean([len(one & other) / len(one) for one, other in zip(truth, found, strict=True)])
        far = f"{index.probes} of {index.lists} lists" if index.lists else f"{max(index.probes, 22)} candidates"
        print(f"{kind}, {far}: {each:.1f} ms a query, {recall:.1%} of the true 10 found")


if __name__ == "__main__":
    main()
