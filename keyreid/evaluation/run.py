"""One evaluation: embed the test tracklets on all ranks, judge them by named protocols, write scores and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from keyreid.config import Config
from keyreid.errors import DataError, KeyreidError
from keyreid.evaluation.features import extract
from keyreid.evaluation.report import combine, write_json
from keyreid.evaluation.scoring import Ranking, rank_gallery
from keyreid.evaluation.vectors import Vectors
from keyreid.model import KeyReID
from keyreid.shards.index import ShardSet

Part = Literal["test", "holdout"]


def evaluate(
    model: KeyReID | None,
    shards: ShardSet,
    config: Config,
    out_dir: Path,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    protocols: Sequence[str] = (),
    part: Part = "test",
    vectors: Vectors | None = None,
) -> dict[str, Any]:
    """Evaluate a model on the test split that the configuration names. All ranks call it and get the same result.

    Writes to `out_dir`: `vectors.npz`, `scores.json`, `ranked.png`, `cmc.png`.

    Args:
        protocols: names; default `config.evaluation.protocol`. Pictures show the first.
        part: `holdout` judges the training identities that `data.holdout` kept out of training.
        vectors: embedded earlier; then nothing is embedded and the model may be None.

    Returns:
        `report.combine`'s object with `split_number`, `part`, `distance` and `rerank`; beside it `pictures` and
        `vectors`, the paths of what was written.

    Raises:
        DataError: the split has no queries, or no query has a match.
    """
    protocols = tuple(protocols) or (config.evaluation.protocol,)
    query, gallery = test_positions(shards, config.data.split_number, part)
    if vectors is None:
        vectors = extract(model, shards, sorted({*query, *gallery}), config, rank, world_size, device)
    result: Any = None
    if rank == 0:
        try:
            result = _judge_and_draw(vectors, shards, config, out_dir, device, protocols, part, query, gallery)
        except KeyreidError as error:  # the other ranks wait for an answer
            result = error
    if world_size > 1:
        box = [result]
        dist.broadcast_object_list(box, src=0)
        result = box[0]
    if isinstance(result, KeyreidError):
        raise result
    return result


def test_positions(shards: ShardSet, split_number: int, part: Part = "test") -> tuple[list[int], list[int]]:
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


def _judge_and_draw(
    vectors: Vectors,
    shards: ShardSet,
    config: Config,
    out_dir: Path,
    device: torch.device | str,
    protocols: tuple[str, ...],
    part: Part,
    query: list[int],
    gallery: list[int],
) -> dict[str, Any]:
    out_dir.mkdir(parents=True, exist_ok=True)
    vectors.save(out_dir / "vectors.npz")
    query_vectors, gallery_vectors = (
        vectors[vectors.rows_of([shards.tracklets[position].key for position in positions])]
        for positions in (query, gallery)
    )
    rankings = rank_gallery(query_vectors, gallery_vectors, config.evaluation, protocols, device)
    junk = len(shards.select("junk", config.data.split_number)) if part == "test" else 0
    scores = {name: {**ranking.scores.as_dict(), "junk": junk} for name, ranking in rankings.items()}
    result = combine(
        scores,
        vectors.dataset,
        split_number=config.data.split_number,
        part=part,
        distance=config.evaluation.distance,
        rerank=config.evaluation.rerank,
    )
    write_json(result, out_dir / "scores.json")
    pictures = draw(rankings, shards, config, out_dir)
    return {**result, "pictures": [str(path) for path in pictures], "vectors": str(out_dir / "vectors.npz")}


def draw(rankings: dict[str, Ranking], shards: ShardSet, config: Config, out_dir: Path) -> list[Path]:
    """Write the ranked lists of the first ranking and the CMC curves of all; gives their paths."""
    from keyreid.visualization.curves import draw_cmc
    from keyreid.visualization.evaluation import ranked_picture

    if not config.evaluation.pictures:
        return []
    ranked, cmc = out_dir / "ranked.png", out_dir / "cmc.png"
    first = next(iter(rankings.values()))
    ranked_picture(first, shards, config.evaluation.pictures, config.seed).save(ranked)
    draw_cmc({name: ranking.scores for name, ranking in rankings.items()}, first.query.dataset, cmc)
    return [ranked, cmc]
