"""Evaluation at MARS's size: what the metric, the distances, the search and the re-ranking cost.

    python benchmarks/evaluation.py metric      against the usual loop over queries, 1980 x 11310
    python benchmarks/evaluation.py distance    1980 x 11310 vectors of 19200 numbers
    python benchmarks/evaluation.py search      100 queries in a memory-mapped float16 gallery of 1,000,000 x 768
    python benchmarks/evaluation.py rerank      1980 queries, 9330 gallery tracklets of 768 numbers
    python benchmarks/evaluation.py ranks       1000 x 100,000 x 64 judged by 2 ranks (--full: 10,000 x 1,000,000)

Memory is what the process itself holds at its peak (pages of mapped files not counted), over what it held before.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from keyreid.evaluation.protocols import PROTOCOLS, Side, judge

QUERIES, GALLERY, WIDTH = 1980, 11310, 19200
MIB = 2**20


def main() -> None:
    """Run one benchmark, or all."""
    benchmarks = {"metric": metric, "distance": distance, "search": search, "rerank": rerank, "ranks": ranks}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="?", choices=list(benchmarks), help="all, unless given")
    parser.add_argument("--full", action="store_true", help="of `ranks`: 10,000 queries, 1,000,000 gallery entries")
    options = parser.parse_args()
    for name in [options.which] if options.which else benchmarks:
        print(f"\n{name}", flush=True)
        benchmarks[name](*[options.full][: name == "ranks"])


def metric() -> None:
    """`judge` against argsort and a loop over the queries, as the published evaluators do it."""
    rng = np.random.default_rng(0)
    query, gallery = (
        Side(rng.integers(1, 626, n), rng.integers(1, 7, n), rng.integers(2, 900, n)) for n in (QUERIES, GALLERY)
    )
    matrix = rng.random((QUERIES, GALLERY), dtype=np.float32)
    expected, slow = timed(lambda: loop_over_queries(matrix, query, gallery))
    print(f"loop over queries  {slow:7.2f} s")
    for name in PROTOCOLS:
        with own_memory() as memory:
            scores, fast = min(
                (timed(lambda name=name: judge(matrix, query, gallery, name)) for _ in range(3)), key=second
            )
        print(f"{name:<18} {fast:7.3f} s   {slow / fast:5.0f} times faster   {memory['peak'] / MIB:5.0f} MiB")
        if name == "torchreid":
            assert abs(scores.mean_ap - expected) < 1e-12
    ties = np.round(matrix * 50)
    _, slow = timed(lambda: loop_over_queries(ties, query, gallery))
    _, fast = timed(lambda: judge(ties, query, gallery, "torchreid"))
    print(f"all tied           {fast:7.3f} s   {slow / fast:5.0f} times faster")


def loop_over_queries(matrix: np.ndarray, query: Side, gallery: Side) -> float:
    """The usual evaluator: mAP by one Python loop over the queries and one over each ranking."""
    order = np.argsort(matrix, axis=1, kind="stable")
    matches = gallery.identities[order] == query.identities[:, None]
    precisions = []
    for row in range(len(query)):
        keep = ~(matches[row] & (gallery.cameras[order[row]] == query.cameras[row]))
        hits = matches[row][keep].astype(np.int32)
        if hits.any():
            precision = np.asarray([found / (rank + 1.0) for rank, found in enumerate(hits.cumsum())]) * hits
            precisions.append(precision.sum() / hits.sum())
    return float(np.mean(precisions))


def distance() -> None:
    """Euclidean distances of whole evaluation vectors."""
    from keyreid.embedding.distance import Embeddings, pairwise

    rng = np.random.default_rng(0)
    query, gallery = (Embeddings(rng.standard_normal((n, WIDTH), dtype=np.float32)) for n in (QUERIES, GALLERY))
    pairwise(query[:8], gallery[:8])
    with own_memory() as memory:
        result, seconds = timed(lambda: pairwise(query, gallery))
    own = memory["peak"] - result.nbytes
    operations = 2 * QUERIES * GALLERY * WIDTH
    print(f"{seconds:.1f} s, {operations / seconds / 1e9:.0f} GFLOP/s, {own / MIB:.0f} MiB beside input and result")


def search() -> None:
    """The ten nearest in a gallery on disk."""
    from keyreid.embedding.distance import Embeddings, nearest

    count, width = 1_000_000, 768
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gallery.npy"
        made = np.lib.format.open_memmap(path, "w+", np.float16, (count, width))
        for start in range(0, count, 50_000):
            made[start : start + 50_000] = rng.standard_normal((50_000, width), dtype=np.float32)
        rows = np.linspace(0, count - 1, 100).astype(int)
        query = Embeddings(made[rows].astype(np.float32))
        made.flush()
        del made
        gallery = Embeddings(np.load(path, mmap_mode="r"))
        nearest(query, gallery[:1000], 10)
        for metric_name in ("euclidean", "cosine"):
            with own_memory() as memory:
                found, seconds = timed(lambda name=metric_name: nearest(query, gallery, 10, name))
            assert (found[1][:, 0] == rows).all()
            peak = memory["peak"] / MIB
            print(
                f"{metric_name:<10} {seconds:5.1f} s, {peak:.0f} MiB; the gallery has {count * width * 2 / MIB:.0f} MiB"
            )


def rerank() -> None:
    """k-reciprocal re-ranking of clustered vectors."""
    from keyreid.embedding.distance import Embeddings
    from keyreid.embedding.reranking import rerank as k_reciprocal

    rng = np.random.default_rng(0)
    centres = rng.standard_normal((626, 768), dtype=np.float32)

    def side(n: int) -> Embeddings:
        return Embeddings(centres[rng.integers(0, 626, n)] + rng.standard_normal((n, 768), dtype=np.float32))

    query, gallery = side(QUERIES), side(9330)
    with own_memory() as memory:
        result, seconds = timed(lambda: k_reciprocal(query, gallery))
    whole = (QUERIES + 9330) ** 2 * 4
    print(f"{seconds:.1f} s, {(memory['peak'] - result.nbytes) / MIB:.0f} MiB (one full matrix: {whole / MIB:.0f} MiB)")


def ranks(full: bool) -> None:
    """Judging by two ranks of one thread each, who made half of the vectors each; ten tracklets an identity."""
    queries, gallery = (10_000, 1_000_000) if full else (1_000, 100_000)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        started = [context.Process(target=judging_rank, args=(n, folder, queries, gallery)) for n in range(2)]
        for process in started:
            process.start()
        for process in started:
            process.join()
        assert not any(process.exitcode for process in started)


def judging_rank(number: int, folder: str, queries: int, gallery: int) -> None:
    """A rank; the first then judges some queries by the whole matrix."""
    import torch

    from keyreid.distributed.ranks import Ranks
    from keyreid.embedding.distance import Embeddings, pairwise
    from keyreid.evaluation.counting import Comparison, judge_strips
    from keyreid.evaluation.protocols import Answers

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=number, world_size=2)
    us = Ranks(number, 2, 0, torch.device("cpu"), torch.distributed.group.WORLD)
    rng = np.random.default_rng(0)
    total = queries + gallery
    who, where = rng.integers(1, gallery // 10, total), rng.integers(1, 9, total)
    centres = rng.standard_normal((gallery // 10, 64), dtype=np.float32)

    def vectors(rows: np.ndarray) -> Embeddings:  # a row's numbers follow from its thousand
        noise = {
            n: np.random.default_rng([1, n]).standard_normal((1000, 64), np.float32) for n in np.unique(rows // 1000)
        }
        return Embeddings(np.stack([centres[who[row]] + 1.5 * noise[row // 1000][row % 1000] for row in rows]))

    own = np.arange(total)[number::2]  # rows lie anywhere
    mine = Embeddings(np.concatenate([vectors(part).vectors for part in np.array_split(own, 100)]))
    place = np.full(total, -1)
    place[own] = np.arange(len(own))
    sides = Side(who[:queries], where[:queries]), Side(who[queries:], where[queries:])
    start, cpu = time.monotonic(), time.process_time()
    with own_memory() as memory:
        answers = Answers(*sides, "torchreid")
        strips = Comparison(mine, place[:queries], place[queries:], "euclidean", us)
        (scores,) = judge_strips(strips, [answers], us)
    took, cpu = time.monotonic() - start, time.process_time() - cpu
    print(
        f"rank {number}: {took:.0f} s, {cpu:.0f} CPU-s, {memory['peak'] / MIB:.0f} MiB beside the vectors", flush=True
    )
    torch.distributed.destroy_process_group()
    if us.first:
        some = np.linspace(0, queries - 1, 50).astype(int)
        everyone = np.concatenate([vectors(part).vectors for part in np.array_split(np.arange(queries, total), 100)])
        plain = judge(pairwise(vectors(some), Embeddings(everyone)), sides[0][some], sides[1], "torchreid")
        difference = np.nanmax(np.abs(plain.average_precision - scores.average_precision[some]))
        print(f"mAP {scores.mean_ap:.4f}; AP of 50 queries by the whole matrix: {difference:.1e} apart at most")


def timed(function: Callable) -> tuple:
    """The result and the seconds of CPU time that it took, over the threads that NumPy and torch use."""
    start = time.process_time()
    result = function()
    return result, time.process_time() - start


def second(pair: tuple) -> float:
    """The second of two: the time."""
    return pair[1]


@contextmanager
def own_memory() -> Iterator[dict[str, int]]:
    """Peak bytes over those before, sampled every 2 ms."""
    before = anonymous_bytes()
    result = {"peak": 0}
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            result["peak"] = max(result["peak"], anonymous_bytes() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    yield result
    stop.set()
    thread.join()
    result["peak"] = max(result["peak"], anonymous_bytes() - before)


def anonymous_bytes() -> int:
    """Resident memory of this process without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
