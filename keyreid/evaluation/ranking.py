"""From embedded tracklets to scores: which tracklets query which, how far apart they are, and what a protocol says."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from keyreid.config import EvaluationConfig
from keyreid.embedding.distance import pairwise
from keyreid.embedding.vectors import Vectors
from keyreid.errors import DataError
from keyreid.evaluation.protocols import Scores, Side, judge, protocol_named, ranked_list
from keyreid.shards.shard_set import ShardSet

JudgedSet = Literal["test", "holdout"]  # a split's test set, or the training identities that `data.holdout` keeps out


@dataclass(frozen=True)
class Ranking:
    """A judged distance matrix [Q, G] and whose rows and columns they are."""

    query: Vectors
    gallery: Vectors
    distance: np.ndarray
    scores: Scores

    def nearest(self, row: int, top: int) -> tuple[np.ndarray, np.ndarray]:
        """`ranked_list` of a query under the protocol that judged."""
        sides = side_of(self.query), side_of(self.gallery)
        return ranked_list(self.distance, row, *sides, self.scores.protocol, top)


def query_and_gallery(shards: ShardSet, split_number: int, part: JudgedSet = "test") -> tuple[list[int], list[int]]:
    """Positions of queries and gallery (without queries and junk).

    Raises:
        DataError: there are none.
    """
    prefix = "holdout_" if part == "holdout" else ""
    query, gallery = (shards.select(f"{prefix}{name}", split_number) for name in ("query", "gallery"))
    if not query or not gallery:
        which = "the identities held out" if part == "holdout" else f"split {split_number}"
        raise DataError(f"{shards.location}: {which} has {len(query)} queries and {len(gallery)} gallery tracklets")
    return query, gallery


def split_vectors(
    vectors: Vectors, shards: ShardSet, split_number: int, part: JudgedSet = "test"
) -> tuple[Vectors, ...]:
    """The vectors of a split's queries and gallery.

    Raises:
        DataError: one of them is not among the vectors.
    """
    sides = query_and_gallery(shards, split_number, part)
    keys = ([shards.tracklets[position].key for position in positions] for positions in sides)
    return tuple(vectors[vectors.rows_of(each)] for each in keys)


def rank_gallery(
    query: Vectors,
    gallery: Vectors,
    evaluation: EvaluationConfig,
    protocols: Sequence[str],
    device: torch.device | str = "cpu",
) -> dict[str, Ranking]:
    """Compare and judge, once for each protocol.

    Args:
        gallery: without junk; protocols that want the queries in it get them, after the others.
        evaluation: distance and re-ranking.

    Raises:
        DataError: no query has a match.
        ConfigError: a protocol is unknown, or the distance does not fit the vectors.
    """
    from keyreid.embedding.reranking import rerank  # brings scipy

    with_queries = {name: protocol_named(name).queries_in_gallery for name in protocols}
    rankings = {}
    for joined in sorted(set(with_queries.values())):
        entries = gallery.followed_by(query[~np.isin(query.keys, gallery.keys)]) if joined else gallery
        compare = rerank if evaluation.rerank else pairwise
        distance = compare(query.embeddings, entries.embeddings, evaluation.distance, device=device)
        for name in protocols:
            if with_queries[name] == joined:
                scores = judge(distance, side_of(query), side_of(entries), name)
                rankings[name] = Ranking(query, entries, distance, scores)
    return {name: rankings[name] for name in protocols}


def side_of(vectors: Vectors) -> Side:
    """Identities, cameras and frames, as protocols take them."""
    return Side(vectors.identities, vectors.cameras, vectors.frames)
