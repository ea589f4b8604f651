"""One evaluation: embed the test tracklets on all ranks, judge them by named protocols, write scores and pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keyreid.config import Config
from keyreid.distributed.ranks import Ranks
from keyreid.embedding.features import extract
from keyreid.embedding.vectors import Vectors
from keyreid.errors import DataError, KeyreidError
from keyreid.evaluation.protocols import Answers, protocol_named
from keyreid.evaluation.ranking import (
    JudgedSet,
    Ranking,
    Shown,
    joined,
    query_and_gallery,
    rank_gallery,
    side_of,
)
from keyreid.evaluation.scores import combine, write_scores
from keyreid.model import KeyReID
from keyreid.shards.shard_set import ShardSet

SCORES, VECTORS, PAGE = "scores.json", "vectors.parquet", "index.html"
PICTURES = ("ranked.png", "cmc.png", "guidance.png", "attention.png")


def evaluate(
    model: KeyReID,
    shards: ShardSet,
    config: Config,
    out: Path,
    ranks: Ranks | None = None,
    protocols: Sequence[str] = (),
    part: JudgedSet = "test",
    vectors_path: Path | None = None,
    weights: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Evaluate a model on the test split that the configuration names. All ranks call it and get the same result.

    Writes what `judge_vectors` writes, and the vectors.

    Args:
        protocols: names; default `config.evaluation.protocol`. Pictures show the first.
        part: `holdout` judges the training identities that `data.holdout` kept out of training.
        vectors_path: default `out/vectors.parquet`.
        weights: what the vectors say of their network, see `VectorsAbout`.

    Returns:
        `judge_vectors`' result and `vectors`, the path.
    """
    positions = np.union1d(*query_and_gallery(shards, config.data.split_number, part))
    vectors = extract(model, shards, positions, config, ranks, weights=weights)
    path = vectors_path or out / VECTORS
    vectors.save(path, ranks)
    return {**judge_vectors(vectors, model, shards, config, out, ranks, protocols, part), "vectors": str(path)}


def judge_vectors(
    vectors: Vectors,
    model: KeyReID | None,
    shards: ShardSet,
    config: Config,
    out: Path,
    ranks: Ranks | None = None,
    protocols: Sequence[str] = (),
    part: JudgedSet = "test",
) -> dict[str, Any]:
    """Judge embedded tracklets. All ranks call it, each with its own vectors, and get the same result.

    Writes to `out`: `scores.json` and, unless `evaluation.pictures` is 0, `ranked.png`, `cmc.png`, `guidance.png`,
    `attention.png` (where there is a model) and `index.html`, which shows them all.

    Returns:
        `scores.combine`'s object with `split_number`, `part`, `distance` and `rerank`; beside it `pictures` and
        `files`, the paths of the pictures and of all that was written.

    Raises:
        DataError: the split has no queries, or no query has a match.
    """
    ranks, settings = ranks or Ranks.alone(), config.evaluation
    sides = query_and_gallery(shards, config.data.split_number, part)
    rankings = rank_gallery(vectors, shards, *sides, settings, protocols or (settings.protocol,), ranks)
    shown: Shown = {}
    if settings.pictures:
        from keyreid.evaluation.pictures import TOP, chosen_queries

        first = next(iter(rankings.values()))
        rows = np.unique(np.concatenate(list(chosen_queries(first, settings.pictures, config.seed).values())))
        shown = first.nearest(rows, TOP)
    result: Any = None
    if ranks.first:
        try:
            result = _write_all(rankings, shown, model, shards, config, out, ranks.device, part)
        except (KeyreidError, OSError) as error:  # the other ranks wait for an answer
            result = error
    result = ranks.from_first(result)
    if isinstance(result, Exception):
        raise result
    return result


def check_judgeable(shards: ShardSet, config: Config, part: JudgedSet = "test") -> int:
    """How many queries the configured protocol will find valid; known from the index, before anything is embedded.

    Raises:
        DataError: none, or there are no queries.
        ConfigError: too many tracklets are to be re-ranked.
    """
    query, gallery = query_and_gallery(shards, config.data.split_number, part)
    if protocol_named(config.evaluation.protocol).queries_in_gallery:
        gallery = joined(query, gallery)
    if config.evaluation.rerank:
        from keyreid.embedding.reranking import check_size  # brings scipy

        check_size(len(query) + len(gallery))
    try:
        return Answers(side_of(shards, query), side_of(shards, gallery), config.evaluation.protocol).check()
    except DataError as error:
        raise DataError(f"{shards.location}: {error}") from None


def _write_all(
    rankings: Mapping[str, Ranking],
    shown: Shown,
    model: KeyReID | None,
    shards: ShardSet,
    config: Config,
    out: Path,
    device: torch.device,
    part: JudgedSet,
) -> dict[str, Any]:
    split_number, settings = config.data.split_number, config.evaluation
    junk = len(shards.select("junk", split_number)) if part == "test" else 0
    split = f" split {split_number}" if shards.card["splits"] else ""
    label = f"{shards.card['name']}{split}{' (held out of training)' if part == 'holdout' else ''}"
    scores = {name: {**ranking.scores.as_dict(), "junk": junk} for name, ranking in rankings.items()}
    about = {"split_number": split_number, "part": part, "distance": settings.distance, "rerank": settings.rerank}
    result = combine(scores, label, **about)
    if (out / SCORES).exists():  # beside the new scores, the pictures of an earlier evaluation would be wrong
        for name in (PAGE, *PICTURES):
            (out / name).unlink(missing_ok=True)
    write_scores(result, out / SCORES)
    pictures: list[Path] = []
    if settings.pictures:
        from keyreid.evaluation.pictures import draw, write_result_page  # matplotlib: trials of a search draw nothing

        pictures = draw(rankings, shown, model, shards, config, out, device)
        write_result_page(out / PAGE, result, pictures)
    files = [out / SCORES, *pictures, *([out / PAGE] if pictures else [])]
    return {**result, "pictures": list(map(str, pictures)), "files": list(map(str, files))}
