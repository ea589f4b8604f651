"""Arguments and options that mean the same in several verbs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Weights = Annotated[str, typer.Argument(help="A run, a checkpoint, exported .safetensors, or a published .pth.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes to the configuration: section.key=value ...", show_default=False)
]
Configuration = Annotated[Path | None, typer.Option(help="Configuration. Default: the run's own, or the defaults.")]
Shards = Annotated[str | None, typer.Option(help="Shards. Default: those of the configuration.")]
RankCount = Annotated[
    int | None, typer.Option(min=1, help="Processes on this machine. Default: one for each GPU, else one.")
]
Metric = Annotated[
    Literal["euclidean", "cosine", "visible"],
    typer.Option(help="visible: parts count by how much both sides see of them."),
]
Verify = Annotated[bool, typer.Option(help="Check the weights' hash first; --no-verify saves the seconds.")]
