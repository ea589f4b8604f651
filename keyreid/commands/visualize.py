"""`keyreid visualize`: pictures of what a model sees and finds."""

from pathlib import Path
from typing import Annotated

import typer

from keyreid.commands.options import Configuration, Metric, Overrides, Shards, Verify, Weights

app = typer.Typer(help="Draw ranked lists, guidance, attention and curves.", no_args_is_help=True)

Keys = Annotated[list[str] | None, typer.Option("--key", help="A tracklet to show; repeat for several.")]
Count = Annotated[int, typer.Option(min=1, help="Number of tracklets, evenly spaced, without --key.")]


@app.command("ranked")
def ranked(
    vectors: Annotated[Path, typer.Argument(help="Vectors from `evaluate` or `embed`.")],
    shards: Annotated[str, typer.Option(help="Shards with the tracklets' pictures.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("ranked.png"),
    protocol: Annotated[str, typer.Option(help="torchreid, official, inclusive or released.")] = "torchreid",
    distance: Metric = "euclidean",
    rerank: Annotated[bool, typer.Option(help="Re-rank by k-reciprocal neighbours.")] = False,
    count: Annotated[int, typer.Option(min=1, help="Queries of each kind: best, worst, random.")] = 8,
    key: Keys = None,
    seed: Annotated[int, typer.Option(help="Seed of the random queries.")] = 1234,
    split_number: Annotated[int, typer.Option(min=0, help="Which split of the dataset.")] = 0,
) -> None:
    """Draw queries and their matches: green frames are right, red ones wrong."""
    import numpy as np
    import pyarrow as pa

    from keyreid.config import EvaluationConfig
    from keyreid.embedding.vectors import Vectors, rows_of
    from keyreid.evaluation.pictures import TOP, chosen_queries, ranked_picture
    from keyreid.evaluation.ranking import query_and_gallery, rank_gallery
    from keyreid.shards.shard_set import ShardSet

    packed = ShardSet.open(shards)
    query, gallery = query_and_gallery(packed, split_number)
    rows = rows_of(pa.array(packed.index.keys(query)), key, "the queries") if key else None
    settings = EvaluationConfig(distance=distance, rerank=rerank)
    ranking = rank_gallery(Vectors.load(vectors), packed, query, gallery, settings, (protocol,))[protocol]
    wanted = list(chosen_queries(ranking, count, seed).values()) if rows is None else [rows]
    shown = ranking.nearest(np.unique(np.concatenate(wanted)), TOP)
    _save(ranked_picture(ranking, shown, packed, count, seed, rows), out)


@app.command("guidance")
def guidance(
    shards: Annotated[str, typer.Argument(help="Shards.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("guidance.png"),
    key: Keys = None,
    count: Count = 4,
    frames: Annotated[int, typer.Option(min=1, help="Frames per tracklet, evenly spaced.")] = 6,
) -> None:
    """Draw the packed part heatmaps of tracklets over their frames."""
    from keyreid.shards.shard_set import ShardSet
    from keyreid.visualization.guidance import guidance_picture

    packed = ShardSet.open(shards)
    _save(guidance_picture(packed, _positions(packed, key, count), frames), out)


@app.command("attention")
def attention(
    weights: Weights,
    overrides: Overrides = None,
    shards: Shards = None,
    config: Configuration = None,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("attention.png"),
    key: Keys = None,
    count: Count = 4,
    verify: Verify = True,
) -> None:
    """Draw where the last block's class token and each part's token look."""
    import torch

    from keyreid.checkpoints.trained import open_trained
    from keyreid.shards.shard_set import ShardSet
    from keyreid.visualization.attention import attention_picture

    trained = open_trained(weights, config, overrides or (), shards, verify)
    packed = ShardSet.from_config(trained.config.data)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network, known = trained.network.to(device), trained.knows_cameras(packed)
    _save(attention_picture(network, packed, _positions(packed, key, count), trained.config, known, device), out)


@app.command("curves")
def curves(
    scores: Annotated[list[Path], typer.Argument(help="scores.json of evaluations, or files from --json.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("cmc.png"),
    title: Annotated[str, typer.Option(help="Title above the curves.")] = "CMC",
) -> None:
    """Draw CMC curves of several evaluations in one picture, each named by its folder, dataset and protocol."""
    from keyreid.evaluation.scores import read_scores
    from keyreid.visualization.curves import draw_cmc

    named = {}
    for path in scores:
        result = read_scores(path)
        for protocol, values in result["protocols"].items():
            named[f"{path.parent.name or path.stem}, {result['dataset']}, {protocol}"] = values
    draw_cmc(named, title, out)
    print(out)


def _positions(shards, keys: list[str] | None, count: int) -> list[int]:
    """The named tracklets, or evenly spaced ones."""
    from keyreid.visualization.guidance import evenly_spaced

    if not keys:
        return evenly_spaced(len(shards), count)
    return [shards.position_of(key) for key in keys]


def _save(picture, out: Path) -> None:
    from keyreid.visualization.canvas import save_picture

    save_picture(picture, out)
    print(f"{out}: {picture.width} x {picture.height} pixels")
