"""The `keyreid` command: one verb per job, each in `keyreid/commands/`."""

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

HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(name="keyreid", no_args_is_help=True, pretty_exceptions_enable=False, context_settings=HELP)
POSE = pose.pose, pose.pose_report, pose.pose_import, pose.pose_export, pose.pose_convert, pose.pose_train
RUNS = shard.shard, inspect_.inspect_, train.train, tune.tune, evaluate.evaluate
OTHERS = embed.embed, search.search, checkpoints.checkpoints, config.config, doctor.doctor, submit.submit
for verb in (walkers.walkers, *POSE, *RUNS, *OTHERS):
    app.command(verb.__name__.rstrip("_").replace("_", "-"))(verb)
for group in (visualize, export, import_):
    app.add_typer(group.app, name=group.__name__.rpartition(".")[2].rstrip("_"))


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
    """Distributed training for keypoint-guided video person re-identification."""
    # DeepSpeed's launcher puts --local_rank before the words of the command; LOCAL_RANK says the same.


def main() -> None:
    """Run the command line; an error a user can fix becomes one message and exit status 1."""
    try:
        app()
    except KeyreidError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
