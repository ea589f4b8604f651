"""The model card that is written beside every export: what the network is, how good, and what it must not do."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import jinja2

import keyreid
from keyreid.evaluation.protocols import PROTOCOLS
from keyreid.export.source import ExportSource
from keyreid.files import replace_text, sha256
from keyreid.pose.parts import part_names


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
    replace_text(path, text)


def card_path(exported: Path) -> Path:
    """FILE.card.md, beside the export."""
    return exported.with_name(f"{exported.name}.card.md")
