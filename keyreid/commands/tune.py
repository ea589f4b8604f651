"""`keyreid tune`: search hyperparameters."""

from pathlib import Path
from typing import Annotated

import typer
import yaml

from keyreid.commands.options import Overrides
from keyreid.plain_text import say


def tune(
    search: Annotated[Path, typer.Argument(help="The search, such as configs/tune/alpha.yaml.", show_default=False)],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the search in its folder, if there is one.")] = False,
    address: Annotated[str | None, typer.Option(help="HOST:PORT of a Ray cluster. Default: this machine.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Check the search, print its points, train nothing.")] = False,
) -> None:
    """Search hyperparameters: many training runs, judged on held-out training identities, never on the test set.

    Overrides change the search: trials=8 budget.epochs=6 settings.data.shards=DIR. Writes best.yaml (for
    `keyreid train`), a table and pictures to OUTPUT/NAME, and everything to MLflow.
    """
    from keyreid.tuning.search import load_search

    wanted, base = load_search(search, overrides or [])
    if dry_run:
        from keyreid.tuning.algorithms import points
        from keyreid.tuning.study import describe

        print(yaml.safe_dump(wanted.model_dump(mode="json", exclude_none=True), sort_keys=False))
        drawn = points(wanted, base)
        if drawn is None:
            print(f"{wanted.trials} trials whose points depend on the scores before them")
        for number, point in enumerate(drawn or []):
            say(f"{number:3} {describe(point)}")
        holdout, epochs = base.data.holdout, base.schedule.epochs
        print(f"{epochs} epochs a trial; {holdout:.0%} of the training identities of {base.data.shards} judge")
        return
    from keyreid.ownership import owned
    from keyreid.tuning.driver import run_search
    from keyreid.tuning.study import BEST, PAGE

    with owned(Path(base.output).expanduser() / wanted.name, "keyreid tune"):
        folder, best, interrupted, out_of_time = run_search(wanted, base, resume, address)
    if best:
        say(f"\nbest: {best.name}, {wanted.metric} {best.score:.4f} after epoch {best.epoch}")
        print(f"configuration: {folder / BEST} (keyreid train takes it as it is)\nreport: {folder / PAGE}")
    else:
        print(f"\nno trial has a score; see {folder}")
    if interrupted:
        more = " ".join(["", "--", *overrides] if overrides else [])
        print(f"interrupted; all reports are saved, resume with: keyreid tune {search} --resume{more}")
        raise typer.Exit(130)
    if out_of_time:
        print("out of time: continue with `--resume` and a larger budget.seconds")
    if best is None:
        raise typer.Exit(1)
