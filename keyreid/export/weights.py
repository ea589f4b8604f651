"""One safetensors file of a network: whatever takes WEIGHTS takes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from keyreid.checkpoints.weights_file import write_weights
from keyreid.errors import ConfigError
from keyreid.export.source import ExportSource
from keyreid.files import replacing


def export_weights(source: ExportSource, out: Path) -> None:
    """Write a network with all that is known of it; the file is there whole or not at all.

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
