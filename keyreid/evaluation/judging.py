"""One evaluation: embed the test tracklets on all ranks, judge them by named protocols, write scores and pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keyreid.config import Config
from keyreid.distributed.ranks import Ranks
from keyreid.embedding.features import extract
from keyreid.embedding.vectors import Vectors
from keyreid.errors import DataError, KeyreidError
from keyreid.evaluation.protocols import Side, judge, protocol_named
from keyreid.evaluation.ranking import JudgedSet, Ranking, query_and_gallery, rank_gallery, split_vectors
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
    query, gallery = query_and_gallery(shards, config.data.split_number, part)
    vectors = extract(model, shards, sorted({*query, *gallery}), config, ranks, weights=weights)
    path = vectors_path or out / VECTORS
    if vectors is not None:
        vectors.save(path)
    return {**judge_vectors(vectors, model, shards, config, out, ranks, protocols, part), "vectors": str(path)}


def judge_vectors(
    vectors: Vectors | None,
    model: KeyReID | None,
    shards: ShardSet,
    config: Config,
    out: Path,
    ranks: Ranks | None = None,
    protocols: Sequence[str] = (),
    part: JudgedSet = "test",
) -> dict[str, Any]:
    """Judge embedded tracklets. All ranks call it and get the same result; the first one needs the vectors.

    Writes to `out`: `scores.json` and, unless `evaluation.pictures` is 0, `ranked.png`, `cmc.png`, `guidance.png`,
    `attention.png` (where there is a model) and `index.html`, which shows them all.

    Returns:
        `scores.combine`'s object with `split_number`, `part`, `distance` and `rerank`; beside it `pictures` and
        `files`, the paths of the pictures and of all that was written.

    Raises:
        DataError: the split has no queries, or no query has a match.
    """
    ranks = ranks or Ranks.alone()
    result: Any = None
    if ranks.first:
        try:
            query, gallery = split_vectors(vectors, shards, config.data.split_number, part)
            protocols = protocols or (config.evaluation.protocol,)
            rankings = rank_gallery(query, gallery, config.evaluation, protocols, ranks.device)
            result = _write_all(rankings, model, shards, config, out, ranks.device, part)
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
    """
    sides = []
    for positions in query_and_gallery(shards, config.data.split_number, part):
        records = [shards.tracklets[position] for position in positions]
        columns = ([getattr(record, name) for record in records] for name in ("identity", "camera", "frames"))
        sides.append(Side(*(np.array(column, np.int64) for column in columns)))
    query, gallery = sides
    if protocol_named(config.evaluation.protocol).queries_in_gallery:
        gallery = Side(*(np.concatenate(pair) for pair in zip(astuple(gallery), astuple(query), strict=True)))
    # Whatever the distances are, the same queries are valid.
    some = np.broadcast_to(np.arange(len(gallery), dtype=np.float32), (len(query), len(gallery)))
    try:
        return judge(some, query, gallery, config.evaluation.protocol).valid_queries
    except DataError as error:
        raise DataError(f"{shards.location}: {error}") from None


def _write_all(
    rankings: Mapping[str, Ranking],
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

        pictures = draw(rankings, model, shards, config, out, device)
        write_result_page(out / PAGE, result, pictures)
    files = [out / SCORES, *pictures, *([out / PAGE] if pictures else [])]
    return {**result, "pictures": list(map(str, pictures)), "files": list(map(str, files))}
