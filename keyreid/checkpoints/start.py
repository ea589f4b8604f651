"""A network with initial weights: those that its configuration names, or another network's."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from keyreid.backbones import build_backbone, family, patch_grid
from keyreid.backbones.backbone import Source, fill
from keyreid.checkpoints.released import from_released, is_released, released_grid
from keyreid.checkpoints.run_folder import check_whole
from keyreid.checkpoints.same_data import keep_known
from keyreid.checkpoints.saved import read_network
from keyreid.checkpoints.weights_file import read_header
from keyreid.config import ClipConfig, ModelConfig
from keyreid.errors import CheckpointError
from keyreid.model import KeyReID, build_model
from keyreid.model.sharded_classes import CLASSIFIERS, ClassGroup
from keyreid.shards.shard_set import ShardSet

log = logging.getLogger(__name__)

BACKBONE = "backbone."
NECK = "global_neck.weight"  # whole networks have it, with classifiers or without
CAMERAS = "backbone.camera"


def start_network(
    model: ModelConfig,
    clip: ClipConfig,
    num_identities: int,
    num_cameras: int,
    shards: ShardSet | None = None,
    group: ClassGroup | None = None,
) -> KeyReID:
    """`build_model`, filled from `model.weights`.

    Args:
        shards: of the training: classifiers and cameras of a network of other data are not taken for theirs.
        group: see `build_model`.

    Raises:
        ConfigError: the backbone, picture size, heads or parts do not fit together.
        CheckpointError: the weights cannot be read, or do not fit but for heads, cameras and `model.allow_partial`.
    """
    state, grid = {}, None
    if model.weights == "timm":
        state = family(model.backbone).download(model.backbone)
    elif model.weights is not None:
        state, grid = _read(Path(model.weights).expanduser())
    if None not in (grid, model.weights_grid) and grid != model.weights_grid:
        raise CheckpointError(f"{model.weights}: its grid is {grid}, not model.weights_grid={model.weights_grid}")
    whole = NECK in state
    backbone = build_backbone(model, clip, num_cameras)
    may_lack = (CAMERAS, *CLASSIFIERS) if whole else backbone.not_in_files
    source = Source(str(model.weights), grid or model.weights_grid, not whole, (*may_lack, *model.allow_partial))
    if state and not whole:
        backbone.load(state, source)
    network = build_model(model, clip, num_identities, num_cameras, backbone, group)
    if whole:
        known = shards is None or keep_known(state, model.weights, shards, CLASSIFIERS[0], CAMERAS)
        load_network(network, state, source, model.keep_classifiers and known)
    elif state and network.guidance.starts_as_backbone:
        started = network.local_branch.start_from(network.global_branch)
        log.info("the local block starts %s", "as the backbone's last block" if started else "at random")
    return network


def _read(file: Path) -> tuple[dict[str, torch.Tensor], tuple[int, int] | None]:
    """A file's tensors, a whole network's in our names, and the grid of its positions where the file tells it."""
    if file.is_file():
        check_whole(file)
    state = read_network(file)
    if is_released(state):
        state = from_released(state)
        return state, released_grid(state)
    header = read_header(file, foreign=True) if file.suffix == ".safetensors" else None
    return state, None if header is None else patch_grid(header.model, header.clip).shape


def load_network(network: KeyReID, state: Mapping[str, torch.Tensor], source: Source, keep_classifiers: bool) -> None:
    """Fill a network from another one's state dict in our names, whatever its identities and cameras.

    Args:
        keep_classifiers: keep the classifiers if they have as many classes; False starts them anew.

    Raises:
        CheckpointError: more is missing or does not fit than the source may lack.
    """
    state, own = dict(state), network.state_dict()
    theirs, ours = state[CLASSIFIERS[0]].shape[1] if CLASSIFIERS[0] in state else 0, network.num_identities
    apart = {name: state.pop(name, None) for name in CLASSIFIERS if name not in own}
    if (network.classes or not apart) and (not keep_classifiers or theirs != ours):
        log.info("%s: classifiers of %d identities dropped, %d new ones are random", source, theirs, ours)
        state |= {name: own[name] for name in CLASSIFIERS if name in own}
    elif network.classes is not None:
        network.classes.load(apart)
    if CAMERAS in own and CAMERAS in state:
        table, cameras = state[CAMERAS], len(own[CAMERAS])
        learnt = len(table)
        if cameras < learnt:
            log.info("%s: camera embeddings cut from %d to %d", source, learnt, cameras)
        elif cameras > learnt:
            log.info("%s: camera embeddings extended from %d to %d by their mean", source, learnt, cameras)
        state[CAMERAS] = torch.cat([table, table.mean(0, keepdim=True).expand(max(cameras - learnt, 0), -1)])[:cameras]
    backbone = {name.removeprefix(BACKBONE): state.pop(name) for name in list(state) if name.startswith(BACKBONE)}
    state |= {BACKBONE + name: tensor for name, tensor in network.backbone.resized(backbone, source).items()}
    fill(network, state, source)
