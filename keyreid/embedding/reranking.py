"""k-reciprocal re-ranking (Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding, CVPR 2017).

Two tracklets are alike when they are among each other's neighbours and share their neighbours. The neighbourhoods are
sparse matrices, so that memory grows with N k1 k2 (N = queries + gallery) instead of N x N; distances come in blocks.
The result is (1 - weight) Jaccard distance + weight d^2 / max d^2, the maximum over each query's row.
"""

import numpy as np
import torch
from scipy import sparse

from keyreid.embedding.distance import BLOCK_BYTES, Embeddings, Metric, distance_blocks, nearest, pair_distances


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
    """Re-ranked distances float32 [Q, G], from 0 to 1.

    Args:
        k1: neighbours that must hold each other.
        k2: nearest neighbours whose encodings are averaged (local query expansion).
        weight: of the original distance (lambda in the paper).
    """
    seen = (query.visibility, gallery.visibility)
    visibility = None if any(side is None for side in seen) else np.concatenate(seen)
    everyone = Embeddings(np.concatenate([query.vectors, gallery.vectors]), visibility, query.global_width)
    count = len(everyone)
    neighbours = nearest(everyone, everyone, min(k1 + 1, count), metric, device, block_bytes)[1]
    original, furthest = _distances_of_queries(everyone, len(query), metric, device, block_bytes)
    scale = np.maximum(furthest, np.finfo(np.float32).tiny).astype(np.float64) ** 2

    reciprocal = _reciprocal(neighbours, k1 + 1)
    expanded = _expand(reciprocal, _reciprocal(neighbours, round(k1 / 2) + 1))
    rows, columns = expanded.nonzero()
    distances = pair_distances(everyone, everyone, rows, columns, metric).astype(np.float64) ** 2
    encoding = sparse.csr_array((np.exp(-distances / scale[rows]), (rows, columns)), shape=(count, count))
    encoding = sparse.diags_array(1 / encoding.sum(axis=1)) @ encoding
    if k2 > 1:
        encoding = _membership(neighbours, min(k2, count)) @ encoding / min(k2, count)

    result = _jaccard(sparse.csr_array(encoding), len(query))
    result *= 1 - weight
    original **= 2
    original *= (weight / scale[: len(query), None]).astype(np.float32)
    result += original
    return result


def _distances_of_queries(
    everyone: Embeddings, queries: int, metric: Metric, device: torch.device | str, block_bytes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Distances from the queries to the gallery [Q, G], and every row's largest distance to anyone [N]."""
    furthest = np.zeros(len(everyone), np.float32)
    original = np.empty((queries, len(everyone)), np.float32)
    for rows, columns, block in distance_blocks(everyone, everyone, metric, device, block_bytes):
        furthest[rows] = np.maximum(furthest[rows], block.amax(dim=1).cpu().numpy())
        wanted = max(0, min(rows.stop, queries) - rows.start)
        original[rows.start : rows.start + wanted, columns] = block[:wanted].cpu().numpy()
    return original[:, queries:], furthest


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


def _jaccard(encoding: sparse.csr_array, queries: int) -> np.ndarray:
    """1 - sum_j min(q_j, g_j) / sum_j max(q_j, g_j) for queries and gallery: float32 [Q, G].

    Each row of `encoding` sums to 1, so that sum max = 2 - sum min.
    """
    gallery = sparse.csc_array(encoding[queries:])
    result = np.empty((queries, gallery.shape[0]), np.float32)
    for row in range(queries):
        own = slice(*encoding.indptr[row : row + 2])
        shared = gallery[:, encoding.indices[own]]
        np.minimum(shared.data, np.repeat(encoding.data[own], np.diff(shared.indptr)), out=shared.data)
        total = shared.sum(axis=1)
        result[row] = 1 - total / (2 - total)
    return result
