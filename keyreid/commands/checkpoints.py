"""`keyreid checkpoints`: list, verify and prune a run's checkpoints."""

from pathlib import Path
from typing import Annotated

import typer


def checkpoints(
    run: Annotated[Path, typer.Argument(help="A run's folder, or its folder `checkpoints`.")],
    verify: Annotated[bool, typer.Option(help="Compare every file with its SHA-256.")] = False,
    prune: Annotated[
        int | None, typer.Option(min=1, help="Keep the newest N, the best and those kept forever; remove the rest.")
    ] = None,
) -> None:
    """List checkpoints with step, best score and size; exit status 1 if any is damaged."""
    from rich.console import Console
    from rich.table import Table

    from keyreid.checkpoints import folder as store
    from keyreid.checkpoints import manifest
    from keyreid.checkpoints.run_folder import checkpoints_of
    from keyreid.errors import CheckpointError
    from keyreid.ownership import owned
    from keyreid.plain_text import cell

    root = checkpoints_of(run)
    if prune is not None:  # not while the run trains
        with owned(root.parent if root.name == "checkpoints" else root, "keyreid checkpoints --prune"):
            print("".join(f"removed {folder}\n" for folder in store.prune(root, prune)), end="")
    folders = store.checkpoints(root)
    if not folders:
        raise CheckpointError(f"{root}: no checkpoints here")
    table = Table("checkpoint", "step", "best so far", "size", "", "whole" if verify else "")
    faults, marks = [], {}
    for name in ("latest", "best"):
        try:
            marks[name] = store.named(root, name)
        except CheckpointError as error:
            faults.append(str(error))
    for folder in folders:
        found = manifest.verify(folder) if verify else []
        faults += found
        try:
            state = store.read_state(folder)
            step, score = str(state.step), "" if state.best_score is None else f"{state.best_score:.4f}"
        except CheckpointError:
            step, score = "?", "?"
        size = f"{sum(path.stat().st_size for path in folder.iterdir()) / 1e6:.1f} MB"
        names = " ".join(name for name, path in marks.items() if path == folder)
        table.add_row(cell(folder.name), step, score, size, names, ("no" if found else "yes") if verify else "")
    Console().print(table)
    if faults:
        raise CheckpointError("; ".join(faults))
