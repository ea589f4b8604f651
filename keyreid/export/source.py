"""A network that is exported and what is known of it: as one safetensors file, and as the model card of any export."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml

import keyreid
from keyreid.checkpoints.folder import folder_name
from keyreid.checkpoints.manifest import EMA
from keyreid.checkpoints.run_folder import RunFolder, find_weights
from keyreid.checkpoints.trained import header_of, load_trained
from keyreid.checkpoints.weights_file import WeightsHeader, write_weights
from keyreid.errors import ConfigError
from keyreid.evaluation.protocols import PROTOCOLS
from keyreid.files import replace_text, replacing, sha256
from keyreid.model import KeyReID
from keyreid.pose.parts import part_names


@dataclass(frozen=True)
class ExportSource:
    """A network before it is exported."""

    file: Path  # the weights file it comes from
    network: KeyReID  # on the CPU, in evaluation mode
    header: WeightsHeader  # made up of the network's sizes for a published checkpoint, which says nothing of itself
    averaged: bool  # the weights are an average over training (EMA)
    training: Mapping[str, Any]  # the run's configuration, where its folder is there; empty otherwise
    scores: Mapping[str, Any]  # of this very checkpoint, as scores.json has them; empty where it was not evaluated


def open_source(
    location: str | Path, best: bool = True, averaged: bool | None = None, verify: bool = True
) -> ExportSource:
    """Read what is to be exported; arguments and errors as for `find_weights` and `load_trained`."""
    file = find_weights(location, best, averaged)
    network, header = load_trained(file, verify)
    header = header or header_of(network, file)
    about = dict(header.about)
    scores, training = about.pop("scores", {}), about.pop("training", {})
    if not training and (run := RunFolder.holding(file)):  # an exported file knows, wherever it lies now
        scores = {}
        with suppress(OSError, ValueError, yaml.YAMLError):  # as the run wrote it, without today's defaults
            training = yaml.safe_load(run.config_file.read_text()) or {}
        with suppress(OSError, ValueError, KeyError):
            scores = json.loads((run.evaluation / folder_name(about["step"]) / "scores.json").read_text())
    averaged = file.name == EMA or bool(about.get("averaged"))
    return ExportSource(file, network, replace(header, about=about), averaged, training, scores)


def export_weights(source: ExportSource, out: Path) -> None:
    """Write one safetensors file, which whatever takes WEIGHTS takes; it is there whole or not at all."""
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


def write_card(source: ExportSource, files: Sequence[Path], usage: str = "") -> Path:
    """Write the model card of exported files beside the first one, FILE.card.md; `usage`: commands that use them."""
    header, training = source.header, source.training
    about = {"dataset": None, "run": None, "step": None, "converted_from": None, **header.about}
    initial = training.get("model", {}).get("weights") if training else header.model.weights
    template = resources.files("keyreid").joinpath("assets/model_card.md.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    text = environment.from_string(template).render(
        version=keyreid.__version__,
        files=[{"name": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)} for file in files],
        source=source,
        parameters=sum(parameter.numel() for parameter in source.network.parameters()),
        parts=", ".join(part_names(header.model.parts)),
        about=about,
        initial=f"`{initial}`" if initial else "random, or not known",
        summaries={name: protocol.summary for name, protocol in PROTOCOLS.items()},
        usage=usage,
    )
    path = files[0].with_name(f"{files[0].name}.card.md")
    replace_text(path, text)
    return path
