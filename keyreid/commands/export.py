"""`keyreid export`: give a trained network away in a form that others read."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Write a trained network for others to use.", no_args_is_help=True)


@app.command("released")
def released(
    weights: Annotated[
        Path,
        typer.Argument(help="A run's folder, a checkpoint, or a weights file, trained with model.guidance=released."),
    ],
    out: Annotated[Path, typer.Argument(help="File to write, .pth.")],
) -> None:
    """Write a checkpoint with exactly the keys that the published KeyRe-ID code loads."""
    import torch

    from keyreid.errors import CheckpointError
    from keyreid.model.released import to_released
    from keyreid.model.trained import load_state

    state, header = load_state(weights)
    if header is not None and header.model.guidance != "released":
        raise CheckpointError(
            f"{weights}: trained with model.guidance={header.model.guidance}; the published code computes another "
            "local branch and would give other features. Train with model.guidance=released to export for it"
        )
    tensors = to_released(state)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    torch.save(tensors, partial)
    partial.replace(out)
    print(f"{out}: {len(tensors)} entries, {out.stat().st_size / 1e6:.0f} MB")
