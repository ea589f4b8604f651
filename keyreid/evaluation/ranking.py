"""From embedded tracklets to scores: which tracklets query which, how far apart they are, and what a protocol says."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from keyreid.config import EvaluationConfig
from keyreid.distributed.ranks import Ranks
from keyreid.embedding.vectors import Vectors, VectorsAbout, places_of
from keyreid.errors import DataError
from keyreid.evaluation.counting import Comparison, Strips, judge_strips, nearest_entries, row_blocks
from keyreid.evaluation.protocols import Answers, Scores, Side, protocol_named
from keyreid.shards.shard_set import ShardSet

JudgedSet = Literal["test", "holdout"]  # a split's test set, or the training identities that `data.holdout` keeps out
Shown = dict[int, list[tuple[int, float, bool]]]  # of a query, its nearest: entry, distance, whether it is a match


@dataclass(frozen=True)
class Ranking:
    """A judged comparison.

    Attributes:
        query, gallery: int64 [Q], [G], positions in the shards.
        about: what the vectors are.
    """

    query: np.ndarray
    gallery: np.ndarray
    about: VectorsAbout
    scores: Scores
    strips: Strips
    answers: Answers
    ranks: Ranks

    def nearest(self, rows: np.ndarray, top: int) -> Shown:
        """What the protocol that judged shows these queries first; a collective."""
        return nearest_entries(self.strips, self.answers, rows, top, self.ranks)


def query_and_gallery(shards: ShardSet, split_number: int, part: JudgedSet = "test") -> tuple[np.ndarray, np.ndarray]:
    """Positions of queries and gallery (without queries and junk), int64 [Q], [G].

    Raises:
        DataError: there are none.
    """
    prefix = "holdout_" if part == "holdout" else ""
    query, gallery = (np.asarray(shards.select(f"{prefix}{name}", split_number)) for name in ("query", "gallery"))
    if not len(query) or not len(gallery):
        which = "the identities held out" if part == "holdout" else f"split {split_number}"
        raise DataError(f"{shards.location}: {which} has {len(query)} queries and {len(gallery)} gallery tracklets")
    return query, gallery


def joined(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """The gallery, followed by those queries that it does not hold."""
    return np.concatenate([gallery, query[~np.isin(query, gallery)]])


def rank_gallery(
    vectors: Vectors,
    shards: ShardSet,
    query: np.ndarray,
    gallery: np.ndarray,
    evaluation: EvaluationConfig,
    protocols: Sequence[str],
    ranks: Ranks | None = None,
) -> dict[str, Ranking]:
    """Compare and judge, once for each protocol; a collective, with the same result on all ranks.

    Args:
        vectors: this rank's.
        query, gallery: positions; the gallery is without junk; protocols that want the queries in it get them.
        evaluation: distance and re-ranking.

    Raises:
        DataError: a tracklet has no vector, or no query has a match.
        ConfigError: a protocol is unknown, the distance does not fit the vectors, or too many are to be re-ranked.
    """
    ranks = ranks or Ranks.alone()
    with_queries = {name: protocol_named(name).queries_in_gallery for name in protocols}
    asking = _own_rows(vectors, shards, query, ranks)
    rankings = {}
    for with_them in sorted(set(with_queries.values())):
        entries = joined(query, gallery) if with_them else gallery
        sides = side_of(shards, query), side_of(shards, entries)
        answers = {name: Answers(*sides, name) for name, wanted in with_queries.items() if wanted == with_them}
        for answer in answers.values():
            answer.check()
        there = _own_rows(vectors, shards, entries, ranks)
        strips: Strips = Comparison(vectors.embeddings, asking, there, evaluation.distance, ranks)
        if evaluation.rerank:
            strips = Reranked(strips, len(query), len(entries), evaluation, ranks)
        for (name, answer), scores in zip(
            answers.items(), judge_strips(strips, list(answers.values()), ranks), strict=True
        ):
            rankings[name] = Ranking(query, entries, vectors.about, scores, strips, answer, ranks)
    return {name: rankings[name] for name in protocols}


class Reranked:
    """Re-ranked distances, as `Strips`: the first rank has them all, and the others meet it while it works."""

    def __init__(
        self, comparison: Comparison, queries: int, gallery: int, evaluation: EvaluationConfig, ranks: Ranks
    ) -> None:
        """Say what it takes, and find the neighbourhoods; ConfigError where there are too many tracklets."""
        from keyreid.embedding.reranking import Reranking, check_size  # brings scipy

        check_size(queries + gallery)
        self._count, self._rows, self._ranks = queries, comparison.rows, ranks
        self.entries = np.arange(gallery if ranks.first else 0)
        everyone = comparison.everyone()
        if everyone is not None:
            self._reranking = Reranking(everyone, queries, evaluation.distance, device=ranks.device)
            print(self._reranking.cost())
        ranks.in_step(iter(()) if everyone is None else self._reranking.prepare())

    def strips(self, wanted: np.ndarray | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """See `Strips`."""
        for rows in row_blocks(self._count, self._rows, wanted):
            nothing = np.empty((rows.stop - rows.start, 0), np.float32)
            yield rows, self._reranking.distances(rows) if self._ranks.first else nothing


def side_of(shards: ShardSet, positions: np.ndarray) -> Side:
    """Identities, cameras and frames of tracklets, as protocols take them."""
    frames = np.asarray(shards.index.frames[positions], np.int64)
    return Side(shards.identities[positions], shards.cameras[positions], frames)


def _own_rows(vectors: Vectors, shards: ShardSet, positions: np.ndarray, ranks: Ranks) -> np.ndarray:
    """int64 [n]: the row of each tracklet here, -1 where another rank has it; DataError where none has."""
    keys = shards.index.keys(positions)
    rows = places_of(vectors.described["key"], keys)
    there = ranks.added((rows >= 0).astype(np.int64))
    if not there.all():
        vectors.rows_of(keys[there == 0])
    return rows
