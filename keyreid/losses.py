"""The losses of KeyRe-ID, each a function on plain tensors, and how they are weighted.

L = alpha L_global + (1 - alpha) mean over parts of L_part + attention L_attention, where for each branch
L_x = identity * cross entropy + triplet * batch-hard triplet + centre * centre loss.

Another loss is a function, a line in `Criterion.branch_terms` (of each branch) or `batch_terms` (of the whole batch),
and a weight of the same name in `LossConfig`; it is then minimised, logged and searched like the others.

All of them see the GLOBAL batch: `gather` brings the features of all ranks together with their gradients, so that R
ranks of b clips compute what one rank of R*b clips would.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keyreid.config import LossConfig
from keyreid.distributed.ranks import gather
from keyreid.errors import DataError
from keyreid.model.keyreid import Features
from keyreid.model.precision import full


def check_labels(labels: Tensor, num_identities: int, keys: Sequence[str]) -> None:
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


def gather_features(features: Features) -> Features:
    """The features of all ranks' clips, in rank order, differentiable."""
    whole, parts, scores = features
    return Features(gather(whole), gather(parts, dim=1), gather(scores))


def identity_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.1, weights: Tensor | None = None) -> Tensor:
    """Cross entropy with label smoothing: logits [..., B, C], labels [B] -> [...], a (weighted) mean over B."""
    classes = logits.shape[-1]
    flat_logits, flat_labels = full(logits).reshape(-1, classes), labels.expand(logits.shape[:-1]).reshape(-1)
    flat = F.cross_entropy(flat_logits, flat_labels, label_smoothing=smoothing, reduction="none")
    return _mean(flat.view(logits.shape[:-1]), weights)


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
    same = labels.unsqueeze(1) == labels
    present = torch.ones_like(labels, dtype=torch.bool) if weights is None else weights > 0
    same, other = (mask & present.unsqueeze(-2) for mask in (same, ~same))
    squared = _squared_distances(features)
    farthest = _hardest(features, squared.masked_fill(~same, -torch.inf), sign=1)
    nearest = _hardest(features, -squared.masked_fill(~other, torch.inf), sign=-1)
    distance = _distances(features, torch.cat([farthest, nearest], -1))
    positive = distance[..., 0].masked_fill(~same.any(-1), 0.0)
    negative = distance[..., 1].masked_fill(~other.any(-1), torch.inf)
    violation = positive - negative
    return _mean(F.softplus(violation) if margin is None else (violation + margin).relu(), weights)


@torch.no_grad()
def _squared_distances(features: Tensor) -> Tensor:
    """[..., B, D] -> float64 [..., B, B], by a matrix product.

    To choose by: in float32 it would lose the small distances that batch-hard mining lives on, and the differences of
    all pairs, which the backward pass of `cdist` keeps on a GPU, are B * B * D numbers.
    """
    features = features.double()
    squares = features.square().sum(-1)
    return squares.unsqueeze(-1) + squares.unsqueeze(-2) - 2 * (features @ features.mT)


@torch.no_grad()
def _hardest(features: Tensor, preference: Tensor, sign: int) -> Tensor:
    """The clip that each clip prefers, [..., B, 1]: of its first two, by sign * their exact distances.

    A preference of -inf is never chosen, unless there is no other.
    """
    first = preference.topk(min(2, preference.shape[-1]))
    exact = (sign * _distances(features, first.indices)).masked_fill(first.values == -torch.inf, -torch.inf)
    return first.indices.gather(-1, exact.argmax(-1, keepdim=True))


def _distances(features: Tensor, columns: Tensor) -> Tensor:
    """Euclidean distances of each clip to k others, by their differences: features [..., B, D], columns [..., B, k]."""
    clips, width = features.shape[-2:]
    flat = features.reshape(-1, width)
    first = torch.arange(0, len(flat), clips, device=flat.device).view(*columns.shape[:-2], 1, 1)
    others = flat.index_select(0, (first + columns).flatten()).view(*columns.shape, width)
    return torch.cdist(features.unsqueeze(-2), others, compute_mode="donot_use_mm_for_euclid_dist").squeeze(-2)


def centre_loss(features: Tensor, labels: Tensor, centres: Tensor, weights: Tensor | None = None) -> Tensor:
    """Squared distance to the identity's centre: features [..., B, D], centres [..., C, D] -> [...], a mean over B."""
    return _mean((full(features) - centres[..., labels, :]).square().sum(-1), weights)


def attention_loss(scores: Tensor, erased: Tensor) -> Tensor:
    """Temporal attention (before its softmax) spent on erased frames: scores and erased [B, T] -> scalar."""
    return (full(scores) * erased).sum(1).mean()


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    return values.mean(-1) if weights is None else (values * weights).sum(-1) / weights.sum(-1).clamp(min=1e-6)


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
        self, features: Features, logits: Tensor, labels: Tensor, erased: Tensor, visibility: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
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
        alpha = self.loss.alpha
        seen = None if visibility is None else (visibility > 0).float().T  # [P, B]
        whole = self.branch_terms(features.global_feature, logits[0], labels, self.global_centres)
        parts = self.branch_terms(features.part_features, logits[1:], labels, self.part_centres, seen)
        parts = {name: term.mean() for name, term in parts.items()}
        batch = self.batch_terms(features, erased)
        total = alpha * self._weighted(whole) + (1 - alpha) * self._weighted(parts) + self._weighted(batch)
        terms = {f"{name}_{branch}": of[name] for name in whole for branch, of in (("global", whole), ("parts", parts))}
        terms |= batch | {"accuracy": (logits[0].argmax(-1) == labels).float().mean()}
        return total, {name: term.detach() for name, term in terms.items()}

    def branch_terms(
        self, features: Tensor, logits: Tensor, labels: Tensor, centres: Tensor, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The losses of the global branch, or of the parts' with P in front of each shape: [] or [P] each.

        Their names are those of their weights in LossConfig. Shapes as in the functions above.
        """
        config = self.loss
        return {
            "identity": identity_loss(logits, labels, config.label_smoothing, weights),
            "triplet": triplet_loss(features, labels, config.triplet_margin, weights),
            "centre": centre_loss(features, labels, centres, weights),
        }

    def batch_terms(self, features: Features, erased: Tensor) -> dict[str, Tensor]:
        """The losses that belong to no branch, each a scalar, under the names of their weights in LossConfig."""
        return {"attention": attention_loss(features.temporal_scores, erased)}

    def _weighted(self, terms: dict[str, Tensor]) -> Tensor:
        return sum(getattr(self.loss, name) * term for name, term in terms.items())

    @torch.no_grad()
    def update_centres(self, features: Features, labels: Tensor, visibility: Tensor | None = None) -> None:
        """Move the centres towards the features of the global batch; every rank does the same.

        `all` (Wen et al., ECCV 2016): an identity's centre c with n clips x in the batch moves by
        rate * sum(x - c) / (1 + n), whatever the batch size. `released`: one step of gradient descent with that rate on
        the global branch's mean squared distance, rate * 2 / B * sum(x - c); the local table stays as drawn.
        """
        rate = self.loss.centre_rate
        pull = full(features.global_feature) - self.global_centres[labels]
        if self.loss.centres == "released":
            self.global_centres.index_add_(0, labels, 2 * rate / len(labels) * pull)
            return
        same = (labels.unsqueeze(1) == labels).float()
        self.global_centres.index_add_(0, labels, rate / (1 + same.sum(1, keepdim=True)) * pull)
        everywhere = torch.ones(self.part_centres.shape[0], len(labels), device=labels.device)
        seen = everywhere if visibility is None else (visibility > 0).float().T
        counts = seen @ same  # [P, B], the clips of one's identity that show the part
        pull = full(features.part_features) - self.part_centres[:, labels]
        self.part_centres.index_add_(1, labels, (rate * seen / (1 + counts)).unsqueeze(-1) * pull)
