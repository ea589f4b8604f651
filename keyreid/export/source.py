"""What is exported: a network's tensors, what they are, and what is known of their training and scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from keyreid.checkpoints import folder as checkpoints
from keyreid.checkpoints.released import released_model
from keyreid.checkpoints.trained import AVERAGED, TRAINED, find_weights, load_state
from keyreid.checkpoints.weights_file import WeightsHeader
from keyreid.config import ClipConfig, ModelConfig
from keyreid.errors import CheckpointError


@dataclass(frozen=True)
class ExportSource:
    """A network before it is exported.

    Attributes:
        file: the weights file it comes from.
        tensors: named as in `KeyReID.state_dict()`.
        header: made up of the tensors' sizes for a published checkpoint, which says nothing of itself.
        averaged: the weights are an average over training (EMA).
        training: the run's configuration, where its folder is there; empty otherwise.
        scores: of this very checkpoint, as `report.combine` makes them; empty where it was not evaluated.
    """

    file: Path
    tensors: dict[str, torch.Tensor]
    header: WeightsHeader
    averaged: bool
    training: Mapping[str, Any]
    scores: Mapping[str, Any]


def open_source(location: Path, best: bool = True, averaged: bool | None = None) -> ExportSource:
    """Read what is to be exported; a checkpoint is verified first.

    Args:
        location: a run's folder, a checkpoint, a weights file, a published checkpoint.
        best: of a run, the best checkpoint, or else the newest.
        averaged: the averaged weights or the raw ones; None: averaged where there are any.

    Raises:
        CheckpointError: there are no such weights, or they are damaged.
    """
    file = locate(location.expanduser(), best, averaged)
    if (file.parent / checkpoints.MANIFEST).is_file() and (faults := checkpoints.verify(file.parent)):
        raise CheckpointError(f"{file.parent}: damaged: {'; '.join(faults)}")
    tensors, header = load_state(file)
    if header is None:
        header = _header_of(file)
    run = file.parents[2] if len(file.parents) > 2 and file.parents[1].name == "checkpoints" else None
    training = _read_yaml(run / "config.yaml") if run else {}
    about = dict(header.about)
    scores: Mapping[str, Any] = about.pop("scores", {})
    training = training or about.pop("training", {})
    if run and "step" in about:
        scores = _read_json(run / "evaluation" / checkpoints.folder_name(about["step"]) / "scores.json") or scores
    averaged = file.name == AVERAGED or bool(about.get("averaged"))
    header = WeightsHeader(header.model, header.clip, header.identities, header.cameras, about)
    return ExportSource(file, tensors, header, averaged, training, scores)


def locate(location: Path, best: bool, averaged: bool | None) -> Path:
    """The weights file of a location.

    Raises:
        CheckpointError: there is none of that kind.
    """
    if location.is_dir():
        root = location / "checkpoints" if (location / "checkpoints").is_dir() else location
        folder = (checkpoints.named(root, "best") if best else None) or checkpoints.named(root, "latest")
        if folder is None and checkpoints.checkpoints(root):
            folder = checkpoints.newest_whole(root)
        location = folder or location
        names = {None: (AVERAGED, TRAINED), True: (AVERAGED,), False: (TRAINED,)}[averaged]
        for name in names:
            if (location / name).is_file():
                return location / name
        if averaged:
            raise CheckpointError(f"{location}: no averaged weights; the run was trained without training.ema_decay")
    return find_weights(location)


def _header_of(file: Path) -> WeightsHeader:
    """A header for a published checkpoint; its identities and cameras are counted, not named."""
    from keyreid.checkpoints.pretrained import read_state

    network = released_model(read_state(file))
    height, width = network.image_size
    return WeightsHeader(
        model=ModelConfig(guidance="released", parts=network.parts),
        clip=ClipConfig(frames=network.frames, height=height, width=width),
        identities=list(range(network.num_identities)),
        cameras=list(range(network.num_cameras)),
        about={"converted_from": file.name},
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError):
        return {}
