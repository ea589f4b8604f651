"""Files of tensors, and a network filled from another network's; a backbone fills itself (`keyreid.backbones`)."""

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from keyreid.backbones.filling import fill
from keyreid.errors import CheckpointError
from keyreid.model.keyreid import KeyReID

log = logging.getLogger(__name__)

CLASSIFIERS = ("global_classifier.weight", "part_classifiers.weight")
BACKBONE = "backbone."
CAMERAS = "backbone.camera"


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or a torch file, on the CPU; nothing in the file is executed.

    Raises:
        CheckpointError: the file is missing, damaged, or holds more than tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own words advise to load it all the same
        raise CheckpointError(
            f"{path}: holds more than tensors, which would run its code on loading; save its state_dict alone"
        ) from None
    except (safetensors.SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        why = str(error).partition("weights_only")[0].partition("\n")[0]
        raise CheckpointError(f"{path}: not a whole weights file: {why}") from None
    for wrapper in ("state_dict", "model", "teacher"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    state = {}
    if isinstance(content, dict):
        state = {str(k).removeprefix("module."): v for k, v in content.items() if isinstance(v, torch.Tensor)}
    if not state:
        raise CheckpointError(f"{path}: holds no named tensors")
    return state


def load_network(
    network: KeyReID, state: Mapping[str, torch.Tensor], source: str, keep_classifiers: bool, strict: bool = False
) -> None:
    """Fill a network from another one's state dict in our names, whatever its identities and cameras.

    Args:
        network: filled in place.
        state: our names.
        source: names the weights in messages.
        keep_classifiers: keep the classifiers if they have as many classes; False starts them anew.
        strict: anything else that is missing or does not fit is an error.

    Raises:
        CheckpointError: nothing fits, or (strict) not everything does.
    """
    state = dict(state)
    own = network.state_dict()
    theirs, ours = (values[CLASSIFIERS[0]].shape[1] if CLASSIFIERS[0] in values else 0 for values in (state, own))
    if not keep_classifiers or theirs != ours:
        log.info("%s: classifiers of %d identities dropped, %d new ones are random", source, theirs, ours)
        for name in CLASSIFIERS:
            state[name] = own[name]
    if CAMERAS in own and CAMERAS in state:
        state[CAMERAS] = _fit_cameras(state[CAMERAS], len(own[CAMERAS]), source)
    backbone = {name.removeprefix(BACKBONE): state[name] for name in state if name.startswith(BACKBONE)}
    state |= {BACKBONE + name: tensor for name, tensor in network.backbone.resized(backbone, source).items()}
    fill(network, state, source, strict)


def _fit_cameras(table: torch.Tensor, cameras: int, source: str) -> torch.Tensor:
    learnt = len(table)
    if cameras < learnt:
        log.info("%s: camera embeddings cut from %d to %d", source, learnt, cameras)
        return table[:cameras]
    if cameras > learnt:
        log.info("%s: camera embeddings extended from %d to %d by their mean", source, learnt, cameras)
        return torch.cat([table, table.mean(0, keepdim=True).expand(cameras - learnt, -1)])
    return table
