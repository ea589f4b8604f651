"""A network with the initial weights that its configuration names."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from keyreid.backbones import build_backbone, family
from keyreid.checkpoints.pretrained import CLASSIFIERS, load_network, read_state
from keyreid.checkpoints.released import from_released, is_released
from keyreid.checkpoints.run_folder import check_whole
from keyreid.config import ClipConfig, ModelConfig
from keyreid.model import KeyReID, build_model

log = logging.getLogger(__name__)


def start_network(model: ModelConfig, clip: ClipConfig, num_identities: int, num_cameras: int) -> KeyReID:
    """`build_model`, filled from `model.weights`.

    Raises:
        ConfigError: the backbone, picture size, heads or parts do not fit together.
        CheckpointError: the weights cannot be read or fit nothing.
    """
    state = _initial_weights(model)
    whole = CLASSIFIERS[0] in state
    backbone = build_backbone(model, clip, num_cameras)
    if state and not whole:
        backbone.load(state, model.weights)
    network = build_model(model, clip, num_identities, num_cameras, backbone)
    if whole:
        load_network(network, state, model.weights, model.keep_classifiers)
    elif state and network.guidance.starts_as_backbone:
        started = network.local_branch.start_from(network.global_branch)
        log.info("the local block starts %s", "as the backbone's last block" if started else "at random")
    return network


def _initial_weights(model: ModelConfig) -> Mapping[str, torch.Tensor]:
    """The state dict that `model.weights` names, if any; a network's in our names, a backbone's as it is."""
    if model.weights is None:
        return {}
    if model.weights == "timm":
        return family(model.backbone).download(model.backbone)
    file = Path(model.weights).expanduser()
    if file.is_file():
        check_whole(file)
    state = read_state(file)
    return from_released(state) if is_released(state) else state
