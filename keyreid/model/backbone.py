"""The backbone: all blocks but the last of a timm VisionTransformer, with a camera embedding on every token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Mlp, build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from keyreid.config import ClipConfig, ModelConfig
from keyreid.patches import create, patch_grid


def create_vit(model: ModelConfig, clip: ClipConfig) -> VisionTransformer:
    """The timm network that the branches are cut from, with random weights, at the clip's size.

    Its position embedding fits the patch grid, its patches overlap where `patch_stride` says so, and stochastic depth
    grows linearly to `drop_path` at the last of the `depth` blocks.
    """
    grid = patch_grid(model, clip)
    settings = {"drop_path_rate": model.drop_path, "img_size": (clip.height, clip.width)}
    vit = create(model.backbone, depth=model.depth, **settings)
    if model.patch_stride:
        vit.patch_embed.proj.stride = (model.patch_stride, model.patch_stride)
    vit.patch_embed.grid_size = grid
    vit.patch_embed.num_patches = grid[0] * grid[1]
    if vit.pos_embed is not None:
        tokens = vit.patch_embed.num_patches + (0 if vit.no_embed_class else vit.num_prefix_tokens)
        # From random weights, sines and cosines (Beyer et al., arXiv 2205.01580) let attention tell places apart from
        # the first step: the quickstart's network learns nearly twice as fast as from small random numbers.
        places = build_sincos2d_pos_embed(list(grid), vit.embed_dim)
        vit.pos_embed = nn.Parameter(F.pad(places, (0, 0, tokens - len(places), 0)).unsqueeze(0))
    return vit


class InPlaceGELU(nn.GELU):
    """GELU that overwrites its argument where no gradient will ask for it.

    The widest tensor of a block is then there once instead of twice: an evaluation holds a quarter less beside the
    weights (benchmarks/README.md).
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Elementwise; the argument must be the caller's own, as a linear layer's output is."""
        if torch.is_grad_enabled() and input.requires_grad:
            return super().forward(input)
        return torch.ops.aten.gelu_(input, approximate=self.approximate)


class Backbone(nn.Module):
    """Patch, position and camera embedding and the first depth-1 blocks.

    Args:
        vit: taken apart: its modules and parameters become this module's.
        num_cameras: rows of the camera embedding; 0 for none.
        camera_factor: what the camera embedding is multiplied with (published: 3).
    """

    def __init__(self, vit: VisionTransformer, num_cameras: int, camera_factor: float):
        super().__init__()
        self.patch_embed = vit.patch_embed
        self.cls_token = vit.cls_token
        extra = getattr(vit, "dist_token", None)  # DeiT's distillation token is one more register
        self.reg_token = extra if extra is not None else vit.reg_token
        self.pos_embed = vit.pos_embed
        self.embed_prefix = not vit.no_embed_class
        self.norm_pre = vit.norm_pre
        self.blocks = vit.blocks[:-1]
        for mlp in (getattr(block, "mlp", None) for block in self.blocks):
            if type(mlp) is Mlp and type(mlp.act) is nn.GELU:
                mlp.act = InPlaceGELU(mlp.act.approximate)
        self.prefix_tokens = vit.num_prefix_tokens
        self.camera_factor = camera_factor
        self.camera = None
        if num_cameras and camera_factor:
            self.camera = nn.Parameter(torch.empty(num_cameras, vit.embed_dim))
            nn.init.trunc_normal_(self.camera, std=0.02)

    def forward(self, images: torch.Tensor, cameras: torch.Tensor, checkpoint_blocks: bool = False) -> torch.Tensor:
        """Embed frames.

        Args:
            images: [S, 3, H, W], normalised.
            cameras: int [S]; -1 is unknown and gets the mean of the learnt camera embeddings.
            checkpoint_blocks: keep only each block's input for the backward pass.

        Returns:
            [S, R+N, D]: R prefix tokens (CLS first), then N patches in raster order.
        """
        x = self.patch_embed(images.to(self.cls_token.dtype))
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        if self.pos_embed is None:
            x = torch.cat([*prefix, x], 1)
        elif self.embed_prefix:
            x = torch.cat([*prefix, x], 1) + self.pos_embed
        else:
            x = torch.cat([*prefix, x + self.pos_embed], 1)
        if self.camera is not None:
            table = torch.cat([self.camera, self.camera.mean(0, keepdim=True)])
            x = x + self.camera_factor * table[torch.where(cameras < 0, len(self.camera), cameras)].unsqueeze(1)
        x = self.norm_pre(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if checkpoint_blocks else block(x)
        return x
