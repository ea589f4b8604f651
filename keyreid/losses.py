"""The losses of KeyRe-ID, each a function on plain tensors, and how they are weighted.

L = alpha L_global + (1 - alpha) mean over parts of L_part + attention L_attention, where for each branch
L_x = identity * cross entropy + triplet * batch-hard triplet + centre * centre loss.

Another loss is a function, a line in `Criterion.branch_terms` (of each branch) or `batch_terms` (of all features), and
a weight of the same name in `LossConfig`; it is then minimised, logged and searched like the others.

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
from keyreid.distributed.owned_rows import Exchange, own_rows
from keyreid.distributed.parts import Held, Part
from keyreid.distributed.ranks import Ranks, gather
from keyreid.distributed.share import WHOLE, Compared, Share
from keyreid.errors import DataError
from keyreid.model.keyreid import Features
from keyreid.model.precision import full
from keyreid.model.sharded_classes import Judged, ShardedLogits
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
    logits: Tensor | Judged,
    labels: Tensor,
    smoothing: float = 0.1,
    weights: Tensor | None = None,
    share: Share = WHOLE,
) -> Tensor:
    """Cross entropy with label smoothing: logits [..., B, C], labels [B] -> [...], a (weighted) mean over B."""
    if isinstance(logits, Judged):
        return share.mean(logits.entropies, weights)
    classes = logits.shape[-1]
    flat_logits, flat_labels = full(logits).reshape(-1, classes), labels.expand(logits.shape[:-1]).reshape(-1)
    flat = F.cross_entropy(flat_logits, flat_labels, label_smoothing=smoothing, reduction="none")
    return share.mean(flat.view(logits.shape[:-1]), weights)


def centre_loss(
    features: Tensor, labels: Tensor, centres: Tensor, weights: Tensor | None = None, share: Share = WHOLE
) -> Tensor:
    """Squared distance to the identity's centre: features [..., B, D], centres [..., C, D] -> [...], a mean over B."""
    centres = centres[..., labels, :].expand_as(features)
    squares = F.mse_loss(full(features), centres, reduction="none")  # keeps no differences
    return share.mean(squares.sum(-1), weights)


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


class Centres(NamedTuple):
    """Of some identities: global [C, D], of the parts [P or 1, C, T*D], and which row is each clip's, [n]."""

    whole: Tensor
    parts: Tensor
    places: Tensor


class Branch(NamedTuple):
    """What the losses of the global branch see of a rank's n clips; those of the parts', with P before each shape."""

    features: Tensor  # [n, D]
    logits: Tensor | Judged  # [n, C]
    labels: Tensor  # [n]; of the parts too
    weights: Tensor | None  # 0 where a clip never shows the part, which must then not count
    centres: Tensor  # [rows, D]
    places: Tensor  # [n], rows of the centres; of the parts too
    compared: Compared


class Criterion(nn.Module):
    """All losses with their weights, and the centre tables (buffers; `update_centres` moves them).

    Where scopes are lanes, no rank sees all features; the ranks share out the tables (distributed/owned_rows.py).

    Args:
        loss: weights and variants.
        num_identities: C.
        width: D of the global feature.
        part_width: T*D of a part's feature.
        parts: P.
        owners: the ranks that share out the tables; None: all here.
    """

    def __init__(
        self,
        loss: LossConfig,
        num_identities: int,
        width: int,
        part_width: int,
        parts: int,
        owners: Ranks | None = None,
    ) -> None:
        super().__init__()
        self.loss, self.num_identities, self.owners = loss, num_identities, owners
        self._exchange: Exchange | None = None  # of this step
        ranks = owners or Ranks.alone()
        tables = parts if loss.centres == "all" else 1
        self.register_buffer("global_centres", own_rows(torch.randn, 1, num_identities, width, ranks)[0])
        self.register_buffer("part_centres", own_rows(torch.randn, tables, num_identities, part_width, ranks))

    def forward(
        self,
        features: Features,
        logits: Tensor | ShardedLogits,
        labels: Tensor,
        erased: Tensor,
        visibility: Tensor | None = None,
        share: Share = WHOLE,
        scope: Scope | None = None,
        centres: Centres | None = None,
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
            centres: of their identities; default the tables.

        Returns:
            The total, with gradient, and its terms before weighting, detached; `accuracy` is the global classifier's.
        """
        alpha = self.loss.alpha
        if isinstance(logits, ShardedLogits):
            logits = logits.judged(labels, self.loss.label_smoothing)
        others, all_labels, shown = scope or Scope(features, labels, visibility)
        global_centres, part_centres, places = centres or self.centres_of(labels)
        compared = Compared(others.global_feature, all_labels, None)
        branch = Branch(features.global_feature, logits[0], labels, None, global_centres, places, compared)
        of_whole = self.branch_terms(branch, share)
        compared = Compared(others.part_features, all_labels, _seen(shown))
        branch = Branch(features.part_features, logits[1:], labels, _seen(visibility), part_centres, places, compared)
        of_parts = {name: term.mean() for name, term in self.branch_terms(branch, share).items()}
        batch = self.batch_terms(features, erased, share)
        total = alpha * self._weighted(of_whole) + (1 - alpha) * self._weighted(of_parts) + self._weighted(batch)
        branches = ("global", of_whole), ("parts", of_parts)
        terms = {f"{name}_{branch}": of[name] for name in of_whole for branch, of in branches}
        right = logits[0].right if isinstance(logits, Judged) else (logits[0].argmax(-1) == labels).float()
        terms |= batch | {"accuracy": share.mean(right)}
        return total, {name: term.detach() for name, term in terms.items()}

    def branch_terms(self, branch: Branch, share: Share) -> dict[str, Tensor]:
        """The losses of the global branch, or of the parts', with P in front of each shape: [] or [P] each.

        Their names are those of their weights in LossConfig.
        """
        features, logits, labels, weights, centres, places, compared = branch
        margin = self.loss.triplet_margin
        if share.peers is None:
            triplet = share.compare(partial(triplet_loss, margin=margin), features, compared)
        else:
            triplet = triplet_loss_across(features, compared, margin, share)
        return {
            "identity": identity_loss(logits, labels, self.loss.label_smoothing, weights, share),
            "triplet": triplet,
            "centre": centre_loss(features, places, centres, weights, share),
        }

    def batch_terms(self, features: Features, erased: Tensor, share: Share) -> dict[str, Tensor]:
        """The losses that belong to no branch, each a scalar, under the names of their weights in LossConfig."""
        return {"attention": attention_loss(features.temporal_scores, erased, share)}

    def _weighted(self, terms: dict[str, Tensor]) -> Tensor:
        return sum(getattr(self.loss, name) * term for name, term in terms.items())

    def centres_of(self, labels: Tensor) -> Centres:
        """The centres of identities, int64 [n]; a collective where the ranks share out the tables.

        There the CPU has to know the labels: call it before they go to a GPU.
        """
        if self.owners is None:
            return Centres(self.global_centres, self.part_centres, labels.to(self.global_centres.device))
        self._exchange = Exchange(labels.cpu(), self.owners)
        whole, *parts = self._exchange.fetch([self.global_centres, *self.part_centres])
        return Centres(whole, torch.stack(parts), self._exchange.place)

    @torch.no_grad()
    def update_centres(
        self, features: Features, labels: Tensor, visibility: Tensor | None = None, centres: Centres | None = None
    ) -> None:
        """Move the centres towards the features of the global batch; every rank does the same, or its owners.

        `all` (Wen et al., ECCV 2016): an identity's centre c with n clips x in the batch moves by
        rate * sum(x - c) / (1 + n), whatever the batch size. `released`: one step of gradient descent with that rate on
        the global branch's mean squared distance, rate * 2 / B * sum(x - c); the local table stays as drawn.

        Args:
            features: of all clips, or of this rank's where the ranks share out the tables; so labels and visibility.
            centres: what `centres_of` gave in this step.
        """
        table, part_table, places = centres or self.centres_of(labels)
        ones = torch.ones_like(places, dtype=table.dtype)
        moved = [(self.global_centres, features.global_feature, table, ones)]
        if self.loss.centres == "all":
            shown = [ones] * len(part_table) if visibility is None else _seen(visibility)
            moved += zip(self.part_centres, features.part_features, part_table, shown, strict=True)
        if self.owners is not None:
            self._move_owned(moved, places)
            return
        for table, clips, centre, seen in moved:  # one at a time: they are as large as the features
            self._move(table, clips - centre[places], places, seen)

    def _move(self, table: Tensor, pull: Tensor, places: Tensor, seen: Tensor) -> None:
        """Add each identity's pulls [n, D] to its row, of those clips that are seen, [n]."""
        rate, released = self.loss.centre_rate, self.loss.centres == "released"
        count = seen.new_zeros(len(table)).index_add_(0, places, seen)[places]
        weight = torch.full_like(seen, 2 * rate / len(places)) if released else rate * seen / (1 + count)
        table.index_add_(0, places, weight.unsqueeze(1) * pull)

    def _move_owned(self, moved: list[tuple[Tensor, ...]], places: Tensor) -> None:
        """The same by the owners of the rows, from all ranks' sums of pulls and of clips seen."""
        rate, released = self.loss.centre_rate, self.loss.centres == "released"
        pulls = [((clips - centre[places]) * seen[:, None], seen[:, None]) for _, clips, centre, seen in moved]
        addends = torch.cat([torch.cat(of, 1) for of in pulls], 1)
        own = addends.new_zeros(self._exchange.rows, addends.shape[1]).index_add_(0, places, addends)
        sums = self._exchange.add(own).split([table.shape[1] + 1 for table, *_ in moved], 1)
        for (table, *_), found in zip(moved, sums, strict=True):
            weight = 2 * rate / (len(places) * self.owners.world_size) if released else rate / (1 + found[:, -1:])
            table[self._exchange.owned] += weight * found[:, :-1]

    def held_tables(self) -> dict[str, Held]:
        """This rank's part of each table."""
        place, held = self.owners or Ranks.alone(), {}
        for name, table in self.named_buffers():
            part = Part.rows((*table.shape[:-2], self.num_identities, table.shape[-1]), place.rank, place.world_size)
            held[name] = Held(part, table.detach) if self.owners else Held.by_all(table)
        return held
