"""What is exported: a network, what it is, and what is known of its training and scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keyreid.checkpoints.folder import EMA
from keyreid.checkpoints.run_folder import RunFolder, find_weights
from keyreid.checkpoints.trained import load_trained
from keyreid.checkpoints.weights_file import WeightsHeader
from keyreid.config import ClipConfig, ModelConfig
from keyreid.model import KeyReID


@dataclass(frozen=True)
class ExportSource:
    """A network before it is exported.

    Attributes:
        file: the weights file it comes from.
        network: on the CPU, in evaluation mode.
        header: made up of the network's sizes for a published checkpoint, which says nothing of itself.
        averaged: the weights are an average over training (EMA).
        training: the run's configuration, where its folder is there; empty otherwise.
        scores: of this very checkpoint, as an evaluation's scores.json has them; empty where it was not evaluated.
    """

    file: Path
    network: KeyReID
    header: WeightsHeader
    averaged: bool
    training: Mapping[str, Any]
    scores: Mapping[str, Any]


def open_source(location: Path, best: bool = True, averaged: bool | None = None, verify: bool = True) -> ExportSource:
    """Read what is to be exported.

    Args:
        location: a run's folder, a checkpoint, a weights file, a published checkpoint.
        best, averaged: see `find_weights`.
        verify: refuse weights of which a byte was altered.

    Raises:
        CheckpointError: there are no such weights, or they are damaged.
    """
    file = find_weights(location, best, averaged)
    network, header = load_trained(file, verify)
    header = header or _header_of(network, file)
    about = dict(header.about)
    scores, training = about.pop("scores", {}), about.pop("training", {})
    run = None if training else RunFolder.holding(file)  # an exported file knows, wherever it lies now
    if run is not None:
        training = run.config()
        scores = run.scores(about["step"]) if "step" in about else {}
    averaged = file.name == EMA or bool(about.get("averaged"))
    return ExportSource(file, network, replace(header, about=about), averaged, training, scores)


def _header_of(network: KeyReID, file: Path) -> WeightsHeader:
    """A header for a published checkpoint; its identities and cameras are counted, not named."""
    height, width = network.image_size
    return WeightsHeader(
        model=ModelConfig(guidance=network.guidance, parts=network.parts),
        clip=ClipConfig(frames=network.frames, height=height, width=width),
        identities=list(range(network.num_identities)),
        cameras=list(range(network.num_cameras)),
        about={"converted_from": file.name},
    )
