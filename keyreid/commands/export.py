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

    from keyreid.checkpoints.released import to_released
    from keyreid.checkpoints.trained import load_state
    from keyreid.errors import CheckpointError
    from keyreid.files import replacing
    from keyreid.guidance import named

    state, header = load_state(weights)
    if header is not None and not named(header.model.guidance).is_published:
        raise CheckpointError(
            f"{weights}: trained with model.guidance={header.model.guidance}; the published code computes another "
            "local branch and would give other features. Train with model.guidance=released to export for it"
        )
    tensors = to_released(state)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out, alone=True) as partial:
        torch.save(tensors, partial)
    print(f"{out}: {len(tensors)} entries, {out.stat().st_size / 1e6:.0f} MB")


Source = Annotated[Path, typer.Argument(help="A run's folder, a checkpoint, a weights file, or a published .pth.")]
Best = Annotated[bool, typer.Option("--best/--newest", help="Which checkpoint of a run.")]
Averaged = Annotated[
    bool | None,
    typer.Option("--ema/--no-ema", help="Averaged weights or the raw ones; default averaged where there are any."),
]


@app.command("weights")
def weights(
    source: Source,
    out: Annotated[Path, typer.Argument(help="File to write, .safetensors.")],
    best: Best = True,
    averaged: Averaged = None,
) -> None:
    """Write a network as one safetensors file, with a model card: `keyreid evaluate`, `embed` and `export` take it."""
    from keyreid.export.model_card import card_path, write_card
    from keyreid.export.source import open_source
    from keyreid.export.weights import export_weights

    network = open_source(source, best, averaged)
    export_weights(network, out)
    usage = f"keyreid embed {out.name} SHARDS --out vectors.parquet\nkeyreid search vectors.parquet --query KEY"
    write_card(card_path(out), network, [out], usage)
    kind = "averaged" if network.averaged else "raw"
    print(f"{out}: {kind} weights of {network.file}, {out.stat().st_size / 1e6:.0f} MB")
    print(f"{card_path(out)}: model card; read what it says of limits and intended use before you pass it on")


@app.command("onnx")
def onnx(
    source: Source,
    out: Annotated[Path, typer.Argument(help="File to write, .onnx.")],
    best: Best = True,
    averaged: Averaged = None,
) -> None:
    """Write the clip embedding as ONNX, any number of clips at a time, compared with torch; with a model card."""
    from keyreid.checkpoints.trained import load_trained
    from keyreid.export.model_card import card_path, write_card
    from keyreid.export.onnx import TOLERANCE, export_onnx
    from keyreid.export.source import open_source

    network = open_source(source, best, averaged)
    about = {"weights": network.file.name, "model": network.header.model.model_dump_json()}
    difference = export_onnx(load_trained(network.file)[0], out, about)
    files = [path for path in (out, out.with_name(f"{out.name}.data")) if path.is_file()]
    write_card(card_path(out), network, files)
    print(
        f"{out}: {sum(path.stat().st_size for path in files) / 1e6:.0f} MB; onnxruntime's vectors differ from torch's"
    )
    print(f"by {difference:.1e} at most, allowed are {TOLERANCE:.0e}; {card_path(out)}: model card")
