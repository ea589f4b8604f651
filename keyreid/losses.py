"""The losses of KeyRe-ID, each a function on plain tensors, and how they are weighted.

L = alpha L_global + (1 - alpha) mean over parts of L_part + attention L_attention, where for each branch
L_x = identity * cross entropy + triplet * batch-hard triplet + centre * centre loss.

Another loss is a function, a line in `Criterion.branch_terms` (of each branch) or `batch_terms` (of the whole batch),
and a weight of the same name in `LossConfig`; it is then minimised, logged and searched like the others.

R ranks of b clips minimise what one rank of R*b clips would: see `Share`. A loss of single clips is their
`share.mean`; one that compares clips is a plain function of a scope's clips, given to `share.compare`. The triplet loss
has a form of its own for scopes that lie on several ranks, whose cost does not grow with them.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keyreid.config import LossConfig
from keyreid.distributed.ranks import gather
from keyreid.distributed.share import WHOLE, Compared, Share
from keyreid.errors import DataError
from keyreid.model.keyreid import Features
from keyreid.model.precision import full
from keyreid.triplet import triplet_loss, triplet_loss_across


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
    """The features of all ranks' clips, in rank order, differentiable: for the plain form of the losses."""
    whole, parts, scores = features
    return Features(gather(whole), gather(parts, dim=1), gather(scores))


def identity_loss(
    logits: Tensor, labels: Tensor, smoothing: float = 0.1, weights: Tensor | None = None, share: Share = WHOLE
) -> Tensor:
    """Cross entropy with label smoothing: logits [..., B, C], labels [B] -> [...], a (weighted) mean over B."""
    classes = logits.shape[-1]
    flat_logits, flat_labels = full(logits).reshape(-1, classes), labels.expand(logits.shape[:-1]).reshape(-1)
    flat = F.cross_entropy(flat_logits, flat_labels, label_smoothing=smoothing, reduction="none")
    return share.mean(flat.view(logits.shape[:-1]), weights)


def centre_loss(
    features: Tensor, labels: Tensor, centres: Tensor, weights: Tensor | None = None, share: Share = WHOLE
) -> Tensor:
    """Squared distance to the identity's centre: features [..., B, D], centres [..., C, D] -> [...], a mean over B."""
    return share.mean((full(features) - centres[..., labels, :]).square().sum(-1), weights)


def attention_loss(scores: Tensor, erased: Tensor, share: Share = WHOLE) -> Tensor:
    """Temporal attention (before its softmax) spent on erased frames: scores and erased [B, T] -> scalar."""
    return share.mean((full(scores) * erased).sum(1))


class Scope(NamedTuple):
    """What is known of the S clips that a rank's own are compared with, themselves among them, without gradient."""

    features: Features
    labels: Tensor  # [S]
    visibility: Tensor | None  # [S, P]

    @staticmethod
    def gathered(features: Features, labels: Tensor, visibility: Tensor | None, share: Share) -> "Scope":
        """From each peer's own; a collective of theirs."""
        if share.peers is not None:
            whole, parts, scores = (share.gather(f.to(share.wire or f.dtype)) for f in _clips_first(features))
            features = Features(whole, parts.transpose(0, 1), scores)
            visibility = None if visibility is None else share.gather(visibility)
        return Scope(Features(*(of.detach() for of in features)), share.gather(labels), visibility)


def _clips_first(features: Features) -> Features:
    return features._replace(part_features=features.part_features.transpose(0, 1))


def _seen(visibility: Tensor | None) -> Tensor | None:
    """[B, P] -> [P, B], 1 where a clip ever shows the part."""
    return None if visibility is None else (visibility > 0).float().T


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
        logits: Tensor,
        labels: Tensor,
        erased: Tensor,
        visibility: Tensor | None = None,
        share: Share = WHOLE,
        scope: Scope | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the global batch, or this rank's addend of it.

        Args:
            features: of the share's n clips.
            logits: [1+P, n, C] of the same clips.
            labels: int64 [n].
            erased: [n, T], 1 where a frame has an erased rectangle.
            visibility: [n, P], share of a clip's frames that show the part. Where given, a clip that never shows a
                part takes no part in that part's losses: there is nothing of it to learn from.
            scope: the clips that they are compared with; default themselves.

        Returns:
            The total, with gradient, and its terms before weighting, detached; `accuracy` is the global classifier's.
        """
        alpha = self.loss.alpha
        whole, parts, _ = features
        others, other_labels, shown = scope or Scope(features, labels, visibility)
        compared = Compared(others.global_feature, other_labels, None)
        of_whole = self.branch_terms(whole, logits[0], labels, self.global_centres, None, share, compared)
        seen, compared = _seen(visibility), Compared(others.part_features, other_labels, _seen(shown))
        of_parts = self.branch_terms(parts, logits[1:], labels, self.part_centres, seen, share, compared)
        of_parts = {name: term.mean() for name, term in of_parts.items()}
        batch = self.batch_terms(features, erased, share)
        total = alpha * self._weighted(of_whole) + (1 - alpha) * self._weighted(of_parts) + self._weighted(batch)
        branches = ("global", of_whole), ("parts", of_parts)
        terms = {f"{name}_{branch}": of[name] for name in of_whole for branch, of in branches}
        terms |= batch | {"accuracy": share.mean((logits[0].argmax(-1) == labels).float())}
        return total, {name: term.detach() for name, term in terms.items()}

    def branch_terms(
        self,
        features: Tensor,
        logits: Tensor,
        labels: Tensor,
        centres: Tensor,
        weights: Tensor | None,
        share: Share,
        compared: Compared,
    ) -> dict[str, Tensor]:
        """The losses of the global branch, or of the parts' with P in front of each shape: [] or [P] each.

        Their names are those of their weights in LossConfig. Shapes as in the functions above.
        """
        config = self.loss
        if share.peers is None:
            triplet = share.compare(partial(triplet_loss, margin=config.triplet_margin), features, compared)
        else:
            triplet = triplet_loss_across(features, compared, config.triplet_margin, share)
        return {
            "identity": identity_loss(logits, labels, config.label_smoothing, weights, share),
            "triplet": triplet,
            "centre": centre_loss(features, labels, centres, weights, share),
        }

    def batch_terms(self, features: Features, erased: Tensor, share: Share) -> dict[str, Tensor]:
        """The losses that belong to no branch, each a scalar, under the names of their weights in LossConfig."""
        return {"attention": attention_loss(features.temporal_scores, erased, share)}

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
        tables, classes, _ = self.part_centres.shape
        seen = torch.ones(tables, len(labels), device=labels.device) if visibility is None else _seen(visibility)

        def count(shown: Tensor) -> Tensor:  # [..., B], of each clip's identity
            return shown.new_zeros(*shown.shape[:-1], classes).index_add_(-1, labels, shown)[..., labels]

        self.global_centres.index_add_(0, labels, (rate / (1 + count(torch.ones_like(seen[0])))).unsqueeze(1) * pull)
        counts = count(seen)  # [P, B], the clips of one's identity that show the part
        pull = full(features.part_features) - self.part_centres[:, labels]
        self.part_centres.index_add_(1, labels, (rate * seen / (1 + counts)).unsqueeze(-1) * pull)
