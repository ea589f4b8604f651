"""Backbones by name, and the patch grids that readers ask for without building one.

A backbone of another kind is a file here with a class made from `Backbone`, and its line in `FAMILIES`.
"""

from keyreid.backbones.backbone import Backbone, LastStage, PatchGrid
from keyreid.backbones.vit import ViT
from keyreid.config import ClipConfig, ModelConfig

__all__ = ["FAMILIES", "Backbone", "LastStage", "PatchGrid", "build_backbone", "family", "patch_grid"]

# How the names of a family begin; the longest beginning that fits decides.
FAMILIES: dict[str, type[Backbone]] = {
    "": ViT,  # whatever else timm calls a VisionTransformer
}


def family(name: str) -> type[Backbone]:
    """The class behind a `model.backbone`."""
    return FAMILIES[max((beginning for beginning in FAMILIES if name.startswith(beginning)), key=len)]


def patch_grid(model: ModelConfig, clip: ClipConfig) -> PatchGrid:
    """Where a configuration's patches lie, without building a network; ConfigError if they do not tile the picture."""
    return family(model.backbone).grid_of(model, clip)


def build_backbone(model: ModelConfig, clip: ClipConfig, num_cameras: int) -> Backbone:
    """A configuration's backbone with random weights; ConfigError if there is none, or it does not fit the clip."""
    return family(model.backbone).build(model, clip, num_cameras)
