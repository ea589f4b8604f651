"""Guidance as the published code computes it, for its checkpoints."""

from typing import TYPE_CHECKING

from keyreid.guidance.mode import Guidance

if TYPE_CHECKING:
    import torch
    from torch import nn


class Released(Guidance):
    """A row is T consecutive tokens of one frame.

    Guidance in [-1, 1], in raster order, multiplies the rows after TCSS, before the block's LayerNorm (which leaves
    its sign alone: docs/model.md).
    """

    name = "released"
    swaps_sides = False
    uses_visibility = False
    starts_as_backbone = False
    rows_are_patches = False
    most_clips = 41
    blanks_repeats = True
    is_published = True

    def scaled(self, heatmaps: "torch.Tensor") -> "torch.Tensor":
        """To [-1, 1]."""
        return heatmaps * 2 - 1

    def part_features(self, branch: "nn.Module", tokens: "torch.Tensor", guidance: "torch.Tensor") -> "torch.Tensor":
        """See Guidance."""
        # The published view joins T consecutive tokens of a frame: [B, 1+N, T*D]
        rows = tokens.contiguous().view(guidance.shape[0], tokens.shape[1], -1).index_select(1, branch.gather)
        patches, places = guidance.shape[2], len(branch.order)
        if places > patches:  # the published code stops here; the repeated row takes the guidance of the last place
            guidance = guidance[..., [min(place, patches - 1) for place in range(places)]]
        return branch.block(rows, scale=guidance)
