"""From a configuration to a network."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from keyreid.config import ClipConfig, ModelConfig
from keyreid.model.backbone import create_vit
from keyreid.model.keyreid import KeyReID
from keyreid.model.pretrained import CLASSIFIERS, download_backbone, load_backbone, load_network, read_state
from keyreid.model.released import from_released, is_released

log = logging.getLogger(__name__)


def build_model(model: ModelConfig, clip: ClipConfig, num_identities: int, num_cameras: int) -> KeyReID:
    """The network of a configuration, with the initial weights that it names.

    Args:
        model: architecture and initial weights.
        clip: frames and picture size.
        num_identities: training identities (classes).
        num_cameras: cameras of the data set.

    Raises:
        ConfigError: the backbone, picture size, heads or parts do not fit together.
        CheckpointError: the weights cannot be read or fit nothing.
    """
    state = _initial_weights(model)
    vit = create_vit(model, clip)
    of_backbone = state is not None and CLASSIFIERS[0] not in state
    if of_backbone:
        load_backbone(vit, state, model.weights)
    network = KeyReID(
        vit,
        frames=clip.frames,
        num_identities=num_identities,
        num_cameras=num_cameras,
        parts=model.parts,
        guidance=model.guidance,
        guidance_epsilon=model.guidance_epsilon,
        local_heads=model.local_heads,
        camera_embedding=model.camera_embedding,
        tcss=model.tcss,
        drop_path=model.drop_path,
    )
    if state is not None and not of_backbone:
        load_network(network, state, model.weights, model.keep_classifiers)
    elif of_backbone and model.guidance == "aligned":
        started = network.local_branch.start_from(network.global_branch)
        log.info("the local block starts %s", "as the backbone's last block" if started else "at random")
    return network


def _initial_weights(model: ModelConfig) -> dict[str, torch.Tensor] | None:
    """The state dict that `model.weights` names; a network's in our names, a backbone's as it is."""
    if model.weights is None:
        return None
    if model.weights == "timm":
        return download_backbone(model.backbone)
    state = read_state(Path(model.weights).expanduser())
    return from_released(state) if is_released(state) else state
