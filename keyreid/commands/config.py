"""`keyreid config`: show and check a configuration."""

from pathlib import Path
from typing import Annotated

import typer


def config(
    path: Annotated[Path | None, typer.Argument(help="Configuration file.", show_default=False)] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List the configurations that come with keyreid.")] = False,
) -> None:
    """Check a configuration and print it as used: with everything it extends, overrides and defaults."""
    import yaml

    from keyreid import resources
    from keyreid.config import load_config
    from keyreid.errors import ConfigError

    if show_list:
        print(f"In {resources.home()}; these names work in every folder, and a file of your own of that name wins:")
        for name, purpose in resources.configurations().items():
            print(f"  {name:<29}{purpose}")
    elif path is None:
        raise ConfigError("name a configuration (keyreid config configs/mars.yaml); --list shows those there are")
    else:
        print(yaml.safe_dump(load_config(path, overrides or []).model_dump(mode="json"), sort_keys=False), end="")
