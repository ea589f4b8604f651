"""The `keyreid` command: one verb a job, each in `keyreid/commands/`."""

import sys
from typing import Annotated

import typer

from keyreid.commands import (
    checkpoints,
    config,
    doctor,
    embed,
    evaluate,
    export,
    import_,
    inspect_,
    pose,
    search,
    shard,
    submit,
    train,
    tune,
    visualize,
    walkers,
)
from keyreid.errors import KeyreidError

app = typer.Typer(
    name="keyreid",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("walkers")(walkers.walkers)
app.command("pose")(pose.pose)
app.command("pose-report")(pose.pose_report)
app.command("pose-import")(pose.pose_import)
app.command("pose-export")(pose.pose_export)
app.command("pose-convert")(pose.pose_convert)
app.command("pose-train")(pose.pose_train)
app.command("shard")(shard.shard)
app.command("inspect")(inspect_.inspect_)
app.command("train")(train.train)
app.command("tune")(tune.tune)
app.command("evaluate")(evaluate.evaluate)
app.add_typer(visualize.app, name="visualize")
app.add_typer(export.app, name="export")
app.add_typer(import_.app, name="import")
app.command("embed")(embed.embed)
app.command("search")(search.search)
app.command("checkpoints")(checkpoints.checkpoints)
app.command("config")(config.config)
app.command("doctor")(doctor.doctor)
app.command("submit")(submit.submit)


def _print_version(wanted: bool) -> None:
    if wanted:
        from keyreid.version import version

        print(f"keyreid {version()}")
        raise typer.Exit


@app.callback()
def keyreid(
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print version and commit.")
    ] = False,
) -> None:
    """Distributed training of keypoint-guided video person re-identification."""
    # DeepSpeed's launcher puts --local_rank before the words of the command; LOCAL_RANK says the same.


def main() -> None:
    """Run the command line; an error that a user can mend becomes one message and exit status 1."""
    try:
        app()
    except KeyreidError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
