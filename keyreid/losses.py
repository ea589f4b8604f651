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
from torch import nn

from keyreid.config import LossConfig
from keyreid.distributed.collectives import gather
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


def gather_features(features: Features) -> Features:
    """The features of all ranks' clips, in rank order, differentiable."""
    return Features(
        gather(features.global_feature), gather(features.part_features, dim=1), gather(features.temporal_scores)
    )


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
        alpha = self.loss.alpha
        seen = None if visibility is None else (visibility > 0).float().T  # [P, B]
        whole = self.branch_terms(features.global_feature, logits[0], labels, self.global_centres)
        parts = self.branch_terms(features.part_features, logits[1:], labels, self.part_centres, seen)
        parts = {name: term.mean() for name, term in parts.items()}
        batch = self.batch_terms(features, erased)
        total = alpha * self._weighted(whole) + (1 - alpha) * self._weighted(parts) + self._weighted(batch)
        terms = {
            f"{name}_{part}": term for name in whole for part, term in (("global", whole[name]), ("parts", parts[name]))
        }
        terms |= batch | {"accuracy": (logits[0].argmax(-1) == labels).float().mean()}
        return total, {name: term.detach() for name, term in terms.items()}

    def branch_terms(
        self,
        features: torch.Tensor,
        logits: torch.Tensor,
        labels: torch.Tensor,
        centres: torch.Tensor,
        weights: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The losses of the global branch, or of the parts' with P in front of each shape: [] or [P] each.

        Their names are those of their weights in LossConfig. Shapes as in the functions above.
        """
        config = self.loss
        return {
            "identity": identity_loss(logits, labels, config.label_smoothing, weights),
            "triplet": triplet_loss(features, labels, config.triplet_margin, weights),
            "centre": centre_loss(features, labels, centres, weights),
        }

    def batch_terms(self, features: Features, erased: torch.Tensor) -> dict[str, torch.Tensor]:
        """The losses that belong to no branch, each a scalar, under the names of their weights in LossConfig."""
        return {"attention": attention_loss(features.temporal_scores, erased)}

    def _weighted(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum(getattr(self.loss, name) * term for name, term in terms.items())

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
