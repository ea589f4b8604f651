"""What of a step's batch a rank has, and what the ranks must tell each other about it.

The clips of a batch are compared within scopes: equal parts of it, the lanes of the plan, or one, the whole batch
(`loss.compare`). A rank has whole scopes, or neighbouring ranks hold one together. What it computes of a loss are the
addends of its own clips, so that the ranks' values add up to the loss of the whole batch, and so do their gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from keyreid.errors import ConfigError


class Compared(NamedTuple):
    """The S clips that own ones are compared with, themselves among them, without gradient."""

    features: Tensor  # [..., S, D]
    labels: Tensor  # [S]
    weights: Tensor | None  # [..., S], 0 for those that take no part


@dataclass(frozen=True)
class Share:
    """A rank's n rows of a batch, or of a micro-batch of it; by default all that there are.

    Attributes:
        clips: B, of the whole batch, over all ranks and micro-batches; None: these rows are the batch, and one scope.
        scopes: that these rows hold, one after the other.
        ranks: of the run.
        peers: the ranks that hold these rows' one scope together, in the order of their rows; None: this one alone.
        seen: [P], how many clips of the batch show each part.
        wire: in what features travel to the peers; None: as they are.
    """

    clips: int | None = None
    scopes: int = 1
    ranks: int = 1
    peers: dist.ProcessGroup | None = None
    seen: Tensor | None = None
    wire: torch.dtype | None = None

    @property
    def size(self) -> int:
        """Ranks that hold these rows' scopes."""
        return self.peers.size() if self.peers else 1

    def first(self, rows: int) -> int:
        """Where these rows begin in their scope."""
        return self.peers.rank() * rows if self.peers else 0

    def mean(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """These rows' addends, [..., n] -> [...], of the (weighted) mean over the batch; weights are 1 where seen."""
        if self.clips is None:
            return values.mean(-1) if weights is None else (values * weights).sum(-1) / _some(weights.sum(-1))
        return values.sum(-1) / self.clips if weights is None else (values * weights).sum(-1) / _some(self.seen)

    def compare(self, loss: Callable[..., Tensor], own: Tensor, scope: "Compared") -> Tensor:
        """These rows' addends of a loss that compares clips, each scope's by itself.

        Args:
            loss: the plain function of a scope, (features [..., S, D], labels [S], weights=[..., S] or None) ->
                [...], a (weighted) mean over S.
            own: features of these rows, [..., n, D].
        """
        features, labels, weights = scope
        if self.clips is None:
            return loss(own, labels, weights=weights)
        first, rows = self.first(own.shape[-2]), own.shape[-2]
        if self.size > 1:  # each peer computes the loss, and takes its part of it
            own = own + (self.size - 1) * (own - own.detach())
            own = torch.cat([features[..., :first, :], own, features[..., first + rows :, :]], -2)
        total = 0.0
        for part in torch.arange(len(labels)).chunk(self.scopes):
            part = slice(part[0], part[-1] + 1)
            within = None if weights is None else weights[..., part]
            share = len(labels[part]) / self.clips if weights is None else within.sum(-1) / _some(self.seen)
            total += loss(own[..., part, :], labels[part], weights=within) * share / self.size
        return total

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all peers, [n, ...] -> [n * size, ...], without gradient."""
        if self.peers is None:
            return rows.detach()
        everywhere = rows.new_empty(self.size * len(rows), *rows.shape[1:])
        dist.all_gather_single(everywhere, rows.detach().contiguous(), self.peers)
        return everywhere

    def add(self, values: Tensor) -> Tensor:
        """The sum over the peers, with gradient."""
        return values if self.peers is None else _Sum.apply(values, self.peers)

    def add_all(self, values: Tensor) -> Tensor:
        """The sum over all ranks, without gradient."""
        if self.ranks > 1:
            dist.all_reduce(values := values.detach().clone())
        return values


WHOLE = Share()


def peers_of(scopes: int, ranks: int, what: str) -> dist.ProcessGroup | None:
    """The ranks that hold a scope together with this one; None where it holds whole ones; a collective.

    Raises:
        ConfigError: neither do the ranks divide the scopes, nor the scopes the ranks.
    """
    if (together := ranks_of_scope(scopes, ranks, what)) == 1:
        return None
    return dist.group.WORLD if scopes == 1 else dist.new_subgroups(together)[0]


def ranks_of_scope(scopes: int, ranks: int, what: str) -> int:
    """How many ranks hold a scope together; ConfigError as by `peers_of`."""
    if scopes % ranks and ranks % scopes:
        raise ConfigError(f"{what} and {ranks} ranks: one must divide the other")
    return max(1, ranks // scopes)


def _some(weight: Tensor) -> Tensor:
    return weight.clamp(min=1e-6)


class _Sum(torch.autograd.Function):
    """The same sum goes into the losses of all peers, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, values: Tensor, peers: dist.ProcessGroup) -> Tensor:
        ctx.peers = peers
        dist.all_reduce(values := values.clone(), group=peers)
        return values

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        dist.all_reduce(gradient := gradient.contiguous().clone(), group=ctx.peers)
        return gradient, None
