"""A network with initial weights: those that its configuration names, or another network's."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from keyreid.backbones import build_backbone, family
from keyreid.backbones.backbone import fill
from keyreid.checkpoints.released import from_released, is_released
from keyreid.checkpoints.run_folder import check_whole
from keyreid.checkpoints.same_data import keep_known
from keyreid.checkpoints.weights_file import read_weights
from keyreid.config import ClipConfig, ModelConfig
from keyreid.model import KeyReID, build_model
from keyreid.shards.shard_set import ShardSet

log = logging.getLogger(__name__)

CLASSIFIERS = ("global_classifier.weight", "part_classifiers.weight")
BACKBONE = "backbone."
CAMERAS = "backbone.camera"


def start_network(
    model: ModelConfig, clip: ClipConfig, num_identities: int, num_cameras: int, shards: ShardSet | None = None
) -> KeyReID:
    """`build_model`, filled from `model.weights`.

    Args:
        shards: of the training: classifiers and cameras of a network of other data are not taken for theirs.

    Raises:
        ConfigError: the backbone, picture size, heads or parts do not fit together.
        CheckpointError: the weights cannot be read or fit nothing.
    """
    state = {}
    if model.weights == "timm":
        state = family(model.backbone).download(model.backbone)
    elif model.weights is not None:
        file = Path(model.weights).expanduser()
        if file.is_file():
            check_whole(file)
        state = read_weights(file)
        state = from_released(state) if is_released(state) else state
    whole = CLASSIFIERS[0] in state
    backbone = build_backbone(model, clip, num_cameras)
    if state and not whole:
        backbone.load(state, model.weights)
    network = build_model(model, clip, num_identities, num_cameras, backbone)
    if whole:
        known = shards is None or keep_known(state, model.weights, shards, CLASSIFIERS[0], CAMERAS)
        load_network(network, state, model.weights, model.keep_classifiers and known)
    elif state and network.guidance.starts_as_backbone:
        started = network.local_branch.start_from(network.global_branch)
        log.info("the local block starts %s", "as the backbone's last block" if started else "at random")
    return network


def load_network(
    network: KeyReID, state: Mapping[str, torch.Tensor], source: str, keep_classifiers: bool, strict: bool = False
) -> None:
    """Fill a network from another one's state dict in our names, whatever its identities and cameras.

    Args:
        source: names the weights in messages.
        keep_classifiers: keep the classifiers if they have as many classes; False starts them anew.
        strict: anything else that is missing or does not fit is an error.

    Raises:
        CheckpointError: nothing fits, or (strict) not everything does.
    """
    state, own = dict(state), network.state_dict()
    theirs, ours = (values[CLASSIFIERS[0]].shape[1] if CLASSIFIERS[0] in values else 0 for values in (state, own))
    if not keep_classifiers or theirs != ours:
        log.info("%s: classifiers of %d identities dropped, %d new ones are random", source, theirs, ours)
        state |= {name: own[name] for name in CLASSIFIERS}
    if CAMERAS in own and CAMERAS in state:
        table, cameras = state[CAMERAS], len(own[CAMERAS])
        learnt = len(table)
        if cameras < learnt:
            log.info("%s: camera embeddings cut from %d to %d", source, learnt, cameras)
        elif cameras > learnt:
            log.info("%s: camera embeddings extended from %d to %d by their mean", source, learnt, cameras)
        state[CAMERAS] = torch.cat([table, table.mean(0, keepdim=True).expand(max(cameras - learnt, 0), -1)])[:cameras]
    backbone = {name.removeprefix(BACKBONE): state[name] for name in state if name.startswith(BACKBONE)}
    state |= {BACKBONE + name: tensor for name, tensor in network.backbone.resized(backbone, source).items()}
    fill(network, state, source, strict)
