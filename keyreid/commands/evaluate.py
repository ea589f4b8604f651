"""`keyreid evaluate`: judge a model, or any distance matrix, by named protocols."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    weights: Annotated[
        str | None,
        typer.Argument(
            help="A run's folder, a checkpoint, exported .safetensors, or a published .pth. "
            "With --all-splits it may hold {split}: each split's own weights.",
            show_default=False,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to the configuration: section.key=value ...", show_default=False)
    ] = None,
    distance: Annotated[
        Path | None, typer.Option(help="Judge the distance matrix in this .npz file; needs no model.")
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(
            help="torchreid, official, inclusive or released; repeat it for several. Default: torchreid, "
            "or what the configuration says.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the scores as JSON to this file too.")] = None,
    config: Annotated[Path | None, typer.Option(help="Configuration. Default: the run's own, or the defaults.")] = None,
    shards: Annotated[
        str | None, typer.Option(help="Shards to evaluate on. Default: those of the configuration.")
    ] = None,
    vectors: Annotated[
        Path | None, typer.Option(help="vectors.npz of an earlier evaluation: nothing is embedded again.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for vectors, scores and pictures. Default: the run's.")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine. Default: one for each GPU, else one.")
    ] = None,
    split_number: Annotated[int | None, typer.Option(min=0, help="Which split (iLIDS-VID, PRID2011: 0 to 9).")] = None,
    all_splits: Annotated[bool, typer.Option(help="Mean and standard deviation over all splits.")] = False,
) -> None:
    """Evaluate: mAP, mINP and CMC by named protocols, with ranked lists and curves as pictures.

    Prints one table with the protocol and the data set beside each number. JSON values are fractions from 0 to 1.
    """
    from keyreid.errors import ConfigError

    protocols = tuple(dict.fromkeys(protocol or ()))
    if distance is not None:
        given = {
            "WEIGHTS": weights,
            "--config": config,
            "--shards": shards,
            "--vectors": vectors,
            "--out": out,
            "--ranks": ranks,
            "--split-number": split_number,
            "--all-splits": all_splits or None,
        }
        extra = [name for name, value in given.items() if value is not None]
        if extra:
            raise ConfigError(f"--distance judges a matrix as it is: it does not go with {', '.join(extra)}")
        _judge_matrix(distance, protocols or ("torchreid",), json)
        return
    raise ConfigError("name a run, a checkpoint or weights, or a matrix with --distance FILE.npz")


def _judge_matrix(path: Path, protocols: tuple[str, ...], json: Path | None) -> None:
    from keyreid.evaluation.distance_file import judge_file, junk_note
    from keyreid.evaluation.report import table, write_json

    result = judge_file(path, protocols)
    print(table(result))
    if note := junk_note(result):
        print(note)
    if json is not None:
        write_json(result, json)
