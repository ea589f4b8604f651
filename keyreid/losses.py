"""The losses of KeyRe-ID, each a function on plain tensors, and how they are weighted.

L = alpha L_global + (1 - alpha) mean over parts of L_part + attention L_attention, where for each branch
L_x = identity * cross entropy + triplet * batch-hard triplet + centre * centre loss.

All of them see the GLOBAL batch: `gather` brings the features of all ranks together with their gradients, so that R
ranks of b clips compute what one rank of R*b clips would.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from keyreid.config import LossConfig
from keyreid.errors import DataError
from keyreid.model.keyreid import Features
from keyreid.model.precision import full


def check_labels(labels: torch.Tensor, num_identities: int, keys: Sequence[str]) -> None:
    """Refuse labels that no classifier has, naming the tracklets. Call it before the labels go to a GPU.

    Raises:
        DataError: a label is not in 0 .. num_identities - 1.
    """
    wrong = [(key, label) for key, label in zip(keys, labels.tolist(), strict=True) if not 0 <= label < num_identities]
    if wrong:
        named = ", ".join(f"{key} (label {label})" for key, label in wrong[:8])
        raise DataError(
            f"{len(wrong)} of {len(keys)} clips have a label outside 0..{num_identities - 1}: {named}; "
            "the shards' training identities and the model's classifiers do not belong together"
        )


def gather(tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """The tensors of all ranks, joined along `dim` in rank order, differentiable; the same object on one rank.

    Every rank must hold the same shape and compute the same loss from the result. Then the gradient for a rank's own
    part needs no communication: it is its slice of the gradient, times the number of ranks because data-parallel
    training averages the weights' gradients over the ranks.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    return _Gather.apply(tensor, dim)


def gather_features(features: Features) -> Features:
    """The features of all ranks' clips, in rank order, differentiable."""
    return Features(
        gather(features.global_feature), gather(features.part_features, dim=1), gather(features.temporal_scores)
    )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        ctx.dim, ctx.length = dim, tensor.shape[dim]
        pieces = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(pieces, tensor.contiguous())
        return torch.cat(pieces, dim)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        own = gradient.narrow(ctx.dim, dist.get_rank() * ctx.length, ctx.length)
        return own * dist.get_world_size(), None


def identity_loss(
    logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.1, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross entropy with label smoothing: logits [..., B, C], labels [B] -> [...], a (weighted) mean over B."""
    classes = logits.shape[-1]
    flat = F.cross_entropy(
        full(logits).reshape(-1, classes),
        labels.expand(logits.shape[:-1]).reshape(-1),
        label_smoothing=smoothing,
        reduction="none",
    )
    return _mean(flat.view(logits.shape[:-1]), weights)


def triplet_loss(
    features: torch.Tensor, labels: torch.Tensor, margin: float | None = None, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Batch-hard triplet loss with Euclidean distance.

    Each clip against its farthest clip of the same identity and its nearest of another; soft margin
    log(1 + exp(positive - negative)) unless a margin is given.

    Args:
        features: [..., B, D], before the BatchNorm.
        labels: [B].
        margin: None for the soft margin.
        weights: [..., B]; clips of weight 0 are neither anchor, positive nor negative.

    Returns:
        [...], a (weighted) mean over B. Without any other identity it is 0.
    """
    features = full(features)
    # mm-based distances lose the small ones that batch-hard mining lives on
    distance = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    same = (labels.unsqueeze(1) == labels).expand(distance.shape)
    other = ~same
    if weights is not None:
        present = (weights > 0).unsqueeze(-2)
        same, other = same & present, other & present
    positive = torch.where(same, distance, 0.0).amax(-1)
    negative = torch.where(other, distance, torch.inf).amin(-1)
    violation = positive - negative
    loss = F.softplus(violation) if margin is None else (violation + margin).relu()
    return _mean(loss, weights)


def centre_loss(
    features: torch.Tensor, labels: torch.Tensor, centres: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Squared distance to the identity's centre: features [..., B, D], centres [..., C, D] -> [...], a mean over B."""
    squared = (full(features) - centres[..., labels, :]).square().sum(-1)
    return _mean(squared, weights)


def attention_loss(scores: torch.Tensor, erased: torch.Tensor) -> torch.Tensor:
    """Temporal attention (before its softmax) spent on erased frames: scores and erased [B, T] -> scalar."""
    return (full(scores) * erased).sum(1).mean()


def _mean(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    if weights is None:
        return values.mean(-1)
    return (values * weights).sum(-1) / weights.sum(-1).clamp(min=1e-6)


class Criterion(nn.Module):
    """All losses with their weights, and the centre tables (buffers; `update_centres` moves them).

    Args:
        loss: weights and variants.
        num_identities: C.
        width: D of the global feature.
        part_width: T*D of a part's feature.
        parts: P.
    """

    def __init__(self, loss: LossConfig, num_identities: int, width: int, part_width: int, parts: int):
        super().__init__()
        self.loss = loss
        tables = parts if loss.centres == "all" else 1
        self.register_buffer("global_centres", torch.randn(num_identities, width))
        self.register_buffer("part_centres", torch.randn(tables, num_identities, part_width))

    def forward(
        self,
        features: Features,
        logits: torch.Tensor,
        labels: torch.Tensor,
        erased: torch.Tensor,
        visibility: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of the global batch.

        Args:
            features: of all ranks' clips.
            logits: [1+P, B, C] of the same clips.
            labels: int64 [B].
            erased: [B, T], 1 where a frame has an erased rectangle.
            visibility: [B, P], share of a clip's frames that show the part. Where given, a clip that never shows a
                part takes no part in that part's losses: there is nothing of it to learn from.

        Returns:
            The total, with gradient, and its terms before weighting, detached; `accuracy` is the global classifier's.
        """
        config = self.loss
        seen = None if visibility is None else (visibility > 0).float().T  # [P, B]
        identity_global = identity_loss(logits[0], labels, config.label_smoothing)
        identity_parts = identity_loss(logits[1:], labels, config.label_smoothing, seen).mean()
        triplet_global = triplet_loss(features.global_feature, labels, config.triplet_margin)
        triplet_parts = triplet_loss(features.part_features, labels, config.triplet_margin, seen).mean()
        centre_global = centre_loss(features.global_feature, labels, self.global_centres)
        centre_parts = centre_loss(features.part_features, labels, self.part_centres, seen).mean()
        attention = attention_loss(features.temporal_scores, erased)

        whole = config.identity * identity_global + config.triplet * triplet_global + config.centre * centre_global
        parts = config.identity * identity_parts + config.triplet * triplet_parts + config.centre * centre_parts
        total = config.alpha * whole + (1 - config.alpha) * parts + config.attention * attention
        terms = {
            "identity_global": identity_global,
            "identity_parts": identity_parts,
            "triplet_global": triplet_global,
            "triplet_parts": triplet_parts,
            "centre_global": centre_global,
            "centre_parts": centre_parts,
            "attention": attention,
            "accuracy": (logits[0].argmax(-1) == labels).float().mean(),
        }
        return total, {name: term.detach() for name, term in terms.items()}

    @torch.no_grad()
    def update_centres(self, features: Features, labels: torch.Tensor, visibility: torch.Tensor | None = None) -> None:
        """Move the centres towards the features of the global batch; every rank does the same.

        `all` (Wen et al., ECCV 2016): an identity's centre c with n clips x in the batch moves by
        rate * sum(x - c) / (1 + n), whatever the batch size. `released`: one step of gradient descent with that rate on
        the global branch's mean squared distance, rate * 2 / B * sum(x - c); the local table stays as drawn.
        """
        rate = self.loss.centre_rate
        if self.loss.centres == "released":
            pull = 2 * rate / len(labels) * (full(features.global_feature) - self.global_centres[labels])
            self.global_centres.index_add_(0, labels, pull)
            return
        same = (labels.unsqueeze(1) == labels).float()
        pull = full(features.global_feature) - self.global_centres[labels]
        self.global_centres.index_add_(0, labels, rate / (1 + same.sum(1, keepdim=True)) * pull)
        seen = torch.ones(self.part_centres.shape[0], len(labels), device=labels.device)
        if visibility is not None:
            seen = (visibility > 0).float().T
        counts = seen @ same  # [P, B], the clips of one's identity that show the part
        pull = full(features.part_features) - self.part_centres[:, labels]
        self.part_centres.index_add_(1, labels, (rate * seen / (1 + counts)).unsqueeze(-1) * pull)
