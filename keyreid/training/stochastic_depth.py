"""Stochastic depth whose draws belong to the clip, not to the process.

timm's DropPath draws from the generator of whichever process meets the clip, so the draw changes with the number of
ranks and micro-batches. Here a step's draws are made lane by lane from (seed, step, lane) and each process takes
the rows of its clips: any number of ranks and micro-batches, a second forward of the same clips, and a resumed run all
drop the same paths, with no generator state to save.
"""

import torch
from torch import Tensor, nn


class ClipDropPath(nn.Module):
    """A residual path that is dropped for some rows.

    Attributes:
        keep: float32 [clips, copies], 0 or 1 / keep probability; a block that sees each clip as k rows (its frames or
            its parts, clip by clip) uses the first k columns.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.keep: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Scale each row of x [clips * k, ...] by its draw; the identity in evaluation."""
        if not self.training:
            return x
        rows = self.keep[:, : x.shape[0] // self.keep.shape[0]].flatten()
        return x * rows.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def use_clip_draws(model: nn.Module) -> list[ClipDropPath]:
    """Replace every timm DropPath in `model`; gives the new ones in module order."""
    from timm.layers import DropPath

    replaced = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, DropPath):
                replaced.append(ClipDropPath(float(child.drop_prob)))
                setattr(parent, name, replaced[-1])
    return replaced


def draw(paths: list[ClipDropPath], seed: int, step: int, clips: int, copies: int, lane: int = 0) -> list[Tensor]:
    """A step's draws for all clips of a lane: for each path float32 [clips, copies]."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step + lane * 0x9E3779B97F4A7C15) % 2**63)
    return [
        (torch.rand(clips, copies, generator=generator) >= path.probability).float() / (1 - path.probability)
        for path in paths
    ]


def use(paths: list[ClipDropPath], draws: list[Tensor], rows: slice, device: torch.device) -> None:
    """Let the next forward, of clips `rows` of the global batch, use their draws."""
    for path, keep in zip(paths, draws, strict=True):
        path.keep = keep[rows].to(device, non_blocking=True)
