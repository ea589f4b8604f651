"""What is exported: a network, and what is known of it; and the export as one safetensors file with all of that."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keyreid.checkpoints.folder import EMA
from keyreid.checkpoints.run_folder import RunFolder, find_weights
from keyreid.checkpoints.trained import header_of, load_trained
from keyreid.checkpoints.weights_file import WeightsHeader, write_weights
from keyreid.errors import ConfigError
from keyreid.files import replacing
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
    header = header or header_of(network, file)
    about = dict(header.about)
    scores, training = about.pop("scores", {}), about.pop("training", {})
    if not training and (run := RunFolder.holding(file)):  # an exported file knows, wherever it lies now
        training = run.config()
        scores = run.scores(about["step"]) if "step" in about else {}
    averaged = file.name == EMA or bool(about.get("averaged"))
    return ExportSource(file, network, replace(header, about=about), averaged, training, scores)


def export_weights(source: ExportSource, out: Path) -> None:
    """Write one safetensors file, which whatever takes WEIGHTS takes; it is there whole or not at all.

    Raises:
        ConfigError: the file's name does not end in .safetensors.
    """
    if out.suffix != ".safetensors":
        raise ConfigError(f"{out}: the name of a weights file ends in .safetensors")
    about = {**source.header.about, "averaged": source.averaged}
    if source.training:
        about["training"] = dict(source.training)
    if source.scores:
        about["scores"] = {name: value for name, value in source.scores.items() if name not in ("pictures", "vectors")}
    model = source.header.model.model_copy(update={"weights": None})
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out, alone=True) as partial:
        write_weights(partial, source.network.state_dict(), replace(source.header, model=model, about=about))
