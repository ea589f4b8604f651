"""`keyreid doctor`: what works on this machine, and the command that fixes what does not."""

from typing import Annotated

import typer


def doctor(
    require: Annotated[
        list[str] | None,
        typer.Option(help="Also fail if this is missing: gpu, dali, pose, slurm, video, tune, search, export, remote."),
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Check only this; repeat for several.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check versions, GPU, DALI, DeepSpeed, NCCL/gloo, Slurm, MLflow, pose and disk by briefly using each.

    Exit status 1 when something that training needs, or that --require names, is missing or broken.
    """
    from dataclasses import asdict

    from rich import print_json
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from keyreid.doctor import CHECKS, examine, failures
    from keyreid.errors import ConfigError

    for name in (*(require or ()), *(only or ())):
        if name not in CHECKS:
            raise ConfigError(f"doctor knows no {name!r}; it checks {', '.join(CHECKS)}")
    checks = examine(only or ())
    failed = failures(checks, require or ())
    if json:
        print_json(data=[asdict(check) for check in checks])
    else:
        table = Table("", "", "found", "to mend it")
        colours = {"ok": "green", "note": "cyan", "missing": "yellow", "broken": "red"}
        for check in checks:
            colour = "red" if check in failed else colours[check.state]
            table.add_row(check.name, f"[{colour}]{check.state}[/]", escape(check.found), escape(check.remedy))
        Console().print(table)
        if failed:
            print(f"{len(failed)} things that are needed do not work: {', '.join(check.name for check in failed)}")
    if failed:
        raise typer.Exit(1)
