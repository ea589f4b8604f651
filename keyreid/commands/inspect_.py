"""`keyreid inspect`: what is in a set of shards, and whether it is intact."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keyreid.commands.options import Share, parse_share
from keyreid.errors import ConfigError
from keyreid.plain_text import say

if TYPE_CHECKING:
    from keyreid.shards.shard_set import ShardSet

SHEET_TRACKLETS = 12
_BAR = 50
_SHOWN = 200  # problems that are printed
_LANES_LOOKED_AT = 8


def inspect_(
    shards: Annotated[str, typer.Argument(help="folder (or URL) that `keyreid shard` wrote")],
    verify: Annotated[bool, typer.Option("--verify", help="check every hash, header and member of a folder")] = False,
    share: Share = "0/1",
    against: Annotated[Path | None, typer.Option(help="compare with the dataset in this folder, the source")] = None,
    keypoints: Annotated[
        Path | None, typer.Option(help="with --against: the keypoint files that were packed; default: ROOT/keypoints")
    ] = None,
    sheet: Annotated[Path | None, typer.Option(help="write a contact sheet (PNG) of some tracklets")] = None,
    config: Annotated[
        Path | None, typer.Option(help="say what training by this configuration reads: windows, bytes, cache")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="with --config: a change to it, section.key=value")
    ] = None,
    tracklet: Annotated[str | None, typer.Option(help="print the JSON of the tracklet with this key")] = None,
) -> None:
    """Show what is in a set of shards; check it, compare it with its source, draw it. Status 1 if anything is wrong."""
    from keyreid.shards.members import JSON
    from keyreid.shards.shard_set import ShardSet
    from keyreid.visualization.canvas import save_picture
    from keyreid.visualization.guidance import evenly_spaced, guidance_picture

    if verify:
        if "://" in shards:
            raise ConfigError(
                f"{shards}: --verify reads a folder; verify the shards where they lie, before or after copying them "
                "(what is fetched from a URL is checked against its SHA-256 in any case)"
            )
        _verify(Path(shards).expanduser(), parse_share(share))
    opened = ShardSet.open(shards)
    if tracklet is not None:
        say(opened.read_member(opened.position_of(tracklet), JSON))
        return
    _describe(opened)
    if config is not None:
        _describe_training(opened, config, overrides or [])
    if sheet is not None:
        save_picture(guidance_picture(opened, evenly_spaced(len(opened), SHEET_TRACKLETS)), sheet)
        say(f"contact sheet: {sheet}")
    if against is not None:
        _compare(opened, against.expanduser(), keypoints)


def _verify(folder: Path, share: tuple[int, int]) -> None:
    from keyreid.shards.card import read_card
    from keyreid.shards.verify import verify

    total = len(read_card(folder)["shards"][share[0] :: share[1]])
    mend = "run the same `keyreid shard` again: it packs what is damaged or missing anew and keeps the rest"
    good = f"{folder}: verified, {total} shards are whole"
    _report(verify(folder, len(os.sched_getaffinity(0)), share), (total + 1, "verifying", "shards"), good, mend)


def _compare(shards: "ShardSet", root: Path, keypoints: Path | None) -> None:
    from keyreid.datasets import open_dataset
    from keyreid.shards.verify import compare
    from keyreid.shards.writer import PackSettings

    source, packed = shards.card["source"], shards.card["settings"]
    dataset = open_dataset(source["dataset"], root, **source["options"])
    total = len(dataset.tracklets)
    if packed["keypoints"] != "keypoint files":
        keypoints = None
    elif keypoints is None and (root / "keypoints").is_dir():
        keypoints = root / "keypoints"
    elif keypoints is None:
        say(f"keypoints are not compared: {root / 'keypoints'} is not there; name their folder with --keypoints")
    results = compare(shards, dataset, PackSettings(root, keypoints, image=packed["image"], order=packed.get("order")))
    mend = "where the shards are out of date, delete those named and run the same `keyreid shard` again"
    good = f"{shards.location}: the same as {root}, {total} tracklets"
    _report(results, (total, "comparing", "tracklets"), good, mend)


def _report(results: Iterator[tuple[str, list]], tracked: tuple[Any, ...], good: str, mend: str) -> None:
    """Print the problems found while `track(results, *tracked)` shows how far it is; exits with 1 where there are."""
    from keyreid.progress import track

    found = [problem for _, problems in track(results, *tracked) for problem in problems]
    for problem in found[:_SHOWN]:
        say(str(problem))
    if len(found) > _SHOWN:
        say(f"... and {len(found) - _SHOWN} more")
    if found:
        say(f"{len(found)} {'problem' if len(found) == 1 else 'problems'}; {mend}", err=True)
        sys.exit(1)
    say(good)


def _describe(shards: "ShardSet") -> None:
    import numpy as np

    card = shards.card
    counts, size = card["counts"], sum(shard["bytes"] for shard in card["shards"]) / 1e9
    say(f"{card['name']} in {shards.location}: {len(card['shards'])} shards, {size:.3g} GB, by {card['tool']}")
    say(f"{'':10}{'tracklets':>12}{'frames':>12}{'identities':>12}")
    for name, row in {**card["by_split"], "in all": counts}.items():
        say(f"{name:10}{row['tracklets']:12}{row['frames']:12}{row['identities']:12}")
    splits = f"; {len(card['splits'])} splits, camera {card['query_camera']} queries the others"
    say(f"cameras: {', '.join(map(str, card['cameras']))}" + (splits if card["splits"] else ""))
    frames, known = counts["frames"], counts["frames_with_keypoints"]
    origin = f"from {card['settings']['heatmaps']['from']}" if known else "all zero, there are no keypoints"
    say(
        f"heatmaps: {origin}; {shards.parts} parts, {counts['heatmap_bytes'] / frames:.0f} bytes a frame; "
        f"{known} of {frames} frames have keypoints"
    )
    both = shards.index.width.astype(np.uint32) << 16 | shards.index.height
    sizes, often = np.unique(both, return_counts=True)
    width, height = divmod(int(sizes[often.argmax()]), 1 << 16)
    say(f"pictures: {len(sizes)} sizes, most often {width} x {height} (width x height)")
    lengths = shards.index.frames
    say(f"frames a tracklet: least {lengths.min()}, median {np.median(lengths):g}, most {lengths.max()}")
    edges = np.unique(np.geomspace(lengths.min(), lengths.max() + 1, 11).round().astype(int))
    heights = np.histogram(lengths, edges)[0]
    for low, high, height in zip(edges[:-1], edges[1:], heights, strict=True):
        label = f"{low}" if high == low + 1 else f"{low} to {high - 1}"
        say(f"{label:>12} {'#' * round(_BAR * height / heights.max())} {height}")


def _describe_training(shards: "ShardSet", path: Path, overrides: list[str]) -> None:
    """What training reads: an epoch's windows of a few lanes stand for all."""
    from keyreid.config import load_config
    from keyreid.shards.plan import TrainingPlan

    config = load_config(path, [*overrides, f"data.shards={json.dumps(shards.location)}"])
    data, plan = config.data, TrainingPlan(shards, config.data, config.clip, config.seed)
    lane = f"{data.identities // data.lanes} identities x {data.tracklets} tracklets"
    say(f"training by {path}: {data.lanes} lanes of {lane}, {plan.steps_per_epoch} steps an epoch")
    size = [shard["bytes"] for shard in shards.card["shards"]]
    if not data.window:
        say(f"no windows: each step draws from all {sum(size) / 1e9:.3g} GB; see data.window")
        return
    walks = [plan.windows(0, number) for number in range(min(data.lanes, _LANES_LOOKED_AT))]
    windows = [window for walk in walks for window in walk]
    counts = [sorted(map(len, walks)), sorted(len(w.shards) for w in windows), sorted(w.identities for w in windows)]
    a_lane, of_shards, of_people = (f"{each[0]} to {each[-1]}" for each in counts)
    say(f"windows: {a_lane} a lane, of {of_shards} shards with {of_people} identities")
    walked = [sum(w.sampler.steps_per_epoch for w in walk) / plan.steps_per_epoch for walk in walks]
    held = [[sum(size[shard] for shard in w.shards.tolist()) for w in walk] for walk in walks]
    epoch = max(map(sum, held))
    # A window, the next one, and for some batches the one before, which readers that are behind still read.
    three = max(sum(sorted(walk)[-3:]) for walk in held)
    say(
        f"a node reads for each of its lanes {epoch / plan.steps_per_epoch / 1e6:.3g} MB a step, {epoch / 1e9:.3g} GB "
        f"an epoch, and caches at most three windows, {three / 1e9:.3g} GB "
        f"(data.cache_gigabytes={data.cache_gigabytes:g} in all); "
        f"{1 - min(walked):.1%} of its steps fill up"
    )
