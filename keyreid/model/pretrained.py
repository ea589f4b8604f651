"""Initial weights: timm names, timm and jax .pth files, .safetensors, Hugging Face ViTs, whole networks."""

from __future__ import annotations

import logging

import torch

from keyreid.model.keyreid import KeyReID

log = logging.getLogger(__name__)

CLASSIFIERS = ("global_classifier.weight", "part_classifiers.weight")


def load_network(network: KeyReID, state: dict[str, torch.Tensor], source: str, keep_classifiers: bool) -> None:
    network.load_state_dict(state)
