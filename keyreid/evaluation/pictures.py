"""The pictures of an evaluation and the page that shows them: which queries, and their ranked lists from the shards."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from keyreid.config import Config
from keyreid.datasets.tracklet import DISTRACTOR_IDENTITY
from keyreid.evaluation.ranking import Ranking, Shown
from keyreid.evaluation.scores import table
from keyreid.model import KeyReID
from keyreid.pages import Section, write_page
from keyreid.shards.shard_set import ShardSet
from keyreid.visualization.attention import attention_picture, can_draw_attention
from keyreid.visualization.canvas import save_picture
from keyreid.visualization.curves import draw_cmc
from keyreid.visualization.guidance import guidance_picture
from keyreid.visualization.ranked import RankedRow, Tile, draw_ranked

TOP = 10
SHOWN_IN_STRIPS = 2  # best and as many worst queries whose guidance and attention are shown
CAPTIONS = {
    "ranked": "Ranked lists: the query on the left, its nearest tracklets beside it; green right, red wrong.",
    "cmc": "Cumulative matching: the share of queries whose first match stands at a rank or before it.",
    "guidance": "Guidance: the part heatmaps of the best and worst queries over their frames.",
    "attention": "Attention of the class token in the last block, frame by frame, and of each part's token.",
}


def draw(
    rankings: Mapping[str, Ranking],
    shown: Shown,
    model: KeyReID | None,
    shards: ShardSet,
    config: Config,
    out: Path,
    device: torch.device | str = "cpu",
) -> list[Path]:
    """Write all pictures of an evaluation; gives their paths, the ranked lists first.

    Ranked lists are those of the first ranking (`shown`), CMC curves of all. Guidance, and attention where there is a
    model, are those of its best and worst queries; the model is shown their cameras as it was when it embedded them.
    """
    first = next(iter(rankings.values()))
    pictures = {"ranked": ranked_picture(first, shown, shards, config.evaluation.pictures, config.seed)}
    chosen = chosen_queries(first, SHOWN_IN_STRIPS, config.seed)
    rows = np.unique(np.concatenate([chosen["Best queries"], chosen["Worst queries"]]))
    positions = first.query[rows].tolist()
    pictures["guidance"] = guidance_picture(shards, positions)
    if model is not None and can_draw_attention(model):
        known = first.about.cameras_known is not False
        pictures["attention"] = attention_picture(model, shards, positions, config, known, device)
    for name, picture in pictures.items():
        save_picture(picture, out / f"{name}.png")
    scores = {name: ranking.scores.as_dict() for name, ranking in rankings.items()}
    draw_cmc(scores, first.about.dataset, out / "cmc.png")
    return [out / f"{name}.png" for name in CAPTIONS if name == "cmc" or name in pictures]


def write_result_page(path: Path, result: Mapping[str, Any], pictures: Sequence[Path]) -> None:
    """`scores.combine`'s object as one page: scores, what they mean, and every picture, which lie in its folder."""
    facts = [f"distance {result['distance']}"] if "distance" in result else []
    if result.get("rerank"):
        facts.append("re-ranked by k-reciprocal neighbours")
    shown = [(picture.name, CAPTIONS.get(picture.stem, picture.stem)) for picture in pictures]
    section = Section(preformatted=table(result), text=[", ".join(facts)] if facts else [], pictures=shown)
    write_page(path, f"{result['dataset']} · protocol {result['protocol']}", [section])


def chosen_queries(ranking: Ranking, count: int, seed: int) -> dict[str, np.ndarray]:
    """Rows of the best, the worst and some random valid queries, by AP; up to `count` of each kind."""
    ap = ranking.scores.average_precision
    valid = np.flatnonzero(~np.isnan(ap))
    ordered = valid[np.argsort(-ap[valid], kind="stable")]
    drawn = np.sort(np.random.default_rng(seed).permutation(valid)[:count])
    worst = ordered[::-1][: min(count, len(valid) // 2)]  # a few queries are not shown as best and worst both
    best = ordered[: min(count, len(valid) - len(worst))]
    return {"Best queries": best, "Worst queries": worst, "Random queries": drawn}


def ranked_picture(
    ranking: Ranking, shown: Shown, shards: ShardSet, count: int, seed: int, rows: np.ndarray | None = None
) -> Image.Image:
    """Ranked lists of best, worst and random queries (or of the given rows), as the ranking's protocol shows them.

    A tracklet is shown by its middle frame. Tracklets that the protocol leaves out for a query do not appear.
    """
    scores = ranking.scores
    chosen = chosen_queries(ranking, count, seed) if rows is None else {"Queries": rows}
    groups = [
        (heading, [_row(ranking, shown[int(row)], shards, int(row)) for row in rows])
        for heading, rows in chosen.items()
    ]
    title = f"{ranking.about.dataset} · protocol {scores.protocol}"
    subtitle = (
        f"mAP {scores.mean_ap:.1%} · rank-1 {scores.cmc(1)[0]:.1%} · {scores.valid_queries} valid queries of "
        f"{scores.queries} · gallery {scores.gallery} · blue: query, green: right, red: wrong"
    )
    return draw_ranked(groups, title, subtitle)


def _row(ranking: Ranking, nearest: list[tuple[int, float, bool]], shards: ShardSet, row: int) -> RankedRow:
    gallery, query = ranking.gallery, int(ranking.query[row])
    results = [_tile(shards, int(gallery[entry]), f"{distance:.4g}", match) for entry, distance, match in nearest]
    ap, first = ranking.scores.average_precision[row], ranking.scores.first_match[row]
    verdict = f"AP {ap:.1%} · first match at rank {first}" if first else "no match in the gallery"
    return RankedRow(f"{shards.index.keys([query])[0]} · {verdict}", _tile(shards, query, "query"), results)


def _tile(shards: ShardSet, position: int, head: str, right: bool | None = None) -> Tile:
    picture = shards.picture(position, int(shards.index.frames[position]) // 2)
    identity = int(shards.identities[position])
    who = "distractor" if identity == DISTRACTOR_IDENTITY else f"identity {identity}"
    return Tile(picture, (head, who, f"camera {shards.cameras[position]}"), right)
