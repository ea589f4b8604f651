"""Classifiers whose classes the ranks share out: no rank has all of their weights, nor all logits of a clip.

In a group of S ranks, class i of all 1 + P classifiers is rank i % S's, as in distributed/owned_rows.py. The cross
entropy is that of all classes: a rank has the logits of its classes for the clips of the whole group, and the group
adds up what each knows of the softmax (Partial FC, arXiv 2203.15565, and its sampling of negative classes).

The weights are no parameters of the network, so no engine averages, shards or casts them; training/class_optimizer.py
trains them, and the network is evaluated and exported without.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from keyreid.distributed.owned_rows import own_rows
from keyreid.distributed.parts import Held, Part
from keyreid.distributed.ranks import Ranks, gather
from keyreid.distributed.share import Share
from keyreid.errors import ConfigError

CLASSIFIERS = ("global_classifier.weight", "part_classifiers.weight")  # [1, C, D] and [P, C, T*D]


@dataclass(frozen=True)
class ClassGroup:
    """The ranks that share out the classes with this one.

    Attributes:
        place: this process among them.
        ranks: of the run.
        number: of this group in the run.
        peers: the group; None: this process alone.
        between: the processes with the same classes, one of each group; None: there is one group.
    """

    place: Ranks
    ranks: int = 1
    number: int = 0
    peers: dist.ProcessGroup | None = None
    between: dist.ProcessGroup | None = None

    @staticmethod
    def of(ranks: Ranks, size: int | None) -> "ClassGroup":
        """Groups of `size` neighbouring ranks, or one of all; a collective.

        Raises:
            ConfigError: the size does not divide the ranks.
        """
        world, size = ranks.world_size, size or ranks.world_size
        if world % size:
            raise ConfigError(f"training.class_group={size} does not divide {world} ranks")
        peers = between = None
        if size > 1:
            peers = dist.group.WORLD if size == world else dist.new_subgroups(size)[0]
        if size < world:
            of_classes = [list(range(first, world, size)) for first in range(size)]
            between = dist.new_subgroups_by_enumeration(of_classes)[0]
        place = replace(ranks, rank=ranks.rank % size, world_size=size)
        return ClassGroup(place, world, ranks.rank // size, peers, between)


class ShardedClasses:
    """This rank's classes of all classifiers, drawn as model/heads.py draws all of them.

    Attributes:
        weights: float32 [1, c, D] and [P, c, T*D] by their names in CLASSIFIERS.
        seen: int64, increasing, which of them this step's softmax sees; None: all.
    """

    def __init__(self, widths: tuple[int, int], parts: int, classes: int, group: ClassGroup) -> None:
        self.classes, self.group, self.seen = classes, group, None
        self.weights: dict[str, nn.Parameter] = {}
        for name, branches, width in zip(CLASSIFIERS, (1, parts), widths, strict=True):
            own = own_rows(_draw, branches, classes, width, group.place, group.place.device)
            self.weights[name] = nn.Parameter(own)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take this rank's classes of the whole weights."""
        for name, own in self.weights.items():
            own.data.copy_(weights[name][:, self.group.place.rank :: self.group.place.world_size])

    def held(self, own: Tensor) -> Held:
        """Which part this rank's rows are of a value as large as a whole weight, [branches, C, W]."""
        place, group = self.group.place, self.group
        part = Part.rows((len(own), self.classes, own.shape[-1]), place.rank, place.world_size)
        return Held(part, own.detach, group.number, group.ranks // place.world_size)

    def choose(self, labels: Tensor, negatives: float, key: int) -> None:
        """Draw the classes that a step sees: those of all ranks' labels [n], and a share of the others; a collective.

        Whether a class is drawn follows from `key` and the class alone, so any number of ranks draws the same.
        """
        if negatives == 1:
            return
        place, labels = self.group.place, gather(labels)
        own = np.arange(place.rank, self.classes, place.world_size)
        seen = torch.from_numpy(_uniform(own, key) < negatives).to(labels.device)
        seen[labels[labels % place.world_size == place.rank] // place.world_size] = True
        self.seen = seen.nonzero().flatten()


def _draw(rows: int, width: int) -> Tensor:
    return torch.empty(rows, width).normal_(std=0.001)


class ShardedLogits(NamedTuple):
    """What stands for the logits of n clips: what the classifiers are given, [1, n, D] and [P, n, T*D]."""

    whole: Tensor
    parts: Tensor
    classes: ShardedClasses

    def judged(self, labels: Tensor, smoothing: float) -> "Judged":
        """What the losses need of them, with label smoothing; a collective of the group."""
        group, seen = self.classes.group, self.classes.seen
        weights = [weight if seen is None else weight[:, seen] for weight in self.classes.weights.values()]
        return Judged(*_CrossEntropy.apply(self.whole, self.parts, *weights, labels, seen, smoothing, group))


@dataclass(frozen=True)
class Judged:
    """Cross entropies of n clips, [1+P, n], and whether no class that was seen has a larger logit than the label's."""

    entropies: Tensor
    right: Tensor

    def __getitem__(self, branches: int | slice) -> "Judged":
        return Judged(self.entropies[branches], self.right[branches])


class _CrossEntropy(torch.autograd.Function):
    """Label smoothing e: log sum exp z - (1 - e) z[label] - e mean z, where each rank knows the z of its classes."""

    @staticmethod
    def forward(ctx, whole, parts, of_whole, of_parts, labels, seen, smoothing, group):
        share, place = Share(peers=group.peers), group.place
        rows, classes = whole.shape[1], of_whole.shape[1]
        clips = share.gather(torch.cat([whole[0], parts.transpose(0, 1).flatten(1)], 1))
        labels = share.gather(labels)
        owned = labels % place.world_size == place.rank
        at = labels // place.world_size
        at = (at if seen is None else torch.searchsorted(seen, at)).where(owned, 0).expand(1 + len(parts), 1, -1)
        with torch.autocast(clips.device.type, enabled=False):
            logits = clips.new_empty(1 + len(parts), classes, len(clips))
            for_whole, for_parts = _apart(clips, whole, parts)
            torch.matmul(of_whole, for_whole.mT, out=logits[:1])
            torch.matmul(of_parts, for_parts.mT, out=logits[1:])
        largest = logits.amax(1) if classes else logits.new_full(logits.shape[::2], -torch.inf)
        _reduce(largest, group, dist.ReduceOp.MAX)
        sums = logits.new_zeros(4, *largest.shape)
        if classes:
            sums[1] = logits.gather(1, at)[:, 0] * owned
        sums[2], sums[3] = logits.sum(1), classes
        logits.sub_(largest.unsqueeze(1)).exp_()
        sums[0] = logits.sum(1)
        _reduce(sums, group)
        exponentials, of_label, everything, count = sums
        logits.div_(exponentials.unsqueeze(1))
        ctx.save_for_backward(whole, parts, clips, of_whole, of_parts, logits, count, owned, at)
        ctx.share, ctx.smoothing, ctx.group = share, smoothing, group
        entropies = largest + exponentials.log() - (1 - smoothing) * of_label - smoothing * everything / count
        first = share.first(rows)
        right = (of_label >= largest)[:, first : first + rows].float()
        ctx.mark_non_differentiable(right)
        return entropies[:, first : first + rows].contiguous(), right

    @staticmethod
    def backward(ctx, gradient, _):
        whole, parts, clips, of_whole, of_parts, probabilities, count, owned, at = ctx.saved_tensors
        gradient = ctx.share.gather(gradient.T).T
        slopes = probabilities * gradient.unsqueeze(1)
        slopes -= (ctx.smoothing / count * gradient).unsqueeze(1)
        if slopes.shape[1]:
            slopes.scatter_add_(1, at, ((ctx.smoothing - 1) * gradient * owned).unsqueeze(1))
        of_branches = slopes[:1], slopes[1:]
        to_weights = (slope @ given for slope, given in zip(of_branches, _apart(clips, whole, parts), strict=True))
        to_whole, to_parts = (s.mT @ weights for s, weights in zip(of_branches, (of_whole, of_parts), strict=True))
        to_clips = torch.cat([to_whole[0], to_parts.transpose(0, 1).flatten(1)], 1)
        if ctx.group.peers is not None:
            own = to_clips.new_empty(whole.shape[1], to_clips.shape[1])
            dist.reduce_scatter(own, list(to_clips.chunk(ctx.share.size)), group=ctx.group.peers)
            to_clips = own
        return *_apart(to_clips, whole, parts), *to_weights, None, None, None, None


def _apart(clips: Tensor, whole: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
    """[N, D + P*T*D] -> [1, N, D] and [P, N, T*D]."""
    width = whole.shape[-1]
    return clips[None, :, :width], clips[:, width:].unflatten(1, parts.shape[::2]).transpose(0, 1)


def _reduce(values: Tensor, group: ClassGroup, how: dist.ReduceOp = dist.ReduceOp.SUM) -> None:
    if group.peers is not None:
        dist.all_reduce(values, how, group.peers)


def _uniform(numbers: np.ndarray, key: int) -> np.ndarray:
    """A number in [0, 1) from each number and the key alone: SplitMix64 (Steele et al., OOPSLA 2014)."""
    mixed = numbers.astype(np.uint64) * 0x9E3779B97F4A7C15 + key % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB
    return ((mixed ^ (mixed >> 31)) >> 11) * 2.0**-53
