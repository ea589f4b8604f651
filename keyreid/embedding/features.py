"""One vector a tracklet: the mean over its clips' embeddings, computed on any number of ranks with the same result.

All clips of all tracklets form one sequence that is cut into batches of equal size, whatever the tracklets' lengths
and however many ranks there are. A rank owns consecutive tracklets and runs the batches that hold their clips; a batch
on the border of two ranks is run by both. So every clip is embedded in the same batch and every mean is summed in the
same order on one rank as on many: bit for bit the same vectors where machine and thread count are the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist

from keyreid.config import Config
from keyreid.embedding.vectors import Vectors
from keyreid.guidance import named
from keyreid.model import KeyReID
from keyreid.model.inputs import prepare
from keyreid.progress import track
from keyreid.shards import open_reader
from keyreid.shards.batch import ClipBatch, ClipPlan
from keyreid.shards.index import ShardSet
from keyreid.shards.plan import evaluation_clips

_GATHER_BYTES = 64 * 2**20
UNKNOWN_CAMERA = -1  # what the network takes for a camera that it has not been trained on


def extract(
    model: KeyReID,
    shards: ShardSet,
    positions: Sequence[int],
    config: Config,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    cameras_known: bool = True,
) -> Vectors | None:
    """Embed tracklets. Every rank calls it; with several, the default process group must exist.

    Every rank runs equally many batches, so that a network whose weights are spread over the ranks works too. The
    model is put into evaluation mode and back. Memory of the first rank: N x D floats and one clip batch.

    Args:
        positions: of the tracklets in `shards.tracklets`.
        config: clip size, batch size, number of clips, reader and precision.
        cameras_known: the model was trained on these cameras; otherwise all are unknown to it.

    Returns:
        the vectors in the order of `positions` on the first rank, None on the others.
    """
    mode = named(config.model.guidance)
    clips = evaluation_clips(shards, positions, config.clip.frames, clips=config.evaluation.clips, mode=mode)
    counts = _clips_of_each(clips, positions)
    share = _shares(counts, world_size)
    batches = _batches_of(share, counts, config.evaluation.clips_per_batch)
    size = config.evaluation.clips_per_batch
    chosen = [clips[batch * size : (batch + 1) * size] for batch in batches[rank]]

    was_training = model.training
    model.eval()
    reader = open_reader(shards, iter(chosen), config, device=device)
    try:
        start = time.monotonic()
        shown = track(reader, len(chosen), "embedding", "batches", quiet=rank > 0)
        embedded = (_embed(model, batch.to(device), config, cameras_known) for batch in shown)
        means = _mean_by_tracklet(embedded, batches[rank], size, counts, share[rank])
        if rank == 0 and clips:
            rate = len(clips) / (time.monotonic() - start)
            print(f"embedded {len(counts)} tracklets, {len(clips)} clips: {rate:.1f} clips/s on {world_size} rank(s)")
    finally:
        reader.close()
        model.train(was_training)

    if world_size > 1:
        means = _gather_rows(means, [len(tracklets) for tracklets in share], rank, device)
    if rank > 0:
        return None
    width = model.width + model.parts * model.part_width
    records = [shards.tracklets[position] for position in positions]
    return Vectors(
        keys=np.array([record.key for record in records], np.str_),
        identities=np.array([-2 if record.identity is None else record.identity for record in records], np.int64),
        cameras=np.array([record.camera for record in records], np.int64),
        frames=np.array([record.frames for record in records], np.int64),
        vectors=means[:, :width].numpy(),
        visibility=means[:, width:].numpy(),
        global_width=model.width,
        dataset=str(shards.card.get("name", "")),
    )


def _clips_of_each(clips: Sequence[ClipPlan], positions: Sequence[int]) -> np.ndarray:
    """int64 [N]: how many clips each tracklet has; they come in the tracklets' order."""
    place = {position: row for row, position in enumerate(positions)}
    return np.bincount([place[clip.tracklet] for clip in clips], minlength=len(positions))


def _shares(counts: np.ndarray, world_size: int) -> list[range]:
    """The consecutive tracklets of each rank, with about as many clips each."""
    ends = np.cumsum(counts)
    cuts = np.searchsorted(ends, np.arange(1, world_size) * (ends[-1] / world_size), side="right") if len(ends) else []
    borders = [0, *(int(cut) for cut in cuts), len(counts)] if len(ends) else [0] * (world_size + 1)
    return [range(borders[rank], borders[rank + 1]) for rank in range(world_size)]


def _batches_of(share: list[range], counts: np.ndarray, size: int) -> list[list[int]]:
    """The batches that each rank runs: those with clips of its tracklets, then its last one again up to the longest."""
    ends = np.cumsum(counts)
    result = []
    for tracklets in share:
        if not len(tracklets):
            result.append([])
            continue
        first_clip = ends[tracklets.start] - counts[tracklets.start]
        result.append(list(range(first_clip // size, -(-ends[tracklets[-1]] // size))))
    longest = max(len(batches) for batches in result)
    return [batches + [batches[-1] if batches else 0] * (longest - len(batches)) for batches in result]


def _mean_by_tracklet(
    embedded: Iterator[torch.Tensor], batches: list[int], size: int, counts: np.ndarray, own: range
) -> torch.Tensor:
    """Means over the clips of this rank's tracklets: float32 [n, E] on the CPU.

    A batch's clips are summed by tracklet on the device in float64; a tracklet's batches are added in their order.

    Args:
        embedded: [B, E] of each of `batches`.
    """
    ends = np.cumsum(counts)
    tracklet_of = np.repeat(np.arange(len(counts)), counts)
    means = torch.zeros(len(own), 0)
    total: torch.Tensor | float = 0.0
    done = -1
    for number, vectors in zip(batches, embedded, strict=True):
        if done < 0:
            means = torch.zeros(len(own), vectors.shape[1])
        if number == done:  # run again only because another rank has more batches
            continue
        done = number
        last_clip = number * size + len(vectors)
        of_clip = tracklet_of[number * size : last_clip]
        present = np.unique(of_clip)
        members = torch.from_numpy(of_clip[None] == present[:, None]).to(vectors.device, torch.float64)
        for tracklet, clip_sum in zip(present.tolist(), (members @ vectors.double()).cpu(), strict=True):
            if tracklet in own:
                total = total + clip_sum
                if ends[tracklet] <= last_clip:
                    means[tracklet - own.start] = total / counts[tracklet]
                    total = 0.0
    return means


@torch.no_grad()
def _embed(model: KeyReID, batch: ClipBatch, config: Config, cameras_known: bool) -> torch.Tensor:
    """Embedding and visibility of each clip side by side: float32 [B, D + P]."""
    images, guidance = prepare(batch, model.guidance)
    cameras = batch.cameras if cameras_known else torch.full_like(batch.cameras, UNKNOWN_CAMERA)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[config.training.precision]
    device = batch.images.device.type
    # On a CPU half precision costs accuracy and saves nothing.
    with torch.autocast(device, dtype, enabled=dtype is not None and device != "cpu"):
        weights = next(model.parameters()).dtype
        vectors = model.embed(images.to(weights), guidance.to(weights), cameras)
    return torch.cat([vectors.float(), batch.visibility.float()], dim=1)


def _gather_rows(rows: torch.Tensor, lengths: list[int], rank: int, device: torch.device | str) -> torch.Tensor:
    """All ranks' rows in rank order, on the first rank's CPU; the others get their own back.

    Args:
        lengths: rows of each rank. They travel in pieces of `_GATHER_BYTES`, padded to equal length.
    """
    step = max(1, _GATHER_BYTES // (4 * rows.shape[1]))
    first_row = [sum(lengths[:owner]) for owner in range(len(lengths))]
    gathered = torch.empty(sum(lengths), rows.shape[1]) if rank == 0 else rows
    for start in range(0, max(lengths), step):
        piece = torch.zeros(min(step, max(lengths) - start), rows.shape[1], device=device)
        own = rows[start : start + len(piece)]
        piece[: len(own)] = own.to(device)
        pieces = [torch.empty_like(piece) for _ in lengths] if rank == 0 else None
        dist.gather(piece, pieces, dst=0)
        for owner, received in enumerate(pieces or []):
            count = min(len(received), max(0, lengths[owner] - start))
            gathered[first_row[owner] + start :][:count] = received[:count].cpu()
    return gathered
