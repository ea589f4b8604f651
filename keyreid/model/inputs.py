"""From a reader's batch to the network's inputs, on the device that the batch is on."""

import torch

from keyreid.guidance import Guidance
from keyreid.shards.batch import ClipBatch

ERASED_COLOUR = (0.485, 0.456, 0.406)  # after normalising, as published


def prepare(batch: ClipBatch, mode: Guidance) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise uint8 pictures, fill erased rectangles, and bring guidance in [0, 1] into the mode's range.

    Returns:
        images float32 [B, T, 3, H, W] in [-1, 1] and guidance float32 [B, T, P, Hp, Wp] as the mode takes it.
    """
    images = batch.images.float().mul_(2 / 255).sub_(1)
    height, width = images.shape[-2:]
    top, left, rows, columns = batch.erase.unbind(-1)
    down, across = (torch.arange(side, device=images.device) for side in (height, width))
    inside = _within(down, top, rows).unsqueeze(-1) & _within(across, left, columns).unsqueeze(-2)  # [B, T, H, W]
    for channel, value in enumerate(ERASED_COLOUR):
        images[:, :, channel].masked_fill_(inside, value)
    return images, mode.scaled(batch.guidance)


def _within(positions: torch.Tensor, start: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    start, length = start.unsqueeze(-1), length.unsqueeze(-1)
    return (positions >= start) & (positions < start + length)
