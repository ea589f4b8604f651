"""`keyreid tune`: search hyperparameters."""

import importlib.util
from pathlib import Path
from typing import Annotated

import typer


def tune(
    search: Annotated[
        Path, typer.Argument(help="The search, for example configs/tune/alpha.yaml.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to it: trials=8 budget.epochs=6 settings.data.shards=DIR ...", show_default=False),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the search that its folder holds; start it if there is none.")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of a Ray cluster to run on. Default: Ray on this machine, for the search."),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Check the search, print its points, train nothing.")] = False,
) -> None:
    """Search hyperparameters: many trainings, judged by training identities that were held out, never by the test set.

    Writes best.yaml, which `keyreid train` takes, a table and pictures to OUTPUT/NAME, and everything to MLflow.
    """
    from keyreid.errors import ConfigError, install_hint
    from keyreid.tuning.search import load_search

    wanted, base = load_search(search, list(overrides or []))
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(f"keyreid tune needs Ray; {install_hint('tune')}")
    if dry_run:
        _print_points(wanted, base)
        return
    from keyreid.tuning.run import run_search

    result = run_search(wanted, base, resume, address)
    if result.outcome is not None:
        best = result.outcome.best
        print(f"\nbest: {best.name}, {wanted.metric} {best.score:.4f} after epoch {best.epoch}")
        print(
            f"configuration: {result.outcome.config} (keyreid train takes it as it is)\nreport: {result.outcome.page}"
        )
    else:
        print(f"\nno trial has a score; see {result.folder}")
    if result.interrupted:
        more = " ".join(["", *(overrides or [])])
        print(f"interrupted; all reports are saved, go on with: keyreid tune {search} --resume{more and f' --{more}'}")
        raise typer.Exit(130)
    if result.out_of_time:
        print("out of time: `--resume` with a larger budget.seconds goes on")
    if result.outcome is None:
        raise typer.Exit(1)


def _print_points(search, base) -> None:
    import yaml

    from keyreid.tuning import algorithms
    from keyreid.tuning.records import describe

    print(yaml.safe_dump(search.model_dump(mode="json", exclude_none=True), sort_keys=False))
    points = algorithms.points(search, base)
    if points is None:
        print(f"{search.trials} trials whose points depend on the scores before them")
    for number, point in enumerate(points or []):
        print(f"{number:3} {describe(point)}")
    holdout, epochs = base.data.holdout, base.schedule.epochs
    print(f"{epochs} epochs a trial; {holdout:.0%} of the training identities of {base.data.shards} judge")
