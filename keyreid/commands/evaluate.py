"""`keyreid evaluate`: judge a model, or any distance matrix, by named protocols."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    weights: Annotated[
        str | None,
        typer.Argument(
            help="A run's folder (its best checkpoint), a checkpoint, keyreid .safetensors, or a published .pth. With "
            "--all-splits it may hold {split}, for weights of each split.",
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
            help="torchreid, official, inclusive or released; repeat it for several. Default: the configuration's.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the scores as JSON to this file too.")] = None,
    config: Annotated[Path | None, typer.Option(help="Configuration. Default: the run's own, or the defaults.")] = None,
    shards: Annotated[
        str | None, typer.Option(help="Shards to evaluate on. Default: those of the configuration.")
    ] = None,
    vectors: Annotated[
        Path | None, typer.Option(help="vectors.npz of an earlier evaluation; then nothing is embedded again.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for vectors, scores and pictures. Default: one beside the weights.")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine. Default: one for each GPU, else one.")
    ] = None,
    split_number: Annotated[
        int | None, typer.Option(min=0, help="Which split of the dataset (iLIDS-VID, PRID2011: 0 to 9).")
    ] = None,
    all_splits: Annotated[
        bool, typer.Option(help="Mean and standard deviation over all splits of the dataset.")
    ] = False,
) -> None:
    """Evaluate: mAP, mINP and CMC by named protocols, with ranked lists, curves, guidance and attention as pictures.

    Prints one table with the protocol and the data set beside each number; JSON values are fractions from 0 to 1.
    Several machines: start it with torchrun or slurm/evaluate.sbatch; the ranks come from their variables.
    """
    from keyreid.errors import ConfigError

    protocols = tuple(dict.fromkeys(protocol or ()))
    if vectors is not None and weights is not None and "=" in weights:  # without weights the first word is an override
        weights, overrides = None, [weights, *(overrides or [])]
    if distance is not None:
        options = {"--config": config, "--shards": shards, "--vectors": vectors, "--out": out, "--ranks": ranks}
        options |= {"WEIGHTS": weights, "--split-number": split_number, "--all-splits": all_splits or None}
        extra = sorted(name for name, value in options.items() if value is not None)
        if extra:
            raise ConfigError(f"--distance judges a matrix as it is; it does not go with {', '.join(extra)}")
        _judge_matrix(distance, protocols or ("torchreid",), json)
        return
    if weights is None and (vectors is None or (config is None and shards is None)):
        raise ConfigError(
            "name a run, a checkpoint or weights; or --vectors FILE.npz with --shards; or --distance FILE.npz"
        )
    if all_splits and split_number is not None:
        raise ConfigError("--split-number is one split, --all-splits all of them")
    if weights is None or vectors is not None:
        ranks = 1  # nothing is embedded

    from keyreid.distributed.launch import default_ranks, is_launched, run_ranks

    ranks = ranks or default_ranks()
    if ranks > 1 and not is_launched():
        sys.exit(run_ranks(ranks, _logs(out)))
    _evaluate(weights, overrides or [], protocols, json, config, shards, vectors, out, split_number, all_splits)


def _judge_matrix(path: Path, protocols: tuple[str, ...], json: Path | None) -> None:
    from keyreid.evaluation.distance_file import judge_file, junk_note
    from keyreid.evaluation.report import table, write_json

    result = judge_file(path, protocols)
    print(table(result))
    if note := junk_note(result):
        print(note)
    if json is not None:
        write_json(result, json)


def _logs(out: Path | None) -> Path:
    """Where ranks other than the first write what they say."""
    import tempfile

    return out / "logs" if out is not None else Path(tempfile.mkdtemp(prefix="keyreid-evaluate-"))


def _evaluate(
    weights: str | None,
    overrides: list[str],
    protocols: tuple[str, ...],
    json: Path | None,
    config: Path | None,
    shards: str | None,
    vectors: Path | None,
    out: Path | None,
    split_number: int | None,
    all_splits: bool,
) -> None:
    from keyreid.distributed import ranks as processes
    from keyreid.evaluation.protocols import protocol_named
    from keyreid.evaluation.report import table, write_json
    from keyreid.evaluation.splits import Evaluation

    for name in protocols:
        protocol_named(name)  # before the long work
    ranks = processes.join()
    try:
        where = ranks.rank, ranks.world_size, ranks.device
        evaluation = Evaluation(weights, overrides, config, shards, protocols, vectors, out, *where)
        result = evaluation.all_splits() if all_splits else evaluation.one_split(split_number)
    finally:
        processes.leave()
    if ranks.first:
        print(f"\n{table(result)}\nwritten to {result['folder']}")
        if json is not None:
            write_json(result, json)
