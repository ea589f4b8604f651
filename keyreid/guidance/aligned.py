"""Guidance as the paper's figures draw it: it weighs the patches that a part attends to."""

from typing import TYPE_CHECKING

from keyreid.guidance.mode import Guidance

if TYPE_CHECKING:
    import torch
    from torch import nn


class Aligned(Guidance):
    """A row is one patch over the T frames, the token is the T class tokens joined.

    log(guidance + epsilon) is added to the attention's logits, and travels with its row through TCSS.
    """

    name = "aligned"

    def part_features(self, branch: "nn.Module", tokens: "torch.Tensor", guidance: "torch.Tensor") -> "torch.Tensor":
        """See Guidance."""
        rows = tokens.unflatten(0, (-1, branch.frames)).transpose(1, 2)  # [B, R+N, T, D]
        rows = rows.index_select(1, branch.gather).flatten(2)
        return branch.block(rows, log_weight=(guidance.index_select(2, branch.order) + branch.epsilon).log())
