"""From embedded tracklets to scores: which tracklets query which, how far apart they are, and what a protocol says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from keyreid.config import EvaluationConfig
from keyreid.embedding.distance import pairwise
from keyreid.embedding.reranking import rerank
from keyreid.embedding.vectors import Vectors
from keyreid.evaluation.protocols import Scores, judge, protocol_named


@dataclass(frozen=True)
class Ranking:
    """A judged distance matrix [Q, G] and whose rows and columns they are."""

    query: Vectors
    gallery: Vectors
    distance: np.ndarray
    scores: Scores


def rank_gallery(
    query: Vectors,
    gallery: Vectors,
    evaluation: EvaluationConfig,
    protocols: tuple[str, ...],
    device: torch.device | str = "cpu",
) -> dict[str, Ranking]:
    """Compare and judge, once for each protocol.

    Args:
        query, gallery: the gallery without junk; protocols that want the queries in it get them, after the others.
        evaluation: distance and re-ranking.

    Raises:
        DataError: no query has a match.
        ConfigError: a protocol is unknown, or the distance does not fit the vectors.
    """
    with_queries = {name: protocol_named(name).queries_in_gallery for name in protocols}
    rankings = {}
    for joined in (False, True):
        names = [name for name in protocols if with_queries[name] == joined]
        if not names:
            continue
        entries = gallery
        if joined:
            entries = gallery.followed_by(query[~np.isin(query.keys, gallery.keys)])
        compare = rerank if evaluation.rerank else pairwise
        distance = compare(query.embeddings, entries.embeddings, evaluation.distance, device=device)
        for name in names:
            rankings[name] = Ranking(query, entries, distance, judge(distance, query.side, entries.side, name))
    return {name: rankings[name] for name in protocols}
