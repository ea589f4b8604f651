"""The network: `build_model` from a configuration."""

from keyreid.model.build import build_model
from keyreid.model.keyreid import Features, KeyReID
from keyreid.patches import patch_grid, patch_size

__all__ = ["Features", "KeyReID", "build_model", "patch_grid", "patch_size"]
