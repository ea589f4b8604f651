"""`keyreid train`: train a model on shards."""

import sys
from pathlib import Path
from typing import Annotated

import typer

SEED_STYLE_DATASETS = {"MARS": "mars", "iLIDS-VID": "ilids_vid", "PRID2011": "prid2011"}


def train(
    config: Annotated[
        Path | None, typer.Argument(help="Configuration, for example configs/mars.yaml.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it: section.key=value ...", show_default=False)
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes. Default: one for each GPU (of the Ray cluster), else one.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT, or auto: let this Ray cluster place the ranks. local: start Ray on this machine."
        ),
    ] = None,
    resume: Annotated[
        str, typer.Option(help="auto: go on from the run's newest whole checkpoint. never: start anew.")
    ] = "auto",
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
    """Train a model. Run again with the same configuration, it goes on where it stopped.

    Several machines: --ray, or start it with torchrun, deepspeed or slurm/train.sbatch, whose variables name the ranks.
    """
    from keyreid.config import load_config
    from keyreid.distributed.launch import default_ranks, is_launched, run_ranks
    from keyreid.errors import ConfigError

    overrides = list(overrides or [])
    if dataset_name is not None:
        if config is not None:  # the first word after the options is an override then
            overrides.insert(0, str(config))
        config = _dataset_configuration(dataset_name)
    if config is None:
        raise ConfigError("name a configuration (keyreid train configs/mars.yaml), or a dataset (--dataset-name MARS)")
    if vit_path is not None:
        overrides.append(f"model.weights={vit_path}")
    if resume not in ("auto", "never"):
        raise ConfigError(f"--resume {resume}: auto or never")
    settings = load_config(config, overrides)
    if dry_run:
        _print_plan(settings)
        return
    if ray is not None:
        _train_on_ray(settings, ray, ranks, resume == "auto")
        return
    if not is_launched():
        ranks = ranks or default_ranks()
        settings.check_ranks(ranks)
        if ranks > 1:
            _check_data(settings)  # once and soon, not by every rank after it has imported everything
            arguments = ["train", str(config), f"--resume={resume}", "--", *overrides]
            sys.exit(run_ranks(ranks, settings.run_dir / "logs", arguments))
    _train(settings, resume == "auto")


def _train(settings, resume: bool) -> None:
    from keyreid.training.run import completed_result, train

    result = completed_result(settings) if resume else None
    if result is None:
        result = train(settings, resume)
    if _is_first_rank():
        _print_result(result, settings)


def _train_on_ray(settings, address: str, ranks: int | None, resume: bool) -> None:
    import importlib.util

    from keyreid.errors import ConfigError
    from keyreid.training.run import completed_result

    if importlib.util.find_spec("ray") is None:
        raise ConfigError("--ray needs Ray: pip install 'keyreid[tune]'")
    from keyreid.distributed.ray_launch import run_on_ray

    result = completed_result(settings) if resume else None
    if result is None:
        _check_data(settings)
        result = run_on_ray(settings, address, ranks, resume)
    _print_result(result, settings)


def _print_result(result: dict | None, settings) -> None:
    if result is not None:
        print(f"\n{result.get('summary', result)}\nrun folder: {settings.run_dir}")


def _is_first_rank() -> bool:
    from keyreid.distributed.ranks import position

    return position()[0] == 0


def _check_data(settings):
    from keyreid.shards.index import ShardSet
    from keyreid.shards.plan import TrainingPlan

    shards = ShardSet.from_config(settings.data)
    return shards, TrainingPlan(shards, settings.data, settings.clip, settings.model.parts, settings.seed)


def _print_plan(settings) -> None:
    import yaml

    from keyreid.checkpoints.start import start_network

    shards, plan = _check_data(settings)
    network = start_network(settings.model, settings.clip, plan.num_identities, len(shards.camera_index))
    print(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
    steps = settings.schedule.steps_per_epoch or plan.steps_per_epoch
    print(
        f"{plan.num_identities} training identities, {steps} steps an epoch, {steps * settings.schedule.epochs} in all"
    )
    print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters")


def _dataset_configuration(name: str) -> Path:
    from keyreid.errors import ConfigError

    known = {key.lower(): file for key, file in SEED_STYLE_DATASETS.items()}
    if name.lower() not in known:
        raise ConfigError(f"--dataset-name {name}: {', '.join(SEED_STYLE_DATASETS)} have a configuration in configs/")
    path = Path(__file__).resolve().parents[2] / "configs" / f"{known[name.lower()]}.yaml"
    if not path.is_file():
        raise ConfigError(f"{path} is missing: configurations come with a clone of the repository; give a file instead")
    return path
