"""The pictures of an evaluation: which queries are shown, and their ranked lists from the shards' frames."""

from __future__ import annotations

import numpy as np
from PIL import Image

from keyreid.datasets.tracklet import DISTRACTOR_IDENTITY
from keyreid.evaluation.protocols import ranked_list
from keyreid.evaluation.scoring import Ranking
from keyreid.evaluation.vectors import Vectors
from keyreid.shards.index import ShardSet
from keyreid.visualization.ranked import RankedRow, Tile, draw_ranked

TOP = 10


def chosen_queries(ranking: Ranking, count: int, seed: int) -> dict[str, np.ndarray]:
    """Rows of the best, the worst and some random valid queries, by AP; up to `count` of each kind."""
    ap = ranking.scores.average_precision
    valid = np.flatnonzero(~np.isnan(ap))
    ordered = valid[np.argsort(-ap[valid], kind="stable")]
    drawn = np.sort(np.random.default_rng(seed).permutation(valid)[:count])
    worst = ordered[::-1][: min(count, len(valid) // 2)]  # a few queries are not shown as best and worst both
    return {
        "Best queries": ordered[: min(count, len(valid) - len(worst))],
        "Worst queries": worst,
        "Random queries": drawn,
    }


def ranked_picture(ranking: Ranking, shards: ShardSet, count: int, seed: int) -> Image.Image:
    """Ranked lists of best, worst and random queries, as the ranking's protocol shows them.

    A tracklet is shown by its middle frame. Tracklets that the protocol leaves out for a query do not appear.
    """
    scores = ranking.scores
    groups = []
    for heading, rows in chosen_queries(ranking, count, seed).items():
        groups.append((heading, [_row(ranking, shards, int(row)) for row in rows]))
    title = f"{ranking.query.dataset} · protocol {scores.protocol}"
    subtitle = (
        f"mAP {scores.mean_ap:.1%} · rank-1 {scores.cmc(1)[0]:.1%} · {scores.valid_queries} valid queries of "
        f"{scores.queries} · gallery {scores.gallery} · blue: query, green: right, red: wrong"
    )
    return draw_ranked(groups, title, subtitle)


def _row(ranking: Ranking, shards: ShardSet, row: int) -> RankedRow:
    query, gallery = ranking.query, ranking.gallery
    entries, right = ranked_list(ranking.distance, row, query.side, gallery.side, ranking.scores.protocol, TOP)
    results = [
        _tile(gallery, entry, shards, ranking.distance[row, entry], bool(match))
        for entry, match in zip(entries.tolist(), right, strict=True)
    ]
    ap, first = ranking.scores.average_precision[row], ranking.scores.first_match[row]
    label = f"{query.keys[row]} · AP {ap:.1%} · first match at rank {first}"
    return RankedRow(label, _tile(query, row, shards), results)


def _tile(
    vectors: Vectors, row: int, shards: ShardSet, distance: float | None = None, right: bool | None = None
) -> Tile:
    position = shards.position[str(vectors.keys[row])]
    picture = shards.picture(position, shards.tracklets[position].frames // 2)
    identity = int(vectors.identities[row])
    who = "distractor" if identity == DISTRACTOR_IDENTITY else f"identity {identity}"
    first = "query" if distance is None else f"{distance:.4g}"
    return Tile(picture, (first, who, f"camera {vectors.cameras[row]}"), right)
