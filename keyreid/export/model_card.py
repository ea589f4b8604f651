"""The model card that is written beside every export: what the network is, how good, and what it must not do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

import keyreid
from keyreid.evaluation.protocols import PROTOCOLS
from keyreid.export.source import ExportSource
from keyreid.files import replace_text, sha256
from keyreid.pose.parts import part_names

SHOWN_TRAINING = ("loss", "optimizer", "schedule")
SHOWN_RATES = ("mAP", "mINP", "rank1", "rank5", "rank10")


def write_card(path: Path, source: ExportSource, files: Sequence[Path], usage: str = "") -> None:
    """Write the model card of an export.

    Args:
        files: what was exported.
        usage: commands that show how to use it.
    """
    header, training = source.header, source.training
    about = {"dataset": None, "run": None, "step": None, "converted_from": None, **header.about}
    initial = training.get("model", {}).get("weights") if training else header.model.weights
    template = resources.files("keyreid").joinpath("assets/model_card.md.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    text = environment.from_string(template).render(
        name=_name(about, source.file),
        version=keyreid.__version__,
        files=[{"name": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)} for file in files],
        source=source,
        model=header.model,
        parameters=sum(parameter.numel() for parameter in source.network.parameters()),
        parts=", ".join(part_names(header.model.parts)),
        about=about,
        training=training,
        shown=[section for section in SHOWN_TRAINING if section in training],
        initial=f"`{initial}`" if initial else "random, or not known",
        scores=source.scores,
        rates=SHOWN_RATES,
        summaries={name: protocol.summary for name, protocol in PROTOCOLS.items()},
        usage=usage,
    )
    replace_text(path, text)


def card_path(exported: Path) -> Path:
    """FILE.card.md, beside the export."""
    return exported.with_name(f"{exported.name}.card.md")


def _name(about: Mapping[str, Any], file: Path) -> str:
    if about["run"] is None:
        return file.stem
    return f"{about['run']}, step {about['step']}" if about["step"] else str(about["run"])
