"""The batch-hard triplet loss: on clips of one process, and on clips of ranks that compare theirs with each other's."""

import torch
import torch.nn.functional as F
from torch import Tensor

from keyreid.distributed.share import WHOLE, Compared, Share
from keyreid.model.precision import full

_BLOCK = 256  # clips of a scope that are in float64 at once


def triplet_loss(
    features: Tensor, labels: Tensor, margin: float | None = None, weights: Tensor | None = None
) -> Tensor:
    """Batch-hard triplet loss with Euclidean distance.

    Each clip against its farthest clip of the same identity and its nearest of another; soft margin
    log(1 + exp(positive - negative)) unless a margin is given.

    Args:
        features: [..., B, D], before the BatchNorm.
        labels: [B].
        weights: [..., B]; clips of weight 0 are neither anchor, positive nor negative.

    Returns:
        [...], a (weighted) mean over B. Without any other identity it is 0. Of clips at exactly the same distance one
        gets the gradient.
    """
    features = full(features)
    same, other = _allowed(labels, labels, weights)
    pairs = _hardest_pairs(features, features, same, other)
    violation = _violation(_distances(features, features, pairs), same, other)
    return WHOLE.mean(_hinge(violation, margin), weights)


def triplet_loss_across(features: Tensor, scope: Compared, margin: float | None, share: Share) -> Tensor:
    """The same of the scope that the peers of `share` hold together: own rows' addends, and their whole gradient.

    Nothing travels back: each rank has all features of the scope, and hears of all pairs, so it knows itself what every
    pair with one of its rows adds to their gradients, and never holds the features' differences but for own rows.

    Args:
        features: of own rows, [..., n, D].
    """
    return _Across.apply(full(features), *scope, margin, share)


class _Across(torch.autograd.Function):
    """Computes value and gradient at once; backward only scales it."""

    @staticmethod
    def forward(ctx, features, compared, labels, weights, margin, share):
        *branches, rows, width = features.shape
        first = share.first(rows)
        own = slice(first, first + rows)
        features, compared = features.reshape(-1, rows, width), compared.reshape(-1, len(labels), width)
        weights = None if weights is None else weights.reshape(-1, len(labels))
        losses, pairs, pulls = [], [], []
        for branch, everyone in enumerate(compared):
            present = None if weights is None else weights[branch]
            same, other = _allowed(labels[own], labels, present)
            anchors = full(everyone[own])
            chosen = _hardest_pairs(anchors, everyone, same, other)
            distance = _distances(anchors, everyone, chosen)
            violation = _violation(distance, same, other)
            counted = torch.ones_like(violation) if weights is None else present[own]
            whole = share.clips if weights is None else share.seen[branch].clamp(min=1e-6)
            slope = violation.sigmoid() if margin is None else (violation + margin > 0).to(violation)
            sides = torch.stack([slope * same.any(-1), -slope * other.any(-1)], -1)
            losses.append((_hinge(violation, margin) * counted).sum() / whole)
            pairs.append(chosen)
            # What a pair's difference is multiplied with in the gradient: of equal clips nothing.
            pulls.append(torch.where(distance > 0, sides / distance, 0.0) * counted.unsqueeze(-1) / whole)
        pairs, pulls = torch.stack(pairs), torch.stack(pulls)
        everywhere = [share.gather(of.transpose(0, 1)).transpose(0, 1) for of in (pairs, pulls)]
        gradient = torch.empty_like(features)
        for branch, of_branch in enumerate(zip(pairs, pulls, *everywhere, strict=True)):
            gradient[branch] = _gradient(compared[branch], own, *of_branch)
        ctx.save_for_backward(gradient.view(*branches, rows, width))
        return torch.stack(losses).view(branches)

    @staticmethod
    def backward(ctx, gradient):
        return gradient[..., None, None] * ctx.saved_tensors[0], None, None, None, None, None


def _gradient(
    everyone: Tensor, own: slice, pairs: Tensor, pulls: Tensor, all_pairs: Tensor, all_pulls: Tensor
) -> Tensor:
    """What own rows get, [n, D]: from the pairs that they chose, [n, 2], and from those that chose them, of [S, 2]."""
    rows = own.stop - own.start
    pull = pulls.new_zeros(rows, len(everyone), dtype=torch.float64)
    at = torch.arange(rows, device=pull.device).unsqueeze(1)
    pull.index_put_((at, pairs), pulls.double(), accumulate=True)
    mine = (all_pairs >= own.start) & (all_pairs < own.stop)
    anchor = torch.arange(len(everyone), device=pull.device).unsqueeze(1)
    pull.index_put_(((all_pairs - own.start).clamp(0, rows - 1), anchor), (all_pulls * mine).double(), accumulate=True)
    gradient = pull.sum(1, keepdim=True) * everyone[own].double()
    for weights, others in zip(pull.split(_BLOCK, 1), everyone.split(_BLOCK), strict=True):
        gradient.addmm_(weights, others.double(), alpha=-1)
    return gradient


def _allowed(anchors: Tensor, labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which clips are a positive, and which a negative, of each anchor: bool [..., n, S] from labels [n] and [S]."""
    same = anchors.unsqueeze(1) == labels
    present = torch.ones_like(labels, dtype=torch.bool) if weights is None else weights > 0
    return same & present.unsqueeze(-2), ~same & present.unsqueeze(-2)


@torch.no_grad()
def _hardest_pairs(anchors: Tensor, features: Tensor, same: Tensor, other: Tensor) -> Tensor:
    """The farthest positive and the nearest negative of each anchor, int [..., n, 2]."""
    squared = _squared_distances(anchors, features)
    farthest = _hardest(anchors, features, squared, same, sign=1)
    return torch.cat([farthest, _hardest(anchors, features, squared, other, sign=-1)], -1)


def _squared_distances(anchors: Tensor, features: Tensor) -> Tensor:
    """[..., n, D] and [..., S, D] -> float64 [..., n, S], by a matrix product.

    To choose by: in float32 it would lose the small distances that batch-hard mining lives on, and the differences of
    all pairs, which the backward pass of `cdist` keeps on a GPU, are n * S * D numbers.
    """
    anchors, blocks = anchors.double(), []
    squares = torch.linalg.vecdot(anchors, anchors).unsqueeze(-1)
    for others in map(torch.Tensor.double, features.split(_BLOCK, -2)):
        blocks.append(squares + torch.linalg.vecdot(others, others).unsqueeze(-2) - 2 * (anchors @ others.mT))
    return torch.cat(blocks, -1)


def _hardest(anchors: Tensor, features: Tensor, squared: Tensor, allowed: Tensor, sign: int) -> Tensor:
    """The farthest (sign 1) or nearest (-1) clip of each anchor, [..., n, 1], among those allowed, if there are any.

    Of the two that the squared distances put first, the exact distances choose.
    """
    first = (sign * squared).masked_fill(~allowed, -torch.inf).topk(min(2, squared.shape[-1]))
    exact = (sign * _distances(anchors, features, first.indices)).masked_fill(first.values == -torch.inf, -torch.inf)
    return first.indices.gather(-1, exact.argmax(-1, keepdim=True))


def _distances(anchors: Tensor, features: Tensor, columns: Tensor) -> Tensor:
    """Euclidean distances, by differences, of each anchor [..., n, D] to k of the features [..., S, D]: [..., n, k]."""
    clips, width = features.shape[-2:]
    flat = features.reshape(-1, width)
    first = torch.arange(0, len(flat), clips, device=flat.device).view(*columns.shape[:-2], 1, 1)
    others = full(flat.index_select(0, (first + columns).flatten())).view(*columns.shape, width)
    return torch.cdist(anchors.unsqueeze(-2), others, compute_mode="donot_use_mm_for_euclid_dist").squeeze(-2)


def _violation(distance: Tensor, same: Tensor, other: Tensor) -> Tensor:
    """Distance to the positive less that to the negative, [..., n]; without any negative -inf."""
    positive = distance[..., 0].masked_fill(~same.any(-1), 0.0)
    return positive - distance[..., 1].masked_fill(~other.any(-1), torch.inf)


def _hinge(violation: Tensor, margin: float | None) -> Tensor:
    return F.softplus(violation) if margin is None else (violation + margin).relu()
