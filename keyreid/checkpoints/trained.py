"""Trained networks from wherever people have them: a run, a checkpoint, a weights file, a published checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from keyreid.checkpoints.pretrained import CLASSIFIERS, load_network, read_state
from keyreid.checkpoints.released import from_released, is_released, released_model
from keyreid.checkpoints.weights_file import WeightsHeader, read_header, read_weights
from keyreid.errors import CheckpointError
from keyreid.model.build import build_model
from keyreid.model.keyreid import KeyReID

AVERAGED, TRAINED = "ema.safetensors", "weights.safetensors"


def load_trained(location: Path, verify: bool = True) -> tuple[KeyReID, WeightsHeader | None]:
    """The network of a run's folder (its best checkpoint), a checkpoint, a keyreid .safetensors, or a published .pth.

    Returns:
        The network in evaluation mode, and what its file says of it; a published checkpoint says nothing.

    Raises:
        CheckpointError: there are no weights, or they are damaged or of an unknown kind.
    """
    path = find_weights(location)
    if path.suffix != ".safetensors":
        state = read_state(path)
        if not is_released(state):
            raise CheckpointError(f"{path}: not a published KeyRe-ID checkpoint, nor a keyreid .safetensors")
        return released_model(state).eval(), None
    header = read_header(path)
    own = header.model.model_copy(update={"weights": None})
    network = build_model(own, header.clip, len(header.identities), len(header.cameras))
    load_network(network, read_weights(path), str(path), keep_classifiers=True, strict=True)
    return network.eval(), header


def load_state(location: Path) -> tuple[dict[str, torch.Tensor], WeightsHeader | None]:
    """The tensors alone, in our names; also of a bare state dict."""
    path = find_weights(location)
    if path.suffix == ".safetensors":
        return read_weights(path), read_header(path)
    state = read_state(path)
    if is_released(state):
        return from_released(state), None
    if CLASSIFIERS[0] not in state:
        raise CheckpointError(f"{path}: not a KeyRe-ID network")
    return state, None


def find_weights(location: Path) -> Path:
    """The file that holds the weights: of a run the best checkpoint's or else the newest's, the average if it has one.

    Raises:
        CheckpointError: there is none.
    """
    location = location.expanduser()
    if location.is_file():
        return location
    root = location / "checkpoints" if (location / "checkpoints").is_dir() else location
    named = [root / (root / name).read_text().strip() for name in ("best", "latest") if (root / name).is_file()]
    for folder in (*named, root):
        for name in (AVERAGED, TRAINED):
            if (folder / name).is_file():
                return folder / name
    raise CheckpointError(f"{location}: no run, checkpoint or weights file")
