"""`keyreid config`: show and check a configuration."""

from pathlib import Path
from typing import Annotated

import typer


def config(
    path: Annotated[Path, typer.Argument(help="Configuration file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)] = None,
) -> None:
    """Print a configuration as it is used: with all it extends, overrides and defaults, checked."""
    import yaml

    from keyreid.config import load_config

    print(yaml.safe_dump(load_config(path, overrides or []).model_dump(mode="json"), sort_keys=False), end="")
