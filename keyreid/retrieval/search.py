"""Find the nearest tracklets of query vectors: exactly, in one pass over the gallery's files, or by an index.

Memory of the exact search: the queries of one pass (QUERY_BYTES at most), one block of the gallery, and what
`embedding.distance` needs (256 MiB), whatever the gallery's size.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from keyreid.embedding.distance import Metric, nearest
from keyreid.embedding.reranking import rerank
from keyreid.embedding.vectors import DESCRIPTION, VectorFiles, check_comparable, embeddings_of
from keyreid.errors import ConfigError
from keyreid.retrieval.index import GalleryIndex

QUERY_BYTES = 256 * 2**20
SHOWN = list(DESCRIPTION)
RERANK_CANDIDATES = 200
RECALL_QUERIES, RECALL_TOP = 100, 10


@dataclass(frozen=True)
class SearchSettings:
    """How the gallery is searched.

    Attributes:
        other_cameras: leave out tracklets of the query's own camera.
        rerank: k-reciprocal re-ranking among each query's RERANK_CANDIDATES nearest.
    """

    top: int = 10
    metric: Metric = "euclidean"
    other_cameras: bool = False
    rerank: bool = False


@dataclass(frozen=True)
class Found:
    """A query and its hits, nearest first, by the vector file's columns; a hit has its gallery `row` and `distance`."""

    query: dict[str, Any]
    hits: list[dict[str, Any]] = field(default_factory=list)


def search(
    queries: VectorFiles,
    rows: np.ndarray | None,
    gallery: VectorFiles,
    settings: SearchSettings,
    index: GalleryIndex | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Found]:
    """Search for queries, in their order. A tracklet never finds itself (the entry of its own key).

    Args:
        queries, rows: vector files and the rows of them that ask; None: all.
        index: an index of the gallery instead of the exact search.

    Raises:
        ConfigError: the distance does not fit the vectors or the index.
        DataError: queries and gallery were embedded by different networks.
    """
    check_comparable(gallery.about, queries.about, f"{gallery.paths[0]}", f"{queries.paths[0]}")
    if len(gallery) == 0:
        raise ConfigError(f"{gallery.paths[0]}: the gallery is empty")
    # By name: files of different data sets may number their cameras differently.
    codes, names = pd.factorize(gallery.column("camera_name")) if settings.other_cameras else (None, None)
    wanted = max(settings.top + 1, RERANK_CANDIDATES if settings.rerank else 0)  # one more: itself
    step = max(1, QUERY_BYTES // (4 * queries.about.width))
    rows = np.arange(len(queries)) if rows is None else rows
    for start in range(0, len(rows), step):
        table = queries.take(rows[start : start + step], [*SHOWN, "vector", "visibility"])
        cameras = None
        if codes is not None:  # of queries and gallery; -1 where the gallery lacks it
            cameras = pd.Index(names).get_indexer(table["camera_name"].to_pylist()), codes
        distances, found = _nearest(table, gallery, min(wanted, len(gallery)), settings.metric, cameras, index, device)
        yield from _described(table, gallery, distances, found, settings, device)


def recall(gallery: VectorFiles, index: GalleryIndex, device: torch.device | str = "cpu") -> float:
    """The share of the RECALL_TOP nearest that an index finds, over some rows of its gallery, which is read once."""
    rows = np.unique(np.linspace(0, len(gallery) - 1, RECALL_QUERIES).astype(np.int64))
    table, k = gallery.take(rows, ["vector", "visibility"]), min(RECALL_TOP + 1, len(gallery))  # one more: itself
    exact, found = (_nearest(table, gallery, k, index.metric, None, way, device)[1] for way in (None, index))
    true = [np.setdiff1d(near, [row, -1]) for near, row in zip(exact, rows, strict=True)]
    hits = sum(np.isin(near, other).sum() for near, other in zip(true, found, strict=True))
    return float(hits / max(1, sum(map(len, true))))


def _nearest(
    table: pa.Table,
    gallery: VectorFiles,
    k: int,
    metric: Metric,
    cameras: tuple[np.ndarray, np.ndarray] | None,
    index: GalleryIndex | None,
    device: torch.device | str,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of each query: distances [Q, k] and rows [Q, k]; infinity and -1 where there are fewer."""
    query = embeddings_of(table, gallery.about)
    if index is not None and cameras is None:
        return index.search(query.vectors, k)
    distances, found = np.full((len(query), k), np.inf, np.float32), np.full((len(query), k), -1, np.int64)
    if index is not None:  # queries of one camera go together, since they leave out the same rows
        for camera in np.unique(cameras[0]):
            chosen = cameras[0] == camera
            distances[chosen], found[chosen] = index.search(query.vectors[chosen], k, cameras[1] != camera)
        return distances, found
    for first, block in gallery.blocks(["vector", "visibility"]):
        groups = {}
        if cameras:
            groups = {"query_group": cameras[0], "gallery_group": cameras[1][first : first + len(block)]}
        there = embeddings_of(block, gallery.about)
        near, rows = nearest(query, there, min(k, len(block)), metric, device, **groups)
        near = np.concatenate([distances, near], axis=1)
        rows = np.concatenate([found, np.where(rows < 0, -1, rows + first)], axis=1)
        best = np.argsort(near, axis=1, kind="stable")[:, :k]
        distances, found = np.take_along_axis(near, best, 1), np.take_along_axis(rows, best, 1)
    return distances, found


def _described(
    table: pa.Table,
    gallery: VectorFiles,
    distances: np.ndarray,
    found: np.ndarray,
    settings: SearchSettings,
    device: torch.device | str,
) -> Iterator[Found]:
    """From rows to results: without the query itself, re-ranked where asked for, described."""
    if settings.rerank:
        for at in range(len(found)):
            candidates = found[at][found[at] >= 0]
            rows = gallery.take(candidates, ["vector", "visibility"])
            one = embeddings_of(table.slice(at, 1), gallery.about)
            again = rerank(one, embeddings_of(rows, gallery.about), settings.metric, device=device)[0]
            order = np.argsort(again, kind="stable")
            distances[at, : len(order)], found[at, : len(order)] = again[order], candidates[order]
    keep = settings.top + 1
    shown = np.unique(found[:, :keep][found[:, :keep] >= 0])
    by_row = dict(zip(shown.tolist(), gallery.take(shown, SHOWN).to_pylist(), strict=True))
    described = table.select(SHOWN).to_pylist()
    for query, near, rows in zip(described, distances[:, :keep].tolist(), found[:, :keep].tolist(), strict=True):
        hits = [
            {**by_row[row], "row": row, "distance": distance}
            for distance, row in zip(near, rows, strict=True)
            if row >= 0 and by_row[row]["key"] != query["key"]
        ]
        yield Found(query, hits[: settings.top])
