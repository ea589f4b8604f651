"""`keyreid export`: write a trained network in a form that others can read."""

from pathlib import Path
from typing import Annotated

import typer

from keyreid.commands.options import Verify, Weights
from keyreid.ownership import owned

VERB = "keyreid export"
app = typer.Typer(help="Write a trained network for others to use.", no_args_is_help=True)

Best = Annotated[bool, typer.Option("--best/--newest", help="Which checkpoint of the run.")]
Averaged = Annotated[
    bool | None,
    typer.Option("--ema/--no-ema", help="Averaged weights or the raw ones; default: averaged if there are any."),
]


@app.command("weights")
def weights(
    source: Weights,
    out: Annotated[Path, typer.Argument(help="File to write, .safetensors.")],
    best: Best = True,
    averaged: Averaged = None,
    verify: Verify = True,
) -> None:
    """Write a network as one safetensors file, with a model card, for `keyreid evaluate`, `embed` and `export`."""
    from keyreid.export.source import export_weights, open_source, write_card

    exported = open_source(source, best, averaged, verify)
    usage = f"keyreid embed {out.name} SHARDS --out vectors.parquet\nkeyreid search vectors.parquet --query KEY"
    with owned(out.parent, VERB, out.name):
        export_weights(exported, out)
        card = write_card(exported, [out], usage)
    kind = "averaged" if exported.averaged else "raw"
    print(f"{out}: {kind} weights of {exported.file}, {out.stat().st_size / 1e6:.0f} MB")
    print(f"{card}: model card; read what it says of limits and intended use before you pass it on")


@app.command("onnx")
def onnx(
    source: Weights,
    out: Annotated[Path, typer.Argument(help="File to write, .onnx.")],
    best: Best = True,
    averaged: Averaged = None,
    verify: Verify = True,
) -> None:
    """Write the clip embedding as ONNX, for any number of clips at a time, checked against torch, with a model card."""
    from keyreid.export.onnx import TOLERANCE, export_onnx
    from keyreid.export.source import open_source, write_card

    exported = open_source(source, best, averaged, verify)
    with owned(out.parent, VERB, out.name):
        difference = export_onnx(exported, out)
        files = [path for path in (out, out.with_name(f"{out.name}.data")) if path.is_file()]
        card = write_card(exported, files)
    size = sum(path.stat().st_size for path in files)
    print(f"{out}: {size / 1e6:.0f} MB; onnxruntime's vectors differ from torch's")
    print(f"by {difference:.1e} at most, allowed are {TOLERANCE:.0e}; {card}: model card")


@app.command("released")
def released(
    source: Weights, out: Annotated[Path, typer.Argument(help="File to write, .pth.")], verify: Verify = True
) -> None:
    """Write a checkpoint with the published KeyRe-ID code's keys, from training with model.guidance=released."""
    import torch

    from keyreid.checkpoints.released import to_released
    from keyreid.checkpoints.trained import load_state
    from keyreid.errors import CheckpointError
    from keyreid.files import replacing
    from keyreid.guidance import named

    state, header = load_state(source, verify)
    if header is not None and not named(header.model.guidance).is_published:
        raise CheckpointError(
            f"{source}: trained with model.guidance={header.model.guidance}; the published code computes another "
            "local branch and would give other features. Train with model.guidance=released to export for it"
        )
    tensors = to_released(state)
    with owned(out.parent, VERB, out.name), replacing(out, alone=True) as partial:
        torch.save(tensors, partial)
    print(f"{out}: {len(tensors)} entries, {out.stat().st_size / 1e6:.0f} MB")
