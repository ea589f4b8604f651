"""What a guidance mode decides, and the two that there are."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


class Guidance:
    """What one mode decides, from the reader to the evaluation, instead of a name compared everywhere.

    Configurations ask for names before anything needs torch, so a mode imports torch inside its methods, if at all.

    Attributes:
        name: what `model.guidance` says.
        swaps_sides: where a frame is flipped, its left and right parts swap.
        uses_visibility: the losses leave a part out for clips that do not show it.
        starts_as_backbone: with pretrained weights, the local block starts as the backbone's last one.
        rows_are_patches: each row that a part attends to is one patch over all frames, so its attention can be drawn,
            and tokens before the patches (registers) can be left out.
        most_clips: so many clips of a tracklet are evaluated, the first ones; None: all.
        blanks_repeats: frames that only fill up an evaluation clip have no guidance.
        is_published: the published code computes the same, and reads our weights.
    """

    name: str
    swaps_sides: bool = True
    uses_visibility: bool = True
    starts_as_backbone: bool = True
    rows_are_patches: bool = True
    most_clips: int | None = None
    blanks_repeats: bool = False
    is_published: bool = False

    def scaled(self, heatmaps: "torch.Tensor") -> "torch.Tensor":
        """From the readers' [0, 1] to the range that the network takes."""
        return heatmaps

    def prompts(self, parts: int, width: int) -> "nn.Module | None":
        """What maps guidance [S, P, Hp, Wp] to addends [S, Hp * Wp, width] of the patch tokens, if anything does."""
        return None

    def part_features(self, branch: "nn.Module", tokens: "torch.Tensor", guidance: "torch.Tensor") -> "torch.Tensor":
        """The parts of B clips, [B, P, T*D], before the local branch's norm.

        Args:
            branch: the LocalBranch: its `block` attends from the first row, once a part; `frames` T, `gather` the
                tokens that become rows, in order, the class token first, `order` the patches of those rows, `epsilon`.
            tokens: [B*T, R+N, D].
            guidance: [B, P, N], the mean over the frames, float32.
        """
        raise NotImplementedError


class Aligned(Guidance):
    """As the paper's figures draw it: guidance weighs the patches that a part attends to.

    A row is one patch over the T frames, the token is the T class tokens joined. log(guidance + epsilon) is added to
    the attention's logits, and travels with its row through TCSS.
    """

    name = "aligned"

    def part_features(self, branch: "nn.Module", tokens: "torch.Tensor", guidance: "torch.Tensor") -> "torch.Tensor":
        """See Guidance."""
        rows = tokens.unflatten(0, (-1, branch.frames)).transpose(1, 2)  # [B, R+N, T, D]
        rows = rows.index_select(1, branch.gather).flatten(2)
        return branch.block(rows, log_weight=(guidance.index_select(2, branch.order) + branch.epsilon).log())


class Released(Guidance):
    """As the published code computes it, for its checkpoints: a row is T consecutive tokens of one frame.

    Guidance in [-1, 1], in raster order, multiplies the rows after TCSS, before the block's LayerNorm (which leaves
    its sign alone: docs/model.md).
    """

    name = "released"
    swaps_sides = uses_visibility = starts_as_backbone = rows_are_patches = False
    most_clips = 41
    blanks_repeats = is_published = True

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
