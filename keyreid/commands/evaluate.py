"""`keyreid evaluate`: evaluate a model, or any distance matrix, by named protocols."""

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from keyreid.commands.options import Configuration, Overrides, RankCount, Shards, Verify
from keyreid.errors import ConfigError

_WEIGHTS = "A run, a checkpoint, exported .safetensors, or a published .pth; with --all-splits {split} is the number."
Weights = Annotated[str | None, typer.Argument(help=_WEIGHTS, show_default=False)]
_PROTOCOLS = "torchreid, official, inclusive or released; repeat it for several. Default: the configuration's."
Protocols = Annotated[list[str] | None, typer.Option(help=_PROTOCOLS, show_default=False)]
Distance = Annotated[Path | None, typer.Option(help="Evaluate the distance matrix in this .npz file; needs no model.")]
Json = Annotated[Path | None, typer.Option(help="Also write the scores to this file, as JSON.")]
VectorFile = Annotated[Path | None, typer.Option(help="Vectors of `evaluate` or `embed`, to avoid embedding again.")]
Out = Annotated[Path | None, typer.Option(help="Folder for all output. Default: one beside the weights.")]
SplitNumber = Annotated[int | None, typer.Option(min=0, help="Split of the dataset (iLIDS-VID, PRID2011: 0 to 9).")]
AllSplits = Annotated[bool, typer.Option(help="Mean and standard deviation over all splits of the dataset.")]


def evaluate(
    weights: Weights = None,
    overrides: Overrides = None,
    distance: Distance = None,
    protocol: Protocols = None,
    json: Json = None,
    config: Configuration = None,
    shards: Shards = None,
    vectors: VectorFile = None,
    out: Out = None,
    ranks: RankCount = None,
    split_number: SplitNumber = None,
    all_splits: AllSplits = False,
    verify: Verify = True,
) -> None:
    """Report mAP, mINP and CMC by named protocols, with ranked lists, curves, guidance and attention as pictures.

    Prints one table with the protocol and the data set beside each number; JSON values are fractions from 0 to 1.
    On several machines, start it with torchrun or slurm/evaluate.sbatch, whose variables name the ranks.
    """
    from keyreid.evaluation.protocols import protocol_named

    protocols = tuple(dict.fromkeys(protocol or ()))
    for name in protocols:
        protocol_named(name)  # before the long work
    if vectors is not None and weights is not None and "=" in weights:  # without weights the first word is an override
        weights, overrides = None, [weights, *(overrides or [])]
    if distance is not None:
        others = {"--config": config, "--shards": shards, "--vectors": vectors, "--out": out, "--ranks": ranks}
        others |= {"WEIGHTS": weights, "--split-number": split_number, "--all-splits": all_splits or None}
        if extra := sorted(name for name, value in others.items() if value is not None):
            raise ConfigError(f"--distance judges a matrix as it is; it does not go with {', '.join(extra)}")
        _judge_matrix(distance, protocols or ("torchreid",), json)
        return
    if weights is None and (vectors is None or (config is None and shards is None)):
        raise ConfigError("name a run, checkpoint or weights; or --vectors FILE with --shards; or --distance FILE.npz")
    if all_splits and split_number is not None:
        raise ConfigError("--split-number is one split, --all-splits all of them")
    if vectors is None:
        _start_ranks(ranks, out)
    what = {"weights": weights, "overrides": overrides or (), "config": config, "shards": shards, "out": out}
    _judge_weights({**what, "protocols": protocols, "verify": verify}, vectors, split_number, all_splits, json)


def _judge_matrix(path: Path, protocols: tuple[str, ...], json: Path | None) -> None:
    from keyreid.evaluation.distance_file import judge_file, junk_note
    from keyreid.evaluation.scores import table, write_scores

    result = judge_file(path, protocols)
    print(table(result))
    if note := junk_note(result):
        print(note)
    if json is not None:
        write_scores(result, json)


def _start_ranks(ranks: int | None, out: Path | None) -> None:
    """Where several ranks are wanted and no launcher started them: start them and end with their status."""
    from keyreid.distributed.launch import default_ranks, is_launched, run_ranks

    if is_launched() or (ranks := ranks or default_ranks()) == 1:
        return
    logs = out / "logs" if out is not None else Path(tempfile.mkdtemp(prefix="keyreid-evaluate-"))
    sys.exit(run_ranks(ranks, logs))


def _judge_weights(
    what: dict[str, Any], vectors: Path | None, split_number: int | None, all_splits: bool, json: Path | None
) -> None:
    from keyreid.distributed import ranks as processes
    from keyreid.embedding.vectors import Vectors
    from keyreid.evaluation.saved_weights import SavedEvaluation
    from keyreid.evaluation.scores import table, write_scores

    if vectors is not None:
        what |= {"vectors": Vectors.load(vectors), "out": what["out"] or vectors.parent}
    ranks = processes.join()
    try:
        evaluation = SavedEvaluation(**what, ranks=ranks)
        result = evaluation.all_splits() if all_splits else evaluation.one_split(split_number)
    finally:
        processes.leave()
    if ranks.first:
        print(f"\n{table(result)}\nwritten to {result['folder']}")
        if json is not None:
            write_scores(result, json)
