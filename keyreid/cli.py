"""The `keyreid` command: one verb a job, each in `keyreid/commands/`."""

import sys

import typer

from keyreid.commands import walkers
from keyreid.errors import KeyreidError

app = typer.Typer(
    name="keyreid",
    help="Distributed training of keypoint-guided video person re-identification.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("walkers")(walkers.walkers)


def main() -> None:
    """Run the command line; an error that a user can mend becomes one message and exit status 1."""
    try:
        app()
    except KeyreidError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
