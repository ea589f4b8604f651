"""Arguments and options shared by several verbs."""

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from keyreid.datasets import READERS
from keyreid.errors import ConfigError

Weights = Annotated[str, typer.Argument(help="A run, a checkpoint, exported .safetensors, or a published .pth.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes to the configuration: section.key=value ...", show_default=False)
]
Configuration = Annotated[Path | None, typer.Option(help="Configuration. Default: the run's own, or the defaults.")]
Shards = Annotated[str | None, typer.Option(help="Shards. Default: those of the configuration.")]
RankCount = Annotated[
    int | None, typer.Option(min=1, help="Processes on this machine. Default: one per GPU, else one.")
]
Metric = Annotated[
    Literal["euclidean", "cosine", "visible"],
    typer.Option(help="visible: parts count by how much of them both tracklets show."),
]
Verify = Annotated[bool, typer.Option(help="Check the weights' hash first; --no-verify saves a few seconds.")]
DatasetName = Annotated[str, typer.Argument(help=f"{', '.join(READERS)}; rendered walkers are read as mars")]
Root = Annotated[Path, typer.Argument(help="the dataset's folder (or manifest)")]
ReaderOptions = Annotated[list[str] | None, typer.Option("--option", help="NAME=VALUE, for the dataset's reader")]
Share = Annotated[
    str, typer.Option("--share", "--shard", help="I/N: task I (from 0) of N sharing the work, as in a job array")
]


def parse_share(text: str) -> tuple[int, int]:
    """What `Share` says: (I, N)."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    if not found or int(found[1]) >= int(found[2]):
        raise ConfigError(f"--share {text[:80]}: write I/N, I from 0 to N - 1, for example 0/8")
    return int(found[1]), int(found[2])
