"""The network: `build_model` from a configuration."""

from keyreid.model.build import build_model
from keyreid.model.keyreid import Features, KeyReID

__all__ = ["Features", "KeyReID", "build_model"]
