"""One vector per tracklet: the mean over its clips' embeddings, computed on any number of ranks with the same result.

All clips of all tracklets form one sequence that is cut into batches of equal size, whatever the tracklets' lengths
and however many ranks there are. A rank owns consecutive tracklets and runs the batches that hold their clips; a batch
on the border of two ranks is run by both. So every clip is embedded in the same batch and every mean is summed in the
same order on one rank as on many: bit for bit the same vectors where machine and thread count are the same.
"""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from keyreid.config import Config
from keyreid.distributed.ranks import Ranks
from keyreid.embedding.description import describe
from keyreid.embedding.vectors import Vectors, VectorsAbout
from keyreid.guidance import named
from keyreid.model import KeyReID
from keyreid.model.inputs import prepare
from keyreid.progress import track
from keyreid.shards import open_reader
from keyreid.shards.batch import ClipBatch, ClipPlan
from keyreid.shards.plan import evaluation_clip_counts, evaluation_clips
from keyreid.shards.shard_set import ShardSet

UNKNOWN_CAMERA = -1  # what the network takes for a camera that it has not been trained on


def extract(
    model: KeyReID,
    shards: ShardSet,
    positions: Sequence[int],
    config: Config,
    ranks: Ranks | None = None,
    cameras_known: bool = True,
    weights: Mapping[str, str] | None = None,
) -> Vectors:
    """Embed tracklets. Every rank calls it; with several, the default process group must exist.

    Every rank runs equally many batches, so that a network whose weights are spread over the ranks works too. The
    model is put into evaluation mode and back. Memory of a rank: its own vectors and one clip batch.

    Args:
        positions: of the tracklets in `shards.tracklets`.
        config: clip size, batch size, number of clips, reader and precision.
        cameras_known: the model was trained on these cameras; otherwise all are unknown to it.
        weights: what the vectors say of their network, see `VectorsAbout`.

    Returns:
        this rank's share of the vectors; the shares of all ranks, one after the other, are in the order of `positions`.
    """
    ranks = ranks or Ranks.alone()
    mode = named(config.model.guidance)
    positions = np.asarray(positions, np.int64)
    cut = {"frames": config.clip.frames, "clips": config.evaluation.clips, "mode": mode}
    counts = evaluation_clip_counts(shards.index.frames[positions], **cut)
    share = _shares(counts, ranks.world_size)
    size = config.evaluation.clips_per_batch
    batches = _batches_of(share, counts, size)[ranks.rank]
    ends = np.cumsum(counts)

    def clips_of(batch: int) -> list[ClipPlan]:
        start, stop = batch * size, min((batch + 1) * size, int(counts.sum()))
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        skipped = start - int(ends[first] - counts[first])
        return evaluation_clips(shards, positions[first : last + 1].tolist(), **cut)[skipped:][: stop - start]

    was_training = model.training
    model.eval()
    reader = open_reader(shards, map(clips_of, batches), config, device=ranks.device)
    try:
        start = time.monotonic()
        shown = track(reader, len(batches), "embedding", "batches", quiet=not ranks.first)
        embedded = (_embed(model, batch.to(ranks.device), config, cameras_known) for batch in shown)
        means = _mean_by_tracklet(embedded, batches, size, counts, share[ranks.rank])
        if ranks.first:
            rate = f"{counts.sum() / (time.monotonic() - start):.1f} clips/s on {ranks.world_size} rank(s)"
            print(f"embedded {len(counts)} tracklets, {counts.sum()} clips: {rate}")
    finally:
        reader.close()
        model.train(was_training)
    about = about_vectors(model, shards, cameras_known, weights or {})
    vectors, seen = np.split(means.numpy(), [about.width], axis=1)
    own = share[ranks.rank]
    return Vectors(about, describe(shards, positions[own.start : own.stop]), vectors, seen)


def about_vectors(model: KeyReID, shards: ShardSet, cameras_known: bool, weights: Mapping[str, str]) -> VectorsAbout:
    """What the vectors are that a model makes of shards."""
    width, dataset = model.width + model.parts * model.part_width, str(shards.card.get("name", ""))
    return VectorsAbout(width, model.parts, model.width, dataset, dict(weights), cameras_known=cameras_known)


def network_inputs(model: KeyReID, batch: ClipBatch, cameras_known: bool) -> tuple[torch.Tensor, ...]:
    """Pictures, guidance and cameras of a batch as the network takes them when it is judged, on the batch's device.

    Whoever asks the network what it sees (an evaluation, a picture of its attention) asks with these.
    """
    images, guidance = prepare(batch, model.guidance)
    cameras = batch.cameras if cameras_known else torch.full_like(batch.cameras, UNKNOWN_CAMERA)
    weights = next(model.parameters()).dtype
    return images.to(weights), guidance.to(weights), cameras


def _shares(counts: np.ndarray, world_size: int) -> list[range]:
    """The consecutive tracklets of each rank, with about as many clips each."""
    cuts = np.searchsorted(np.cumsum(counts), np.arange(1, world_size) * (counts.sum() / world_size), side="right")
    return [range(start, end) for start, end in itertools.pairwise([0, *cuts.tolist(), len(counts)])]


def _batches_of(share: list[range], counts: np.ndarray, size: int) -> list[list[int]]:
    """The batches that each rank runs: those with clips of its tracklets, then its last one again up to the longest."""
    ends = np.cumsum(counts)
    starts = ends - counts
    own = [list(range(starts[of[0]] // size, -(-ends[of[-1]] // size))) if of else [] for of in share]
    longest = max(map(len, own))
    return [batches + (batches[-1:] or [0]) * (longest - len(batches)) for batches in own]


def _mean_by_tracklet(
    embedded: Iterator[torch.Tensor], batches: list[int], size: int, counts: np.ndarray, own: range
) -> torch.Tensor:
    """Means over the clips of this rank's tracklets: float32 [n, E] on the CPU.

    A batch's clips are summed by tracklet on the device in float64; a tracklet's batches are added in their order.

    Args:
        embedded: [B, E] of each of `batches`.
    """
    ends = np.cumsum(counts)
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
        of_clip = np.searchsorted(ends, np.arange(number * size, last_clip), side="right")
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
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[config.training.precision]
    device = batch.images.device.type
    # On a CPU half precision costs accuracy and saves nothing.
    with torch.autocast(device, dtype, enabled=dtype is not None and device != "cpu"):
        vectors = model.embed(*network_inputs(model, batch, cameras_known))
    return torch.cat([vectors.float(), batch.visibility.float()], dim=1)
