"""k-reciprocal re-ranking (Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding, CVPR 2017).

Two tracklets are alike when they are among each other's neighbours and share their neighbours. The neighbourhoods are
sparse matrices, so that memory grows with N k1 k2 (N = queries + gallery) instead of N x N; distances come in blocks.
The result is (1 - weight) Jaccard distance + weight d^2 / max d^2, the maximum over each query's row.
"""

import time
from collections.abc import Iterator

import numpy as np
import torch
from scipy import sparse

from keyreid.embedding.distance import BLOCK_BYTES, Embeddings, Metric, nearest, pair_distances, pairwise
from keyreid.errors import ConfigError

MOST = 200_000  # tracklets: time grows with their square, and all vectors are on one rank
_BYTES_OF_EACH = 6_000  # neighbours and encodings while they are made: `benchmarks/evaluation.py rerank` holds less
_STEP = 1024  # tracklets whose neighbours are looked for at a time


def rerank(
    query: Embeddings,
    gallery: Embeddings,
    metric: Metric = "euclidean",
    k1: int = 20,
    k2: int = 6,
    weight: float = 0.3,
    device: torch.device | str = "cpu",
    block_bytes: int = BLOCK_BYTES,
) -> np.ndarray:
    """Re-ranked distances float32 [Q, G], from 0 to 1; arguments as of `Reranking`."""
    seen = (query.visibility, gallery.visibility)
    visibility = None if any(side is None for side in seen) else np.concatenate(seen)
    everyone = Embeddings(np.concatenate([query.vectors, gallery.vectors]), visibility, query.global_width)
    reranking = Reranking(everyone, len(query), metric, k1, k2, weight, device, block_bytes)
    for _ in reranking.prepare():
        pass
    return reranking.distances(slice(0, len(query)))


def check_size(count: int) -> None:
    """Raise ConfigError where so many tracklets are too many to be re-ranked."""
    if count > MOST:
        instead = "leave out evaluation.rerank; `keyreid search --rerank` re-ranks each query's nearest alone"
        raise ConfigError(
            f"re-ranking {count} tracklets: more than {MOST} cannot be compared with each other; {instead}"
        )


class Reranking:
    """Re-ranked distances of the first Q of N tracklets to the others, block by block."""

    def __init__(
        self,
        everyone: Embeddings,
        queries: int,
        metric: Metric = "euclidean",
        k1: int = 20,
        k2: int = 6,
        weight: float = 0.3,
        device: torch.device | str = "cpu",
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        """Raise ConfigError where there are too many.

        Args:
            everyone: queries, then gallery.
            k1: neighbours that must hold each other.
            k2: nearest neighbours whose encodings are averaged (local query expansion).
            weight: of the original distance (lambda in the paper).
        """
        check_size(len(everyone))
        self._everyone, self._queries, self._compared = everyone, queries, (metric, device, block_bytes)
        self._k1, self._k2, self._weight = k1, k2, weight

    def cost(self) -> str:
        """Memory, and the time that a small part of the work hints at."""
        count, some = len(self._everyone), self._everyone[:256]
        start = time.monotonic()
        nearest(some, self._everyone[:4096], min(count, 4096, self._k1 + 1), *self._compared)
        seconds = (time.monotonic() - start) * count / len(some) * max(1.0, count / 4096)
        size = (self._everyone.vectors.nbytes + count * _BYTES_OF_EACH + BLOCK_BYTES) / 2**30
        return f"re-ranking {count} tracklets: about {size:.1f} GiB on the first rank, {seconds / 60:.1f} minutes"

    def prepare(self) -> Iterator[None]:
        """Find all neighbourhoods, in pieces of seconds; once, before any distances."""
        everyone, count, (metric, device, block_bytes) = self._everyone, len(self._everyone), self._compared
        neighbours = np.empty((count, min(self._k1 + 1, count)), np.int64)
        furthest = np.zeros(count, np.float32)
        for start in range(0, count, _STEP):
            rows = slice(start, start + _STEP)
            neighbours[rows] = nearest(
                everyone[rows], everyone, neighbours.shape[1], metric, device, block_bytes, furthest=furthest[rows]
            )[1]
            yield
        self._scale = np.maximum(furthest, np.finfo(np.float32).tiny).astype(np.float64) ** 2
        reciprocal = _reciprocal(neighbours, self._k1 + 1)
        yield
        expanded = _expand(reciprocal, _reciprocal(neighbours, round(self._k1 / 2) + 1))
        yield
        rows, columns = expanded.nonzero()
        distances = pair_distances(everyone, everyone, rows, columns, metric).astype(np.float64) ** 2
        yield
        encoding = sparse.csr_array((np.exp(-distances / self._scale[rows]), (rows, columns)), shape=(count, count))
        encoding = sparse.diags_array(1 / encoding.sum(axis=1)) @ encoding
        if self._k2 > 1:
            encoding = _membership(neighbours, min(self._k2, count)) @ encoding / min(self._k2, count)
        encoding = sparse.csr_array(encoding)
        self._asking, self._asked = encoding[: self._queries], sparse.csc_array(encoding[self._queries :])

    def distances(self, rows: slice) -> np.ndarray:
        """Re-ranked distances of some queries to the gallery: float32 [n, G], from 0 to 1."""
        result = _jaccard(sparse.csr_array(self._asking[rows]), self._asked)
        result *= 1 - self._weight
        original = pairwise(self._everyone[: self._queries][rows], self._everyone[self._queries :], *self._compared)
        original **= 2
        original *= (self._weight / self._scale[: self._queries][rows, None]).astype(np.float32)
        result += original
        return result


def _membership(neighbours: np.ndarray, k: int) -> sparse.csr_array:
    """[N, N], 1 where the column is among the row's k nearest, itself included."""
    count = len(neighbours)
    indices = neighbours[:, :k].ravel()
    pointers = np.arange(0, len(indices) + 1, min(k, neighbours.shape[1]))
    return sparse.csr_array((np.ones(len(indices)), indices, pointers), shape=(count, count))


def _reciprocal(neighbours: np.ndarray, k: int) -> sparse.csr_array:
    """[N, N], 1 where row and column are among each other's k nearest."""
    forward = _membership(neighbours, k)
    return forward * forward.T


def _expand(reciprocal: sparse.csr_array, half: sparse.csr_array) -> sparse.csr_array:
    """Reciprocal neighbours, and those of each candidate (at k1 / 2) whose own overlap them by more than two thirds."""
    # |R(row, k1) and R(column, k1/2)|, for candidates
    overlap = sparse.coo_array(reciprocal * (reciprocal @ half.T))
    size = np.diff(sparse.csr_array(half).indptr)
    chosen = 3 * overlap.data > 2 * size[overlap.col]
    places = overlap.row[chosen], overlap.col[chosen]
    return reciprocal + sparse.csr_array((np.ones(chosen.sum()), places), shape=reciprocal.shape) @ half


def _jaccard(asking: sparse.csr_array, asked: sparse.csc_array) -> np.ndarray:
    """1 - sum_j min(q_j, g_j) / sum_j max(q_j, g_j) of the encodings of queries and gallery: float32 [Q, G].

    Each row sums to 1, so that sum max = 2 - sum min.
    """
    result = np.empty((asking.shape[0], asked.shape[0]), np.float32)
    for row in range(len(result)):
        own = slice(*asking.indptr[row : row + 2])
        shared = asked[:, asking.indices[own]]
        np.minimum(shared.data, np.repeat(asking.data[own], np.diff(shared.indptr)), out=shared.data)
        total = shared.sum(axis=1)
        result[row] = 1 - total / (2 - total)
    return result
