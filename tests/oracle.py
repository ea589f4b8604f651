"""KeyRe-ID in its naive form, written from the description: every token of every block is computed.

The slow but plain counterpart of keyreid.model: what it gives, and its gradients, the fast form must give too. Its
modules are named as in the published state dict, so `keyreid.checkpoints.released.to_released` fills it and
`from_released` brings its gradients into our layout. The triplet loss is here too, by the distances of all pairs.
benchmarks/model.py and benchmarks/losses.py measure against them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from keyreid.checkpoints.released import from_released, to_released
from keyreid.model import KeyReID
from keyreid.model.keyreid import Features
from keyreid.model.local_branch import row_order


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, key_bias: torch.Tensor | None = None) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0], qkv[1], qkv[2]
        logits = (query @ key.transpose(-2, -1)) * (width // self.heads) ** -0.5
        if key_bias is not None:
            logits = logits + key_bias[:, None, None, :]
        x = (logits.softmax(dim=-1) @ value).transpose(1, 2).reshape(batch, tokens, width)
        return self.proj(x)


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x: torch.Tensor, key_bias: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), key_bias)
        return x + self.mlp(self.norm2(x))


class Oracle(nn.Module):
    """The naive form of a KeyReID with the same weights; stochastic depth is not part of it."""

    def __init__(self, model: KeyReID, heads: int, local_heads: int = 12, epsilon: float = 1e-2, tcss=None):
        super().__init__()
        width, local_width, depth = model.width, model.part_width, len(model.backbone.blocks) + 1
        self.frames, self.parts, self.mode, self.epsilon = model.frames, model.parts, model.guidance.name, epsilon
        self.grid = model.patch_grid
        self.order = model.local_branch.order if tcss is None else row_order(self.grid[0] * self.grid[1], tcss)
        self.base = nn.Module()
        self.base.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.base.pos_embed = nn.Parameter(torch.empty(model.backbone.pos_embed.shape))
        self.base.Cam = nn.Parameter(torch.empty(len(model.backbone.camera), 1, width))
        patch = model.backbone.patch_embed.proj
        self.base.patch_embed = nn.Module()
        self.base.patch_embed.proj = nn.Conv2d(3, width, patch.kernel_size, patch.stride)
        self.base.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.base.norm = nn.LayerNorm(width, eps=1e-6)
        self.base.fc = nn.Linear(width, 1000)
        self.b1 = nn.Sequential(Block(width, heads), nn.LayerNorm(width, eps=1e-6))
        self.bottleneck = nn.BatchNorm1d(width)
        self.classifier = nn.Linear(width, model.num_identities, bias=False)
        self.block1 = Block(local_width, local_heads)
        self.b2 = nn.Sequential(self.block1, nn.LayerNorm(local_width))
        for part in range(1, self.parts + 1):
            setattr(self, f"bottleneck_{part}", nn.BatchNorm1d(local_width))
            setattr(self, f"classifier_{part}", nn.Linear(local_width, model.num_identities, bias=False))
        self.attention_conv = nn.Conv2d(width, 256, [1, 1])
        self.attention_tconv = nn.Conv1d(256, 1, 3, padding=1)
        self.load_state_dict(to_released(model.state_dict()))  # strict: every published name, and no other
        self.to(model.backbone.cls_token.dtype)

    def features(self, images: torch.Tensor, guidance: torch.Tensor, cameras: torch.Tensor) -> Features:
        batch, frames = images.shape[:2]
        x = self.base.patch_embed.proj(images.flatten(0, 1)).flatten(2).transpose(1, 2)
        x = torch.cat([self.base.cls_token.expand(len(x), -1, -1), x], 1) + self.base.pos_embed
        x = x + 3.0 * self.base.Cam[cameras.repeat_interleave(frames)]
        for block in self.base.blocks[:-1]:
            x = block(x)

        per_frame = self.b1(x)[:, 0].view(batch, frames, -1)
        hidden = F.relu(self.attention_conv(per_frame.flatten(0, 1)[..., None, None])).view(batch, frames, -1)
        scores = F.relu(self.attention_tconv(hidden.transpose(1, 2))).view(batch, frames)
        whole = (per_frame * scores.softmax(1)[..., None]).sum(1)

        guidance = guidance.mean(1).flatten(2)  # [B, P, N]
        if self.mode == "released":
            joined = x.reshape(batch, x.shape[1], -1)
        else:
            joined = x.view(batch, frames, x.shape[1], -1).permute(0, 2, 1, 3).reshape(batch, x.shape[1], -1)
        token, rows = joined[:, :1], joined[:, 1:][:, self.order]
        parts = []
        for part in range(self.parts):
            if self.mode == "released":
                out = self.b2(torch.cat([token, rows * guidance[:, part, :, None]], 1))
            else:
                bias = torch.log(guidance[:, part, self.order] + self.epsilon)
                bias = torch.cat([torch.zeros(batch, 1, dtype=bias.dtype), bias], 1)
                out = self.b2[1](self.block1(torch.cat([token, rows], 1), bias))
            parts.append(out[:, 0])
        return Features(whole, torch.stack(parts), scores)

    def heads(self, features: Features) -> torch.Tensor:
        logits = [self.classifier(self.bottleneck(features.global_feature))]
        for part, feature in enumerate(features.part_features, start=1):
            logits.append(self.classifier_of(part)(self.neck_of(part)(feature)))
        return torch.stack(logits)

    def embed(self, images: torch.Tensor, guidance: torch.Tensor, cameras: torch.Tensor) -> torch.Tensor:
        features = self.features(images, guidance, cameras)
        vectors = [self.bottleneck(features.global_feature)]
        for part, feature in enumerate(features.part_features, start=1):
            vectors.append(self.neck_of(part)(feature) / self.parts)
        return torch.cat(vectors, 1)

    def neck_of(self, part: int) -> nn.Module:
        return getattr(self, f"bottleneck_{part}")

    def classifier_of(self, part: int) -> nn.Module:
        return getattr(self, f"classifier_{part}")

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients under our names; entries without one are zeros."""
        gradients = {name: torch.zeros_like(tensor) for name, tensor in self.state_dict().items()}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if parameter.grad is not None:
                gradients[name] = parameter.grad
        return from_released(gradients)


def triplet_of_all_pairs(
    features: torch.Tensor, labels: torch.Tensor, margin: float | None = None, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The triplet loss by its definition: features [..., B, D], labels [B], weights [..., B] -> [...]."""
    distance = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    same = labels.unsqueeze(1) == labels
    seen = torch.ones_like(same) if weights is None else (weights > 0).unsqueeze(-2)
    positive = torch.where(same & seen, distance, 0.0).amax(-1)
    negative = torch.where(~same & seen, distance, torch.inf).amin(-1)
    hard = positive - negative
    loss = F.softplus(hard) if margin is None else (hard + margin).relu()
    return loss.mean(-1) if weights is None else (loss * weights).sum(-1) / weights.sum(-1).clamp(min=1e-6)
