"""`keyreid train`: train a model on shards."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from keyreid.commands.options import Overrides
from keyreid.plain_text import say

SEED_STYLE_DATASETS = ("MARS", "iLIDS-VID", "PRID2011")


def train(
    config: Annotated[
        Path | None, typer.Argument(help="Configuration, for example configs/mars.yaml.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes. Default: one per GPU (of the Ray cluster), else one.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="HOST:PORT or auto: this Ray cluster places the ranks. local: start Ray here.")
    ] = None,
    resume: Annotated[
        Literal["auto", "never"], typer.Option(help="auto: from the newest complete checkpoint. never: start over.")
    ] = "auto",
    change: Annotated[
        list[str] | None,
        typer.Option(help="Allow a resumed run another value of: optimizer.lr, or all of optimizer."),
    ] = None,
    dataset_name: Annotated[
        str | None, typer.Option(help="MARS, iLIDS-VID or PRID2011: use its configuration from configs/.")
    ] = None,
    vit_path: Annotated[
        Path | None, typer.Option(help="File with the backbone's initial weights (the same as model.weights=FILE).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Check configuration and shards, print the plan, train nothing.")
    ] = False,
) -> None:
    """Train a model. Run again with the same configuration, it resumes where it stopped.

    On several machines, use --ray, or torchrun, deepspeed or slurm/train.sbatch, whose variables name the ranks.
    """
    from keyreid.config import load_config
    from keyreid.distributed.launch import default_ranks, is_launched, run_ranks
    from keyreid.distributed.ranks import position
    from keyreid.training import run

    settings = load_config(*_named(config, overrides or [], dataset_name, vit_path))
    if dry_run:
        print(run.describe_plan(settings, ranks or (position()[1] if is_launched() else default_ranks())))
        return
    if ray is None and not is_launched():
        ranks = ranks or default_ranks()
        settings.check_ranks(ranks)
        if ranks > 1:
            run.check_data(settings)  # once and soon, not by every rank after it has imported everything
            sys.exit(run_ranks(ranks, settings.run_dir / "logs"))
    result = run.completed_result(settings) if resume == "auto" else None
    if result is None and ray is not None:
        result = _train_on_ray(settings, ray, ranks, resume == "auto", change or ())
    elif result is None:
        result = run.train(settings, resume == "auto", change=change or ())
    if result is not None and position()[0] == 0:
        say(f"\n{result.get('summary', result)}\nrun folder: {settings.run_dir}")


def _named(
    config: Path | None, overrides: list[str], dataset_name: str | None, vit_path: Path | None
) -> tuple[Path, list[str]]:
    """The configuration file and the changes to it that the options name."""
    from keyreid.errors import ConfigError
    from keyreid.resources import shipped

    if dataset_name is not None:  # the first word after the options is an override then
        overrides = [*([str(config)] if config is not None else []), *overrides]
        if dataset_name.lower() not in map(str.lower, SEED_STYLE_DATASETS):
            names = ", ".join(SEED_STYLE_DATASETS)
            raise ConfigError(f"--dataset-name {dataset_name}: {names} have a configuration in configs/")
        config = shipped(f"configs/{dataset_name.lower().replace('-', '_')}.yaml")
    if config is None:
        raise ConfigError("name a configuration (keyreid train configs/mars.yaml), or a dataset (--dataset-name MARS)")
    return config, [*overrides, *([f"model.weights={vit_path}"] if vit_path is not None else [])]


def _train_on_ray(settings, address: str, ranks: int | None, resume: bool, change: Sequence[str]) -> dict | None:
    import importlib.util
    from functools import partial

    from keyreid.errors import ConfigError, install_hint
    from keyreid.training.run import check_data, train

    if importlib.util.find_spec("ray") is None:
        raise ConfigError(f"--ray needs Ray; {install_hint('tune')}")
    from keyreid.distributed.ray_launch import run_on_ray

    check_data(settings)
    work = partial(train, settings, resume, command=sys.argv, change=change)
    return run_on_ray(work, address, ranks, settings.check_ranks)
