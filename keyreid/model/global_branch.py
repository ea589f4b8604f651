"""The global branch: each frame's class token, weighed over time by a learnt attention."""

import torch
from torch import nn

from keyreid.backbones import LastStage
from keyreid.model.precision import full
from keyreid.model.single_query import SingleQueryBlock, is_rewritable

ATTENTION_CHANNELS = 256  # as published


class GlobalBranch(nn.Module):
    """The backbone's last block and norm for the class tokens, and temporal attention over the frames.

    Args:
        stage: the backbone's last. Its block is run whole where the single-query rewriting does not hold for it
            (query/key norms, gates, or no transformer block at all).
        width: D.
    """

    def __init__(self, stage: LastStage, width: int):
        super().__init__()
        self.block = SingleQueryBlock.from_block(stage.block) if is_rewritable(stage.block) else stage.block
        self.norm = stage.norm
        self.attention = nn.Linear(width, ATTENTION_CHANNELS)
        self.temporal = nn.Conv1d(ATTENTION_CHANNELS, 1, kernel_size=3, padding=1)

    def forward(self, tokens: torch.Tensor, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """From [B*T, R+N, D] to the clip feature [B, D] and the attention scores before the softmax [B, T]."""
        frame_features = self.norm(self.block(tokens)[:, 0]).unflatten(0, (-1, frames))
        hidden = self.attention(frame_features).relu()
        scores = full(self.temporal(hidden.mT).squeeze(1)).relu()
        clip_feature = (scores.softmax(-1).unsqueeze(-1) * full(frame_features)).sum(1)
        return clip_feature, scores
