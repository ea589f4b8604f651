"""timm's VisionTransformers by name, and the patches that they cut a picture into: what model and readers both ask."""

from __future__ import annotations

import difflib
from functools import lru_cache

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from keyreid.config import ClipConfig, ModelConfig
from keyreid.errors import ConfigError


def patch_grid(model: ModelConfig, clip: ClipConfig) -> tuple[int, int]:
    """Rows and columns (Hp, Wp) of the patches, without building the network.

    Raises:
        ConfigError: the backbone is not a VisionTransformer, or its patches do not tile the picture.
    """
    patch, stride = patch_size(model)
    sides = {"clip.height": clip.height, "clip.width": clip.width}
    for name, pixels in sides.items():
        excess = (pixels - patch) % stride
        if pixels < patch or excess:
            below = max(pixels - excess, patch)
            raise ConfigError(
                f"{name}={pixels}: patches of {patch} pixels every {stride} pixels do not tile it; "
                f"use {below} or {below + stride} with {model.backbone}"
            )
    height, width = ((pixels - patch) // stride + 1 for pixels in sides.values())
    return height, width


def patch_size(model: ModelConfig) -> tuple[int, int]:
    """Side of a patch and step between patches, in pixels."""
    patch = _native_patch_size(model.backbone)
    return patch, model.patch_stride or patch


@lru_cache
def _native_patch_size(name: str) -> int:
    with torch.device("meta"):
        return create(name, depth=1).patch_embed.patch_size[0]


def create(name: str, depth: int | None, **settings) -> VisionTransformer:
    """timm's network of this name, with random weights.

    Raises:
        ConfigError: there is none, or it is not a VisionTransformer with a class token.
    """
    if not timm.is_model(name):
        family = timm.list_models("*vit*") + timm.list_models("deit*")
        near = difflib.get_close_matches(name, family, n=3, cutoff=0.4)
        raise ConfigError(f"model.backbone={name!r}: timm has no such model; near names: {', '.join(near) or 'none'}")
    if depth is not None:
        settings["depth"] = depth
    try:
        vit = timm.create_model(name, pretrained=False, num_classes=0, **settings)
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"model.backbone={name!r}: cannot be built as a VisionTransformer: {error}") from None
    if not isinstance(vit, VisionTransformer):
        raise ConfigError(f"model.backbone={name!r} is a {type(vit).__name__}; only timm's VisionTransformer will do")
    if vit.cls_token is None:
        raise ConfigError(f"model.backbone={name!r} has no class token, which both branches read")
    return vit
