"""What a guidance mode decides, from the reader to the evaluation: one class instead of a name compared everywhere."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


class Guidance:
    """One way in which part heatmaps lead the network.

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
        """A module whose output is added to the patch tokens before the first block, or None for no such addend.

        It maps guidance [S, P, Hp, Wp] of S frames to [S, Hp * Wp, width].
        """
        return None

    def part_features(self, branch: "nn.Module", tokens: "torch.Tensor", guidance: "torch.Tensor") -> "torch.Tensor":
        """The parts of B clips, before the local branch's norm.

        Args:
            branch: the LocalBranch: its `block` attends from the first row, once a part; `frames` T, `gather` the
                tokens that become rows, in order, the class token first, `order` the patches of those rows, `epsilon`.
            tokens: [B*T, R+N, D].
            guidance: [B, P, N], the mean over the frames, float32.

        Returns:
            [B, P, T*D].
        """
        raise NotImplementedError
