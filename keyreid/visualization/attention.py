"""Where the network looks: the attention of the class token in the last block, frame by frame, and of each part.

The network never builds these maps (docs/model.md: one query is folded through the keys), so they are computed here,
from what goes into its attention modules during a forward pass.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from keyreid.config import Config
from keyreid.embedding.features import network_inputs
from keyreid.errors import ConfigError
from keyreid.model import KeyReID
from keyreid.model.single_query import SingleQueryAttention, SingleQueryBlock
from keyreid.pose.parts import part_names
from keyreid.shards import open_reader
from keyreid.shards.batch import ClipBatch, ClipPlan
from keyreid.shards.shard_set import ShardSet
from keyreid.visualization.guidance import describe, evenly_spaced
from keyreid.visualization.strips import Strip, draw_strips, overlay


@dataclass(frozen=True)
class AttentionMaps:
    """Shares of attention, mean over the heads.

    Attributes:
        frames: float32 [B, T, Hp, Wp], of each frame's class token over its patches (global branch).
        parts: float32 [B, P, Hp, Wp], of each part's token over the patches, all T frames together (local branch);
            None for `released`, whose rows are no patches.
    """

    frames: np.ndarray
    parts: np.ndarray | None


def can_draw_attention(model: KeyReID) -> bool:
    """Whether the last block's attention is plain: no query/key norms, no gates."""
    return isinstance(model.global_branch.block, SingleQueryBlock)


@torch.no_grad()
def attention_maps(model: KeyReID, batch: ClipBatch, cameras_known: bool = True) -> AttentionMaps:
    """Run the network on clips, as an evaluation does, and give its attention; `cameras_known` as for `extract`.

    Raises:
        ConfigError: the backbone's attention is of another kind than the single-query form.
    """
    if not can_draw_attention(model):
        raise ConfigError("attention pictures need a backbone with plain attention (no query/key norms or gates)")
    caught: dict[str, Any] = {}
    branches = {"frames": model.global_branch.block.attention, "parts": model.local_branch.block.attention}
    was_training = model.training
    with contextlib.ExitStack() as hooks:
        hooks.callback(model.train, was_training)
        for name, module in branches.items():
            catch = module.register_forward_pre_hook(lambda _, args, name=name: caught.update({name: args}))
            hooks.callback(catch.remove)
        model.eval().features(*network_inputs(model, batch, cameras_known))
    rows, columns = model.patch_grid
    x = caught["frames"][0]
    frames = _attention(branches["frames"], x)[:, 0, -rows * columns :]
    parts = None
    if model.guidance.rows_are_patches:
        x, _, log_weight = caught["parts"]
        shuffled = _attention(branches["parts"], x, log_weight)[:, :, 1:]
        parts = torch.empty_like(shuffled)
        parts[:, :, model.local_branch.order] = shuffled  # back from TCSS to raster order
        parts = parts.unflatten(2, (rows, columns)).cpu().numpy()
    return AttentionMaps(frames.unflatten(0, (-1, model.frames)).unflatten(2, (rows, columns)).cpu().numpy(), parts)


def attention_picture(
    model: KeyReID,
    shards: ShardSet,
    positions: Sequence[int],
    config: Config,
    cameras_known: bool = True,
    device: torch.device | str = "cpu",
) -> Image.Image:
    """A clip of evenly spaced frames of each tracklet, and over them the attention; arguments as for `extract`."""
    plans = [_spread_clip(shards, position, config.clip.frames) for position in positions]
    with contextlib.closing(open_reader(shards, iter([plans]), config, device=device)) as reader:
        batch = next(iter(reader)).to(device)
    maps = attention_maps(model, batch, cameras_known)
    pictures = batch.images.permute(0, 1, 3, 4, 2).cpu().numpy()
    strips = []
    for clip, plan in enumerate(plans):
        rows = [("frame", list(pictures[clip])), ("class token", _overlaid(pictures[clip], maps.frames[clip]))]
        if maps.parts is not None:
            for part, name in enumerate(part_names(model.parts)):
                over_frames = [maps.parts[clip, part]] * config.clip.frames
                rows.append((name.replace("_", " "), _overlaid(pictures[clip], over_frames)))
        strips.append(Strip(describe(shards.tracklets[plan.tracklet]), [str(frame) for frame in plan.frames], rows))
    note = "mean over heads, each map from its least to its most · parts: one map for all frames"
    title = f"{shards.card['name']} · attention of the last block"
    return draw_strips(strips, title, f"columns: frame numbers · {note}")


def _spread_clip(shards: ShardSet, position: int, frames: int) -> ClipPlan:
    """A clip over the whole tracklet instead of consecutive frames."""
    chosen = np.sort(np.resize(evenly_spaced(shards.tracklets[position].frames, frames), frames))
    nothing, no_crop, no_erasing = np.zeros(frames, bool), np.zeros((frames, 2), int), np.zeros((frames, 4), int)
    return ClipPlan(position, -1, chosen, nothing, no_crop, no_erasing, nothing)


def _overlaid(pictures: Sequence[np.ndarray], maps: Sequence[np.ndarray]) -> list[np.ndarray]:
    spread = [(m - m.min()) / max(float(np.ptp(m)), 1e-12) for m in maps]
    return list(map(overlay, pictures, spread))


def _attention(module: SingleQueryAttention, x: torch.Tensor, log_weight: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) of the first token, with keys built in full: float32 [S, P, rows], mean over heads."""
    x = x.float()
    gain, bias = module.norm_weight.float(), module.norm_bias.float()
    normalised = functional.layer_norm(x, x.shape[-1:], gain, bias, module.eps)
    q_bias, k_bias, _ = module.qkv_bias.float().chunk(3)
    query = functional.linear(normalised[:, 0], module.q_weight.float(), q_bias).unflatten(-1, (module.heads, -1))
    keys = functional.linear(normalised, module.k_weight.float(), k_bias).unflatten(-1, (module.heads, -1))
    logits = torch.einsum("shd,snhd->shn", query, keys).unsqueeze(1) * query.shape[-1] ** -0.5
    if log_weight is not None:
        logits = logits + functional.pad(log_weight.float(), (1, 0)).unsqueeze(2)
    return logits.softmax(-1).mean(2)
