"""Distances between embeddings, in blocks: on the CPU or a GPU, for galleries in memory or memory-mapped.

Nothing here holds more than `block_bytes` (256 MiB by default) beside what it is given and what it returns. The
gallery is read once for every block of queries (at most 1024), so that it may be larger than memory, in float16.
`evaluation.counting` cuts blocks in its own way, for it needs the same bits on any number of ranks.

- `euclidean`: |q - g|, not squared.
- `cosine`: 1 - cos(q, g).
- `visible`: the mean of the Euclidean distances of the global feature and of the parts, where a part weighs as much
  as both sides see of it: (d_global + sum_p v_qp v_gp d_p) / (1 + sum_p v_qp v_gp), v in [0, 1].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from keyreid.errors import ConfigError

Metric = Literal["euclidean", "cosine", "visible"]
BLOCK_BYTES = 256 * 2**20
_MAX_ROWS = 1024
_NO_ENTRY = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Embeddings:
    """N embedded tracklets.

    Attributes:
        vectors: float32 or float16 [N, D], also memory-mapped.
        visibility: float32 [N, P], the share of frames in which each part is seen; only `visible` needs it.
        global_width: how many of the D entries are the global feature; the rest is P parts of equal width.
    """

    vectors: np.ndarray
    visibility: np.ndarray | None = None
    global_width: int = 0

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, rows: slice | np.ndarray) -> "Embeddings":
        seen = None if self.visibility is None else self.visibility[rows]
        return Embeddings(self.vectors[rows], seen, self.global_width)


def pairwise(
    query: Embeddings,
    gallery: Embeddings,
    metric: Metric = "euclidean",
    device: torch.device | str = "cpu",
    block_bytes: int = BLOCK_BYTES,
) -> np.ndarray:
    """All distances: float32 [Q, G].

    Raises:
        ConfigError: the vectors' widths differ, or `visible` is asked for without visibilities.
    """
    result = np.empty((len(query), len(gallery)), np.float32)
    for rows, columns, block in distance_blocks(query, gallery, metric, device, block_bytes):
        result[rows, columns] = block.cpu().numpy()
    return result


def nearest(
    query: Embeddings,
    gallery: Embeddings,
    k: int,
    metric: Metric = "euclidean",
    device: torch.device | str = "cpu",
    block_bytes: int = BLOCK_BYTES,
    query_group: np.ndarray | None = None,
    gallery_group: np.ndarray | None = None,
    furthest: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest gallery entries of each query, exactly; ties go to the smaller index.

    Args:
        query_group, gallery_group: int64 [Q], [G]; entries of the query's own group (its camera, say) are left out.
        furthest: float32 [Q], is raised to the largest distance of each query to anyone.

    Returns:
        distances float32 [Q, k] ascending, indices int64 [Q, k]; infinity and -1 where fewer than k entries are left.
    """
    found = np.full((len(query), k), _NO_ENTRY, np.int64)
    for rows, columns, block in distance_blocks(query, gallery, metric, device, block_bytes):
        if furthest is not None:
            furthest[rows] = np.maximum(furthest[rows], block.amax(dim=1).cpu().numpy())
        # Distances are not negative, so their bits order as they do; with the index below them no two keys are equal.
        keys = block.view(torch.int32).long()
        keys <<= 32
        keys |= torch.arange(columns.start, columns.stop, device=block.device)
        if query_group is not None:
            own = torch.from_numpy(query_group[rows])[:, None] == torch.from_numpy(gallery_group[columns])[None]
            keys.masked_fill_(own.to(block.device), _NO_ENTRY)
        best = keys.topk(min(k, keys.shape[1]), dim=1, largest=False, sorted=False).values.cpu().numpy()
        found[rows] = np.sort(np.concatenate([found[rows], best], axis=1), axis=1)[:, :k]
    distances = (found >> 32).astype(np.int32).view(np.float32)
    missing = found == _NO_ENTRY
    return np.where(missing, np.float32(np.inf), distances), np.where(missing, -1, found & 0xFFFFFFFF)


def distance_blocks(
    query: Embeddings,
    gallery: Embeddings,
    metric: Metric,
    device: torch.device | str = "cpu",
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """The distance matrix piece by piece: (rows, columns, float32 [rows, columns] on `device`), row blocks in order."""
    check_metric(query, gallery, metric)
    if not len(query) or not len(gallery):
        return
    width = query.vectors.shape[1]
    row_count = max(1, min(_MAX_ROWS, len(query), block_bytes // 4 // (8 * width)))
    # A column: its vector as stored, in float32 and a part's copy, and for each row a distance, two temporaries, a key.
    column_count = max(1, min(len(gallery), block_bytes * 3 // 4 // (16 * width + 24 * row_count)))
    centre = torch.from_numpy(query.vectors.mean(axis=0, dtype=np.float64).astype(np.float32)).to(device)
    for top in range(0, len(query), row_count):
        rows = slice(top, min(top + row_count, len(query)))
        left = prepare(query[rows], metric, centre, device)
        for start in range(0, len(gallery), column_count):
            columns = slice(start, min(start + column_count, len(gallery)))
            right = prepare(gallery[columns], metric, centre, device)
            yield rows, columns, compare(left, right, metric)


def pair_distances(
    query: Embeddings, gallery: Embeddings, left: np.ndarray, right: np.ndarray, metric: Metric
) -> np.ndarray:
    """float32 [n]: the distances of query left[i] and gallery right[i], in chunks within BLOCK_BYTES, on the CPU."""
    check_metric(query, gallery, metric)
    result = np.empty(len(left), np.float32)
    step = max(1, BLOCK_BYTES // (20 * query.vectors.shape[1]))
    centre = torch.zeros(query.vectors.shape[1])
    for start in range(0, len(left), step):
        chosen = slice(start, start + step)
        one = prepare(query[left[chosen]], metric, centre, "cpu")
        other = prepare(gallery[right[chosen]], metric, centre, "cpu")
        pairs = zip(one.pieces, other.pieces, strict=True)
        if metric == "cosine":
            parts = [(1 - (a * b).sum(1)).clamp_(min=0) for a, b in pairs]
        else:
            parts = [functional.pairwise_distance(a, b, eps=0) for a, b in pairs]
        if metric == "visible":
            weights = one.weights * other.weights
            parts = [(torch.stack(parts, 1) * weights).sum(1) / weights.sum(1)]
        result[chosen] = parts[0].numpy()
    return result


class Prepared(NamedTuple):
    """Vectors on the device, cut into what is compared apart, and how much each piece weighs ([n, pieces])."""

    pieces: list[torch.Tensor]
    weights: torch.Tensor | None = None


def check_metric(query: Embeddings, gallery: Embeddings, metric: Metric) -> None:
    """Raise ConfigError where the widths differ, or `visible` is asked for without visibilities."""
    if query.vectors.shape[1] != gallery.vectors.shape[1]:
        raise ConfigError(f"vectors {query.vectors.shape} and {gallery.vectors.shape} differ in width")
    if metric not in ("euclidean", "cosine", "visible"):
        raise ConfigError(f"unknown distance {metric!r}; there are euclidean, cosine, visible")
    if metric == "visible":
        for side in (query, gallery):
            parts = 0 if side.visibility is None else side.visibility.shape[1]
            rest = side.vectors.shape[1] - side.global_width
            if not parts or not rest or rest % parts:
                needs = "the parts' visibility and their vectors beside the global feature"
                raise ConfigError(f"distance visible needs {needs}; embed whole vectors, or use euclidean")


def prepare(side: Embeddings, metric: Metric, centre: torch.Tensor, device: torch.device | str) -> Prepared:
    """One side of a block; `centre` [D] is anything near the middle of all vectors, the same for both sides."""
    vectors = torch.from_numpy(np.array(side.vectors)).to(device).float()
    if metric == "cosine":
        return Prepared([functional.normalize(vectors, dim=1)])
    # Distances do not change when both sides move, and small vectors lose less where large numbers would cancel.
    vectors -= centre
    if metric == "euclidean":
        return Prepared([vectors])
    parts = side.visibility.shape[1]
    part_width = (vectors.shape[1] - side.global_width) // parts
    seen = torch.from_numpy(np.array(side.visibility, np.float32)).to(device)
    pieces = list(vectors.split([side.global_width] + [part_width] * parts, dim=1))
    return Prepared(pieces, torch.cat([torch.ones(len(seen), 1, device=seen.device), seen], dim=1))


def compare(left: Prepared, right: Prepared, metric: Metric) -> torch.Tensor:
    """All distances of two prepared sides: float32 [rows, columns] on their device."""
    if metric == "cosine":
        return (left.pieces[0] @ right.pieces[0].T).neg_().add_(1).clamp_(min=0)
    total = _euclidean(left.pieces[0], right.pieces[0])
    if metric == "euclidean":
        return total
    for part in range(1, len(left.pieces)):
        weight = left.weights[:, part, None] * right.weights[None, :, part]
        total += weight.mul_(_euclidean(left.pieces[part], right.pieces[part]))
    return total.div_(left.weights @ right.weights.T)


def _euclidean(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    squares = torch.addmm(right.square().sum(1)[None], left, right.T, alpha=-2)
    return squares.add_(left.square().sum(1)[:, None]).clamp_(min=0).sqrt_()
