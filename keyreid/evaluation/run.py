"""One evaluation: embed the test tracklets on all ranks, judge them by named protocols, write scores and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from keyreid.config import Config
from keyreid.embedding.features import extract
from keyreid.embedding.vectors import Vectors
from keyreid.errors import DataError, KeyreidError
from keyreid.evaluation.protocols import Side, judge, protocol_named
from keyreid.evaluation.report import combine, write_json
from keyreid.evaluation.scoring import rank_gallery
from keyreid.model import KeyReID
from keyreid.shards.shard_set import ShardSet

Part = Literal["test", "holdout"]
SCORES, PAGE, PICTURES = "scores.json", "index.html", ("ranked.png", "cmc.png", "guidance.png", "attention.png")


def evaluate(
    model: KeyReID,
    shards: ShardSet,
    config: Config,
    out_dir: Path,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    protocols: Sequence[str] = (),
    part: Part = "test",
    vectors_path: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a model on the test split that the configuration names. All ranks call it and get the same result.

    Writes what `judge_vectors` writes, and the vectors.

    Args:
        protocols: names; default `config.evaluation.protocol`. Pictures show the first.
        part: `holdout` judges the training identities that `data.holdout` kept out of training.
        vectors_path: default `out_dir/vectors.npz`.

    Returns:
        `judge_vectors`' result and `vectors`, the path.

    Raises:
        DataError: the split has no queries, or no query has a match.
    """
    query, gallery = test_positions(shards, config.data.split_number, part)
    vectors = extract(model, shards, sorted({*query, *gallery}), config, rank, world_size, device)
    path = vectors_path or out_dir / "vectors.npz"
    if vectors is not None:
        vectors.save(path)
    result = judge_vectors(vectors, model, shards, config, out_dir, rank, world_size, device, protocols, part)
    return {**result, "vectors": str(path)}


def judge_vectors(
    vectors: Vectors | None,
    model: KeyReID | None,
    shards: ShardSet,
    config: Config,
    out_dir: Path,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    protocols: Sequence[str] = (),
    part: Part = "test",
) -> dict[str, Any]:
    """Judge embedded tracklets. All ranks call it and get the same result; the first one needs the vectors.

    Writes to `out_dir`: `scores.json` and, unless `evaluation.pictures` is 0, `ranked.png`, `cmc.png`, `guidance.png`,
    `attention.png` (where there is a model) and `index.html`, which shows them all.

    Returns:
        `report.combine`'s object with `split_number`, `part`, `distance` and `rerank`; beside it `pictures` and
        `files`, the paths of the pictures and of all that was written.
    """
    protocols = tuple(protocols) or (config.evaluation.protocol,)
    result: Any = None
    if rank == 0:
        try:
            result = _judge_and_draw(vectors, model, shards, config, out_dir, device, protocols, part)
        except (KeyreidError, OSError) as error:  # the other ranks wait for an answer
            result = error
    if world_size > 1:
        box = [result]
        dist.broadcast_object_list(box, src=0)
        result = box[0]
    if isinstance(result, Exception):
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


def check_judgeable(shards: ShardSet, config: Config, part: Part = "test") -> int:
    """How many queries the configured protocol will find valid; known from the index, before anything is embedded.

    Raises:
        DataError: none, or there are no queries.
    """
    sides = []
    for positions in test_positions(shards, config.data.split_number, part):
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


def split_vectors(
    vectors: Vectors, shards: ShardSet, split_number: int, part: Part = "test"
) -> tuple[Vectors, Vectors]:
    """The vectors of a split's queries and gallery.

    Raises:
        DataError: one of them is not among the vectors.
    """
    query, gallery = (
        vectors[vectors.rows_of([shards.tracklets[position].key for position in positions])]
        for positions in test_positions(shards, split_number, part)
    )
    return query, gallery


def _judge_and_draw(
    vectors: Vectors,
    model: KeyReID | None,
    shards: ShardSet,
    config: Config,
    out_dir: Path,
    device: torch.device | str,
    protocols: tuple[str, ...],
    part: Part,
) -> dict[str, Any]:
    out_dir.mkdir(parents=True, exist_ok=True)
    query, gallery = split_vectors(vectors, shards, config.data.split_number, part)
    rankings = rank_gallery(query, gallery, config.evaluation, protocols, device)
    junk = len(shards.select("junk", config.data.split_number)) if part == "test" else 0
    scores = {name: {**ranking.scores.as_dict(), "junk": junk} for name, ranking in rankings.items()}
    result = combine(
        scores,
        _label(shards, config.data.split_number, part),
        split_number=config.data.split_number,
        part=part,
        distance=config.evaluation.distance,
        rerank=config.evaluation.rerank,
    )
    if (out_dir / SCORES).exists():  # beside the new scores, the pictures of an earlier evaluation would be wrong
        for name in (PAGE, *PICTURES):
            (out_dir / name).unlink(missing_ok=True)
    write_json(result, out_dir / SCORES)
    pictures: list[Path] = []
    if config.evaluation.pictures:
        from keyreid.visualization.evaluation import draw  # matplotlib only here: trials of a search draw nothing
        from keyreid.visualization.page import write_page

        pictures = draw(rankings, model, shards, config, out_dir, device)
        write_page(out_dir / PAGE, result, pictures)
    files = [out_dir / SCORES, *pictures, *([out_dir / PAGE] if pictures else [])]
    return {**result, "pictures": [str(path) for path in pictures], "files": [str(path) for path in files]}


def _label(shards: ShardSet, split_number: int, part: Part) -> str:
    """The data set as it stands beside numbers: its name, its split where it has several."""
    split = f" split {split_number}" if shards.card["splits"] else ""
    return f"{shards.card['name']}{split}{' (held out of training)' if part == 'holdout' else ''}"
